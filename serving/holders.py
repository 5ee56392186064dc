"""Which processes are alive, of those that share a directory: told by locks that end with their process, not by clocks."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Holder:
    """
    This process to the others: alive as long as it holds the lock on a file that has its name.

    Made and cleaned up inside of transactions of the index, so that none is swept away between its making and its
    locking. A child that is forked, and runs no other program, keeps its parent's lock.

    Attributes:
        name: 16 hex digits, never used before.

    Raises:
        OSError: the directory cannot be written, or the system has no such locks.
    """

    def __init__(self, directory: Path):
        if fcntl is None:
            raise OSError("a store of sessions needs file locks, which this system does not have.")
        self.directory, self.name = directory, secrets.token_hex(8)
        self._descriptor = os.open(directory / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """As if the process had ended."""
        if self._descriptor >= 0:
            with suppress(OSError):
                os.unlink(self.directory / self.name)
            os.close(self._descriptor)
            self._descriptor = -1


def is_alive(directory: Path, name: str) -> bool:
    try:
        descriptor = os.open(directory / name, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: who else asks is not taken for the process
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
