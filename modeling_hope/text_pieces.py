"""Text of any length in pieces that can be tokenized one by one."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


# Characters of text held at a time.
BLOCK = 1 << 16
# Where text may be cut, the best place first: before a lone space, between words or not; before a newline after a word.
CUTS = tuple(re.compile(place, re.DOTALL) for place in (r".*\w(?= \w)", r".*\S(?= \S)", r".*\w(?=\n\S)"))


def text_blocks(source: Any) -> Iterator[str]:
    """
    A string, a file (a path or an open one, UTF-8) or an iterable of strings, in blocks of about `BLOCK` characters.

    Bytes that are no UTF-8 become U+FFFD.

    Raises:
        TypeError: the source is none of these.
    """
    if isinstance(source, str):
        return _slices(source)
    if isinstance(source, os.PathLike):
        return _path_blocks(Path(source))
    if hasattr(source, "read"):
        return _file_blocks(source)
    if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray)):
        return _joined(source)
    raise TypeError(
        f"`source` is a {type(source).__name__}: give text, a pathlib.Path, an open file or an iterable of strings."
    )


def text_bytes(source: Any) -> int | None:
    """Bytes that lie ahead in a source, `None` where unknown."""
    if isinstance(source, str):
        return sum(encoded_bytes(block) for block in _slices(source))
    if isinstance(source, os.PathLike):
        return os.stat(source).st_size
    with suppress(AttributeError, OSError):
        return os.fstat(source.fileno()).st_size - source.tell()
    return None


def encoded_bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def text_pieces(blocks: Iterable[str], drop_space: bool) -> Iterator[str]:
    """
    Text in pieces of at most `BLOCK` characters, cut where a tokenizer cuts too.

    Text in which there is no such place, like a long line without a space, is cut after `BLOCK` characters: there the
    tokens next to the cut may be others than in the whole, and at a newline too, where a tokenizer prepends spaces.

    Args:
        blocks: the text, in parts.
        drop_space: leave out the space that a piece would begin with, for a tokenizer that puts one there itself.
    """
    rest = ""
    for block in blocks:
        rest += block
        while len(rest) > BLOCK:
            match = next((match for cut in CUTS if (match := cut.match(rest, 0, BLOCK))), None)
            end = match.end() if match else BLOCK
            yield rest[:end]
            rest = rest[end + (drop_space and rest[end] == " ") :]
    if rest:
        yield rest


def prepends_space(tokenizer: Any) -> bool:
    """Whether a tokenizer begins a text as it begins a word after a space, so that a piece must not bring its own."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    whole, start = tokens("a b"), tokens("a")
    return whole != start + tokens(" b") and whole == start + tokens("b")


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))


def _path_blocks(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from _file_blocks(file)


def _file_blocks(file: Any) -> Iterator[str]:
    parts = iter(lambda: file.read(BLOCK), file.read(0))
    return codecs.iterdecode(parts, "utf-8", "replace") if isinstance(file.read(0), bytes) else parts


def _joined(strings: Iterable[Any]) -> Iterator[str]:
    """Short strings joined to blocks, so that many of them cost no more than one long one."""
    held, characters = [], 0
    for text in strings:
        if not isinstance(text, str):
            raise TypeError(f"`source` gave a {type(text).__name__}: an iterable has to give strings.")
        for part in _slices(text):
            held.append(part)
            characters += len(part)
            if characters >= BLOCK:
                yield "".join(held)
                held, characters = [], 0
    yield "".join(held)
