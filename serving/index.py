"""The index of sessions: whose they are, where their memories lie, and who may write them now."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .database import Database
from .quotas import Limits
from .refusals import QuotaExceeded, SessionBusy, SessionExists, SessionNotFound, TurnLost


EMPTY = "empty"  # the place of the memory that sessions begin with: never removed
TURNS_KEPT = 1000  # of each session's history
COLUMNS = "number, owner, id, place, created, used, turns, tokens, bytes, notes, memory, holder"


@dataclass(frozen=True)
class Session:
    """
    What is known of a session without its memory.

    Attributes:
        id: unique among its owner's.
        created, used: seconds since 1970; `used`: when it last changed.
        turns: times it changed, a reset among them.
        tokens: read so far.
        bytes: that its files take. A fork's count in full, shared or not.
        notes: its user's, as given when it was made.
        memory: the `HopeCache.summary()` of its row.
        busy: a turn runs.
    """

    id: str
    created: float
    used: float
    turns: int
    tokens: int
    bytes: int
    notes: dict[str, Any]
    memory: dict[str, Any]
    busy: bool


@dataclass(frozen=True)
class TurnRecord:
    """
    What a turn has come to.

    Attributes:
        turn: its number, the first is 1.
        at: seconds since 1970.
        tokens, bytes: of the session, after it.
        updates: so far, by level.
        loss: of the last segment that was learned from, nats per token; `None` where there was none.
        record: what was kept with it.
    """

    turn: int
    at: float
    tokens: int
    bytes: int
    updates: list[int]
    loss: float | None
    record: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What an owner has: sessions, and the bytes of their files."""

    sessions: int
    bytes: int


@dataclass(frozen=True)
class Entry:
    """A session as the store sees it: also its number, the place of its memory, and who holds it."""

    number: int
    owner: str
    place: str
    session: Session

    @classmethod
    def of(cls, row: Sequence[Any]) -> Entry:
        number, owner, id, place, created, used, turns, tokens, size, notes, memory, holder = row
        known = Session(
            id, created, used, turns, tokens, size, json.loads(notes), json.loads(memory), holder is not None
        )
        return cls(number, owner, place, known)


