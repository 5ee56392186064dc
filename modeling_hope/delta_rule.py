"""
The gated delta rule over one chunk, in parallel form: the operation that writes every fast weight (Eq. 88).

For a state W `[out, in]`, unit keys k_t, rates b_t and decays alpha_t, a chunk of C tokens does

    W_t = alpha_t (W_{t-1} - u_t k_t^T) + (1 - alpha_t) R,     u_t = b_t (W_{t-1} k_t + g_t)

(eta_t = alpha_t b_t of Eq. 88). With Lambda_t = alpha_1 ... alpha_t all u_t of a chunk solve one unit-triangular system:

    u_t + b_t sum_{s<t} (Lambda_{t-1} / Lambda_{s-1}) <k_s, k_t> u_s
        = b_t (g_t + Lambda_{t-1} W_0 k_t + (1 - Lambda_{t-1}) R k_t)

Tokens are columns, `[..., features, C]`, so that everything reads as the equations do. Decays are differences of logs,
masked before `exp`: nothing is divided by a decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Decay(NamedTuple):
    """
    What decay does within a chunk; all of it at most 1. `heads` stands for rows times heads.

    Attributes:
        between: `[heads, 1, C, C]`, Lambda_{t-1} / Lambda_{s-1} at [s, t] for s < t, 0 elsewhere.
        before: `[heads, 1, 1, C]`, Lambda_{t-1}: from the chunk's start to before token t.
        after: `[heads, 1, 1, C]`, Lambda_C / Lambda_{s-1}: from the write at token s to the chunk's end.
        whole: `[heads, 1, 1, 1]`, Lambda_C.
    """

    between: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    whole: torch.Tensor


def decay_of(log_alpha: torch.Tensor) -> Decay:
    """`log_alpha`: `[heads, C]`, at most 0; 0 at padded tokens."""
    total = log_alpha.cumsum(-1)
    before = total - log_alpha
    size = log_alpha.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=log_alpha.device).triu(1)
    between = (before[:, None, :] - before[:, :, None]).masked_fill(~earlier, -torch.inf).exp()
    after = (total[:, -1:] - before).exp()
    return Decay(
        between[:, None], before.exp()[:, None, None], after[:, None, None], total[:, -1].exp()[:, None, None, None]
    )


def erasure(keys: torch.Tensor, rates: torch.Tensor, decay: Decay) -> torch.Tensor:
    """
    The inverse of the unit-triangular system, `[heads, n, C, C]`, upper triangular.

    Args:
        keys: `[heads, n, in, C]`, units.
        rates: b, `[heads, 1, 1, C]`; 0 at padded tokens.
    """
    system = (keys.mT @ keys) * (decay.between * rates)
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system, identity, upper=True, unitriangular=True)


def writes(
    gradients: torch.Tensor,
    rates: torch.Tensor,
    decay: Decay,
    erase: torch.Tensor | None,
    recalled: torch.Tensor | None,
    rest_recalled: torch.Tensor | None,
) -> torch.Tensor:
    """
    All u_t of a chunk, `[heads, n, out, C]`.

    Args:
        gradients: g, `[heads, n, out, C]`.
        erase: what `erasure` returned; `None` without a delta term, and then nothing else is needed.
        recalled: W_0 k, `[heads, n, out, C]`; `None` where W_0 is zero.
        rest_recalled: R k, the same shape; `None` where R is zero.
    """
    if erase is None:
        return gradients * rates
    total = gradients
    if recalled is not None:
        total = total + decay.before * recalled
    if rest_recalled is not None:
        total = total + (1 - decay.before) * rest_recalled
    return (total * rates) @ erase


def state_after(
    state: torch.Tensor | None, keys: torch.Tensor, written: torch.Tensor, decay: Decay, rest: torch.Tensor | None
) -> torch.Tensor:
    """The state at the chunk's end, `[heads, n, out, in]`, from that at its start (`None`: zero)."""
    after = -(written * decay.after) @ keys.mT
    if state is not None:
        after = after + decay.whole * state
    if rest is not None:
        after = after + (1 - decay.whole) * rest
    return after


def read_within(
    recalled: torch.Tensor,
    rest_recalled: torch.Tensor | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    written: torch.Tensor,
    decay: Decay,
) -> torch.Tensor:
    """
    W_{t-1} q_t for every token of a chunk, `[heads, n, out, C]`.

    Args:
        recalled, rest_recalled: W_0 q and R q, `[heads, n, out, C]`.
        queries: `[heads, n, in, C]`.
        written: what `writes` returned.
    """
    read = decay.before * recalled - written @ ((keys.mT @ queries) * decay.between)
    return read if rest_recalled is None else read + (1 - decay.before) * rest_recalled
