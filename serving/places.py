"""Where memories lie on disk: each in a directory of its own, written once, and never changed."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from modeling_hope.cache_hope import HopeCache
from modeling_hope.memory_files import DESCRIPTION_FILE

from .index import EMPTY
from .refusals import StorageFailed


# What a process has made: its name, and a random part.
MADE = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}(\.safetensors)?")


class Places:
    """
    The memories of one model, by place, and a directory for files on their way in or out.

    Made inside of a transaction of the index: the memory that sessions begin with tells whose the directory is, and one
    process makes it.

    Args:
        directory: of the store.
        model (`HopeForCausalLM`): the memories'.
        maker: the name of this process, which the names of what it makes begin with.

    Raises:
        ValueError: the memories are another model's.
        OSError: the directory cannot be used.
    """

    def __init__(self, directory: Path, model: Any, maker: str):
        self.memories, self.staging, self.model, self.maker = (
            directory / "memories",
            directory / "staging",
            model,
            maker,
        )
        for path in (self.memories, self.staging):
            path.mkdir(mode=0o700, exist_ok=True)
        if not self.has(EMPTY):
            self.save(EMPTY, HopeCache(model.config))
        try:
            self.load(EMPTY)
        except ValueError as error:
            raise ValueError(
                f"The sessions in {directory} cannot be used with this model: {error.__cause__ or error}. Give the model "
                "that they were made with, or another directory."
            ) from error

    def new(self) -> str:
        return f"{self.maker}-{secrets.token_hex(8)}"

    def has(self, place: str) -> bool:
        return (self.memories / place / DESCRIPTION_FILE).exists()

    def save(self, place: str, memory: HopeCache) -> int:
        """Write a memory to a new place, durably; the bytes of its files."""
        try:
            saved = memory.save_pretrained(self.memories / place, model=self.model)
            descriptor = os.open(self.memories, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # the name of the place
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_failed(error, "The memory was not kept, and the session is as it was") from error
        return saved.bytes

    def load(self, place: str) -> HopeCache:
        """Onto the model's device; `ValueError` where the files are not there, damaged, or another model's."""
        return HopeCache.from_pretrained(self.memories / place, model=self.model)

    def remove(self, place: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.memories / place)

    def made(self) -> Sequence[tuple[Path, str | None]]:
        """All that there is, and the process that made it, as far as that is told."""
        found = [path for directory in (self.memories, self.staging) for path in directory.iterdir()]
        return [(path, match[1] if (match := MADE.fullmatch(path.name)) else None) for path in found]


def storage_failed(error: OSError, told: str) -> StorageFailed:
    """What to raise for an error of the disk: without the paths, which are nobody's business but the operator's."""
    why = os.strerror(error.errno) if error.errno else "the files cannot be written"
    return StorageFailed(error.errno or errno.EIO, f"{told}: {why}")
