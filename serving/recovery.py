"""What is found when a store is opened, after whatever has happened to the processes before."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .holders import is_alive
from .index import Index
from .places import Places


@dataclass(frozen=True)
class Recovery:
    """
    What a store found when it was opened. `str()` says it in a line, without names.

    Attributes:
        sessions, bytes: kept.
        interrupted: owner and id of sessions whose process died in a turn; they are as they were before it.
        removed, removed_bytes: memories and files that a killed process had not finished, or not removed yet.
        missing: owner and id of sessions whose files are gone.
    """

    sessions: int
    bytes: int
    interrupted: Sequence[tuple[str, str]]
    removed: int
    removed_bytes: int
    missing: Sequence[tuple[str, str]]

    def __str__(self) -> str:
        told = [f"{_counted(self.sessions, 'session')}, {_mib(self.bytes)}"]
        if self.interrupted:
            told.append(f"{_counted(len(self.interrupted), 'turn')} cut off and lost, all before kept")
        if self.removed:
            told.append(f"{_counted(self.removed, 'leftover')} of killed processes removed, {_mib(self.removed_bytes)}")
        if self.missing:
            lost = _counted(len(self.missing), "session")
            told.append(f"{lost} WITHOUT FILES: restore them, or reset or delete the sessions")
        return "; ".join(told)


def recover(index: Index, places: Places, holders: Path) -> Recovery:
    """Let go of what the dead held, and remove what is no session's; other processes may be at work meanwhile."""
    interrupted = index.free_the_dead()
    # Listed before the index is asked: what a dead process has made and no session has then, none will ever have.
    made = places.made()
    trash, sessions = index.trash(), index.all()
    used = {place for _, _, place in sessions}
    removed = size = 0
    for path, maker in made:
        dead = maker is not None and path.name not in used and not is_alive(holders, maker)
        if path.name in trash or dead:
            with suppress(FileNotFoundError):  # who put it into the trash may be removing it
                found = _size(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed, size = removed + 1, size + found
    for place in trash:
        index.removed(place)
    with index.database.transaction(durable=False):  # no process is between making its lock and taking it
        for lock in holders.iterdir():
            if not is_alive(holders, lock.name):
                lock.unlink(missing_ok=True)
    index.database.forget_log()
    lost = {place for place in used if not places.has(place)}
    # Asked again, for other processes may have replaced it.
    missing = [(owner, id) for owner, id, place in index.all() if place in lost] if lost else []
    total = index.usage()
    return Recovery(total.sessions, total.bytes, interrupted, removed, size, missing)


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
