"""One turn of a conversation with a memory: what of the input is new to it, and which rows have finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from .cache_hope import HopeCache


# What is learned from: everything, what the model is told, or nothing.
LEARN = ("all", "prompt", "off")
# As many tokens in common with the start of the history do not come about by chance.
LONG_REPETITION = 8


@dataclass
class Turn:
    """
    What one `generate()` adds to the streams, from the prompt to the last token sampled.

    Attributes:
        ids: new tokens, right-aligned, `[rows, new]` int64; `None` where the prompt is `embeds`.
        embeds: `[rows, new, hidden_size]`.
        mask: `[rows, new]` bool, the real ones.
        marked: `[rows, new]` bool, those to be learned from.
        learn: `"all"`, `"prompt"` or `"off"`.
        width: columns of the ids that were handed to `generate()`.
        done: `[rows]` bool, rows that have finished.
        last: `[rows]` int64, column of each row's last token.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor | None
    mask: torch.Tensor
    marked: torch.Tensor
    learn: str
    width: int
    done: torch.Tensor | None = None
    last: torch.Tensor | None = None

    @property
    def own_words(self) -> str:
        """The policy for what the model says."""
        return "all" if self.learn == "all" else "off"

    def inputs(self, start: int, stop: int | None) -> dict[str, Any]:
        """Arguments of `forward()` for columns of the prompt."""
        return {
            "input_ids": None if self.ids is None else self.ids[:, start:stop],
            "inputs_embeds": None if self.embeds is None else self.embeds[:, start:stop],
            "attention_mask": self.mask[:, start:stop],
            "learn": self.learn,
            "learn_mask": self.marked[:, start:stop],
        }

    def next_inputs(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """Arguments of `forward()` for the token sampled last; a row that has finished gets padding."""
        done = self.done
        if done is None:
            done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return {"input_ids": input_ids[:, -1:], "attention_mask": ~done[:, None], "learn": self.own_words}

    def whole(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """Arguments of `forward()` without a memory, where every step reads everything again."""
        assert self.ids is not None
        sampled = input_ids[:, self.width :]
        own = torch.full_like(sampled, self.learn == "all", dtype=torch.bool)
        return {
            "input_ids": torch.cat([self.ids, sampled], 1),
            "attention_mask": torch.cat([self.mask, torch.ones_like(own)], 1),
            "learn": self.learn,
            "learn_mask": torch.cat([self.marked, own], 1),
        }

    def skip(self, columns: int) -> None:
        """Leave out columns that were read already."""
        self.ids = None if self.ids is None else self.ids[:, columns:]
        self.embeds = None if self.embeds is None else self.embeds[:, columns:]
        self.mask, self.marked = self.mask[:, columns:], self.marked[:, columns:]

    def expand(self, copies: int) -> None:
        if copies > 1:
            self.ids = None if self.ids is None else self.ids.repeat_interleave(copies, 0)
            self.embeds = None if self.embeds is None else self.embeds.repeat_interleave(copies, 0)
            self.mask, self.marked = self.mask.repeat_interleave(copies, 0), self.marked.repeat_interleave(copies, 0)

    def note(self, done: torch.Tensor, columns: int) -> None:
        """Note which rows a step of the sampling loop has finished."""
        if self.done is None or self.last is None:
            self.done, self.last = torch.zeros_like(done), torch.zeros_like(done, dtype=torch.int64)
        self.last = torch.where(self.done, self.last, columns - 1)
        self.done = self.done | done


class WatchedCriteria(StoppingCriteriaList):
    """The stopping criteria of a turn, which also learns which rows have finished: those go on receiving pads."""

    def __init__(self, criteria: StoppingCriteriaList, turn: Turn):
        super().__init__(criteria)
        self.turn = turn

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.turn.note(done, input_ids.shape[1])
        return done


class TurnCriterion(StoppingCriteria):
    """Carries the turn to where the stopping criteria are made, which nothing else of a call reaches; stops nothing."""

    def __init__(self, turn: Turn):
        self.turn = turn

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def check_learn(learn: str) -> None:
    """Raise `ValueError` for a policy that there is not."""
    if learn not in LEARN:
        raise ValueError(f"`learn` must be one of {', '.join(map(repr, LEARN))}, got {learn!r}.")


def new_turn(
    memory: HopeCache,
    input_ids: torch.Tensor | None,
    embeds: torch.Tensor | None,
    mask: torch.Tensor | None,
    learn_mask: torch.Tensor | None,
    learn: str,
    own_words: bool = False,
) -> Turn:
    """
    What of the input is new to the memory. `own_words`: the ids are the tokens that wait to be read.

    Raises:
        ValueError: the ids fit neither as history nor as new tokens, or bring nothing new.
    """
    inputs = input_ids if input_ids is not None else embeds
    assert inputs is not None
    width = inputs.shape[1]
    real, covers_history = _real(memory, inputs, mask)
    if learn_mask is None:
        learn_mask = torch.ones_like(real)
    elif learn_mask.shape != real.shape:
        raise ValueError(
            f"`learn_mask` has shape {tuple(learn_mask.shape)}, the prompt {tuple(real.shape)}: give one entry for each token."
        )
    rows = [row[keep] for row, keep in zip(inputs, real, strict=True)]
    marked = [row[keep].bool() for row, keep in zip(learn_mask.to(real.device), real, strict=True)]
    if input_ids is None:
        if any(record.pending is not None for record in memory.rows):
            raise ValueError(
                "`inputs_embeds` cannot follow a memory whose last sampled token is not read yet: give `input_ids`, or read "
                "that token first, with forward()."
            )
        given, present = right_aligned(rows)
        return Turn(None, given, present, right_aligned(marked)[0], learn, width)
    is_history = not covers_history and not own_words and _is_history(memory, rows)
    for index, record in enumerate(memory.rows):
        own = record.pending is not None
        if is_history:
            rows[index] = _after_history(rows[index], record.seen, record.pending, index)
            marked[index] = marked[index][record.seen :]
        elif own and not own_words:
            rows[index] = F.pad(rows[index], (1, 0), value=record.pending)
            marked[index] = F.pad(marked[index], (1, 0), value=True)
        if own and learn != "all":
            marked[index] = F.pad(marked[index][1:], (1, 0), value=False)
    ids, present = right_aligned(rows)
    return Turn(ids, None, present, right_aligned(marked)[0], learn, width)


def _real(memory: HopeCache, inputs: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, bool]:
    """Which of the inputs are real, `[rows, width]` bool, and whether the mask covers the history too."""
    batch, width = inputs.shape[:2]
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool, device=inputs.device), False
    used = any(memory.seen)
    unread = memory.columns + any(record.pending is not None for record in memory.rows)
    with_history = {memory.columns + width, unread + width} if used else set()
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in {width, *with_history}:
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}: it must be {(batch, width)} as the ids"
            + (f", or {(batch, unread + width)} with the {unread} columns of the history." if used else ".")
        )
    real = mask[:, -width:].bool()
    if bool((~real.any(1)).any()):
        raise ValueError("`attention_mask` has a row that is all padding: every row needs at least one token.")
    return real, mask.shape[1] != width


