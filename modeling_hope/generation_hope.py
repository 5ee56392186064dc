"""generate() with a memory that lasts: what is new to it, what it learns from, and what it holds afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerationMixin

from .cache_hope import HopeCache, check_memory


if TYPE_CHECKING:
    from .modeling_hope import HopeForCausalLM


# What is learned from: everything, what the model is told, or nothing.
LEARN = ("all", "prompt", "off")
# What Transformers' loop hands on to every step and Hope does not read, `tokenizer` for the sake of stop strings.
NOT_READ = ("position_ids", "token_type_ids", "labels", "tokenizer")
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
        told: `[rows, new]` bool, those that the model is told; the others are its own words.
        learn: `"all"`, `"prompt"` or `"off"`.
        width: columns of the ids that were handed to `generate()`.
        done: `[rows]` bool, rows that have finished.
        last: `[rows]` int64, column of each row's last token.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor | None
    mask: torch.Tensor
    told: torch.Tensor
    learn: str
    width: int
    done: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def inputs(self, start: int, stop: int | None) -> dict[str, Any]:
        """Arguments of `forward()` for columns of the prompt."""
        return {
            "input_ids": None if self.ids is None else self.ids[:, start:stop],
            "inputs_embeds": None if self.embeds is None else self.embeds[:, start:stop],
            "attention_mask": self.mask[:, start:stop],
            "learn": self.learn,
            "learn_mask": None if self.learn == "all" else self.told[:, start:stop],
        }

    def skip(self, columns: int) -> None:
        """Leave out columns that were read already."""
        self.ids = None if self.ids is None else self.ids[:, columns:]
        self.embeds = None if self.embeds is None else self.embeds[:, columns:]
        self.mask, self.told = self.mask[:, columns:], self.told[:, columns:]

    def expand(self, copies: int) -> None:
        if copies > 1:
            self.ids = None if self.ids is None else self.ids.repeat_interleave(copies, 0)
            self.embeds = None if self.embeds is None else self.embeds.repeat_interleave(copies, 0)
            self.mask, self.told = self.mask.repeat_interleave(copies, 0), self.told.repeat_interleave(copies, 0)

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


class _OfTurn(StoppingCriteria):
    """Carries the turn to where the stopping criteria are made, which nothing else of a call reaches; stops nothing."""

    def __init__(self, turn: Turn):
        self.turn = turn

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class HopeGenerationMixin(GenerationMixin):
    """Transformers' own `generate()`, told what is new to the memory it is given."""

    @torch.no_grad()
    def generate(
        self: HopeForCausalLM,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As `GenerationMixin.generate`, with a memory that lasts.

        With a used `past_key_values`, `input_ids` that begin with all that a row has read are *history*, of which the
        rest is new; otherwise they are *new tokens*. The last sampled token of the call before, which nothing has read
        yet, is read first, once; without any ids, it is the prompt. An `attention_mask` is as wide as the ids, or
        covers the history too: then the ids are new tokens.

        Args:
            learn (`str`, *optional*): what is learned from: `"prompt"` (what the model is told), `"all"` (its own words
                too) or `"off"`. Unset: the generation config's `learn`, and without one `"prompt"` where the model
                learns at all.

        Returns:
            As `GenerationMixin.generate`. The memory holds the returned sequences up to their last tokens, one row for
            each, after beam search too. When anything is raised it is as it was.
        """
        settings = Settings(kwargs, generation_config, self.generation_config)
        learn = kwargs.pop("learn", None) or settings.get("learn") or ("prompt" if self._learns(None) else "off")
        check_learn(learn)
        if settings.get("cache_implementation") not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation={settings.get('cache_implementation')!r}`: a Hope model remembers more than keys and "
                "values, and needs a HopeCache. Leave it out."
            )
        given, embeds = kwargs.pop("past_key_values", None), kwargs.get("inputs_embeds")
        if given is not None:
            check_memory(given, self.config)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is not None and embeds is not None:
            raise ValueError("Give one of `input_ids` and `inputs_embeds`: a Hope model reads everything it is given.")
        own_words = input_ids is None and embeds is None  # the prompt is the token that waits, or a start token
        if embeds is None:
            input_ids = _prompt(input_ids, given, settings.get("bos_token_id"), self.device)
        use_cache = embeds is not None or settings.get("use_cache") is not False
        if given is not None and not use_cache:
            raise ValueError("`use_cache=False` leaves `past_key_values` unread: leave out one of them.")

        prompt = input_ids if input_ids is not None else embeds
        assert prompt is not None
        batch, width = prompt.shape[:2]
        memory = HopeCache(self.config, batch) if given is None else check_memory(given, self.config, batch)
        mask = kwargs.pop("attention_mask", None)
        if mask is None and input_ids is not None and not own_words:
            mask = _mask_of_pads(input_ids, settings.get("pad_token_id"), settings.get("eos_token_id"))
        turn = new_turn(memory, input_ids, embeds, mask, learn, own_words)

        work = memory.clone()
        beams = settings.get("num_beams") or 1
        copies = max(beams, settings.get("num_return_sequences") or 1)
        chunk = settings.get("prefill_chunk_size")
        if use_cache and (copies > 1 or chunk):
            # One row reads the prompt for all its copies, which then share what it learned.
            last = turn.mask.shape[1] - 1
            for start in range(0, last, chunk or max(last, 1)):
                part = turn.inputs(start, min(start + (chunk or last), last))
                self(**part, past_key_values=work, logits_to_keep=1, idle_rows=True)
            turn.skip(last)
            kwargs["prefill_chunk_size"] = None
        before, last_of_prompt = work.clone(), replace(turn)
        if copies > 1:
            work.batch_repeat_interleave(copies)
        turn.expand(copies)
        wants_output = settings.get("return_dict_in_generate")
        if beams > 1:
            kwargs["return_dict_in_generate"] = True  # its beam indices tell how long each sequence is
        if use_cache:
            kwargs["past_key_values"] = work
        output = super().generate(
            input_ids,
            generation_config,
            logits_processor=logits_processor,
            stopping_criteria=StoppingCriteriaList([*(stopping_criteria or []), _OfTurn(turn)]),
            attention_mask=torch.ones(batch, width, dtype=torch.int64, device=prompt.device),
            turn=turn,
            **kwargs,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if use_cache and beams > 1:
            lengths = (output.beam_indices >= 0).sum(1).tolist()
            start = width if input_ids is not None else 0
            words = [row[start : start + length] for row, length in zip(sequences, lengths, strict=True)]
            memory.assign(self._read_words(before, last_of_prompt, words))
        elif use_cache:
            assert turn.last is not None, "This version of Transformers makes its stopping criteria elsewhere."
            for row, column in enumerate(turn.last.tolist()):
                work.rows[row] = replace(work.rows[row], pending=int(sequences[row, column]))
            memory.assign(work)
        if not isinstance(output, torch.Tensor):
            output.past_key_values = memory if use_cache else None
        return output if wants_output or isinstance(output, torch.Tensor) else sequences

    def _read_words(self: HopeForCausalLM, memory: HopeCache, prompt: Turn, words: list[torch.Tensor]) -> HopeCache:
        """
        The memory of what beam search returned: the cache of the search is that of the beams still running.

        Read from where the memory stood before the last token of the prompt.
        """
        self(**prompt.inputs(0, None), past_key_values=memory, logits_to_keep=1)
        memory.batch_repeat_interleave(len(words) // memory.batch_size)
        read, real = _right_aligned([row[:-1] for row in words])
        if read.shape[1]:
            own = "all" if prompt.learn == "all" else "off"
            self(read, attention_mask=real, past_key_values=memory, learn=own, logits_to_keep=1)
        for row, tokens in enumerate(words):
            memory.rows[row] = replace(memory.rows[row], pending=int(tokens[-1]))
        return memory

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList | None, **kwargs: Any
    ) -> StoppingCriteriaList:
        turns = [c.turn for c in stopping_criteria or [] if isinstance(c, _OfTurn)]
        given = StoppingCriteriaList(c for c in stopping_criteria or [] if not isinstance(c, _OfTurn))
        made = super()._get_stopping_criteria(generation_config=generation_config, stopping_criteria=given, **kwargs)
        # Beam search asks about candidates, and never runs a finished beam: nothing to watch there.
        return WatchedCriteria(made, turns[0]) if turns and generation_config.num_beams == 1 else made

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: HopeCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        turn: Turn | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new tokens of a step and what is to be learned from them; `turn` says what is new to the memory."""
        if turn is None:
            return super().prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_sequence_length,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **kwargs,
            )
        if is_first_iteration:
            inputs = turn.inputs(0, None)
        elif past_key_values is not None:
            done = (
                torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
                if turn.done is None
                else turn.done
            )
            inputs = {
                "input_ids": input_ids[:, -1:],
                "attention_mask": ~done[:, None],
                "learn": "all" if turn.learn == "all" else "off",
            }
        else:
            inputs = _whole(turn, input_ids)
        passed = {name: value for name, value in kwargs.items() if name not in NOT_READ and value is not None}
        return {**passed, **inputs, "past_key_values": past_key_values}


