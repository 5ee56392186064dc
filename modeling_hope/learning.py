"""How the levels learn from a stream (Eq. 71): where segments end, their gradient, and the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .cache_hope import HopeCache
from .configuration_hope import HopeConfig
from .fast_weights import LevelMemory, LevelWeights, Tensors, learning_weights, reading_weights
from .row_stack import RowStacks, stack_of
from .sharding import is_sharded
from .slow_weights import check_gradients
from .stream_record import LOSSES_KEPT, StreamRecord


if TYPE_CHECKING:
    from .modeling_hope import HopeModel

# The weights of one run: for each layer, by level.
RunWeights = list[dict[int, LevelWeights]]


@dataclass(frozen=True)
class Stretch:
    """
    What a row reads next.

    Attributes:
        length: tokens up to the next place where something happens, or to the end of the call.
        learn: the stretch completes a segment that is learned from.
    """

    length: int
    learn: bool = False


@dataclass(frozen=True)
class Pace:
    """Of a config, when its levels act: tokens in a segment, levels that learn, and the periods of all."""

    segment: int | None
    levels: list[int]
    periods: list[int | None]

    @classmethod
    def of(cls, config: HopeConfig) -> Pace:
        return cls(config.segment_length, config.learning_levels, list(config.cms_periods))


def next_stretch(record: StreamRecord, coming: torch.Tensor, pace: Pace) -> Stretch:
    """
    How far a row may read before its levels have to act.

    `coming`: which of the tokens to come are to be learned from, `[tokens]` bool on the CPU. Where nothing is learned
    and nothing waits, a row reads to the end in one go: the ends of such segments do not concern it.
    """
    total, segment, levels = len(coming), pace.segment, pace.levels
    if segment is None or not levels or record.seen % segment + total < segment:
        return Stretch(total)
    waiting = any(record.pairs[level] for level in levels)
    if not (waiting or bool(record.learn.any()) or bool(coming.any())):
        return Stretch(total)
    open_tokens = record.seen % segment
    learn = torch.cat([record.learn, coming])
    for end in range(segment, open_tokens + total + 1, segment):
        # The first token of a segment is an input only: its prediction lies across the cut.
        if bool(learn[end - segment + 1 : end].any()):
            before = end - segment - open_tokens
            return Stretch(before) if before > 0 else Stretch(end - open_tokens, learn=True)
        position = record.seen - open_tokens + end
        if any(record.pairs[level] and position % pace.periods[level] == 0 for level in levels):  # type: ignore[operator]
            return Stretch(end - open_tokens)
    return Stretch(total)


def to_last_segment(seen: int, length: int, segment: int) -> int:
    """
    Tokens to the start of the segment in which a stretch ends, or all where it starts in that segment.

    That segment may be read again, and mixers that cannot go back need their states from there.
    """
    start = (seen + length) // segment * segment
    return start - seen if seen < start else length


def run_weights(
    model: HopeModel,
    cache: HopeCache,
    rows: Sequence[int],
    learn: bool,
    constant: bool,
    connected: bool = False,
    stacks: RowStacks | None = None,
) -> RunWeights:
    """
    The weights with which the levels run for these rows of the memory.

    `learn`: to take the gradient of the run. `constant`: no outer gradient has to reach the slow weights. `connected`: an
    outer gradient flows through the update. `stacks`: the memory's, for a run of one token a row.
    """
    maps = model.config.learned_maps
    record = model.config.cms_optimizer == "dgd"
    # Weights gathered anew, with other numbers, may lie where the last ones lay, and no version would tell.
    merge = constant and not is_sharded(model)
    learning = model.config.learning_levels if learn else []
    if learn:
        check_gradients(model)
    places = None if list(rows) == list(range(len(cache.rows))) else list(rows)
    run: RunWeights = []
    for index, (decoder_layer, cache_layer) in enumerate(zip(model.layers, cache.layers, strict=True)):
        used: dict[int, LevelWeights] = {}
        for level, memories in cache_layer.levels.items():
            mlp = decoder_layer.cms.level(level)
            if stacks is not None and merge and (stack := stack_of(stacks, (index, level), memories, rows)) is not None:
                stack.refresh(mlp, memories, maps, model.dtype)
                used[level] = LevelWeights([], together=partial(stack.linear, rows=places))
                continue
            chosen = [memories[row] for row in rows]
            if level in learning:
                used[level] = learning_weights(mlp, chosen, maps, merge=merge, record=record, connected=connected)
            elif (weights := reading_weights(mlp, chosen, maps, merge=merge)) is not None:
                used[level] = weights
        run.append(used)
    return run


def connected_levels(config: HopeConfig, seen: int, end: int) -> list[int]:
    """
    Levels through whose next update an outer gradient flows, in second-order training.

    It is one of the last `cms_max_backprop_updates` of its level in the call, and something is read after it.

    Args:
        seen: tokens that the row will have read at the end of the segment that is learned from.
        end: tokens that it will have read at the end of the call.
    """
    most = config.cms_max_backprop_updates
    levels = []
    for level in config.learning_levels:
        period = _period(config, level)
        update = math.ceil(seen / period)
        to_come = (end - 1) // period - update + 1
        if to_come > 0 and (most is None or to_come <= most):
            levels.append(level)
    return levels


def segment_loss(logits: torch.Tensor, ids: torch.Tensor, learn: torch.Tensor) -> torch.Tensor:
    """
    Next-token loss inside a segment, summed over its pairs, `[rows]` (nats), in float32 or better.

    Inputs and targets both lie inside the segment, so that its update needs nothing from beyond a cut.

    Args:
        logits: `[rows, segment, vocab_size]`.
        ids: `[rows, segment]` int64.
        learn: `[rows, segment]` bool, which tokens may be targets.
    """
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    targets = F.pad(ids[:, 1:].masked_fill(~learn[:, 1:], -100), (0, 1), value=-100)
    return F.cross_entropy(wide, targets.flatten(), reduction="none").view(ids.shape).sum(1)


def gradients(
    loss: torch.Tensor,
    run: RunWeights,
    learn: torch.Tensor,
    config: HopeConfig,
    keep_graph: bool,
    connected: Sequence[Sequence[int]] = (),
) -> list[dict[int, list[Tensors]]]:
    """
    Gradient of each row's segment loss with respect to its own changes: by layer, level, row and map.

    `connected`: for each row, the levels whose gradients keep their graph.

    `dgd` adds the gradient of 1/2 |W x|^2, x the input of a pair held constant (Eq. 57 summed over the segment).
    """
    traced = [
        tensor for layer in run for weights in layer.values() for row in weights.traced for tensor in row.values()
    ]
    with torch.autocast(loss.device.type, enabled=False):
        found = iter(torch.autograd.grad(loss.sum(), traced, retain_graph=keep_graph, create_graph=any(connected)))
    # A pair's input is the token before its target.
    inputs = F.pad(learn[:, 1:], (0, 1))
    result: list[dict[int, list[Tensors]]] = []
    for layer in run:
        by_level: dict[int, list[Tensors]] = {}
        for level, weights in layer.items():
            rows = []
            for index, row in enumerate(weights.traced):
                taken = {}
                for name, tensor in row.items():
                    gradient = next(found).to(torch.promote_types(tensor.dtype, torch.float32))
                    if config.cms_optimizer == "dgd":
                        x, y = weights.inputs[name][index], weights.outputs[name][index]
                        gradient = gradient + ((y * inputs[index, :, None]).mT @ x).to(gradient.dtype)
                    taken[name] = gradient if connected and level in connected[index] else gradient.detach()
                rows.append(taken)
            if rows:
                by_level[level] = rows
        result.append(by_level)
    return result


def gather(
    cache: HopeCache,
    row: int,
    loss: float,
    pairs: int,
    segment_gradients: list[dict[int, Tensors]],
    config: HopeConfig,
) -> None:
    """Add a segment's gradient to what waits for the levels' updates, unless it is unsurprising or not finite."""
    record = cache.rows[row]
    mean = loss / pairs
    record = replace(record, losses=(*record.losses, mean)[-LOSSES_KEPT:])
    if mean < config.cms_surprise_threshold:
        cache.rows[row] = replace(record, skipped=record.skipped + 1)
        return
    tensors = [tensor for layer in segment_gradients for maps in layer.values() for tensor in maps.values()]
    # A sum tells whether any entry is not finite.
    if not math.isfinite(mean) or not math.isfinite(_total([tensor.sum() for tensor in tensors])):
        cache.rows[row] = replace(record, nonfinite=record.nonfinite + 1)
        return
    for layer, by_level in zip(cache.layers, segment_gradients, strict=True):
        for level, maps in by_level.items():
            memory = layer.levels[level][row]
            gathered = {n: memory.gradient[n] + g if n in memory.gradient else g for n, g in maps.items()}
            layer.levels[level][row] = replace(memory, gradient=gathered)
    learning = config.learning_levels
    counts = tuple(count + pairs * (level in learning) for level, count in enumerate(record.pairs))
    cache.rows[row] = replace(record, pairs=counts, segments=record.segments + 1)


def act(model: HopeModel, cache: HopeCache, row: int) -> None:
    """
    Let every level whose period has ended, and that has learned something, apply it.

    Slower levels act first; in the `nested` variant (Eq. 72) a slower level then moves the initial change of all
    faster ones toward where they got to, and they restart from it.
    """
    config = model.config
    for level in reversed(config.learning_levels):
        record = cache.rows[row]
        if record.pairs[level] and record.seen % _period(config, level) == 0:
            _update(model, cache, row, level)
            if config.cms_variant == "nested":
                for faster in range(level):
                    _restart(cache, row, faster, config.cms_nested_rate)


def _update(model: HopeModel, cache: HopeCache, row: int, level: int) -> None:
    """`Delta <- (1 - decay) Delta - lr clip(gradient / pairs)`; the clip bounds the norm over all layers' gradients."""
    config, record = model.config, cache.rows[row]
    counts = [count * (index != level) for index, count in enumerate(record.pairs)]
    places = [
        index
        for index, layer in enumerate(cache.layers)
        if layer.levels.get(level) and layer.levels[level][row].gradient
    ]
    scale: float | torch.Tensor = 1 / record.pairs[level]
    gathered = [g for index in places for g in cache.layers[index].levels[level][row].gradient.values()]
    squares = [gradient.norm().double().square() for gradient in gathered]
    length = _total(squares) ** 0.5
    norm = scale * length
    if not math.isfinite(norm):
        # Each segment's gradient was finite, their sum is not.
        for index in places:
            memories = cache.layers[index].levels[level]
            memories[row] = replace(memories[row], gradient={})
        cache.rows[row] = replace(record, pairs=tuple(counts), nonfinite=record.nonfinite + 1)
        return
    if config.cms_max_update_norm is not None and norm > config.cms_max_update_norm:
        connected = any(gradient.requires_grad for gradient in gathered)
        scale = config.cms_max_update_norm / (_sum(squares) ** 0.5 if connected else length)
    for index in places:
        memories = cache.layers[index].levels[level]
        cms = model.layers[index].cms
        connected = any(gradient.requires_grad for gradient in memories[row].gradient.values())
        rate = cms.learned_rate(level) if connected else cms.learning_rate(level)
        memories[row] = _updated(memories[row], scale, rate, config.level_decays[level], config)
    updates = [count + (index == level) for index, count in enumerate(record.updates)]
    cache.rows[row] = replace(record, pairs=tuple(counts), updates=tuple(updates))


