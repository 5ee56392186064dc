"""
Reading documents with a memory: how well each token was known before it was read, frozen with a window, learning with
the same window, and frozen at the native context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import initialization as init

from modeling_hope import HopeCache, HopeConfig, HopeForCausalLM


TOKENS_PER_CALL = 512
READINGS = ("frozen", "learning", "native")


@dataclass
class Reading:
    """
    One reading of one document.

    Attributes:
        losses: nats per token, of each token but the first.
        seconds: it took.
        memory: summary of the memory afterwards.
    """

    losses: list[float]
    seconds: float
    memory: dict[str, Any]

    def perplexity(self, start: float = 0.0, stop: float = 1.0) -> float:
        """Of the part of the document between two fractions of it."""
        count = len(self.losses)
        part = torch.tensor(self.losses[round(start * count) : round(stop * count)], dtype=torch.float64)
        return float(part.mean().exp())


@torch.no_grad()
def feed(
    model: Callable[..., Any],
    memory: HopeCache,
    ids: torch.Tensor,
    learn: str | None,
    learn_mask: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """
    Read tokens into a memory, some at a time.

    Args:
        model: a `HopeForCausalLM`, or what is called as one.
        memory: of one row, changed.
        ids: `[tokens]` int64, on the model's device.
        learn: what is learned from, as the model's `learn`.
        learn_mask: `[tokens]`, 0 for tokens not to be learned from.

    Returns:
        Logits after the last token, `[vocab_size]`; `None` where there was nothing to read.
    """
    last = None
    for _, logits in _pieces(model, memory, ids, learn, learn_mask, logits_to_keep=1):
        last = logits[-1]
    return last


@torch.no_grad()
def read(
    model: HopeForCausalLM,
    ids: torch.Tensor,
    *,
    learn: bool,
    memory: HopeCache | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Reading:
    """
    Read a document once, from its start to its end. Every token's loss is taken before the model has learned from it.

    Args:
        ids: `[tokens]` int64.
        learn: whether to learn from it.
        memory: to read with; a new one when `None`.
        progress: called with tokens read and the mean loss of the last part after each call.
    """
    memory = HopeCache(model.config) if memory is None else memory
    losses: list[torch.Tensor] = []
    last: torch.Tensor | None = None
    count, started = 0, time.perf_counter()
    for part, logits in _pieces(model, memory, ids.to(model.device), "all" if learn else "off"):
        logits = logits.float()
        before = logits[:-1] if last is None else torch.cat([last[None], logits[:-1]])
        losses.append(F.cross_entropy(before, part[len(part) - len(before) :], reduction="none"))
        last, count = logits[-1], count + len(part)
        if progress:
            progress(count, float(losses[-1].mean()))
    seconds = time.perf_counter() - started
    return Reading(torch.cat(losses).tolist(), seconds, memory.summary()["rows"][0])


def _pieces(
    model: Callable[..., Any],
    memory: HopeCache,
    ids: torch.Tensor,
    learn: str | None,
    learn_mask: torch.Tensor | None = None,
    **options: Any,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens of each call, `[tokens]`, and the logits that were kept of it, `[kept, vocab_size]`."""
    for start in range(0, len(ids), TOKENS_PER_CALL):
        piece = slice(start, start + TOKENS_PER_CALL)
        marked = None if learn_mask is None else learn_mask[None, piece]
        output = model(ids[None, piece], past_key_values=memory, learn=learn, learn_mask=marked, **options)
        yield ids[piece], output.logits[0]


def read_as(kind: str, model: HopeForCausalLM, ids: torch.Tensor) -> Reading:
    """One of `READINGS`: frozen with the model's window, learning with it, or frozen at its native context."""
    return read(at_native_context(model) if kind == "native" else model, ids, learn=kind == "learning")


def at_native_context(model: HopeForCausalLM) -> HopeForCausalLM:
    """The same weights with a window of all that the model was trained to have in view."""
    return with_window(model, model.config.max_position_embeddings)


def with_window(model: HopeForCausalLM, window: int) -> HopeForCausalLM:
    """
    The same weights with another window, in the layers that have everything in view, or a window that keeps sinks: those
    without slid in the source.

    Args:
        window: tokens in view, besides sinks.
    """
    config = model.config
    kinds, windows = list(config.layer_types or []), config.layer_windows
    for layer, sinks in enumerate(config.layer_sinks):
        if kinds[layer] == "full_attention" or sinks:
            kinds[layer], windows[layer] = "sliding_attention", window
    if windows == config.layer_windows:
        return model
    fields = {"layer_types": kinds, "sliding_window": window if len(set(windows)) == 1 else windows}
    with init.no_init_weights():
        other = HopeForCausalLM(HopeConfig.from_dict({**config.to_dict(), **fields}))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()
