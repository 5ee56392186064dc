"""
What a group of memories does with one chunk of tokens: write, be read within, and go on to the next (Eq. 86-90).

Shapes are those of `memory_rule.py`: G rows times heads, X memories in the group, D the head's width, C tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .delta_rule import Chunk, Decay, Write
from .fused_memory import go_on, inner_gradients, read_within
from .kernels import delta_chunk
from .memory_rule import SMALLEST, Maps, Rule


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
        memories: X.
        rest: W_rest of each map, where decay leads; `None` for zero.
        gamma: `[G, X, D, 1]`, the slow scale of each memory's output; `None` at depth 1.
        mu: momentum kept from chunk to chunk, for each map a column `[G, n, out, 1]`; `None` without.
    """

    memories: int
    rest: Maps | None
    gamma: torch.Tensor | None
    mu: Maps | None


def split(maps: Maps, count: int) -> tuple[Maps, Maps]:
    """The maps of the first of `count` memories, and of the others."""
    rows = maps[0].shape[2] // count
    first, others = maps[0].split([rows, (count - 1) * rows], 2)
    rest = [weights.split([1, count - 1], 1) for weights in maps[1:]]
    return (first, *(pair[0] for pair in rest)), (others, *(pair[1] for pair in rest))


def memory_at(maps: Maps, gamma: torch.Tensor | None, place: int, count: int) -> tuple[Maps, torch.Tensor | None]:
    """The maps and gamma of one of `count` memories."""
    rows = maps[0].shape[2] // count
    own = (maps[0].narrow(2, place * rows, rows), *(weights.narrow(1, place, 1) for weights in maps[1:]))
    return own, None if gamma is None else gamma.narrow(1, place, 1)


def split_constants(constants: Constants) -> tuple[Constants, Constants]:
    """Of a group's first memory, and of the others: what reading takes."""
    count, gamma = constants.memories, constants.gamma
    rest = (None, None) if constants.rest is None else split(constants.rest, count)
    gammas = (None, None) if gamma is None else gamma.split([1, count - 1], 1)
    return Constants(1, rest[0], gammas[0], None), Constants(count - 1, rest[1], gammas[1], None)


def first_memory(weights: FastWeights, constants: Constants) -> tuple[FastWeights, Constants]:
    """A group cut down to its first memory, and to what reading within a chunk needs."""
    now, _ = split(weights.now, constants.memories)
    start = now if weights.start is weights.now else split(weights.start, constants.memories)[0]
    return FastWeights(now, start), split_constants(constants)[0]


class Written(NamedTuple):
    """
    What a chunk writes into a group: for each map the keys `[G, n, in, C]`, and what `delta_chunk` returned.
    """

    keys: Maps
    writes: tuple[Write, ...]


def write(
    weights: FastWeights,
    constants: Constants,
    k: torch.Tensor,
    v: torch.Tensor,
    rates: torch.Tensor,
    decay: Decay,
    rule: Rule,
    ends: bool,
    by_token: bool,
) -> Written:
    """
    Write a chunk of keys and values `[G, D, C]` into each map of a group.

    Args:
        rates: b, `[G, 1, 1, C]`.
        ends: whether the weights at the chunk's end are wanted.
        by_token: whether the group's first memory is read within the chunk.
    """
    if not ends:
        # Only the memory that is read within the chunk is of interest.
        weights, constants = first_memory(weights, constants)
    inner = inner_gradients(weights.start, constants.gamma, k, v, rule)
    found = []
    for i, (keys, gradients, recalled, square) in enumerate(zip(*inner, strict=True)):
        state = weights.now[i]
        erasing = rates if square is None else rates / square.clamp(min=SMALLEST**2)
        if weights.now is not weights.start and rule.delta_decay:
            recalled = state @ keys
        # The first map holds all memories' rows end to end.
        rows = state.shape[2] if i else state.shape[2] // constants.memories
        chunk = Chunk(
            state,
            constants.rest[i] if constants.rest is not None else None,
            keys,
            gradients,
            recalled,
            rates,
            erasing if rule.delta_decay else None,
            decay,
            ends=ends,
            momentum=weights.momentum is not None,
            sums=weights.written[i] if weights.written is not None else None,
            tokens=rows if by_token else 0,
        )
        found.append(delta_chunk(chunk))
    return Written(inner.keys, tuple(found))