def _updated(
    memory: LevelMemory, scale: float | torch.Tensor, rate: float | torch.Tensor, decay: float, config: HopeConfig
) -> LevelMemory:
    """Scale and rate are tensors where an outer gradient flows through them."""
    step, momentum = {name: (gradient, scale) for name, gradient in memory.gradient.items()}, memory.momentum
    if config.cms_optimizer == "momentum":
        momentum = {
            name: g * _like(scale, g) + config.cms_momentum * momentum[name]
            if name in momentum
            else g * _like(scale, g)
            for name, g in memory.gradient.items()
        }
        step = {name: (tensor, 1.0) for name, tensor in momentum.items()}
    change = {}
    for name, (tensor, factor) in step.items():
        old, amount = memory.change.get(name), -rate * factor
        kept = old if old is None or not decay else (1 - decay) * old
        if kept is None:
            change[name] = _like(amount, tensor) * tensor
        elif isinstance(amount, torch.Tensor):
            change[name] = kept + _like(amount, tensor) * tensor
        else:
            change[name] = torch.add(kept, tensor, alpha=amount)
    return memory.with_change(change, gradient={}, momentum=momentum)


def _like(number: float | torch.Tensor, tensor: torch.Tensor) -> float | torch.Tensor:
    return number.to(tensor) if isinstance(number, torch.Tensor) else number


def _restart(cache: HopeCache, row: int, level: int, rate: float) -> None:
    for layer in cache.layers:
        memories = layer.levels.get(level)
        if memories is None or not memories[row].change:
            continue
        memory = memories[row]
        initial = {
            name: memory.initial[name].lerp(change, rate) if name in memory.initial else rate * change
            for name, change in memory.change.items()
        }
        memories[row] = memory.with_change(initial, initial=initial)


def _total(sums: list[torch.Tensor]) -> float:
    """Of numbers that may lie on several devices, fetched at once."""
    return float(_sum(sums).detach())


def _sum(numbers: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([number.double().to(numbers[0].device) for number in numbers]).sum()


def _period(config: HopeConfig, level: int) -> int:
    period = config.cms_periods[level]
    assert period is not None
    return period
