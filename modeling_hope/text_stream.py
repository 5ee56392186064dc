"""Text as it is generated: an iterator over the words of another thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TextIteratorStreamer
from transformers.generation.stopping_criteria import StoppingCriteria


class StopOnRequest(StoppingCriteria):
    """Stops after the next token, once asked to."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


class TextStream(Iterator[str]):
    """
    Pieces of the text that a session says, while it says it.

    What is raised where it is generated is raised here, and the memory is then as before. `stop()` ends the text after
    the next token: the pieces up to there still come, and the memory holds what they say. `close()` does the same and
    waits for it, as does leaving a `with` block, or dropping the iterator.

    Args:
        tokenizer: to decode with, special tokens left out.
        say: generates, given the streamer and the stopping criterion to use. Runs in a thread of its own.
    """

    def __init__(self, tokenizer: Any, say: Callable[[TextIteratorStreamer, StopOnRequest], Any]):
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._criterion = StopOnRequest()
        self._raised: list[BaseException] = []
        # The thread holds no reference to the stream, which may thus end while it runs.
        arguments = (say, self._streamer, self._criterion, self._raised)
        self._thread = threading.Thread(target=_run, args=arguments, name="hope-session", daemon=True)
        self._end = weakref.finalize(self, _end, self._thread, self._criterion)
        self._thread.start()

    def __next__(self) -> str:
        for piece in self._streamer:
            if piece:
                return piece
        self._streamer.text_queue.put(self._streamer.stop_signal)  # for who asks once more
        # The text ends before the memory has taken it in.
        self._thread.join()
        if self._raised:
            raise self._raised.pop()
        raise StopIteration

    def stop(self) -> None:
        """Ask for the text to end after the next token."""
        self._criterion.asked.set()

    def close(self) -> None:
        """End the text after the next token, and wait until the memory holds what was said."""
        self._end()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _run(
    say: Callable[[TextIteratorStreamer, StopOnRequest], Any],
    streamer: TextIteratorStreamer,
    criterion: StopOnRequest,
    raised: list[BaseException],
) -> None:
    try:
        say(streamer, criterion)
    except BaseException as error:
        raised.append(error)
    finally:
        streamer.text_queue.put(streamer.stop_signal)


def _end(thread: threading.Thread, criterion: StopOnRequest) -> None:
    criterion.asked.set()
    if thread is not threading.current_thread():  # where a garbage collection may happen to run
        thread.join()