def read_tokens(maps: Maps, constants: Constants, written: Written, q: torch.Tensor, decay: Decay) -> torch.Tensor:
    """
    M_{t-1}(q_t) of a group's first memory for every token of a chunk: `q` `[G, D, C]` to `[G, D, C]`.

    `maps` and `constants` are that memory's own; `written` may be the group's.
    """
    tokens: Maps = tuple(done.tokens for done in written.writes)  # type: ignore[misc]
    keys = tuple(keys[:, :1] for keys in written.keys)
    return read_within(maps, constants.rest, constants.gamma, q, keys, tokens, decay)


def after_chunk(weights: FastWeights, constants: Constants, written: Written, ends: bool | torch.Tensor) -> FastWeights:
    """
    The weights after a chunk's writes.

    `ends`: whether the group's own chunk ends with it, for all rows, or `[G, 1, 1, 1]` by row. Then S <- mu S + U, and
    the next chunk starts from W + mu S.
    """
    now: Maps = tuple(done.state for done in written.writes)  # type: ignore[misc]
    if weights.momentum is None or constants.mu is None:
        return FastWeights(now, _where(ends, now, weights.start))
    total: Maps = tuple(done.sums for done in written.writes)  # type: ignore[misc]
    if ends is False:
        return FastWeights(now, weights.start, weights.momentum, total)
    steps = [go_on(*each) for each in zip(now, total, weights.momentum, constants.mu, strict=True)]
    ahead, moved = (tuple(maps) for maps in zip(*steps, strict=True))
    if ends is True:
        return FastWeights(ahead, ahead, moved)
    now = _where(ends, ahead, now)
    left = tuple(sums.masked_fill(ends, 0.0) for sums in total)
    return FastWeights(now, _where(ends, now, weights.start), _where(ends, moved, weights.momentum), left)


def of_rows(weights: FastWeights, constants: Constants, rows: torch.Tensor) -> tuple[FastWeights, Constants]:
    """A group cut down to some of the rows times heads, `[n]` int64."""

    def cut(maps: Maps | None) -> Maps | None:
        return None if maps is None else tuple(each.index_select(0, rows) for each in maps)

    now = cut(weights.now)
    start = now if weights.start is weights.now else cut(weights.start)
    assert now is not None and start is not None
    gamma = None if constants.gamma is None else constants.gamma.index_select(0, rows)
    return (
        FastWeights(now, start, cut(weights.momentum), cut(weights.written)),
        Constants(constants.memories, cut(constants.rest), gamma, cut(constants.mu)),
    )


def place(rows: torch.Tensor, new: FastWeights, old: FastWeights) -> FastWeights:
    """`old`, but for the rows times heads `rows`, `[n]` int64, of which there is `new`."""

    def put(maps: Maps, others: Maps) -> Maps:
        return tuple(b.index_copy(0, rows, a) for a, b in zip(maps, others, strict=True))

    return _merged(new, old, put)


def choose(rows: torch.Tensor, new: FastWeights, old: FastWeights) -> FastWeights:
    """`new` in the rows that `rows`, `[G, 1, 1, 1]` bool, names, and `old` in the others."""
    return _merged(new, old, lambda maps, others: _where(rows, maps, others))


def _merged(new: FastWeights, old: FastWeights, merge: Callable[[Maps, Maps], Maps]) -> FastWeights:
    now = merge(new.now, old.now)
    same = new.start is new.now and old.start is old.now
    start = now if same else merge(new.start, old.start)
    if new.momentum is None or old.momentum is None:
        return FastWeights(now, start)
    momentum, written = merge(new.momentum, old.momentum), None
    if new.written is not None or old.written is not None:
        written = merge(*(each.written or tuple(map(torch.zeros_like, each.now)) for each in (new, old)))
    return FastWeights(now, start, momentum, written)


def _where(chosen: bool | torch.Tensor, maps: Maps, others: Maps) -> Maps:
    if isinstance(chosen, bool):
        return maps if chosen else others
    return tuple(torch.where(chosen, a, b) for a, b in zip(maps, others, strict=True))
