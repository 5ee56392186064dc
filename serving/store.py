"""
The store of sessions: every session's memory, in RAM while it is warm and on disk always, and one turn at a time.

    index.sqlite3       whose the sessions are, and where their memories lie; and the API keys
    memories/PLACE/     a memory each, as `HopeCache.save_pretrained` writes it; never changed, only replaced
    staging/            files on their way in or out
    holders/            a file for each process that uses the store, locked while it lives

A turn writes its memory to a new place, and then one transaction of the index makes that the session's: before it the
session is as it was, after it the turn is kept, whenever the process dies. Forks share a place until one goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from modeling_hope.cache_hope import HopeCache, check_memory

from .database import Database
from .holders import Holder, is_alive
from .ids import check_id, make_id
from .index import EMPTY, Entry, Index, Session, TurnRecord, Usage
from .places import Places, storage_failed
from .quotas import NO_LIMITS, Limits
from .recovery import recover
from .refusals import QuotaExceeded, SessionBusy, SessionDamaged, SessionExists, SessionNotFound, StorageFailed
from .session_file import pack, unpack
from .warm import WarmMemories


Found = TypeVar("Found")

NOTES_BYTES = 16 * 1024  # of a session's notes, or of a turn's record
ATTEMPTS = 16  # at reading, while a session goes on
POLL_SECONDS = 0.1  # while another process's turn holds the session; the end of this one's own is told
COPY_BYTES = 2**20

log = logging.getLogger(__name__)


class Turn:
    """
    The one turn that a session is in. Used in a `with` block, which lets go of the session whatever happens.

    Attributes:
        session: as it was when the turn began.
        memory (`HopeCache`): of one row, on the model's device; the turn's own fork.
    """

    def __init__(self, store: SessionStore, entry: Entry, name: str, memory: HopeCache):
        self._store, self._entry, self._name = store, entry, name
        self.session, self.memory = entry.session, memory
        self._open = True

    def commit(self, memory: HopeCache, record: dict[str, Any] | None = None) -> Session:
        """
        Make a memory the session's, and let go of the session. Once this returns it outlasts a crash; tell the end of
        the answer after that.

        Args:
            memory: of one row, on any device, and not changed in place from here on.
            record: kept in the history, as JSON can say it, at most 16 KiB: counts and times, and no text.

        Raises:
            ValueError: it is no memory of the model, or the record cannot be kept.
            StorageFailed: the disk is full, or cannot be written.
            TurnLost: the session was deleted meanwhile.
            In each case the session stays as it was; but for `TurnLost`, the turn may try again.
        """
        if not self._open:
            raise RuntimeError("The turn has ended: begin another one.")
        found = self._store._commit(self._entry, self._name, memory, _json(record or {}, "record"))
        self._open = False
        return found

    def close(self) -> None:
        """Let go of the session; without a `commit` before, nothing of the turn is kept."""
        if self._open:
            self._open = False
            self._store._release(self._entry, self._name)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class SessionStore:
    """
    Sessions of many owners, of one model, from any thread. Several processes may share a directory.

    An owner's session is to every other owner as if it did not exist. Every method that names one raises
    `SessionNotFound` where there is none, and `ValueError` where the name cannot be one.

    A session is held by one turn at a time, across processes: the holder's lock ends with its process, and what a turn
    that has lost its session commits is refused by the index.

    Args:
        directory: made if need be, for its user alone.
        model (`HopeForCausalLM`): all sessions' model.
        warm_bytes: most that the memories held in RAM may take, besides those of the turns that run.
        wait: seconds for which a second turn of a session waits; `None`: it is refused at once.
        limits: of an owner. Unset: none.
        network: several machines share the directory's storage; see `Database`.

    Attributes:
        recovery: what was found.

    Raises:
        ValueError: the directory holds sessions of another model, or something else than sessions.
        OSError: it cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: Any,
        *,
        warm_bytes: int,
        wait: float | None = None,
        limits: Callable[[str], Limits] | None = None,
        network: bool = False,
    ):
        if warm_bytes < 0:
            raise ValueError(f"`warm_bytes` must be 0 or more, got {warm_bytes}.")
        if wait is not None and not wait >= 0:
            raise ValueError(f"`wait` must be 0 seconds or more, or None, got {wait}.")
        self.directory, self.model, self.wait = Path(directory), model, wait
        self._limits = limits or (lambda owner: NO_LIMITS)
        self._holders = self.directory / "holders"
        for path in (self.directory, self._holders):
            path.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._database = Database(self.directory, network)
        self._holder: Holder | None = None
        self._turns: set[str] = set()  # that run in this process
        self._ended = threading.Condition()
        try:
            with self._database.transaction():
                self._holder = Holder(self._holders)
                self._places = Places(self.directory, model, self._holder.name)
            self._index = Index(self._database, self._holder.name, self._may_run)
            self._warm = WarmMemories(warm_bytes)
            # Warm memories are in RAM, and on a device while they are used; over several they stay where they are.
            devices = {parameter.device for parameter in model.parameters()}
            self._device = next(iter(devices)) if len(devices) == 1 and next(iter(devices)).type != "cpu" else None
            self.recovery = recover(self._index, self._places, self._holders)
        except BaseException:
            self.close()
            raise
        log.info("%s: %s", self.directory, self.recovery)

    # Sessions

    def create(self, owner: str, id: str | None = None, notes: dict[str, Any] | None = None) -> Session:
        """
        A session that has read nothing.

        Args:
            id: unset: one that cannot be guessed.
            notes: kept with it, as JSON can say it, at most 16 KiB.

        Raises:
            SessionExists, QuotaExceeded, StorageFailed
        """
        id = _checked(owner, make_id() if id is None else id)
        memory = HopeCache(self.model.config)
        self._index.insert(
            owner,
            id,
            EMPTY,
            self._limits(owner),
            tokens=0,
            size=0,
            notes=_json(notes or {}, "notes"),
            memory=json.dumps(_summary(memory)),
        )
        return self.get(owner, id)

    def get(self, owner: str, id: str) -> Session:
        return self._index.find(owner, _checked(owner, id)).session

    def list(self, owner: str, after: str | None = None, most: int | None = None) -> Sequence[Session]:
        """An owner's sessions, oldest first: those that come after one, and at most so many."""
        check_id(owner, "owner")
        return self._index.list(owner, None if after is None else check_id(after), most)

    def history(self, owner: str, id: str) -> Sequence[TurnRecord]:
        """The last 1,000 turns of a session, oldest first."""
        return self._index.history(owner, _checked(owner, id))

    def usage(self, owner: str) -> Usage:
        return self._index.usage(check_id(owner, "owner"))

    def fork(self, owner: str, id: str, new_id: str | None = None) -> Session:
        """
        Another session that goes on from where this one is, after its last turn. Copies nothing.

        Raises:
            SessionExists, QuotaExceeded, StorageFailed
        """
        name = _checked(owner, make_id() if new_id is None else new_id)
        self._index.fork(owner, _checked(owner, id), name, self._limits(owner))
        return self.get(owner, name)

    def reset(self, owner: str, id: str, levels: Sequence[int] | None = None) -> Session:
        """
        Forget everything; with `levels`, what these have learned. See `HopeCache.reset`. Its notes and history stay.

        Raises:
            SessionBusy, StorageFailed
        """
        record = {"reset": "all" if levels is None else [*levels]}
        if levels is not None:
            with self._begin(owner, id, limited=False) as turn:
                turn.memory.reset(levels)
                return turn.commit(turn.memory, record)
        entry, name = self._hold(owner, id, limited=False)  # not read: it may be damaged
        with Turn(self, entry, name, HopeCache(self.model.config)) as turn:
            return turn.commit(turn.memory, record)

    def delete(self, owner: str, id: str) -> None:
        """
        Forget a session, and remove its bytes: files, RAM, and its lines in the index. A turn that runs is lost.
        Its forks are sessions of their own, and stay.

        Raises:
            StorageFailed: the session is gone, and its files could not be removed: the next start tries again.
        """
        place = self._index.delete(owner, _checked(owner, id))
        if place is None:
            return
        try:
            self._remove(place)
        except OSError as error:
            raise storage_failed(error, "The session is gone, and its files are not yet") from error

    def export(self, owner: str, id: str) -> BinaryIO:
        """
        A session as one safetensors file, as it is after its last turn: open for reading, and gone when closed.

        Raises:
            SessionDamaged, StorageFailed
        """
        entry, file = (
            self._index.find(owner, _checked(owner, id)),
            self._places.staging / f"{self._places.new()}.safetensors",
        )
        notes = entry.session.notes
        try:
            self._read(entry, lambda place: pack(self._places.memories / place, file, notes))
            return open(file, "rb")
        except OSError as error:
            raise storage_failed(error, "The session could not be written to a file") from error
        finally:
            file.unlink(missing_ok=True)

    def import_(self, owner: str, file: BinaryIO, id: str | None = None) -> Session:
        """
        A session from a file of `export`. Nothing is kept before all of it has been checked.

        Args:
            file: open for reading; need not seek.
            id: unset: one that cannot be guessed.

        Raises:
            ValueError: the file is damaged, or no session of this model.
            SessionExists, QuotaExceeded, StorageFailed
        """
        id, limits = _checked(owner, make_id() if id is None else id), self._limits(owner)
        most = None if limits.bytes is None else max(limits.bytes - self.usage(owner).bytes, 0)
        place, opened = self._places.new(), self._places.staging / self._places.new()
        staged = opened.with_suffix(".safetensors")
        try:
            _copy(file, staged, most)
            notes = _json(unpack(staged, opened), "notes")
            try:
                memory = HopeCache.from_pretrained(opened, model=self.model)
            except ValueError as error:
                raise ValueError(f"The session cannot be used: {error.__cause__ or error}.") from error
            memory.columns = memory.rows[0].seen  # one row without padding, whatever the file says
            size, summary = self._places.save(place, memory), json.dumps(_summary(memory))
            self._index.insert(owner, id, place, limits, tokens=memory.seen[0], size=size, notes=notes, memory=summary)
        except BaseException as error:
            self._take_back(place, error)
            if isinstance(error, OSError) and not isinstance(error, StorageFailed):
                raise storage_failed(error, "The session was not taken in") from error
            raise
        finally:
            shutil.rmtree(opened, ignore_errors=True)
            staged.unlink(missing_ok=True)
        return self.get(owner, id)

    # Turns

    def turn(self, owner: str, id: str, *, create: bool = False) -> Turn:
        """
        Begin a turn of a session, which nobody else writes until it ends.

        Args:
            create: make the session if there is none.

        Raises:
            SessionBusy: another turn runs, and has not ended in time.
            QuotaExceeded: the owner's sessions take all the bytes allowed; or there would be too many.
            SessionDamaged: its files cannot be read.
        """
        return self._begin(owner, id, create=create)

    def stats(self) -> dict[str, int]:
        """Numbers of all owners' sessions, and of the memories held in RAM."""
        total = self._index.usage()
        warm = self._warm
        return {
            "sessions": total.sessions,
            "bytes": total.bytes,
            "warm_sessions": len(warm),
            "warm_bytes": warm.bytes,
            "warm_hits": warm.hits,
            "warm_misses": warm.misses,
            "warm_evictions": warm.evictions,
        }

    def close(self) -> None:
        """Let go of the directory. Every turn that was committed is on disk already; one that runs is lost."""
        if self._holder is not None:
            self._holder.close()
        self._database.close()

    def __enter__(self) -> SessionStore:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _begin(self, owner: str, id: str, *, limited: bool = True, create: bool = False) -> Turn:
        entry, name = self._hold(owner, id, limited=limited, create=create)
        try:
            return Turn(self, entry, name, self._read(entry, self._memory))
        except BaseException:
            self._release(entry, name)
            raise

    def _hold(self, owner: str, id: str, *, limited: bool, create: bool = False) -> tuple[Entry, str]:
        """The session, held, and the name of the turn that holds it."""
        limits = self._limits(owner) if limited else None
        name, end = secrets.token_hex(8), time.monotonic() + (self.wait or 0)

        def attempt() -> Entry:
            try:
                return self._index.hold(owner, id, name, limits)
            except SessionNotFound:
                if not create:
                    raise
                with suppress(SessionExists):
                    self.create(owner, id)
                return self._index.hold(owner, id, name, limits)

        _checked(owner, id)
        self._turns.add(name)
        try:
            with self._ended:
                while True:
                    try:
                        return attempt(), name
                    except SessionBusy:
                        left = end - time.monotonic()
                        if left <= 0:
                            raise
                        self._ended.wait(min(left, POLL_SECONDS))
        except BaseException:
            self._turns.discard(name)
            raise

    def _let_go(self, name: str) -> None:
        """A turn has ended: who waits may try."""
        with self._ended:
            self._turns.discard(name)
            self._ended.notify_all()

    def _release(self, entry: Entry, name: str) -> None:
        self._warm.measure(entry.place)
        try:
            self._index.release(entry, name)
        except StorageFailed as error:  # this process knows that it has ended, and the others when this process has
            log.warning("a session was let go of without a note in the index: %s", error)
        self._let_go(name)

    def _commit(self, entry: Entry, name: str, memory: HopeCache, record: str) -> Session:
        check_memory(memory, self.model.config, 1)
        place = self._places.new()
        try:
            size, summary = self._places.save(place, memory), _summary(memory)
            self._warm.put(place, self._at_rest(memory))
            session, gone = self._index.commit(
                entry, name, place, tokens=memory.seen[0], size=size, memory=summary, record=record
            )
        except BaseException as error:
            self._take_back(place, error)
            raise
        self._let_go(name)
        if gone:
            try:
                self._remove(entry.place)
            except OSError as error:
                log.warning("a memory that was replaced is on disk until the next start: %s", error)
        return session

    def _may_run(self, holder: str, turn: str) -> bool:
        own = self._holder is not None and holder == self._holder.name
        return turn in self._turns if own else is_alive(self._holders, holder)

    def _memory(self, place: str) -> HopeCache:
        """A fork of a place's memory, on the model's device; `ValueError` where its files cannot be read."""
        held = self._warm.get(place)
        if held is None:
            held = self._warm.put(place, self._at_rest(self._places.load(place)))
            if place != EMPTY and not self._index.has(place):  # deleted in between
                self._warm.drop(place)
        fork = held.clone()
        return fork if self._device is None else fork.to(self._device)

    def _at_rest(self, memory: HopeCache) -> HopeCache:
        fork = memory.clone()
        return fork if self._device is None else fork.to("cpu")

    def _read(self, entry: Entry, read: Callable[[str], Found]) -> Found:
        """What is read from a session's place; from the next one where the session has gone on since."""
        for _ in range(ATTEMPTS):
            try:
                return read(entry.place)
            except (ValueError, OSError) as error:
                now, failed = self._index.find(entry.owner, entry.session.id), error
            if now.place == entry.place:
                break
            entry = now
        if isinstance(failed, OSError):
            raise failed
        log.error("a session cannot be read: %s", failed)
        raise SessionDamaged(
            f"The memory of session {entry.session.id!r} cannot be read: restore its files, or reset or delete it."
        ) from failed

    def _take_back(self, place: str, error: BaseException) -> None:
        """Remove a memory that an error has kept from being a session's; where the index cannot tell, the next start does."""
        uncertain = isinstance(error, StorageFailed) and error.errno == errno.EIO
        self._warm.drop(place)
        with suppress(OSError):
            if not uncertain and not self._index.has(place):  # an interrupt may have come just after it was
                self._places.remove(place)

    def _remove(self, place: str) -> None:
        """Remove a memory that is in the trash."""
        self._warm.drop(place)
        self._places.remove(place)
        self._index.removed(place)


def _checked(owner: str, id: str) -> str:
    check_id(owner, "owner")
    return check_id(id)


def _summary(memory: HopeCache) -> dict[str, Any]:
    (row,) = memory.summary()["rows"]
    return row


def _json(value: Any, what: str) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`{what}` cannot be kept as JSON: {error}.") from error
    if not isinstance(value, dict) or len(text) > NOTES_BYTES:
        raise ValueError(
            f"`{what}` must be a JSON object of at most {NOTES_BYTES:,} bytes, got {len(text):,} of {type(value).__name__}."
        )
    return text


def _copy(source: BinaryIO, target: Path, most: int | None) -> None:
    """Copy a file to a new one; `QuotaExceeded` where it has more bytes than are left."""
    size = 0
    with open(target, "xb") as opened:
        while piece := source.read(COPY_BYTES):
            size += len(piece)
            if most is not None and size > most:
                raise QuotaExceeded(
                    "bytes", f"The file has more bytes than the {most:,} that are left: delete or reset some sessions."
                )
            opened.write(piece)
