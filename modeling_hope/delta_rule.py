"""
The gated delta rule over one chunk, in parallel form: the operation that writes every fast weight (Eq. 88).

For a state W `[out, in]`, keys k_t, rates b_t and decays alpha_t, a chunk of C tokens does

    W_t = alpha_t (W_{t-1} - u_t k_t^T) + (1 - alpha_t) R,     u_t = e_t (W_{t-1} - R) k_t + b_t g_t

(eta_t = alpha_t b_t of Eq. 88; e_t = b_t / |k_t|^2 makes the delta term erase along the unit key). What decays and is
erased is the change from R, where the paper has R = 0. With Lambda_t = alpha_1 ... alpha_t, the u_t of a chunk solve one
unit-triangular system,

    u_t + e_t sum_{s<t} (Lambda_{t-1} / Lambda_{s-1}) <k_s, k_t> u_s = f_t
    f_t = b_t g_t + e_t Lambda_{t-1} (W_0 - R) k_t

With tokens as columns this is U (I + A) = F, A strictly upper triangular, and the state at the chunk's end is

    W_C = Lambda_C W_0 + (1 - Lambda_C) R - F [(I + A)^-1 K_C^T],     K_C the keys decayed to the chunk's end.

Decays are differences of logs, masked before `exp`: nothing is divided by a decay.

Shapes: G rows times heads, n states that differ in their keys, C tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


Backward = Callable[..., Any]


class Decay(NamedTuple):
    """
    What decay does within a chunk; all of it at most 1.

    Attributes:
        between: `[G, 1, C, C]`, Lambda_{t-1} / Lambda_{s-1} at [s, t] for s < t, 0 elsewhere.
        before: `[G, 1, 1, C]`, Lambda_{t-1}: from the chunk's start to before token t.
        after: `[G, 1, 1, C]`, Lambda_C / Lambda_{s-1}: from the write at token s to the chunk's end.
        whole: `[G, 1, 1, 1]`, Lambda_C.
    """

    between: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    whole: torch.Tensor


class Chunk(NamedTuple):
    """
    A chunk to write, and what is wanted of it.

    Attributes:
        state: W_0, `[G, n, out, in]`.
        rest: R, the same shape; `None` for zero.
        keys: `[G, n, in, C]`.
        gradients: g, `[G, n, out, C]`.
        recalled: W_0 k, the same shape.
        rates: b, `[G, 1, 1, C]`.
        erasing: e, `[G, n, 1, C]`; `None` without a delta term.
        decay: of these tokens.
        ends: whether the state at the chunk's end is wanted.
        momentum: whether the sum of what the gradients write is wanted as well.
        sums: that sum over earlier parts of a longer chunk, as `state`; `None` for zero.
        tokens: how many rows of the first state read within the chunk and want their u_t; 0 for none.
    """

    state: torch.Tensor
    rest: torch.Tensor | None
    keys: torch.Tensor
    gradients: torch.Tensor
    recalled: torch.Tensor
    rates: torch.Tensor
    erasing: torch.Tensor | None
    decay: Decay
    ends: bool = True
    momentum: bool = False
    sums: torch.Tensor | None = None
    tokens: int = 0


class Write(NamedTuple):
    """
    What a chunk does to a state.

    Attributes:
        state: W_C, `[G, n, out, in]`; `None` where it was not asked for.
        sums: the same for what the gradients alone have written, `-sum_t eta_t g_t k_t^T` carried to the chunk's end.
        tokens: u_t of the first `out / memories` rows of the first state, `[G, 1, rows, C]`; for reads within the chunk.
    """

    state: torch.Tensor | None
    sums: torch.Tensor | None
    tokens: torch.Tensor | None


def decay_of(log_alpha: torch.Tensor) -> Decay:
    """`log_alpha`: `[G, C]`, at most 0."""
    total = log_alpha.cumsum(-1)
    before = total - log_alpha
    size = log_alpha.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=log_alpha.device).triu(1)
    between = (before[:, None, :] - before[:, :, None]).masked_fill(~earlier, -torch.inf).exp()
    after = (total[:, -1:] - before).exp()
    return Decay(
        between[:, None], before.exp()[:, None, None], after[:, None, None], total[:, -1].exp()[:, None, None, None]
    )


def inverse(coupled: torch.Tensor) -> torch.Tensor:
    """(I + A)^-1 of strictly upper triangular A, `[..., C, C]`."""
    return _Inverse.apply(coupled)


def in_full(backward: Backward) -> Backward:
    """A backward pass in the forward's precision, where autocast is on around it too."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        device = next(gradient.device.type for gradient in gradients if gradient is not None)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *gradients)

    return wrapped


class _Inverse(torch.autograd.Function):
    """Autograd's own backward solves again; the inverse is at hand."""

    @staticmethod
    def forward(ctx: Any, coupled: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(coupled.shape[-1], dtype=coupled.dtype, device=coupled.device).expand_as(coupled)
        # From the right it takes half the time.
        inverted = torch.linalg.solve_triangular(coupled, identity, upper=True, unitriangular=True, left=False)
        ctx.save_for_backward(inverted)
        return inverted

    @staticmethod
    @in_full
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (inverted,) = ctx.saved_tensors
        return -(inverted.mT @ gradient @ inverted.mT).triu(1)


def delta_chunk(chunk: Chunk) -> Write:
    """Write one chunk."""
    state, rest, keys, gradients, recalled, rates, erasing, decay, ends, momentum, sums, tokens = chunk
    driven = gradients * rates
    inputs = driven
    inverted = None
    if erasing is not None:
        changed = recalled if rest is None else recalled - rest @ keys
        inputs = driven + decay.before * changed * erasing
        inverted = inverse((keys.mT @ keys) * decay.between * erasing)
    own = None
    if tokens:
        own = inputs[:, :1, :tokens]
        own = own if inverted is None else own @ inverted[:, :1]
    if not ends:
        return Write(None, None, own)
    late = (keys * decay.after).mT
    carried = late if inverted is None else inverted @ late
    base = decay.whole * state if rest is None else rest + decay.whole * (state - rest)
    after = base - inputs @ carried
    if not momentum:
        return Write(after, None, own)
    if sums is None:
        return Write(after, -driven @ carried, own)
    if erasing is not None:
        driven = driven + sums @ keys * (decay.before * erasing)
    return Write(after, decay.whole * sums - driven @ carried, own)


def recall_within(
    state: torch.Tensor,
    rest: torch.Tensor | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    tokens: torch.Tensor,
    decay: Decay,
) -> torch.Tensor:
    """
    W_{t-1} q_t for every token of a chunk, `[G, 1, out, C]`.

    Args:
        state, rest: W_0 and R, `[G, 1, out, in]`.
        queries, keys: `[G, 1, in, C]`.
        tokens: u_t, `[G, 1, out, C]`.
    """
    recalled = decay.before * (state @ queries) - tokens @ ((keys.mT @ queries) * decay.between)
    return recalled if rest is None else recalled + (1 - decay.before) * (rest @ queries)
