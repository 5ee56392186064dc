"""An order on its way: its words as they come, its answer, and a way to call it off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from .orders import Answer
from .words import Words


class Job:
    """
    An order that an engine has taken. Any thread may use it, and any number may listen.

    Iterating, with `for` or `async for`, gives the pieces of its text as they come, from the first on; it raises what
    went wrong, and ends where the order was cancelled.

    Attributes:
        answer: comes when all is done; `asyncio.wrap_future` makes it awaitable.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.answer: Future[Answer] = Future()
        self.answer.set_running_or_notify_cancel()  # who waits for it cannot cancel it in passing
        self._tokenizer, self._stops = tokenizer, stops
        self._said: list[int] = []
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], Any]] = []

    def result(self, timeout: float | None = None) -> Answer:
        """
        The answer, waited for.

        Raises:
            TimeoutError: it took longer, in seconds.
            Exception: what went wrong with this order.
        """
        return self.answer.result(timeout)

    def cancel(self) -> None:
        """Call it off, unless it is done: it ends before its next token, and no memory comes of it."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def __iter__(self) -> Iterator[str]:
        words, event = Words(self._tokenizer, self._stops), threading.Event()
        with self._listening(event.set):
            for more in self._pieces(words):
                if more is None:
                    event.wait()
                    event.clear()
                else:
                    yield more

    async def __aiter__(self) -> AsyncIterator[str]:
        words, event, loop = Words(self._tokenizer, self._stops), asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody listens any more
                loop.call_soon_threadsafe(event.set)

        with self._listening(wake):
            for more in self._pieces(words):
                if more is None:
                    await event.wait()
                    event.clear()
                else:
                    yield more

    def say(self, token: int) -> None:
        """For the engine: a token was said."""
        self._said.append(token)
        self._wake()

    def finish(self, answer: Answer | BaseException) -> None:
        """For the engine: this is the end."""
        if isinstance(answer, Answer):
            self.answer.set_result(answer)
        else:
            self.answer.set_exception(answer)
        self._wake()

    def _pieces(self, words: Words) -> Iterator[str | None]:
        """Pieces of text, and `None` where there is nothing but to wait."""
        read = 0
        while True:
            ended, said = self.answer.done(), len(self._said)
            for token in self._said[read:said]:
                words.add(token)
            read = said
            if piece := words.take():
                yield piece
            if ended:
                answer = self.answer.result()
                if answer.memory is not None and (rest := words.rest(answer.text)):
                    yield rest
                return
            if read == len(self._said) and not self.answer.done():
                yield None

    @contextmanager
    def _listening(self, waker: Callable[[], Any]) -> Iterator[None]:
        with self._lock:
            self._wakers.append(waker)
        try:
            yield
        finally:
            with self._lock:
                self._wakers.remove(waker)

    def _wake(self) -> None:
        with self._lock:
            wakers = list(self._wakers)
        for waker in wakers:
            waker()
