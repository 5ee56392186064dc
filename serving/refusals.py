"""What a store, its keys and its quotas refuse. Nothing has changed when one of these is raised."""

from __future__ import annotations


class SessionNotFound(LookupError):
    """There is no such session of this owner; whether another owner has one is not told."""

    def __init__(self, id: str):
        super().__init__(f"There is no session {id!r}.")


class SessionExists(ValueError):
    """The owner has a session of this name."""

    def __init__(self, id: str):
        super().__init__(f"There is a session {id!r} already: give another id, or none to have one made.")


class SessionBusy(RuntimeError):
    """Another turn of the session runs, and it did not end in the time given to wait."""

    def __init__(self, id: str):
        super().__init__(
            f"Session {id!r} is busy with another turn: try again when that has ended, or fork the session."
        )


class TurnLost(RuntimeError):
    """The session was deleted, or given to another process, while a turn ran: the turn cannot be kept."""

    def __init__(self, id: str):
        super().__init__(f"Session {id!r} was deleted or taken over while the turn ran: nothing of the turn was kept.")


class SessionDamaged(RuntimeError):
    """The files of a session cannot be read; the message says which and why."""


class QuotaExceeded(RuntimeError):
    """
    An owner is at a limit.

    Attributes:
        limit: the name of the field of `Limits`.
        retry_after: seconds after which it may go, where time is all it takes.
    """

    def __init__(self, limit: str, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.limit, self.retry_after = limit, retry_after


class StorageFailed(OSError):
    """The disk is full, or cannot be written or read: what was kept before is kept still."""
