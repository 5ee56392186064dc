"""Names of sessions and owners: made here, or checked. None of them ever names a file."""

from __future__ import annotations

import re
import uuid


NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def make_id() -> str:
    """An id that nobody can guess, of 122 random bits."""
    return str(uuid.uuid4())


def check_id(value: object, what: str = "session id") -> str:
    """The name; `ValueError` unless it is text of 1 to 64 letters, digits, dots, underscores and hyphens, not dots alone."""
    if not isinstance(value, str) or not NAME.fullmatch(value) or not value.strip("."):
        told = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
        raise ValueError(
            f"{told} is no {what}: use 1 to 64 letters, digits, dots, underscores and hyphens, and not dots alone."
        )
    return value
