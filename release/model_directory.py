"""The directory that is released: its files, their checksums, and what the checks read of it."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from modeling_hope import HopeConfig
from modeling_hope.conversion.identity import identify


CHECKSUMS, CARD, DESCRIPTION, RESULTS = "SHA256SUMS", "README.md", "release.json", "results"


class ModelDirectory:
    """
    Attributes:
        path: of the directory.
        files: of all files below it, relative and with forward slashes, in their order.

    Raises:
        ValueError: it is no directory with a Hope model.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"{path} is no directory: give that of a model, as `save_pretrained` or `hope convert` writes it."
            )
        try:
            fields = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            kind = fields["model_type"]
        except FileNotFoundError:
            raise ValueError(f"{path} is no model directory: config.json is missing.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no model directory: its config.json cannot be read ({error!r}).") from None
        if kind != HopeConfig.model_type:
            raise ValueError(
                f"{path} holds a model of model_type {kind!r}: give a Hope model, as `hope convert` makes of it."
            )
        self.files = sorted(
            file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if not file.is_dir()
        )

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def config(self) -> HopeConfig:
        return HopeConfig.from_pretrained(self.path)

    @cached_property
    def checkpoint(self) -> dict[str, str]:
        """Which one it is; see `conversion.identity`."""
        return identify(self.path, self.config)

    @property
    def written_here(self) -> set[str]:
        """Files that a release writes, and writes anew."""
        return {name for name in self.files if name in (CARD, DESCRIPTION, CHECKSUMS) or name.startswith(f"{RESULTS}/")}

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def sha256(self, name: str) -> str:
        hashed = hashlib.sha256()
        with open(self.path / name, "rb") as file:
            while part := file.read(1 << 20):
                hashed.update(part)
        return hashed.hexdigest()

    def recorded_checksums(self) -> dict[str, str]:
        """
        Of an earlier release: checksum by file.

        Raises:
            ValueError: the file is none that `sha256sum` reads.
        """
        found = {}
        for line in (self.path / CHECKSUMS).read_text(encoding="utf-8").splitlines():
            digest, star, name = line.partition("  ")
            if not star or len(digest) != 64:
                raise ValueError(f"line {line[:40]!r}")
            found[name] = digest
        return found
