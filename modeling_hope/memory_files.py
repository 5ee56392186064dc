"""
A memory's files: written so that a crash leaves the old memory or the new one, read so that no damage goes unnoticed.

    memory.json                     what the memory is; names the other file and holds its checksums
    memory-<16 hex>.safetensors     its tensors, under a name that no other save uses

Renaming a new `memory.json` into place is what saves: before it, the old memory is there, whole; after it, the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 2
DESCRIPTION_FILE = "memory.json"
TENSORS_FILE = re.compile(r"memory-[0-9a-f]{16}\.safetensors")
STAGING = re.compile(r"\.memory-[0-9a-f]{16}")
ATTEMPTS = 16  # at reading, while a writer keeps replacing what is read
CHECKSUM_LINE = b'  "checksum": "%s"\n}\n'
# What the writing of the files adds to a description.
OF_FILES = ("format_version", "tensors", "file", "checksum")


def write_files(path: Path, description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> int:
    """
    Write a memory to a directory, in place of the one that is there; returns the bytes written.

    Nothing else in the directory is touched. Writers do not disturb each other: the last to finish wins.

    Args:
        path: the directory, made if need be.
        description: what `read_files` is to return, as JSON can say it.
        tensors: on the CPU and contiguous, each the only user of its storage. What occurs twice is written once.

    Raises:
        OSError: the directory cannot be written, or the disk is full; a memory that was there is unharmed.
    """
    known: dict[int, str] = {}
    for tensor in tensors.values():
        if id(tensor) not in known:
            known[id(tensor)] = tensor_digest(tensor)
    description = {**description, "tensors": {name: known[id(tensor)] for name, tensor in tensors.items()}}
    stored = {name: tensors[name] for name in _first_names(description["tensors"]).values()}
    token = secrets.token_hex(8)
    target, staging = path / f"memory-{token}.safetensors", path / f".memory-{token}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _Directory(path) as directory:
            replaced = _named(path)
            try:
                os.mkdir(staging)
                written = _write(staging, target, directory, description, stored)
            except BaseException:
                with suppress(OSError):
                    _remove({staging, target} - {path / (_named(path) or "")})
                raise
            with suppress(OSError):  # what stays is removed by the next save
                old = {path / replaced} if replaced else set()
                _remove({staging, *(_leftovers(path) if directory.lock_alone() else old - {target})})
    except (OSError, SafetensorError) as error:
        why = f"The memory could not be saved in {path}; one saved there before is unharmed: {error}"
        raise (OSError(error.errno, why) if isinstance(error, OSError) else OSError(why)) from error
    return written


def _write(
    staging: Path, target: Path, directory: _Directory, description: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> int:
    draft, staged = staging / DESCRIPTION_FILE, staging / target.name
    save_file(tensors, staged, metadata={"description": _digest_of(description)})
    header, size = _header(staged)
    file = {"name": target.name, "bytes": size, "header_sha256": hashlib.sha256(header).hexdigest()}
    text = json.dumps({"format_version": FORMAT_VERSION, **description, "file": file}, indent=2)
    draft.write_bytes(_sealed(text[:-2].encode() + b",\n"))
    os.chmod(staged, draft.stat().st_mode)  # as other files, where safetensors makes them private
    size += draft.stat().st_size
    for written in (staged, draft):
        with open(written, "rb+") as opened:
            os.fsync(opened.fileno())
    os.replace(staged, target)
    directory.sync()
    os.replace(draft, target.parent / DESCRIPTION_FILE)
    directory.sync()
    return size


def read_files(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    The description and the tensors of a memory, as they were written; tensors written once are one object.

    The tensors are views of the file: copy what is to outlive it. Every byte of both files has been checked.

    Raises:
        ValueError: there is no memory, its format is another version's, or a file is damaged.
    """
    missing = None
    for _ in range(ATTEMPTS):
        description = _read_description(path)
        name = description["file"]["name"]
        try:
            tensors = _read_tensors(path / name, description)
            return {key: value for key, value in description.items() if key not in OF_FILES}, tensors
        except FileNotFoundError:
            if name == missing:
                break
            missing = name  # it may have been replaced by a newer one since its name was read
    raise ValueError(f"The memory in {path} is incomplete: {missing} is missing. Copy all files of the directory.")


