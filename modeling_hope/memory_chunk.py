"""
What a group of memories does with one chunk of tokens (Eq. 84-90): read, take its inner gradient, and write.

Shapes: G rows times heads, X memories in the group, D the head's width, m hidden units, C tokens, which are columns.
The maps of all memories of a group lie together:

    depth 2    W2 `[G, 1, X m, D]` (one key for all: their rows lie end to end), W1 `[G, X, D, m]`
    depth 1    W  `[G, 1, X D, D]`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .delta_rule import Decay, erasure, read_within, state_after, writes


Maps = tuple[torch.Tensor, ...]

SMALLEST = 1e-6  # of a norm to divide by, and the eps of the memories' rms


@dataclass(frozen=True)
class Rule:
    """How memories are written; fields of the config, by their names without `memory_`."""

    objective: str
    delta_decay: bool
    self_values: bool


@dataclass(frozen=True)
class FastWeights:
    """
    A group's weights in every row.

    Attributes:
        now: the maps as the last written chunk left them.
        start: the maps that gradients are taken at and chunks read with: what `now` was when the group's own chunk
            began. The same tensors as `now` unless the group's chunks are the longer ones.
        momentum: S of each map; `None` without momentum.
        written: U of each map, the sum of what the group's open chunk has written; `None` when it has just begun.
    """

    now: Maps
    start: Maps
    momentum: Maps | None = None
    written: Maps | None = None


class Constants(NamedTuple):
    """
    What does not change from chunk to chunk.

    Attributes:
        rest: W_rest of each map, where decay leads; `None` for zero.
        gamma: `[G, X, D, 1]`, the slow scale of each memory's output; `None` at depth 1.
        mu: momentum kept from chunk to chunk, for each map a column `[G, n, out, 1]`; `None` without.
    """

    rest: Maps | None
    gamma: torch.Tensor | None
    mu: Maps | None


def unit(a: torch.Tensor, dim: int = -2) -> torch.Tensor:
    return a / torch.linalg.vector_norm(a, dim=dim, keepdim=True).clamp(min=SMALLEST)


def read(maps: Maps, gamma: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """M(a) of every memory (Eq. 89): `inputs` `[G, D, C]` to `[G, X, D, C]`."""
    first = maps[0] @ inputs[:, None]
    if gamma is None:
        return first.unflatten(2, (-1, inputs.shape[-2])).squeeze(1)
    hidden = F.silu(first.view(first.shape[0], gamma.shape[1], -1, first.shape[-1]))
    return inputs[:, None] + gamma * _rms(maps[1] @ hidden)


def _rms(y: torch.Tensor) -> torch.Tensor:
    return y * torch.rsqrt(y.square().mean(-2, keepdim=True) + SMALLEST)


class Inner(NamedTuple):
    """
    A chunk seen by the maps of a group, first map first.

    Attributes:
        keys: `[G, n, in, C]`, units.
        gradients: g |input|, `[G, n, out, C]`, at the weights the chunk started with.
        recalled: those weights times the keys, the same shape.
    """

    keys: Maps
    gradients: Maps
    recalled: Maps


def inner_gradients(maps: Maps, gamma: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> Inner:
    """
    The gradient of L = 1/2 |M(k) - M(v)|^2 (`l2`), or -<M(k), M(v)> (`dot`), at every map's output, M(v) constant.

    Args:
        k: `[G, D, C]`, units.
        v: `[G, D, C]`.
    """
    size, d = k.shape[-1], k.shape[-2]
    keys = k[:, None]
    both = torch.cat([k, v], -1)[:, None] if rule.self_values else keys
    first = maps[0] @ both
    recalled = first[..., :size]
    if gamma is None:
        target = first[..., size:].unflatten(2, (-1, d)) if rule.self_values else v[:, None, None]
        error = (
            recalled.unflatten(2, (-1, d)) - target
            if rule.objective == "l2"
            else -target.expand(-1, -1, recalled.shape[2] // d, -1, -1)
        )
        return Inner((keys,), (error.flatten(2, 3),), (recalled,))
    first = first.view(first.shape[0], gamma.shape[1], -1, first.shape[-1])
    hidden = F.silu(first)
    out = maps[1] @ hidden
    inverse = torch.rsqrt(out.square().mean(-2, keepdim=True) + SMALLEST)
    normed = out * inverse
    target = v[:, None] + gamma * normed[..., size:] if rule.self_values else v[:, None]
    normed, inverse, hidden = normed[..., :size], inverse[..., :size], hidden[..., :size]
    error = k[:, None] + gamma * normed - target if rule.objective == "l2" else -target
    slope = gamma * error
    at_out = (slope - normed * (normed * slope).mean(-2, keepdim=True)) * inverse
    before = first[..., :size]
    gate = torch.sigmoid(before)
    at_hidden = (maps[1].mT @ at_out) * (gate * (1 + before * (1 - gate)))
    length = torch.linalg.vector_norm(hidden, dim=-2, keepdim=True).clamp(min=SMALLEST)
    return Inner(
        (keys, hidden / length),
        (at_hidden.flatten(1, 2)[:, None], at_out * length),
        (recalled, out[..., :size] / length),
    )


class Written(NamedTuple):
    """
    What a chunk writes into one map.

    Attributes:
        keys: `[G, n, in, C]`.
        into_weights: u_t of the weights, `[G, n, out, C]`.
        into_sum: u_t of the sum of writes U that momentum needs; `None` without momentum.
    """

    keys: torch.Tensor
    into_weights: torch.Tensor
    into_sum: torch.Tensor | None


def write(
    weights: FastWeights,
    constants: Constants,
    k: torch.Tensor,
    v: torch.Tensor,
    rates: torch.Tensor,
    decay: Decay,
    rule: Rule,
    momentum: bool,
) -> list[Written]:
    """
    What a chunk of keys and values `[G, D, C]` writes into each map of a group; nothing is applied yet.

    Args:
        rates: b, `[G, 1, 1, C]`; 0 at padded tokens.
        momentum: whether the sum of writes is wanted too.
    """
    inner = inner_gradients(weights.start, constants.gamma, k, v, rule)
    found = []
    for i, (keys, gradients, recalled) in enumerate(zip(*inner, strict=True)):
        if not rule.delta_decay:
            u = writes(gradients, rates, decay, None, None, None)
            found.append(Written(keys, u, u if momentum else None))
            continue
        if weights.now is not weights.start:
            recalled = weights.now[i] @ keys
        rest = constants.rest[i] @ keys if constants.rest is not None else None
        erase = erasure(keys, rates, decay)
        into_sum = None
        if momentum:
            so_far = weights.written[i] @ keys if weights.written is not None else None
            into_sum = writes(gradients, rates, decay, erase, so_far, None)
        found.append(Written(keys, writes(gradients, rates, decay, erase, recalled, rest), into_sum))
    return found


def read_tokens(
    weights: FastWeights, constants: Constants, written: list[Written], q: torch.Tensor, decay: Decay
) -> torch.Tensor:
    """M_{t-1}(q_t) of one memory for every token of a chunk: `q` `[G, D, C]` to `[G, D, C]`."""
    x = q[:, None]
    for i, (maps, done) in enumerate(zip(weights.now, written, strict=True)):
        if i:
            x = F.silu(x)
        rest = constants.rest[i] @ x if constants.rest is not None else None
        x = read_within(maps @ x, rest, x, done.keys, done.into_weights, decay)
    if constants.gamma is not None:
        x = q[:, None] + constants.gamma * _rms(x)
    return x[:, 0]


def after_chunk(
    weights: FastWeights, constants: Constants, written: list[Written], decay: Decay, ends: bool | torch.Tensor
) -> FastWeights:
    """
    The weights after a chunk's writes.

    `ends`: whether the group's own chunk ends with it, for all rows, or `[G, 1, 1, 1]` by row. Then S <- mu S + U, and
    the next chunk starts from W + mu S.
    """
    rest = constants.rest
    now = tuple(
        state_after(maps, done.keys, done.into_weights, decay, rest[i] if rest is not None else None)
        for i, (maps, done) in enumerate(zip(weights.now, written, strict=True))
    )
    if weights.momentum is None or constants.mu is None:
        return FastWeights(now, _where(ends, now, weights.start))
    so_far = weights.written or (None,) * len(now)
    total = tuple(
        state_after(old, done.keys, done.into_sum, decay, None)  # type: ignore[arg-type]
        for old, done in zip(so_far, written, strict=True)
    )
    if ends is False:
        return FastWeights(now, weights.start, weights.momentum, total)
    moved = tuple(mu * old + sums for mu, old, sums in zip(constants.mu, weights.momentum, total, strict=True))
    ahead = tuple(torch.addcmul(maps, mu, new) for maps, mu, new in zip(now, constants.mu, moved, strict=True))
    if ends is True:
        return FastWeights(ahead, ahead, moved)
    now = _where(ends, ahead, now)
    left = tuple(sums.masked_fill(ends, 0.0) for sums in total)
    return FastWeights(now, _where(ends, now, weights.start), _where(ends, moved, weights.momentum), left)


def choose(rows: torch.Tensor, new: FastWeights, old: FastWeights) -> FastWeights:
    """`new` in the rows that `rows`, `[G, 1, 1, 1]` bool, names, and `old` in the others."""
    now = _where(rows, new.now, old.now)
    same = new.start is new.now and old.start is old.now
    start = now if same else _where(rows, new.start, old.start)
    if new.momentum is None or old.momentum is None:
        return FastWeights(now, start)
    momentum, written = _where(rows, new.momentum, old.momentum), None
    if new.written is not None or old.written is not None:
        nothing = tuple(torch.zeros_like(maps) for maps in now)
        written = _where(rows, new.written or nothing, old.written or nothing)
    return FastWeights(now, start, momentum, written)


def _where(chosen: bool | torch.Tensor, maps: Maps, others: Maps) -> Maps:
    if isinstance(chosen, bool):
        return maps if chosen else others
    return tuple(torch.where(chosen, a, b) for a, b in zip(maps, others, strict=True))
