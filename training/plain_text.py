"""Blocks of text, as the readers of each format make them, and how a document is written from them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple


# Of the characters that are no spaces. Prose has 0.9 and more, most programs 0.6; hex dumps, tables of numbers, drawings
# made of signs, and languages of other scripts have less than half.
LEAST_LETTERS = 0.5
LONGEST_CODE = 60  # lines: what is longer is a listing, not an example
INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Block(NamedTuple):
    """
    A paragraph.

    Attributes:
        text: without blank lines around it; lines matter only in code.
        kind: `"text"`, `"item"` of a list, `"row"` of a table, `"code"`, or `"heading"`.
        level: of a heading, 1 the highest.
    """

    text: str
    kind: str = "text"
    level: int = 0


def decode(data: bytes) -> str:
    """UTF-8, or Latin-1 where it cannot be."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def normalise(text: str) -> str:
    """Unicode's composed form, with plain spaces and without characters that nobody sees."""
    text = unicodedata.normalize("NFC", text).replace("\xa0", " ").replace("\r\n", "\n").replace("\r", "\n")
    return INVISIBLE.sub("", text)


def one_line(text: str) -> str:
    return " ".join(text.split())


def is_readable(block: Block) -> bool:
    """Whether letters of the Latin alphabet make up the block, and no listing does."""
    dense = re.sub(r"\s", "", re.sub(r"^(-|\d+\.) ", "", block.text))
    letters = len(re.sub(r"[^A-Za-z]+", "", dense))
    if "\ufffd" in dense or letters < LEAST_LETTERS * len(dense) or not dense:
        return False
    return block.kind != "code" or block.text.count("\n") < LONGEST_CODE


def clean(blocks: Iterable[Block]) -> list[Block]:
    """The blocks that are readable, in normal form."""
    normal = []
    for block in blocks:
        text = normalise(block.text)
        text = code_lines(text) if block.kind == "code" else one_line(text)
        if text and is_readable(made := block._replace(text=text)):
            normal.append(made)
    return normal


def code_lines(text: str) -> str:
    """Without what all lines are indented by, and blank lines around."""
    lines = [line.rstrip() for line in text.expandtabs().split("\n")]
    indent = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return "\n".join(line[indent:] for line in lines).strip("\n")


def without_empty_sections(blocks: list[Block]) -> list[Block]:
    """Without headings that nothing follows before the next of their level or above."""
    kept: list[Block] = []
    for block in reversed(blocks):
        followed = kept and not (kept[-1].kind == "heading" and kept[-1].level <= block.level)
        if block.kind != "heading" or followed:
            kept.append(block)
    return kept[::-1]


def join(blocks: list[Block]) -> str:
    """A document: paragraphs with a blank line between, items and rows without."""
    return "\n\n".join("\n".join(block.text for block in group) for group in paragraphs(blocks))


def paragraphs(blocks: list[Block]) -> Iterator[list[Block]]:
    """Blocks in their order, with the items of a list and the rows of a table together."""
    for kind, group in groupby(blocks, lambda block: block.kind):
        if kind in ("item", "row"):
            yield list(group)
        else:
            yield from ([block] for block in group)


def read_text(text: str) -> list[Block]:
    """
    Plain text: paragraphs between blank lines, each on one line, unless its lines are of different indentation or have
    columns, as tables and programs do. Lines of signs, such as those under headings, are dropped.
    """
    blocks = []
    for part in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line.rstrip() for line in part.split("\n") if any(c.isalnum() for c in line)]
        if not lines:
            continue
        indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
        verbatim = len(indents) > 1 or any(re.search(r"\S {3,}\S", line) for line in lines)
        blocks.append(Block("\n".join(lines), "code") if verbatim else Block(" ".join(lines)))
    return blocks