def _read_description(path: Path) -> dict[str, Any]:
    try:
        raw = (path / DESCRIPTION_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} holds no memory: there is no {DESCRIPTION_FILE} in it.") from error
    except OSError as error:
        raise ValueError(f"The memory in {path} cannot be read: {error}.") from error
    try:
        description = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path / DESCRIPTION_FILE, f"it is no JSON ({error})") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if type(version) is not int or version < 1:
        raise _damaged(path / DESCRIPTION_FILE, "it has no format version")
    if version != FORMAT_VERSION:
        advice = "update modeling_hope" if version > FORMAT_VERSION else "read the text again, and save what is learned"
        raise ValueError(
            f"The memory in {path} has format version {version} and this code reads {FORMAT_VERSION}: {advice}."
        )
    if raw != _sealed(raw[: -len(CHECKSUM_LINE % (b"0" * 64))]):
        raise _damaged(path / DESCRIPTION_FILE, "its checksum is that of other content")
    file, tensors = description.get("file"), description.get("tensors")
    name, size, digest = (
        file.get(key) if isinstance(file, dict) else None for key in ("name", "bytes", "header_sha256")
    )
    if type(name) is not str or type(size) is not int or type(digest) is not str or not TENSORS_FILE.fullmatch(name):
        raise _damaged(path / DESCRIPTION_FILE, f"`file` does not describe a file of tensors: {file}")
    if not isinstance(tensors, dict) or not all(type(digest) is str for digest in tensors.values()):
        raise _damaged(path / DESCRIPTION_FILE, "`tensors` does not give each tensor its checksum")
    return description


def _read_tensors(path: Path, description: dict[str, Any]) -> dict[str, torch.Tensor]:
    file, digests = description["file"], description["tensors"]
    names = _first_names(digests)
    try:
        size = path.stat().st_size
        if size != file["bytes"]:
            raise _damaged(path, f"it has {size:,} bytes of {file['bytes']:,}")
        header, _ = _header(path)
        if hashlib.sha256(header).hexdigest() != file["header_sha256"]:
            raise _damaged(path, "its header is another file's")
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if set(opened.keys()) != set(names.values()):
                raise _damaged(path, f"its tensors are not those that {DESCRIPTION_FILE} lists")
            stored = {name: opened.get_tensor(name) for name in names.values()}
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, RuntimeError, OverflowError) as error:
        if not path.exists():  # replaced while it was being opened
            raise FileNotFoundError(path) from error
        raise _damaged(path, str(error)) from error
    for digest, name in names.items():
        if tensor_digest(stored[name]) != digest:
            raise _damaged(path, f"the numbers of {name} have changed")
    if metadata.get("description") != _digest_of(description):
        raise _damaged(path.parent / DESCRIPTION_FILE, f"{path.name} was written with another description")
    return {name: stored[names[digest]] for name, digest in digests.items()}


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256, 128 bits of it, of a contiguous tensor's dtype, shape and numbers."""
    hashed = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:32]


def _first_names(digests: dict[str, str]) -> dict[str, str]:
    """By digest, the name that a tensor is stored under: the first of those that share it."""
    names: dict[str, str] = {}
    for name, digest in digests.items():
        names.setdefault(digest, name)
    return names


def _digest_of(description: dict[str, Any]) -> str:
    own = {name: value for name, value in description.items() if name not in OF_FILES or name == "tensors"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _sealed(body: bytes) -> bytes:
    """A description's text with the checksum of all of it as the last entry."""
    return body + CHECKSUM_LINE % hashlib.sha256(body).hexdigest().encode()


def _header(path: Path) -> tuple[bytes, int]:
    """What comes before the tensors in a safetensors file, and the size of the file."""
    with open(path, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = opened.read(8)
        return length + opened.read(min(int.from_bytes(length, "little"), size)), size


def _named(path: Path) -> str | None:
    """The file of tensors that a directory's `memory.json` names; `None` without one that can be read."""
    with suppress(FileNotFoundError, ValueError, RecursionError, AttributeError, TypeError):
        name = json.loads((path / DESCRIPTION_FILE).read_bytes()).get("file").get("name")
        return name if TENSORS_FILE.fullmatch(name) else None
    return None


def _leftovers(path: Path) -> Iterable[Path]:
    """What killed writers left and newer memories replaced; nothing while it cannot be told what is in use."""
    used = _named(path)
    for entry in path.iterdir() if used else ():
        if entry.name != used and (TENSORS_FILE.fullmatch(entry.name) or STAGING.fullmatch(entry.name)):
            yield entry


def _remove(entries: Iterable[Path]) -> None:
    for entry in entries:
        if STAGING.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"The memory in {path.parent} is damaged: {path.name}: {why}. Take it from a backup, or read the text again."
    )


class _Directory:
    """
    A directory that a writer is at work in: its entries can be made durable, and other writers seen.

    Where the system has no locks (Windows, some network file systems) a writer never knows that it is alone.
    """

    def __init__(self, path: Path):
        self.path, self.descriptor = path, -1

    def __enter__(self) -> _Directory:
        if fcntl is not None:
            self.descriptor = os.open(self.path, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        return self

    def __exit__(self, *raised: object) -> None:
        if fcntl is not None:
            os.close(self.descriptor)

    def sync(self) -> None:
        """Make the names in the directory last through a power failure."""
        if fcntl is not None:
            os.fsync(self.descriptor)

    def lock_alone(self) -> bool:
        """Keep writers out until the end; false where another is at work, who will clean up in its turn."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
