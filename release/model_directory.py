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

    @cached_property
    def written_here(self) -> set[str]:
        """Files that a release writes; of results those that an earlier one has written, and nobody has changed since."""
        kept = {
            n
            for n, digest in self.recorded.items()
            if n.startswith(f"{RESULTS}/") and n in self.files and self.sha256(n) == digest
        }
        return kept | ({CARD, DESCRIPTION, CHECKSUMS} & set(self.files))

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def sha256(self, name: str) -> str:
        hashed = hashlib.sha256()
        with open(self.path / name, "rb") as file:
            while part := file.read(1 << 20):
                hashed.update(part)
        return hashed.hexdigest()

    @cached_property
    def recorded(self) -> dict[str, str]:
        """Checksum by file, of an earlier release; lines that `sha256sum` would not read are left out."""
        if CHECKSUMS not in self.files:
            return {}
        lines = (self.path / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
        return {line[66:]: line[:64] for line in lines if line[64:66] == "  "}
