"""How the next token of each row is chosen: as `generate()` would for the row alone, by the same processors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.utils import GenerationMixin

from modeling_hope.session_turn import LIMITS, NEW_TOKENS


# What these do to a row turns on its scores alone: rows with the same settings go through them together.
OF_SCORES_ALONE = {
    EpsilonLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
}
# Settings that need more than one row and one pass, with the values that do not.
ONE_ROW = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1),
    "use_cache": (None, True),
}
ONE_PASS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "token_healing", "is_assistant")


class Choice:
    """
    One row's way from logits to tokens, and to an end.

    Attributes:
        processors: Transformers' own, made by `generate()` from the settings.
        alike: rows for which it is the same go through their processors together; `None` for rows that go alone.
        limit: tokens to say at most.
        ends: tokens that end the answer.
        stops: strings that do.

    Raises:
        ValueError: a setting is impossible, or is about more than one row.
    """

    def __init__(self, model: Any, settings: GenerationConfig, prompt: Sequence[int], seed: int | None):
        for name, plain in ONE_ROW.items():
            if (value := getattr(settings, name, None)) not in plain:
                raise ValueError(f"`{name}={value!r}`: rows of a batch are decoded one token at a time. Leave it out.")
        for name in ONE_PASS:
            if getattr(settings, name, None):
                raise ValueError(f"`{name}`: rows of a batch are decoded one token at a time. Leave it out.")
        known = [settings, model.generation_config]
        self.stops = _strings(next((found for each in known if (found := each.stop_strings)), None))
        settings = copy(settings)
        settings.stop_strings = None  # what is said is looked at as text
        settings.use_cache = False  # what is prepared needs no memory
        if not any(getattr(config, name) for config in known for name in LIMITS):
            settings.max_new_tokens = NEW_TOKENS
        self.seen = list(prompt)
        self.processors, made = _prepared(model, settings, torch.tensor([self.seen], device=model.device))
        self.limit = made.max_length - len(self.seen)
        self.ends = frozenset([] if made.eos_token_id is None else _listed(made.eos_token_id))
        self.sample = bool(made.do_sample)
        self.deadline = None if made.max_time is None else time.monotonic() + made.max_time
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(model.device).manual_seed(seed)
        self.alike = None
        if {type(each) for each in self.processors} <= OF_SCORES_ALONE:
            self.alike = (self.sample, *((type(each), *sorted(vars(each).items())) for each in self.processors))

    def past(self) -> bool:
        """Whether its time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline


def choose(rows: Sequence[Choice], logits: torch.Tensor) -> list[int | Exception]:
    """
    The next token of each row, from `[rows, vocab_size]`; for a row without one, what went wrong.

    Like `generate()`, in float32.
    """
    logits = logits.to(torch.float32)
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(index if row.alike is None else row.alike, []).append(index)
    chosen: list[int | Exception] = [-1] * len(rows)
    for indices in groups.values():
        together = logits if len(indices) == len(rows) else logits[indices]
        for index, token in zip(indices, _of_group([rows[index] for index in indices], together), strict=True):
            chosen[index] = token
    return chosen


def _of_group(rows: list[Choice], logits: torch.Tensor) -> list[int | Exception]:
    """Of rows whose processors do the same; they look at what a row has seen only where it is alone."""
    first = rows[0]
    try:
        seen = None
        if first.alike is None:
            seen = torch.tensor([first.seen], device=logits.device)
        scores = first.processors(seen, logits)
        if not first.sample:
            return scores.argmax(-1).tolist()
        shares = scores.softmax(-1)
    except Exception as error:
        return [error] * len(rows)
    fit = shares.isfinite().all(-1).tolist()
    drawn = [
        torch.multinomial(share, 1, generator=row.generator)
        for row, share, fits in zip(rows, shares.split(1), fit, strict=True)
        if fits
    ]
    tokens = iter(torch.cat(drawn).flatten().tolist() if drawn else [])
    return [next(tokens) if fits else ValueError("The probabilities of the next token are not finite.") for fits in fit]


def _prepared(
    model: Any, settings: GenerationConfig, ids: torch.Tensor
) -> tuple[LogitsProcessorList, GenerationConfig]:
    """The processors and settings with which `generate()` would go into its loop."""

    def loop(
        model: Any, input_ids: torch.Tensor, logits_processor: Any, generation_config: Any, **others: Any
    ) -> tuple[LogitsProcessorList, GenerationConfig]:
        return logits_processor, generation_config

    # Its own defaults may hold stop strings too.
    more = {} if model.generation_config.stop_strings is None else {"stop_strings": None}
    return GenerationMixin.generate(
        model, ids, settings, custom_generate=loop, attention_mask=torch.ones_like(ids), **more
    )


def _strings(found: str | Sequence[str] | None) -> list[str]:
    return [found] if isinstance(found, str) else list(found or [])


def _listed(found: Any) -> list[int]:
    return list(found) if isinstance(found, (list, tuple)) else [int(found)]
