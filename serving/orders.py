"""What an engine is asked to do, and what comes of it."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from modeling_hope import HopeCache
from modeling_hope.session_turn import SessionTurn


@dataclass(frozen=True)
class Order:
    """
    One turn of a session.

    Attributes:
        memory: of one row, never changed: the answer brings a new one.
        ids: what the model is told, read after the token that waits in the memory. Empty where it goes on by itself.
        closing: what ends the answer before, read first as the model's own words.
        learn: `"all"`, `"prompt"` or `"off"`.
        settings: as `generate()` takes them, completed by the model's own; neither beams nor several answers.
        seed: makes sampling repeatable: as `torch.manual_seed(seed)` before a `generate()` of its own.
    """

    memory: HopeCache
    ids: list[int]
    closing: list[int]
    learn: str
    settings: GenerationConfig
    seed: int | None = None

    @classmethod
    def of_turn(
        cls, turn: SessionTurn, model: Any, learn: str, settings: GenerationConfig, seed: int | None = None
    ) -> Order:
        """Of what `chat_turn` and `text_turn` make; what ends the answer is as in `HopeSession`."""
        if turn.ends and settings.eos_token_id is None:
            settings = copy(settings)
            settings.eos_token_id = turn.eos_token_id(model.generation_config.eos_token_id)
        return cls(turn.memory, turn.ids, turn.closing, learn, settings, seed)


@dataclass(frozen=True)
class Answer:
    """
    What came of an order.

    Attributes:
        memory: with all that was read and said, but for the last token, which waits; notes are those of the order's. In
            the CPU's memory. `None` when the order was cancelled.
        ids: the tokens that were said.
        text: what they say, without special tokens and up to a stop string.
        reason: `"stop"` (an end of sequence, or a stop string), `"length"` or `"cancelled"`.
        prompt_tokens: tokens of the prompt, `closing` and what waited left out.
    """

    memory: HopeCache | None
    ids: list[int]
    text: str
    reason: str
    prompt_tokens: int