def check_learn(learn: str) -> None:
    """Raise `ValueError` for a policy that there is not."""
    if learn not in LEARN:
        raise ValueError(f"`learn` must be one of {', '.join(map(repr, LEARN))}, got {learn!r}.")


class Settings:
    """A setting of this call: its argument, else the generation config's, else the model's."""

    def __init__(self, kwargs: dict[str, Any], *configs: GenerationConfig | None):
        self.kwargs, self.configs = dict(kwargs), [config for config in configs if config is not None]

    def get(self, name: str) -> Any:
        values = [self.kwargs.get(name), *(getattr(config, name, None) for config in self.configs)]
        return next((value for value in values if value is not None), None)


def new_turn(
    memory: HopeCache,
    input_ids: torch.Tensor | None,
    embeds: torch.Tensor | None,
    mask: torch.Tensor | None,
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
    batch, width = inputs.shape[:2]
    pendings = [row.pending for row in memory.rows]
    used = any(memory.seen)
    covers_history = False
    if mask is None:
        mask = torch.ones(batch, width, dtype=torch.bool, device=inputs.device)
    elif mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] != width:
        unread = memory.columns + any(pending is not None for pending in pendings)
        covers_history = used and mask.dim() == 2 and mask.shape[1] in (memory.columns + width, unread + width)
        if not covers_history or mask.shape[0] != batch:
            raise ValueError(
                f"`attention_mask` has shape {tuple(mask.shape)}: it must be {(batch, width)} as the ids"
                + (f", or {(batch, unread + width)} with the {unread} columns of the history." if used else ".")
            )
    real = mask[:, -width:].bool()
    if bool((~real.any(1)).any()):
        raise ValueError("`attention_mask` has a row that is all padding: every row needs at least one token.")
    if input_ids is None:
        if any(pending is not None for pending in pendings):
            raise ValueError(
                "`inputs_embeds` cannot follow a memory whose last sampled token is not read yet: give `input_ids`, or read "
                "that token first, with forward()."
            )
        return Turn(None, inputs, real, real, learn, width)

    rows = [ids[keep] for ids, keep in zip(input_ids, real, strict=True)]
    history = [_begins_with(ids, row.ids) for ids, row in zip(rows, memory.rows, strict=True)]
    is_history = used and all(history) and not covers_history
    if used and not is_history and any(history) and not covers_history:
        disagreeing = history.index(False)
        raise ValueError(
            f"`input_ids` row {history.index(True)} repeats what its memory has read and row {disagreeing} does not: "
            "give all rows their history, or all rows new tokens only."
        )
    if used and not is_history and not covers_history and not own_words:
        for index, (ids, record) in enumerate(zip(rows, memory.rows, strict=True)):
            _refuse_half_history(ids, record.ids, index)
    told = []
    for index, record in enumerate(memory.rows):
        if is_history:
            rows[index] = rows[index][record.seen :]
            if not len(rows[index]):
                raise ValueError(
                    f"`input_ids` row {index} repeats the {record.seen} tokens that its memory has read and adds none: give "
                    "at least one new token."
                )
            own = record.pending is not None
            if own and int(rows[index][0]) != record.pending:
                raise ValueError(
                    f"`input_ids` row {index} goes on with {int(rows[index][0])} after what its memory has read, where "
                    f"{record.pending} was sampled: give the history as it was generated, or the new tokens only."
                )
        else:
            own = record.pending is not None
            if own and not own_words:
                rows[index] = F.pad(rows[index], (1, 0), value=record.pending)
        told.append(torch.arange(len(rows[index]), device=inputs.device) >= int(own))
    ids, present = _right_aligned(rows)
    return Turn(ids, None, present, _right_aligned(told)[0], learn, width)


