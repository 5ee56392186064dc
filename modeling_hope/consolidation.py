"""Consolidation: what memories have learned, written into the slow weights of a copy of their model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .cache_hope import HopeCache, check_memory
from .fast_weights import Tensors
from .memory_checks import hope_decoder, same_weights, weight_sample
from .slow_weights import is_linear


if TYPE_CHECKING:
    from .modeling_hope import HopeForCausalLM

logger = logging.get_logger(__name__)
# Of a change's norm, lost by rounding to the dtype of the weights: above this a warning says so.
LOSS_WORTH_A_WARNING = 0.01


@torch.inference_mode(False)
@torch.no_grad()
def consolidate(
    model: HopeForCausalLM,
    memories: HopeCache | Sequence[HopeCache],
    *,
    strength: float | Mapping[int, float] = 1.0,
    memory_weights: Sequence[float] | None = None,
) -> HopeForCausalLM:
    """
    Write what memories have learned into the slow weights of a copy of their model: `W + strength * mean(change)`.

    The copy is a model like any other: it saves, loads and learns on, from nothing learned. At strength 1, with one
    memory and learning off, it gives the logits that the memory gave, once `memory.reset(levels=...)` has taken out what
    is now in the weights and would count twice. Gradients that wait for an update are not applied.

    Args:
        model: the model that the memories belong to; it stays as it is.
        memories: one memory or several; every row of each counts as one.
        strength: how much of the change to write; by level (an index into `config.cms_periods`) where it is a mapping,
            and then nothing of the levels that it leaves out.
        memory_weights: of the rows in their mean, in order; they are divided by their sum. Unset: equal weights.

    Returns:
        The copy, on the model's device and in its dtype.

    Raises:
        ValueError: memories of another model, impossible levels, strengths or weights, or slow weights that a change
            cannot be added to (quantized, adapted or offloaded).
    """
    given = [memories] if isinstance(memories, HopeCache) else memories
    if not isinstance(given, Sequence) or not all(isinstance(memory, HopeCache) for memory in given):
        raise ValueError(
            f"`memories` is a {type(memories).__name__}: give a HopeCache or a list of them, `session.memory` of a session."
        )
    rows = _rows(model, list(given))
    shares = _shares(memory_weights, len(rows))
    strengths = _strengths(strength, len(model.config.cms_periods))
    _check_slow_weights(model, strengths)

    consolidated = copy.deepcopy(model)
    wanted = lost = 0.0
    for index, layer in enumerate(consolidated.model.layers):
        for level, force in strengths.items():
            if level not in layer.cms.held:
                continue
            changes = [memory.layers[index].levels[level][row].change for memory, row in rows]
            for name, change in _mean(changes, shares).items():
                weight = getattr(layer.cms.level(level), name).weight
                step = force * change.to(weight.device)
                written = weight.to(step.dtype) + step
                wanted += float(step.square().sum())
                lost += float((written.to(weight.dtype).to(step.dtype) - written).square().sum())
                weight.copy_(written)
    if not wanted:
        logger.warning(
            "The memories have learned nothing that could be written: no period of these levels has ended yet."
        )
    if lost > LOSS_WORTH_A_WARNING**2 * wanted:
        logger.warning(
            f"Rounding to {model.dtype} lost {(lost / wanted) ** 0.5:.1%} of the change (by norm): load the model in float32 "
            "to consolidate into it."
        )
    return consolidated


def _rows(model: HopeForCausalLM, memories: list[HopeCache]) -> list[tuple[HopeCache, int]]:
    """Every row of the memories, which have to be of this model."""
    own = None
    for memory in memories:
        check_memory(memory, model.config)
        owner = memory.model()
        if owner is None or owner is model:
            continue
        own = weight_sample(model) if own is None else own
        if not same_weights(weight_sample(owner), own, str(owner.dtype), model.dtype):
            raise ValueError(
                "`memories` were learned with other weights than `model` has: consolidate them into the model that learned them."
            )
    return [(memory, row) for memory in memories for row in range(memory.batch_size)]


def _shares(weights: Sequence[float] | None, rows: int) -> list[float]:
    if not rows:
        raise ValueError("`memories` is empty: give at least one memory.")
    if weights is None:
        return [1 / rows] * rows
    if len(weights) != rows:
        raise ValueError(
            f"`memory_weights` has {len(weights)} entries for {rows} rows of `memories`: give one for each."
        )
    total = sum(weights)
    if not all(weight >= 0 for weight in weights) or not 0 < total < float("inf"):
        raise ValueError(f"`memory_weights` must be 0 or more and not all 0, got {list(weights)}.")
    return [weight / total for weight in weights]


def _strengths(strength: float | Mapping[int, float], count: int) -> dict[int, float]:
    """By level, how much of its change is written."""
    each = dict(strength) if isinstance(strength, Mapping) else dict.fromkeys(range(count), strength)
    if not each or not each.keys() <= set(range(count)):
        raise ValueError(f"`strength` must name levels between 0 and {count - 1}, got {list(each)}.")
    if not all(isinstance(force, int | float) and abs(force) < float("inf") for force in each.values()):
        raise ValueError(f"`strength` must be a finite number, or one for each level, got {strength}.")
    return each


def _check_slow_weights(model: HopeForCausalLM, levels: dict[int, float]) -> None:
    for index, layer in enumerate(hope_decoder(model).layers):
        for level in set(levels) & set(layer.cms.held):
            for name in model.config.learned_maps:
                module = getattr(layer.cms.level(level), name)
                place = f"model.layers.{index}.cms level {level} {name}"
                if not is_linear(module):
                    raise ValueError(
                        f"{place} is a {type(module).__name__}, to which no change can be added: consolidate into the plain "
                        "model, without quantization, its adapters merged (`merge_and_unload()`)."
                    )
                if module.weight.is_meta:
                    raise ValueError(
                        f"{place} is offloaded: load the model without `device_map` to consolidate into it."
                    )


def _mean(changes: list[Tensors], shares: list[float]) -> Tensors:
    """Weighted mean of what rows have learned in one level, by map; a row that has learned nothing counts as zero."""
    total: Tensors = {}
    for change, share in zip(changes, shares, strict=True):
        for name, tensor in change.items():
            part = share * tensor
            total[name] = total[name] + part.to(total[name].device) if name in total else part
    return total


__all__ = ["consolidate"]
