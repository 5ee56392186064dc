"""The SQLite file beside the memories: one schema, short transactions, and nothing left of what was deleted."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .refusals import StorageFailed


FILE = "index.sqlite3"
APPLICATION_ID = 0x486F7065  # "Hope"
SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0  # to wait for another process's transaction, which takes milliseconds
SCHEMA = (
    "CREATE TABLE owners (name TEXT PRIMARY KEY, limits TEXT NOT NULL)",
    """
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES owners, digest BLOB NOT NULL, created REAL NOT NULL
    )
    """,
    """
    CREATE TABLE sessions (
        number INTEGER PRIMARY KEY AUTOINCREMENT,  -- no two sessions ever have the same
        owner TEXT NOT NULL, id TEXT NOT NULL,
        place TEXT NOT NULL,                       -- of its memory, which forks share until they change
        created REAL NOT NULL, used REAL NOT NULL, -- seconds since 1970
        turns INTEGER NOT NULL, tokens INTEGER NOT NULL, bytes INTEGER NOT NULL,
        notes TEXT NOT NULL, memory TEXT NOT NULL, -- JSON: the notes of its user, and the summary of its memory
        holder TEXT, turn TEXT,                    -- the process and the turn that alone may write it
        UNIQUE (owner, id)
    )
    """,
    "CREATE INDEX sessions_place ON sessions (place)",
    "CREATE INDEX sessions_holder ON sessions (holder) WHERE holder IS NOT NULL",
    """
    CREATE TABLE turns (
        session INTEGER NOT NULL REFERENCES sessions ON DELETE CASCADE, turn INTEGER NOT NULL,
        at REAL NOT NULL, tokens INTEGER NOT NULL, bytes INTEGER NOT NULL, updates TEXT NOT NULL, loss REAL,
        record TEXT NOT NULL,
        PRIMARY KEY (session, turn)
    ) WITHOUT ROWID
    """,
    "CREATE TABLE trash (place TEXT PRIMARY KEY)",  # no session has it any more, and perhaps it is not removed yet
)


class Database:
    """
    A connection to the index, for the threads of one process.

    Args:
        directory: of the store.
        network: the directory is on storage that several machines share. The write-ahead log needs memory that its
            readers share, so a rollback journal takes its place; the storage has to have locks that hold across machines.
            All processes of a directory have to say the same.

    Raises:
        ValueError: the file is no index, is damaged, or has another version's schema.
        StorageFailed: it cannot be opened or written.
    """

    def __init__(self, directory: Path, network: bool = False):
        self.path, self.network = directory / FILE, network
        self._lock = threading.RLock()
        with self._told():
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            self._open()
        except BaseException as error:
            self._connection.close()
            if type(error.__cause__) is sqlite3.DatabaseError:  # neither locked nor out of reach
                raise ValueError(f"{self.path} is no index of sessions, or damaged: {error.__cause__}.") from error
            raise

    def _open(self) -> None:
        with self._told():
            self._connection.execute("PRAGMA secure_delete = ON")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._check()
            mode = "DELETE" if self.network else "WAL"
            (now,) = self._connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
            if now.upper() != mode:
                raise StorageFailed(errno.EINVAL, f"{self.path} cannot have a journal of mode {mode}: it keeps {now}")
        with self.transaction() as run:
            if self._check():
                for statement in SCHEMA:
                    run(statement)
                run(f"PRAGMA application_id = {APPLICATION_ID}")
                run(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check(self) -> bool:
        """Whether the file is new; `ValueError` where it is another program's or version's."""
        ((tables,), (kind,), (version,)) = (
            self._connection.execute(query).fetchone()
            for query in ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version")
        )
        if not tables and not kind and not version:
            return True
        if kind != APPLICATION_ID:
            raise ValueError(f"{self.path} is no index of sessions: give another directory.")
        if version != SCHEMA_VERSION:
            advice = (
                "update modeling_hope"
                if version > SCHEMA_VERSION
                else "export its sessions with the version that wrote it"
            )
            raise ValueError(f"{self.path} has schema version {version} and this code has {SCHEMA_VERSION}: {advice}.")
        return False

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[Any]:
        """
        Do all that is run inside, or nothing. Gives what runs a statement: `run(sql, values)` returns the cursor.

        `durable`: it outlasts a power failure once this ends; else it may be undone by one, until the next that is.

        Raises:
            StorageFailed: the disk is full, or the file cannot be written.
        """
        with self._lock, self._told():
            run = self._connection.execute
            run(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            run("BEGIN IMMEDIATE")
            try:
                yield run
                run("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    run("ROLLBACK")
                raise

    def query(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._told():
            return self._connection.execute(sql, values).fetchall()

    def forget_log(self) -> None:
        """Take what was deleted out of the write-ahead log too; the next call does where readers are in the way now."""
        with self._lock, self._told():
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "closed database" in str(error):
                raise StorageFailed(errno.EBADF, "the store is closed") from error
            if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):  # of the code, not of the disk
                raise
            number = errno.ENOSPC if "full" in str(error) else errno.EIO
            raise StorageFailed(number, f"{FILE}: {error}; what was kept before is kept still") from error