def _is_history(memory: HopeCache, rows: list[torch.Tensor]) -> bool:
    """Whether the rows begin with all that the memory has read; `ValueError` where some do, or almost."""
    repeats = {
        index: _begins_with(ids, record.ids)
        for index, (ids, record) in enumerate(zip(rows, memory.rows, strict=True))
        if record.seen  # a row that has read nothing begins with nothing, and tells nothing
    }
    if not any(repeats.values()):
        for index in repeats:
            _refuse_half_history(rows[index], memory.rows[index].ids, index)
        return False
    odd = [index for index, repeated in repeats.items() if not repeated]
    if odd:
        same = next(index for index, repeated in repeats.items() if repeated)
        raise ValueError(
            f"`input_ids` row {same} repeats what its memory has read and row {odd[0]} does not: give all rows their history, "
            "or all rows new tokens only."
        )
    return True


def _begins_with(ids: torch.Tensor, read: torch.Tensor) -> bool:
    return len(ids) >= len(read) and bool((ids[: len(read)] == read.to(ids.device)).all())


def _refuse_half_history(ids: torch.Tensor, read: torch.Tensor, row: int) -> None:
    """Raise `ValueError` where ids repeat much of what was read and then differ: read as new, it would be read twice."""
    shared = min(len(ids), len(read))
    differing = (ids[:shared] != read[:shared].to(ids.device)).nonzero()
    same = int(differing[0]) if len(differing) else shared
    if same >= max(LONG_REPETITION, len(read) / 2):
        raise ValueError(
            f"`input_ids` row {row} repeat the first {same} of the {len(read)} tokens that its memory has read, and then "
            "differ: neither history nor new. A chat template may have rendered earlier turns differently: give the new "
            "tokens only. If these are, say so by an `attention_mask` that covers the history too."
        )


def _after_history(ids: torch.Tensor, seen: int, pending: int | None, row: int) -> torch.Tensor:
    """The part of a row that its memory has not read."""
    new = ids[seen:]
    if not len(new):
        raise ValueError(
            f"`input_ids` row {row} repeats the {seen} tokens that its memory has read and adds none: give at least one new "
            "token."
        )
    if pending is not None and int(new[0]) != pending:
        raise ValueError(
            f"`input_ids` row {row} goes on with {int(new[0])} after what its memory has read, where {pending} was sampled: "
            "give the history as it was generated, or the new tokens only."
        )
    return new


def right_aligned(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as `[rows, longest, ...]`, padded on the left, and which entries are real, `[rows, longest]`."""
    whole = pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=whole.device)
    width = whole.shape[1]
    return whole, torch.arange(width, device=whole.device) >= width - lengths[:, None]
