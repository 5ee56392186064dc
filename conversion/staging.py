"""A directory that appears whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged_directory(output: str | Path, needed_bytes: int) -> Iterator[Path]:
    """
    A directory to write into that becomes `output` when the block ends, and is removed when it raises.

    Args:
        output: a new directory, or an empty one, which is filled and keeps its owner and permissions.
        needed_bytes: how much will be written.

    Yields:
        A directory beside `output`, or inside it where `output` exists: it may be a mount, with a disk of its own.

    Raises:
        ValueError: `output` is a file, is not empty or cannot be written to.
        OSError: with `errno.ENOSPC`: there is less space than `needed_bytes`, or none was left while writing.
    """
    output = Path(output).expanduser().resolve()
    fills = output.exists()
    home = output if fills else output.parent
    missing = [directory for directory in (home, *home.parents) if not directory.exists()]
    disk = missing[-1].parent if missing else home
    _refuse(output, disk)
    free = shutil.disk_usage(disk).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, _no_space(needed_bytes, free), str(output))
    written: list[Path] = []
    try:
        home.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=home))
        written.append(staged)
        yield staged
        if fills:
            for path in sorted(staged.iterdir()):
                written.append(output / path.name)
                path.rename(written[-1])
            staged.rmdir()
        else:
            staged.chmod(0o755)  # mkdtemp gives one that only its maker can read
            staged.rename(output)
    except BaseException as error:
        for path in written:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        with suppress(OSError):  # someone else writes there by now
            for directory in missing:
                directory.rmdir()
        if _is_full(error):
            raise OSError(errno.ENOSPC, _no_space(needed_bytes, shutil.disk_usage(disk).free), str(output)) from error
        raise


def check_output(output: str | Path) -> None:
    """
    Raises:
        ValueError: `output` is a file, is not empty, or cannot be made.
    """
    output = Path(output).expanduser().resolve()
    _refuse(output, next(directory for directory in (output, *output.parents) if directory.exists()))


def _refuse(output: Path, existing: Path) -> None:
    """Refuse an output that is taken, or that cannot be made in the nearest directory that exists."""
    if output.is_file():
        raise ValueError(f"`output_dir` {output} is a file: give a new directory.")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"`output_dir` {output} exists and is not empty: give a new directory.")
    if not existing.is_dir():
        raise ValueError(f"`output_dir` {output} cannot be made: {existing} is not a directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` {output} cannot be made: no permission to write to {existing}.")


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and tokenizers raise errors of their own, with Rust's words in them.
    return isinstance(error, Exception) and f"os error {errno.ENOSPC}" in str(error)


def _no_space(needed: int, free: int) -> str:
    return f"Not enough space: at least {needed / 1e9:,.2f} GB needed, {free / 1e9:,.2f} GB free"
