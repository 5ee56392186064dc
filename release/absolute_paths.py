"""Absolute paths in JSON: they tell of the machine that a file was made on, and lead nowhere on another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any


# Two names or more after a slash that begins a word, neither an address nor a closing tag; a drive; a home.
PATH = re.compile(
    r"""(?<![\w.:/<\\~+-])/(?:[\w.+@~-]+/)+[\w.+@~-]*   # /home/ada/model
    |(?<!\w)[A-Za-z]:\\[\w.+@~\\-]+                     # C:\models
    |\bfile://[^\s"']+
    |(?<![\w/])~/[\w.+@/-]+""",
    re.VERBOSE,
)


def absolute_paths(text: str) -> list[str]:
    return [found.group().strip() for found in PATH.finditer(text)]


def without_paths(text: str) -> str:
    """With the last name in the place of each absolute path."""
    return PATH.sub(lambda found: re.split(r"[/\\]", found.group().rstrip("/\\"))[-1], text)


def strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every string in JSON with the keys that lead to it, those of mappings too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield place, str(key)
            yield from strings(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, f"{place}[{index}]")


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with every string changed, the keys of mappings too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): mapped(item, change) for key, item in value.items()}
    return [mapped(item, change) for item in value] if isinstance(value, list) else value