def _whole(turn: Turn, input_ids: torch.Tensor) -> dict[str, Any]:
    """Without a memory every step reads everything again: the prompt, then what was sampled."""
    assert turn.ids is not None
    sampled = input_ids[:, turn.width :]
    own = torch.full_like(sampled, turn.learn == "all", dtype=torch.bool)
    return {
        "input_ids": torch.cat([turn.ids, sampled], 1),
        "attention_mask": torch.cat([turn.mask, torch.ones_like(own)], 1),
        "learn": turn.learn,
        "learn_mask": torch.cat([turn.told, own], 1),
    }


def _mask_of_pads(input_ids: torch.Tensor, pad: Any, eos: Any) -> torch.Tensor | None:
    """As Transformers infers a mask: from the pads, unless a pad may be an end of sequence."""
    ends = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in ends or not bool((input_ids == pad).any()):
        return None
    return input_ids != pad


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


def _begins_with(ids: torch.Tensor, read: torch.Tensor) -> bool:
    return len(ids) >= len(read) and bool((ids[: len(read)] == read.to(ids.device)).all())


def _prompt(
    input_ids: torch.Tensor | None, memory: HopeCache | None, bos: int | None, device: torch.device
) -> torch.Tensor:
    """The ids to start from: those given, the tokens that wait to be read, or the start of a sequence."""
    if input_ids is not None:
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}: give at least one row of at least one token."
            )
        return input_ids
    pendings = [row.pending for row in memory.rows] if memory is not None else []
    if memory is not None and any(memory.seen):
        if any(pending is None for pending in pendings):
            raise ValueError("Give `input_ids`: no sampled token of `past_key_values` waits to be read.")
        return torch.tensor(pendings, device=device)[:, None]
    if bos is None:
        raise ValueError("Give `input_ids`: there is no `bos_token_id` to start from.")
    return torch.full((max(len(pendings), 1), 1), bos, device=device)


def _right_aligned(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as `[rows, longest]`, padded on the left, and which entries are real."""
    width = max(len(row) for row in rows)
    whole = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    real = torch.stack([F.pad(torch.ones_like(row, dtype=torch.bool), (width - len(row), 0)) for row in rows])
    return whole, real
