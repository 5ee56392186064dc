"""
What a memory computes (Eq. 84-89): its reading, and the inner gradient of its objective, in plain torch.

Shapes: G rows times heads, X memories, D the head's width, m hidden units, C tokens, which are columns. The maps of all
memories lie together:

    depth 2    W2 `[G, 1, X m, D]` (one key for all: their rows lie end to end), W1 `[G, X, D, m]`
    depth 1    W  `[G, 1, X D, D]`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .delta_rule import Decay, recall_within


Maps = tuple[torch.Tensor, ...]

# Rates and decays start far from where a task may need them, farther than an optimizer's steps take a plain logit.
LOGIT_GAIN = 5.0
SMALLEST = 1e-6  # of a norm to divide by, and the eps of the memories' rms


@dataclass(frozen=True)
class Rule:
    """How memories are written; fields of the config, by their names without `memory_`."""

    objective: str
    delta_decay: bool
    self_values: bool


def unit(a: torch.Tensor, dim: int = -2) -> torch.Tensor:
    return a / torch.linalg.vector_norm(a, dim=dim, keepdim=True).clamp(min=SMALLEST)


def read(maps: Maps, gamma: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """M(a) of every memory (Eq. 89): `inputs` `[G, D, C]` to `[G, X, D, C]`."""
    first = maps[0] @ inputs[:, None]
    if gamma is None:
        return first.unflatten(2, (-1, inputs.shape[-2])).squeeze(1)
    hidden = F.silu(first.view(first.shape[0], gamma.shape[1], -1, first.shape[-1]))
    return inputs[:, None] + gamma * rms(maps[1] @ hidden)


def rms(y: torch.Tensor) -> torch.Tensor:
    return y * torch.rsqrt(y.square().mean(-2, keepdim=True) + SMALLEST)


class Inner(NamedTuple):
    """
    A chunk seen by the maps of a group, first map first.

    Attributes:
        keys: `[G, n, in, C]`, the maps' inputs.
        gradients: g, `[G, n, out, C]`, at the weights the chunk started with.
        recalled: those weights times the keys, the same shape.
        squares: |key|^2, `[G, n, 1, C]`; `None` for units.
    """

    keys: Maps
    gradients: Maps
    recalled: Maps
    squares: tuple[torch.Tensor | None, ...]


def inner_gradients(maps: Maps, gamma: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> Inner:
    """
    The gradient of L = 1/2 |M(k) - M(v)|^2 (`l2`), or -<M(k), M(v)> (`dot`), at every map's output, M(v) constant.

    Args:
        k: `[G, D, C]`, units.
        v: `[G, D, C]`.
    """
    target = read(maps, gamma, v) if rule.self_values else v[:, None]
    return toward(maps, gamma, k, target, rule.objective)


def toward(maps: Maps, gamma: torch.Tensor | None, k: torch.Tensor, target: torch.Tensor, objective: str) -> Inner:
    """`inner_gradients` for targets `[G, X, D, C]`, or `[G, 1, D, C]`."""
    keys = k[:, None]
    first = maps[0] @ keys
    if gamma is None:
        recalled = first.unflatten(2, (-1, k.shape[-2]))
        error = recalled - target[:, None] if objective == "l2" else -target[:, None].expand_as(recalled)
        return Inner((keys,), (error.flatten(2, 3),), (first,), (None,))
    before = first.view(first.shape[0], gamma.shape[1], -1, first.shape[-1])
    hidden = F.silu(before)
    out = maps[1] @ hidden
    scale = torch.rsqrt(out.square().mean(-2, keepdim=True) + SMALLEST)
    normed = out * scale
    error = keys + gamma * normed - target if objective == "l2" else -target
    slope = gamma * error
    at_out = (slope - normed * (normed * slope).mean(-2, keepdim=True)) * scale
    gate = torch.sigmoid(before)
    at_hidden = (maps[1].mT @ at_out) * (gate * (1 + before * (1 - gate)))
    return Inner(
        (keys, hidden),
        (at_hidden.flatten(1, 2)[:, None], at_out),
        (first, out),
        (None, hidden.square().sum(-2, keepdim=True)),
    )


def read_within(
    maps: Maps,
    rest: Maps | None,
    gamma: torch.Tensor | None,
    q: torch.Tensor,
    keys: Maps,
    tokens: Maps,
    decay: Decay,
) -> torch.Tensor:
    """
    M_{t-1}(q_t) of one memory for every token of a chunk.

    Args:
        maps, rest, gamma: of this memory (X = 1), as the chunk finds them.
        q: `[G, D, C]`.
        keys, tokens: for each map, the keys `[G, 1, in, C]` and u_t `[G, 1, out, C]` of the chunk's writes.

    Returns:
        `[G, D, C]`.
    """
    x = q[:, None]
    for i, weights in enumerate(maps):
        if i:
            x = F.silu(x)
        x = recall_within(weights, None if rest is None else rest[i], x, keys[i], tokens[i], decay)
    if gamma is not None:
        x = q[:, None] + gamma * rms(x)
    return x[:, 0]


def go_on(
    now: torch.Tensor, sums: torch.Tensor, momentum: torch.Tensor, mu: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next chunk's W + mu S, and S <- mu S + U, for W in `now` and U in `sums`."""
    moved = torch.addcmul(sums, mu, momentum)
    return torch.addcmul(now, mu, moved), moved
