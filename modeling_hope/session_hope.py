"""HopeSession: a stream in a user's hands, to talk to, read to, keep and fork."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.utils.logging import tqdm

from .cache_hope import HopeCache, check_memory
from .chat_turns import ChatTurns, Message
from .memory_format import SavedMemory
from .session_turn import (
    CLOSED,
    CONVERSATION,
    LIMITS,
    NEW_TOKENS,
    OPEN,
    SessionTurn,
    chat_turn,
    is_used,
    opening,
    text_turn,
    tokens_of,
    unsaid,
)
from .stream_record import LOSSES_KEPT, StreamRecord
from .text_pieces import encoded_bytes, prepends_space, text_blocks, text_bytes, text_pieces
from .text_stream import TextStream


if TYPE_CHECKING:
    from .modeling_hope import HopeForCausalLM


# What a session decides itself, or has no use for.
NOT_OF_A_SESSION = {
    "past_key_values": "a session has its own memory",
    "inputs": "give the text",
    "input_ids": "give the text",
    "inputs_embeds": "give the text",
    "attention_mask": "a session has one row and no padding",
    "tokenizer": "a session has its own",
    "return_dict_in_generate": "a session returns text. Call model.generate(past_key_values=session.memory.clone(), ...)",
}


@dataclass(frozen=True)
class Reading:
    """
    What a `read()` has read.

    Attributes:
        tokens: read from the source.
        seconds: it took.
        loss: mean over the segments that ended and were learned from, nats per token; `None` where there was none.
    """

    tokens: int
    seconds: float
    loss: float | None


class HopeSession:
    """
    One stream: a model, its tokenizer, and the memory of what was read and said so far.

    Each call puts a new `HopeCache` in the place of `memory` once all has gone well, and in one step: an error or Ctrl-C
    leaves it as it was (`read` goes on piece by piece, and leaves it at the last), and `save()`, `fork()` and `summary()`
    see a whole memory at any time, from any thread. One call at a time may change it: `generate`, `chat`, `read` and
    `reset` raise `RuntimeError` while another one runs, or a text is streamed.

    Args:
        model (`HopeForCausalLM`): shared by as many sessions as one likes.
        tokenizer: of the model.
        memory (`HopeCache`, *optional*): of one row, to go on from a fork of. Unset: a new one.

    ```python
    >>> session = HopeSession(model, tokenizer)
    >>> session.read(Path("book.txt"))
    >>> session.chat("What is it about?", max_new_tokens=50)
    >>> session.save("memory")
    >>> session = HopeSession.load("memory", model, tokenizer)
    ```
    """

    def __init__(self, model: HopeForCausalLM, tokenizer: Any, memory: HopeCache | None = None):
        _check_model(model)
        if memory is not None and check_memory(memory, model.config).batch_size != 1:
            raise ValueError(
                f"`memory` holds {memory.batch_size} rows and a session is one stream: give `memory.clone()` after "
                "`select([row])`."
            )
        self.model, self.tokenizer = model, tokenizer
        self.memory = HopeCache(model.config) if memory is None else memory.clone()
        if self.conversation not in (None, OPEN, CLOSED) or (self.conversation and not is_used(self.memory)):
            raise ValueError(
                f"`memory.notes[{CONVERSATION!r}]` is {self.conversation!r}, which no session has written: remove it."
            )
        self._one_at_a_time = threading.Lock()

    @property
    def tokens(self) -> int:
        """Read so far. The last one that was sampled is read by the next call."""
        return self._record.seen

    @property
    def conversation(self) -> str | None:
        """`"open"`: its last answer waits to be closed; `"closed"`; or `None`, where there is none."""
        return self.memory.notes.get(CONVERSATION)

    def generate(self, prompt: str = "", *, stream: bool = False, **options: Any) -> str | TextStream:
        """
        Go on with the stream: read a prompt, and say what follows.

        Args:
            prompt: may be empty where the last word was the model's own, which then goes on: so an answer in a
                conversation that was cut short is brought to its end.
            stream: return the text piece by piece.
            options: as `model.generate` takes them: `learn`, `max_new_tokens` (256 unless the generation config says),
                `do_sample`, `stop_strings` and so on. Beams and sampling are repeatable by `torch.manual_seed`.

        Returns:
            The new text, without special tokens; with `stream`, an iterator over its pieces.

        Raises:
            ValueError: an option is impossible. Nothing was read.
            RuntimeError: another call runs.
        """
        options = self._checked(options)
        with ExitStack() as running:
            running.enter_context(self._alone())
            return self._say(text_turn(self.memory, self.tokenizer, prompt), options, stream, running)

    def chat(
        self,
        message: str | Sequence[Message],
        *,
        system: str | None = None,
        stream: bool = False,
        template: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str | TextStream:
        """
        Take a turn in a conversation. Only what is new is read; the turns before are in the memory.

        The stream holds the tokens of the conversation as the chat template writes it. An answer that was cut short is
        closed by the next turn; `generate()` goes on with it.

        Args:
            message: the user's, or the new turn's messages, e.g. the results of tools; in the first turn with all that
                comes before the first answer.
            system: the system prompt, in the first turn.
            stream, options: as of `generate()`. Special tokens with which the template ends an answer end it.
            template: options of the chat template, e.g. `{"enable_thinking": False}`.

        Returns:
            As `generate()`.

        Raises:
            ValueError: there is no chat template, or it cannot be written turn by turn; `system` in a later turn; an
                option is impossible. Nothing was read.
            RuntimeError: another call runs.
        """
        options = self._checked(options)
        with ExitStack() as running:
            running.enter_context(self._alone())
            turn = chat_turn(self.memory, self.tokenizer, message, system, template)
            return self._say(turn, options, stream, running)

    def read(
        self, source: Any, *, learn: str | None = None, progress: bool | None = None, chunk: int = 1024
    ) -> Reading:
        """
        Read a text of any length, and learn from it. A long one takes as much memory as a short one, but for 8 bytes a
        token, its id, and the keys of full attention.

        An answer that a conversation has left open is closed first. Text is tokenized in pieces of 65,536 characters, cut
        at spaces: its tokens are those of the whole, but for a stretch of more without one. Special tokens written
        in it are read as such, as by the tokenizer. Ctrl-C leaves the memory with what was read up to then.

        Args:
            source: text, a `pathlib.Path`, an open file, or an iterable of strings. A `str` is never a path.
            learn: `"prompt"` or `"all"`: learn from it; `"off"`: do not. Unset: as in `generate()`.
            progress: show a progress bar; unset: on a terminal.
            chunk: tokens per call of the model. Changes nothing but time and space.

        Raises:
            TypeError, OSError: the source cannot be read.
            ValueError: an option is impossible.
            RuntimeError: another call runs.
        """
        learn = self._settle({"learn": learn})[1]
        if chunk < 1:
            raise ValueError(f"`chunk` must be at least 1, got {chunk}.")
        if learn != "off" and self.model.config.segment_length is not None:
            # A memory keeps the losses of the last segments: none is missed.
            chunk = min(chunk, (LOSSES_KEPT - 1) * self.model.config.segment_length)
        blocks, size, started = text_blocks(source), text_bytes(source), time.monotonic()
        hidden = not (sys.stderr.isatty() if progress is None else progress)
        tokens = 0
        losses: list[float] = []
        with self._alone(), tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=hidden) as bar:
            if self.conversation == OPEN:
                work, turns = self.memory.clone(), ChatTurns(self.tokenizer)
                self._feed(work, unsaid(work, turns, turns.closing()), own=True, learn=learn)
                work.notes[CONVERSATION] = CLOSED
                self.memory = work
            for ids, done in self._chunks(blocks, chunk):
                work = self.memory.clone()
                self._feed(work, ids, own=False, learn=learn)
                losses += _new_losses(self._record, work.rows[0])
                self.memory = work
                tokens += len(ids)
                bar.set_postfix_str(
                    f"{tokens:,} tokens" + (f", loss {losses[-1]:.3f}" if losses else ""), refresh=False
                )
                bar.update(done)
        return Reading(tokens, time.monotonic() - started, sum(losses) / len(losses) if losses else None)

    def save(self, directory: str | os.PathLike[str], **options: Any) -> SavedMemory:
        """Write the memory to a directory, atomically; options, and what is returned, as of `HopeCache.save_pretrained`."""
        return self.memory.save_pretrained(directory, model=self.model, **options)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: HopeForCausalLM, tokenizer: Any) -> HopeSession:
        """
        Go on with a saved session, as if it had never stopped.

        Raises:
            ValueError: the directory holds no memory, one of another model, or a damaged one.
        """
        _check_model(model)
        return cls(model, tokenizer, HopeCache.from_pretrained(directory, model=model))

    def fork(self) -> HopeSession:
        """Another session that goes on from here by itself. Copies nothing until one of the two changes."""
        return type(self)(self.model, self.tokenizer, self.memory)

    def reset(self, levels: Sequence[int] | None = None) -> None:
        """Forget everything; with `levels`, only what these levels have learned and gathered."""
        with self._alone():
            work = self.memory.clone()
            work.reset(levels)
            self.memory = work

    def summary(self) -> dict[str, Any]:
        """As `HopeCache.summary`, of the one row, and the state of the `conversation`."""
        whole = self.memory.summary()
        (row,) = whole.pop("rows")
        return {**whole, **row, "conversation": self.conversation}

    def __repr__(self) -> str:
        size = f"{self.tokens:,} tokens, {self.memory.nbytes() / 2**20:,.1f} MiB"
        return f"HopeSession({type(self.model).__name__}, {size}{', in conversation' if self.conversation else ''})"

    @property
    def _record(self) -> StreamRecord:
        return self.memory.rows[0]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._one_at_a_time.acquire(blocking=False):
            raise RuntimeError(
                "The session is busy with another call: wait for it, or close the text that is streamed. `fork()` gives "
                "another session."
            )
        try:
            yield
        finally:
            self._one_at_a_time.release()

    def _say(self, turn: SessionTurn, options: dict[str, Any], stream: bool, running: ExitStack) -> str | TextStream:
        """Generate after what is new, in the turn's memory, which then becomes the session's."""
        if stream and options.get("streamer") is not None:
            raise ValueError("`streamer`: with `stream=True` the session has its own. Leave out one of them.")
        settings, learn = self._settle(options)
        if turn.ends:
            options.setdefault("eos_token_id", turn.eos_token_id(settings.eos_token_id))
        work, ids = turn.memory, turn.ids
        if turn.closing:
            self._feed(work, turn.closing, own=True, learn=learn)
        width = max(len(ids), 1)  # without any, the token that waits
        # A mask over the history says that the ids are new, whatever they look like.
        mask = torch.ones(1, 1, dtype=torch.bool, device=self.model.device).expand(1, work.columns + width)

        def say(**more: Any) -> str:
            found = self.model.generate(
                self._tensor(ids) if ids else None,
                past_key_values=work,
                attention_mask=mask,
                tokenizer=self.tokenizer,
                **{**options, **more, "num_return_sequences": 1, "return_dict_in_generate": False},
            )
            self.memory = work
            return self.tokenizer.decode(found[0, width:], skip_special_tokens=True)

        if not stream:
            return say()
        held, device = running.pop_all(), self.model.device.type
        # Autocast is each thread's own: the caller's is the one that counts.
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

        def say_piecewise(streamer: Any, criterion: Any) -> None:
            with held, autocast:
                criteria = StoppingCriteriaList([*(options.get("stopping_criteria") or []), criterion])
                say(streamer=streamer, stopping_criteria=criteria)

        return TextStream(self.tokenizer, say_piecewise)

    @torch.no_grad()
    def _feed(self, work: HopeCache, ids: list[int], own: bool, learn: str) -> None:
        """Read tokens, after the one that waits to be read. `own`: they are the model's words, learned from as such."""
        waiting = [work.rows[0].pending] if work.rows[0].pending is not None else []
        if not waiting and not ids:
            return
        told = [learn == "all"] * len(waiting) + [learn == "all" or not own] * len(ids)
        self.model(
            self._tensor(waiting + ids),
            past_key_values=work,
            learn=learn,
            learn_mask=self._tensor(told),
            logits_to_keep=1,
        )

    def _chunks(self, blocks: Iterable[str], chunk: int) -> Iterator[tuple[list[int], int]]:
        """A text's tokens, at most `chunk` at a time, and the bytes that are done with them."""
        ids = opening(self.memory, self.tokenizer)
        for piece in text_pieces(blocks, drop_space=prepends_space(self.tokenizer)):
            ids += tokens_of(self.tokenizer, piece)
            size, parts = encoded_bytes(piece), [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
            for index, part in enumerate(parts):
                yield part, size * (index + 1) // len(parts) - size * index // len(parts)
            ids = []

    def _tensor(self, row: list[Any]) -> torch.Tensor:
        return torch.tensor([row], device=self.model.device)

    def _settle(self, options: Mapping[str, Any]) -> tuple[GenerationConfig, str]:
        """The settings of a call with these options, and what it learns from."""
        others = {name: value for name, value in options.items() if name != "generation_config"}
        return self.model._settle(options.get("generation_config"), others)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options that a session can take, and how much to say at most."""
        for name, reason in NOT_OF_A_SESSION.items():
            if (value := options.get(name)) is not None and value is not False:
                raise ValueError(f"`{name}`: {reason}.")
        if (options.get("num_return_sequences") or 1) > 1:
            raise ValueError("`num_return_sequences`: a session is one stream. `fork()` it for each.")
        self._settle(options)
        configs = [config for config in (options.get("generation_config"), self.model.generation_config) if config]
        limits = [source.get(name) for source in (options, *map(vars, configs)) for name in LIMITS]
        default = {} if any(limits) else {"max_new_tokens": NEW_TOKENS}
        return default | {name: value for name, value in options.items() if name not in NOT_OF_A_SESSION}


def _check_model(model: Any) -> None:
    if getattr(getattr(model, "config", None), "model_type", None) != "hope" or not hasattr(model, "_settle"):
        raise ValueError(
            f"`model` is a {type(model).__name__}: a session needs a HopeForCausalLM. `hope convert` makes one."
        )


def _new_losses(before: StreamRecord, after: StreamRecord) -> tuple[float, ...]:
    """Of the segments that were learned from in between."""
    ended = after.segments + after.skipped + after.nonfinite - before.segments - before.skipped - before.nonfinite
    return after.losses[-ended:] if ended else ()


__all__ = ["HopeSession"]
