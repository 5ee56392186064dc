"""How far a converted model is from its source: logits on a probe, and greedy continuations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from modeling_hope import HopeForCausalLM

from .probe import Probe, make_probe
from .quiet import quiet


LARGEST_DIFFERENCE = 1e-4  # of the logits' range
PROBE_TOKENS = 128
SHORTEST_PROBE = 16


@dataclass(frozen=True)
class Comparison:
    """
    A model next to its source, learning off, on a batch of two rows of which one is padded on the left.

    Attributes:
        probe: `"text"` or `"random ids"`.
        probe_tokens: tokens at which logits were compared, padding left out.
        max_difference: largest absolute difference of two logits.
        range: largest less smallest logit of the source.
        relative: `max_difference / range`; where the source's logits are all the same, `max_difference`.
        kl: mean KL(source || given), nats per token.
        greedy_tokens: how many each row was continued by.
        greedy_agreement: how many of them, from the first, are the same; of the row that parts first.
    """

    probe: str
    probe_tokens: int
    max_difference: float
    range: float
    relative: float
    kl: float
    greedy_tokens: int
    greedy_agreement: int

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, for a terminal."""
        largest, relative, kl = (f"{x:.1e}" if x else "0" for x in (self.max_difference, self.relative, self.kl))
        rows = [
            ("logits", f"max difference {largest}, {relative} of their range {self.range:.3g}"),
            ("", f"mean KL {kl} nats a token, over {self.probe_tokens} tokens of {self.probe}"),
        ]
        if self.greedy_tokens:
            rows.append(("greedy", f"{self.greedy_agreement} of {self.greedy_tokens} tokens the same"))
        return rows

    def check(self, name: str) -> None:
        """
        Refuse a difference that no rounding of float32 explains.

        Args:
            name: what to call the model in the error.

        Raises:
            ValueError: the logits differ by more than `LARGEST_DIFFERENCE` of their range.
        """
        if self.relative > LARGEST_DIFFERENCE:
            raise ValueError(
                f"The {name} model's logits differ from those of the model it was made of by {self.relative:.1e} of their "
                f"range, and may by {LARGEST_DIFFERENCE:.0e}: it is not right. Please report it, with the config.json of "
                f"what it was made of."
            )


class Answer(NamedTuple):
    """Of one model: `logits` at the probe's tokens, `[tokens, vocab_size]`, and `greedy`, `[2, greedy_tokens]` int64."""

    logits: torch.Tensor
    greedy: torch.Tensor


def compare(
    source_model: Callable[[], PreTrainedModel],
    given_model: Callable[[], PreTrainedModel],
    tokenizer: Any = None,
    *,
    limit: int | None = None,
    tokens: int = 64,
) -> Comparison:
    """
    Compare a model with what it was made of: a Hope model, or one that was exported. Learning is off.

    The models are made one after the other; the source is let go before the given model is made.

    Args:
        source_model: makes the source, in `eval()` mode, float32 where the figures are to show no rounding.
        given_model: makes the other, in the same way.
        tokenizer: of both. With one, the probe is English, code, German and Japanese; without, or where it knows too
            little of these, random ids.
        limit: most tokens a row may have, continuation included: positions a small model has, or the window it was given.
        tokens: how many to continue each row by, where the limit allows.

    Raises:
        ValueError: `limit` is below 1 or `tokens` below 0, the tokenizer has ids that the source has no embeddings for,
            or logits are not finite.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    if tokens < 0:
        raise ValueError(f"`tokens` must be 0 or more, got {tokens}.")
    width = PROBE_TOKENS
    if limit is not None:
        tokens = min(tokens, max(limit - SHORTEST_PROBE, limit // 2))
        width = min(width, limit - tokens)
    with quiet():  # what is said of flags and lengths is no news here
        probe, expected = _ask_source(source_model, tokenizer, width, tokens)
        gc.collect()  # a model may hold itself by a cycle, and the next one needs the room
        given = _ask(given_model(), probe, tokens)
    difference, kl = _differences(expected.logits, given.logits)
    spread = float(expected.logits.max() - expected.logits.min())
    same = (expected.greedy == given.greedy).int().cumprod(1).sum(1)
    return Comparison(
        probe=probe.kind,
        probe_tokens=len(expected.logits),
        max_difference=difference,
        range=spread,
        relative=difference / spread if spread else difference,
        kl=kl,
        greedy_tokens=tokens,
        greedy_agreement=int(same.min()),
    )


def _ask_source(
    source_model: Callable[[], PreTrainedModel], tokenizer: Any, width: int, tokens: int
) -> tuple[Probe, Answer]:
    model = source_model()
    probe = make_probe(model, tokenizer, width)
    return probe, _ask(model, probe, tokens)


@torch.no_grad()
def _ask(model: PreTrainedModel, probe: Probe, tokens: int) -> Answer:
    inputs: dict[str, Any] = {"input_ids": probe.ids.to(model.device), "attention_mask": probe.mask.to(model.device)}
    if isinstance(model, HopeForCausalLM):
        inputs["learn"] = "off"
    # Hope counts a row's own tokens. Unlike `generate()`, the stock `forward()` counts padding where it is not told.
    positions = (probe.mask.cumsum(1) - 1).clamp(min=0).to(model.device)
    logits = model(**inputs, position_ids=positions, use_cache=False).logits[probe.mask.bool().to(model.device)].cpu()
    if not logits.isfinite().all():
        raise ValueError(
            f"The {type(model).__name__} gives logits that are not finite: weights are damaged, or overflow."
        )
    if not tokens:
        return Answer(logits, probe.ids[:, :0])
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    with _generation_config(model, settings):
        sequences = model.generate(**inputs, generation_config=settings)
    return Answer(logits, sequences[:, probe.ids.shape[1] :].cpu())


@contextmanager
def _generation_config(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """`generate()` takes from the model's own what a call leaves unset: ends of sequence, penalties, forced tokens."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _differences(expected: torch.Tensor, given: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and mean KL(expected || given) in nats; some rows at a time, in float64."""
    difference, kl = 0.0, 0.0
    for ours, theirs in zip(expected.split(16), given.split(16), strict=True):
        p, q = ours.double(), theirs.double()
        difference = max(difference, float((p - q).abs().max()))
        kl += float(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True))
    return difference, max(kl / len(expected), 0.0)  # rounding may put it below
