"""API keys: made here, shown once, and kept as hashes only. Each belongs to an owner, whose sessions it opens."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .database import Database
from .ids import check_id
from .quotas import NO_LIMITS, Limits


# The first part is the key's id, by which it is found and removed; the second, of 256 random bits, is the secret.
KEY = re.compile(r"hope-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
NO_DIGEST = bytes(hashlib.sha256().digest_size)


@dataclass(frozen=True)
class ApiKey:
    """
    A key without its secret.

    Attributes:
        id: the part of the key that may be told.
        created: seconds since 1970.
    """

    id: str
    owner: str
    created: float


class Keys:
    """
    The keys of a store's directory. What one process adds or removes the others see with their next request.

    A secret of 256 random bits cannot be found by trying, so one SHA-256 of it is kept, without the salt and the slow
    hash that passwords need.

    Raises:
        ValueError, StorageFailed: the index cannot be used; see `Database`.
    """

    def __init__(self, directory: Path, network: bool = False):
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._database = Database(directory, network)

    def add(self, owner: str, limits: Limits | None = None) -> str:
        """
        A new key of an owner, who may have several; it cannot be shown again.

        Args:
            owner: a new one, or one with keys or sessions already, which the new key opens.
            limits: of the owner, from now on; `None`: as they were.
        """
        check_id(owner, "owner")
        id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        with self._database.transaction() as run:
            run("INSERT OR IGNORE INTO owners VALUES (?, ?)", (owner, NO_LIMITS.to_json()))
            if limits is not None:
                run("UPDATE owners SET limits = ? WHERE name = ?", (limits.to_json(), owner))
            run("INSERT INTO keys VALUES (?, ?, ?, ?)", (id, owner, _digest(secret), time.time()))
        return f"hope-{id}-{secret}"

    def list(self) -> Sequence[ApiKey]:
        """All keys, oldest first."""
        return [
            ApiKey(*row) for row in self._database.query("SELECT id, owner, created FROM keys ORDER BY created, id")
        ]

    def remove(self, id: str) -> ApiKey:
        """
        Take a key back, from the next request on. The sessions of its owner stay.

        Raises:
            LookupError: there is none with this id.
        """
        with self._database.transaction() as run:
            row = run("SELECT id, owner, created FROM keys WHERE id = ?", (id,)).fetchone()
            if row is None:
                raise LookupError(f"There is no key {id!r}: give the id of one, as the list shows it, and not the key.")
            run("DELETE FROM keys WHERE id = ?", (id,))
        self._database.forget_log()
        return ApiKey(*row)

    def owner_of(self, key: str) -> str | None:
        """Whose key it is; `None` where it is nobody's. Takes as long for a wrong secret as for a right one."""
        parts = KEY.fullmatch(key)
        id, secret = parts.groups() if parts else ("", "")
        found = self._database.query("SELECT owner, digest FROM keys WHERE id = ?", (id,))
        owner, digest = found[0] if found else (None, NO_DIGEST)
        return owner if hmac.compare_digest(digest, _digest(secret)) else None

    def limits(self, owner: str) -> Limits:
        """Those of an owner alone; none for one who has never had a key."""
        rows = self._database.query("SELECT limits FROM owners WHERE name = ?", (owner,))
        return Limits.from_json(rows[0][0]) if rows else NO_LIMITS

    def close(self) -> None:
        self._database.close()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
