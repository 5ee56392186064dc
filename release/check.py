"""A check by its name: what it found, and what mends it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


WIDTH = 120


class CheckError(ValueError):
    """
    Args:
        found: what is wrong.
        fix: what to do about it.
    """

    def __init__(self, found: str, fix: str):
        super().__init__(f"{found}: {fix}.")
        self.found, self.fix = found, fix


@dataclass(frozen=True)
class Check:
    """
    Attributes:
        name: of what was checked.
        passed: `None`: it was not run, for what it needs is not right.
        found: in words.
        fix: what to do where it failed, else empty.
    """

    name: str
    passed: bool | None
    found: str
    fix: str = ""


def run_checks(checks: Mapping[str, Callable[[], str]]) -> list[Check]:
    """Run each, whatever the others found."""
    done = []
    for name, check in checks.items():
        try:
            done.append(Check(name, True, check()))
        except CheckError as failed:
            done.append(Check(name, False, failed.found, failed.fix))
    return done


def table(checks: Iterable[Check]) -> str:
    """A line for each, and below those that failed what to do."""
    lines = []
    for check in checks:
        result = {True: "ok", False: "FAILED", None: "not run"}[check.passed]
        head = f"{check.name:<18} {result:<8} "
        lines.append(
            textwrap.fill(head + check.found, WIDTH, subsequent_indent=" " * len(head), break_long_words=False)
        )
        if check.fix:
            mark = " " * len(head) + "fix: "
            lines.append(
                textwrap.fill(
                    check.fix, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_long_words=False
                )
            )
    return "\n".join(lines)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of several names, and how many more there are."""
    given = list(names)
    rest = f" and {len(given) - most} more" if len(given) > most else ""
    return ", ".join(given[:most]) + rest
