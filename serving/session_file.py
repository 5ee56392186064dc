"""
A session as one file, to take away and to bring back: a safetensors file that any reader of those opens.

Its tensors are those of the memory, each with the name it is first saved under; `hope_session` in its metadata is JSON:

    format_version   of this file
    memory           all of the memory but its tensors, with each tensor's name and checksum
    notes            its user's notes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modeling_hope.memory_checks import check_form
from modeling_hope.memory_files import read_files, tensor_digest, write_files


FORMAT_VERSION = 1
METADATA = "hope_session"
FORM = {"format_version": int, "memory": dict, "tensors": dict, "notes": dict}


def pack(directory: Path, file: Path, notes: dict[str, Any]) -> None:
    """
    Write a memory's directory as one file.

    Raises:
        ValueError: the memory is damaged.
        OSError: the file cannot be written.
    """
    description, tensors = read_files(directory)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    stored = {name: tensors[name] for name in first.values()}
    digests = {name: tensor_digest(tensor) for name, tensor in stored.items()}
    told = {
        "format_version": FORMAT_VERSION,
        "memory": description,
        "tensors": {name: [first[id(tensor)], digests[first[id(tensor)]]] for name, tensor in tensors.items()},
        "notes": notes,
    }
    try:
        save_file(stored, file, metadata={METADATA: json.dumps(told)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def unpack(file: Path, directory: Path) -> dict[str, Any]:
    """
    Write a file of `pack` as a memory's directory, to be loaded from there, which checks it against the model.

    Returns:
        The notes of the session.

    Raises:
        ValueError: it is no such file, another version's, damaged, or of more than one row.
        OSError: the directory cannot be written.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            told = json.loads((opened.metadata() or {}).get(METADATA, "null"))
            if told is None:
                raise ValueError(f"its metadata has no `{METADATA}`")
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no dict
    except (SafetensorError, RecursionError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"The file is no session, or not all of one: {error}.") from error
    version = told.get("format_version") if isinstance(told, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"The session has format version {version} and this code reads {FORMAT_VERSION}: update modeling_hope."
        )
    try:
        check_form(told, FORM, METADATA)
        rows = told["memory"].get("rows")
        if not isinstance(rows, list) or len(rows) != 1:
            raise ValueError("it has not one row, as a session has")
        digests = {name: tensor_digest(tensor) for name, tensor in stored.items()}
        tensors = {}
        for name, entry in told["tensors"].items():
            check_form(entry, [str], f"`tensors`: {name}")
            if len(entry) != 2 or digests.get(entry[0]) != entry[1]:
                raise ValueError(f"{name} is missing, or its numbers have changed")
            tensors[name] = stored[entry[0]]
        if {entry[0] for entry in told["tensors"].values()} != stored.keys():
            raise ValueError("it holds tensors that nothing names")
    except (ValueError, RuntimeError) as error:  # of a dtype that has no bytes to check
        raise ValueError(f"The file is a damaged session: {error}. Export it again.") from error
    write_files(directory, told["memory"], tensors)
    return told["notes"]
