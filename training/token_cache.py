"""Tokenized text kept in files, so that the runs of a study tokenize their corpus once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .rows import Tokens


def cached(directory: str | None, key: Any, make: Callable[[], Tokens]) -> Tokens:
    """
    Tokens that a file of the directory holds, or that are made and written there.

    Args:
        directory: `None` to keep nothing.
        key: all that the tokens depend on, as JSON can say it.
    """
    if directory is None:
        return make()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(directory) / f"{digest}.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            return Tokens(file.get_tensor("ids"), file.get_tensor("starts"), json.loads(file.metadata()["sources"]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`token_cache`: {directory} is no directory that can be written to ({error.strerror})."
        ) from error
    tokens = make()
    staged = path.with_suffix(f".{os.getpid()}.part")
    tensors: dict[str, torch.Tensor] = {"ids": tokens.ids, "starts": tokens.starts}
    save_file(tensors, staged, {"sources": json.dumps(tokens.sources)})
    staged.replace(path)
    return tokens


def state_of(files: list[Path]) -> list[list[Any]]:
    """What files are, but for reading them: their places, sizes and times."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
