"""Tokens as text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


HALF_CHARACTER = "\ufffd"  # what a decoder makes of bytes that are no whole character yet


class Words:
    """
    The text of an answer, token by token.

    Attributes:
        text: of all tokens so far, but for a character that is not whole yet.
        stopped: where the first stop string begins in it; `None` while there is none.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.text = ""
        self.stopped: int | None = None
        # A token's text may turn on the ones before it: those since `_start` are decoded again with each new one.
        self._ids: list[int] = []
        self._known, self._last = "", 0  # the text of the first `_last` of them
        self._taken = 0

    def add(self, token: int) -> None:
        self._ids.append(token)
        text = self._decode(self._ids)
        if len(text) <= len(self._known) or text.endswith(HALF_CHARACTER):
            return
        before = len(self.text)
        self.text += text[len(self._known) :]
        self._ids = self._ids[self._last :]
        self._known, self._last = self._decode(self._ids), len(self._ids)
        self._find_stop(before)

    def take(self) -> str:
        """What may be shown and was not yet."""
        end = self.stopped if self.stopped is not None else len(self.text) - self._held()
        piece = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def rest(self, text: str) -> str:
        """What of the answer's whole text was not shown yet."""
        return text[self._taken :]

    def cut(self, text: str) -> str:
        """The answer's whole text up to the first stop string."""
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(found)] if found else text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _find_stop(self, before: int) -> None:
        found = [place for stop in self.stops if (place := self.text.find(stop, max(before - len(stop) + 1, 0))) >= 0]
        if found and self.stopped is None:
            self.stopped = min(found)

    def _held(self) -> int:
        """Characters at the end of the text that a stop string may begin with."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
