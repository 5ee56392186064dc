"""What the next call of a session reads: a message or a prompt as tokens, after what its memory has read already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cache_hope import HopeCache
from .chat_turns import ChatTurns, Message


# Of an answer, where neither the call nor the generation config says how many.
NEW_TOKENS = 256
LIMITS = ("max_new_tokens", "max_length")
# The note of a memory that holds a conversation: its last answer waits to be closed, or is.
CONVERSATION = "conversation"
OPEN, CLOSED = "open", "closed"


@dataclass(frozen=True)
class SessionTurn:
    """
    What a turn adds to a stream.

    Attributes:
        memory: a fork of the session's, which notes the conversation as the turn will leave it.
        closing: what ends the answer before, but for what the model has said of it itself: read first, after the token
            that waits, as the model's own words.
        ids: what the model is told. Empty where it goes on with what it said last.
        ends: tokens that end the answer, besides those that end any text.
    """

    memory: HopeCache
    closing: list[int]
    ids: list[int]
    ends: list[int]

    def eos_token_id(self, known: int | list[int] | None) -> list[int] | None:
        """All tokens that end the answer, where those are `known` that end any text."""
        known = [known] if isinstance(known, int) else list(known or [])
        return list(dict.fromkeys([*known, *self.ends])) or None


def chat_turn(
    memory: HopeCache,
    tokenizer: Any,
    message: str | Sequence[Message],
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
) -> SessionTurn:
    """
    A turn in a conversation, by the tokenizer's chat template; arguments as of `HopeSession.chat`.

    Raises:
        ValueError: there is no chat template, or it cannot be written turn by turn; `system` in a later turn.
    """
    turns = ChatTurns(tokenizer, template)
    messages = [{"role": "user", "content": message}] if isinstance(message, str) else message
    if not isinstance(messages, Sequence) or not all(isinstance(each, Mapping) for each in messages) or not messages:
        raise ValueError("`message` must be text, or a list of at least one message with `role` and `content`.")
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    closing: list[int] = []
    if CONVERSATION not in memory.notes:
        ids = turns.first(messages)
        if is_used(memory) and ids[:1] == [tokenizer.bos_token_id]:
            ids = ids[1:]
    elif system is not None:
        raise ValueError("`system` belongs to the first turn of a conversation: `reset()` begins another one.")
    else:
        ending, ids = turns.next(messages)
        closing = unsaid(memory, turns, ending)
    work = memory.clone()
    work.notes[CONVERSATION] = OPEN
    return SessionTurn(work, closing, ids, turns.ends())


def text_turn(memory: HopeCache, tokenizer: Any, prompt: str) -> SessionTurn:
    """
    A prompt that goes on with the stream; arguments as of `HopeSession.generate`.

    Raises:
        ValueError: the prompt is empty, and what was read last was not the model's own.
    """
    ids = opening(memory, tokenizer) + tokens_of(tokenizer, prompt)
    if not ids and memory.rows[0].pending is None and memory.rows[0].seen:
        raise ValueError("`prompt` is empty, and what was read last was not the model's own: give it some text.")
    goes_on = not prompt and memory.notes.get(CONVERSATION) == OPEN
    return SessionTurn(memory.clone(), [], ids, ChatTurns(tokenizer).ends() if goes_on else [])


def unsaid(memory: HopeCache, turns: ChatTurns, closing: list[int]) -> list[int]:
    """Of what ends an answer, what the model has still to read, if the answer is open."""
    if memory.notes.get(CONVERSATION) != OPEN:
        return []
    record = memory.rows[0]
    return turns.unsaid(closing, record.pending if record.pending is not None else int(record.ids[-1]))


def is_used(memory: HopeCache) -> bool:
    """Whether the one row of a memory has read something, or has something to read."""
    return memory.rows[0].seen > 0 or memory.rows[0].pending is not None


def opening(memory: HopeCache, tokenizer: Any) -> list[int]:
    """What the tokenizer begins a text with, at the start of a stream; in the middle, nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if not is_used(memory) and bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