class Index:
    """
    Sessions in a database, each change one transaction.

    A session is written by one turn at a time: `hold` gives it to a turn if none has it whose process is alive, and
    `commit` takes nothing from a turn that does not hold it any more. A turn of a process that has died therefore
    blocks nobody, and one that was thought dead overwrites nothing.

    Args:
        database: of the store.
        holder: the name of this process.
        alive: whether a turn of that name may still run, in a process of that name.
    """

    def __init__(self, database: Database, holder: str, alive: Callable[[str, str], bool]):
        self.database, self.holder, self.alive = database, holder, alive

    def has(self, place: str) -> bool:
        return bool(self.database.query("SELECT 1 FROM sessions WHERE place = ? LIMIT 1", (place,)))

    def find(self, owner: str, id: str) -> Entry:
        rows = self.database.query(f"SELECT {COLUMNS} FROM sessions WHERE owner = ? AND id = ?", (owner, id))
        if not rows:
            raise SessionNotFound(id)
        return Entry.of(rows[0])

    def list(self, owner: str, after: str | None, most: int | None) -> Sequence[Session]:
        first = -1 if after is None else self.find(owner, after).number
        sql = f"SELECT {COLUMNS} FROM sessions WHERE owner = ? AND number > ? ORDER BY number LIMIT ?"
        return [Entry.of(row).session for row in self.database.query(sql, (owner, first, -1 if most is None else most))]

    def history(self, owner: str, id: str) -> Sequence[TurnRecord]:
        sql = "SELECT turn, at, tokens, bytes, updates, loss, record FROM turns WHERE session = ? ORDER BY turn"
        return [
            TurnRecord(turn, at, tokens, size, json.loads(updates), loss, json.loads(record))
            for turn, at, tokens, size, updates, loss, record in self.database.query(
                sql, (self.find(owner, id).number,)
            )
        ]

    def usage(self, owner: str | None = None) -> Usage:
        """Of an owner; `None`: of all."""
        where, values = ("", ()) if owner is None else (" WHERE owner = ?", (owner,))
        return Usage(*self.database.query(f"SELECT count(*), coalesce(sum(bytes), 0) FROM sessions{where}", values)[0])

    def insert(
        self, owner: str, id: str, place: str, limits: Limits, *, tokens: int, size: int, notes: str, memory: str
    ) -> None:
        """
        A new session. `notes`, `memory`: JSON.

        Raises:
            SessionExists, QuotaExceeded
        """
        with self.database.transaction() as run:
            _insert(run, owner, id, place, limits, tokens, size, notes, memory)

    def fork(self, owner: str, id: str, new_id: str, limits: Limits) -> None:
        """A session with the memory of another one, as it is after that one's last turn."""
        columns = "place, tokens, bytes, notes, memory"
        with self.database.transaction() as run:
            row = run(f"SELECT {columns} FROM sessions WHERE owner = ? AND id = ?", (owner, id)).fetchone()
            if row is None:
                raise SessionNotFound(id)
            place, *rest = row
            _insert(run, owner, new_id, place, limits, *rest)

    def hold(self, owner: str, id: str, turn: str, limits: Limits | None) -> Entry:
        """
        Give a session to a turn.

        Args:
            turn: a name that no other turn has.
            limits: of the owner; `None`: the turn may begin whatever they are.

        Raises:
            SessionNotFound, SessionBusy, QuotaExceeded
        """
        with self.database.transaction(durable=False) as run:
            row = run(f"SELECT {COLUMNS}, turn FROM sessions WHERE owner = ? AND id = ?", (owner, id)).fetchone()
            if row is None:
                raise SessionNotFound(id)
            *known, holder, last = row
            if holder is not None and self.alive(holder, last):
                raise SessionBusy(id)
            if limits is not None:
                _check_bytes(run, owner, limits)
            entry = Entry.of((*known, self.holder))
            run("UPDATE sessions SET holder = ?, turn = ? WHERE number = ?", (self.holder, turn, entry.number))
        return entry

    def release(self, entry: Entry, turn: str) -> None:
        """The turn has come to nothing."""
        with self.database.transaction(durable=False) as run:
            run("UPDATE sessions SET holder = NULL, turn = NULL WHERE number = ? AND turn = ?", (entry.number, turn))

    def commit(
        self, entry: Entry, turn: str, place: str, *, tokens: int, size: int, memory: dict[str, Any], record: str
    ) -> tuple[Session, bool]:
        """
        A turn's new memory becomes the session's, which is nobody's again; its history gets a line.

        Returns:
            The session, and whether the memory before is no session's any more, and goes to the trash.

        Raises:
            TurnLost: the turn does not hold the session.
        """
        session = entry.session
        now, turns = time.time(), session.turns + 1
        losses, updates = memory["last_losses"], [level["updates"] for level in memory["levels"]]
        line = (entry.number, turns, now, tokens, size, json.dumps(updates), (losses or [None])[-1], record)
        with self.database.transaction() as run:
            changed = run(
                "UPDATE sessions SET place = ?, used = ?, turns = ?, tokens = ?, bytes = ?, memory = ?, "
                "holder = NULL, turn = NULL WHERE number = ? AND turn = ?",
                (place, now, turns, tokens, size, json.dumps(memory), entry.number, turn),
            )
            if not changed.rowcount:
                raise TurnLost(session.id)
            run("INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?)", line)
            run("DELETE FROM turns WHERE session = ? AND turn <= ?", (entry.number, turns - TURNS_KEPT))
            gone = _discard(run, entry.place)
        new = replace(session, used=now, turns=turns, tokens=tokens, bytes=size, memory=memory, busy=False)
        return new, gone

    def delete(self, owner: str, id: str) -> str | None:
        """Forget a session; the place of its memory, if that is no session's any more."""
        with self.database.transaction() as run:
            row = run("SELECT number, place FROM sessions WHERE owner = ? AND id = ?", (owner, id)).fetchone()
            if row is None:
                raise SessionNotFound(id)
            number, place = row
            run("DELETE FROM sessions WHERE number = ?", (number,))
            gone = _discard(run, place)
        self.database.forget_log()
        return place if gone else None

    def removed(self, place: str) -> None:
        """A place that was in the trash is not there any more."""
        with self.database.transaction(durable=False) as run:
            run("DELETE FROM trash WHERE place = ?", (place,))

    def trash(self) -> set[str]:
        return {place for (place,) in self.database.query("SELECT place FROM trash")}

    def free_the_dead(self) -> Sequence[tuple[str, str]]:
        """Let go of what turns held whose processes have died; owner and id of the sessions that were in them."""
        with self.database.transaction() as run:
            held = run("SELECT number, owner, id, holder, turn FROM sessions WHERE holder IS NOT NULL").fetchall()
            lost = [row[:3] for row in held if not self.alive(*row[3:])]
            for number, _, _ in lost:
                run("UPDATE sessions SET holder = NULL, turn = NULL WHERE number = ?", (number,))
        return [(owner, id) for _, owner, id in lost]

    def all(self) -> Sequence[tuple[str, str, str]]:
        """Owner, id and place of every session."""
        return [(owner, id, place) for owner, id, place in self.database.query("SELECT owner, id, place FROM sessions")]


def _insert(
    run: Any, owner: str, id: str, place: str, limits: Limits, tokens: int, size: int, notes: str, memory: str
) -> None:
    if run("SELECT 1 FROM sessions WHERE owner = ? AND id = ?", (owner, id)).fetchone():
        raise SessionExists(id)
    (count,) = run("SELECT count(*) FROM sessions WHERE owner = ?", (owner,)).fetchone()
    if limits.sessions is not None and count >= limits.sessions:
        raise QuotaExceeded(
            "sessions", f"There are {count:,} sessions, and {limits.sessions:,} are allowed: delete one."
        )
    _check_bytes(run, owner, limits, size)
    now = time.time()
    run(
        "INSERT INTO sessions (owner, id, place, created, used, turns, tokens, bytes, notes, memory) "
        "VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?, ?)",
        (owner, id, place, now, now, tokens, size, notes, memory),
    )


def _check_bytes(run: Any, owner: str, limits: Limits, more: int = 0) -> None:
    """Raise `QuotaExceeded` unless `more` bytes may come, or any at all."""
    if limits.bytes is None:
        return
    (held,) = run("SELECT coalesce(sum(bytes), 0) FROM sessions WHERE owner = ?", (owner,)).fetchone()
    if held + max(more, 1) > limits.bytes:
        raise QuotaExceeded(
            "bytes",
            f"The sessions hold {held + more:,} bytes, and {limits.bytes:,} are allowed: delete or reset some.",
        )


def _discard(run: Any, place: str) -> bool:
    """Into the trash, unless a session has it."""
    if place == EMPTY or run("SELECT 1 FROM sessions WHERE place = ?", (place,)).fetchone():
        return False
    run("INSERT INTO trash VALUES (?)", (place,))
    return True
