"""Text out of dictionaries for dictd: a compressed file of entries, and an index of where each stands."""

from __future__ import annotations

import gzip
import re
import string
from collections.abc import Iterable, Iterator

from .plain_text import Block, one_line, read_text


DIGITS = {
    digit: value for value, digit in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/")
}
ACCENTS = {"'": "\u0301", "`": "\u0300", '"': "\u0308", "^": "\u0302", "~": "\u0303", "=": "\u0304", "-": "\u0304"}
ACCENTS |= {",": "\u0327", ".": "\u0307"}
LETTERS = {"ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "eth": "ð", "th": "þ", "deg": "°", "root": "√"}
# Who wrote an entry: Webster of 1913, WordNet, editors by their initials.
SOURCE = re.compile(r"\s*\[(?:1913 Webster|Webster|WordNet|PJC|RDH|RP|GNU|AS|Century)\b[^\]]*\]")
# After the last one may stand the headwords of the next entry.
NEXT = re.compile(rf"({SOURCE.pattern}) \S[^\n.]{{0,60}}(?:\n {{3}}[^\n.]{{1,60}})*\s*\Z")
SOUND = re.compile(r"\s*\\[^\\\n]+\\(?:\s*\([^()]*[\"\[`'][^()]*(?:\([^()]*\)[^()]*)*\))?")


def entries(dictionary: bytes, index: str) -> Iterator[tuple[str, str]]:
    """
    Args:
        dictionary: the compressed entries (`.dict.dz`).
        index: lines of headword, offset and length, the numbers in base 64.

    Yields:
        Headword and text of each entry, in the order in which the entries stand.
    """
    data = gzip.decompress(dictionary)
    places: dict[tuple[int, int], str] = {}
    for line in index.splitlines():
        headword, start, size = line.split("\t")[:3]
        if not headword.startswith("00-database"):
            places.setdefault((number(start), number(size)), headword)
    for (offset, length), headword in sorted(places.items()):
        yield headword, data[offset : offset + length].decode(errors="replace")


def number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS[digit]
    return value


def by_first_letters(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Entries together whose first line begins with the same two letters or digits."""
    groups: dict[str, list[str]] = {}
    for headword, text in found:
        first = re.sub(r"[^a-z0-9]", "", text.lstrip().partition("\n")[0].lower()) or headword
        groups.setdefault(first[:2], []).append(text)
    return groups


def read_gcide(text: str) -> list[Block]:
    """An entry of the Collaborative International Dictionary: its accents written out, without signs for how it sounds."""
    text = SOUND.sub("", SOURCE.sub("", NEXT.sub(r"\1", text)))
    text = re.sub(r"\s*\([^()\s]*(?:\[[^\]\s]{1,3}\]|\")[^()\s]*\)", "", text)  # how an inflected form sounds
    text = re.sub(r"\[(.{1,4}?)\]", _letter, text)
    return [Block(one_line(part)) for part in re.split(r"\n\s*\n", re.sub(r"[{}]", "", text)) if part.strip()]


def _letter(match: re.Match[str]) -> str:
    code = match[1]
    if code in LETTERS:
        return LETTERS[code]
    if code[0] in ACCENTS and code[1:].isalpha():
        first = LETTERS.get(code[1:], code[1:])
        return first[0] + ACCENTS[code[0]] + first[1:]
    if code[-1] == "^" and code[:-1].isalpha():
        return f"{code[0]}\u0306{code[1:-1]}"
    return match[0]


def read_foldoc(text: str) -> list[Block]:
    """An entry of the Free On-line Dictionary of Computing, without the date of its last change."""
    headword, _, body = text.strip().partition("\n")
    body = re.sub(r"(?m)^\s*\(\d{4}-\d\d-\d\d\)\s*$", "", body)
    body = re.sub(r"<([a-z, ]+)>", r"(\1)", re.sub(r"[{}]", "", body))
    blocks = read_text(body)
    if blocks and blocks[0].kind == "text":
        return [Block(f"{headword.strip()}: {blocks[0].text.strip()}"), *blocks[1:]]
    return [Block(headword.strip()), *blocks]
