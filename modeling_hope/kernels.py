"""
Which implementation writes a chunk: one function decides. Everything works without a kernel.

On a CUDA device with `flash-linear-attention` installed, the states at a chunk's end come from its `chunk_comba`, which
is this rule exactly: for the change S = (W - R)^T,

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,    p = k, beta = alpha e, v = -(g b / e + R k)

It works in bfloat16 or float32 with float32 states, and serves heads of at most 256. `HOPE_KERNELS=off` in the environment
turns it off. Reads within a chunk need u_t itself, which the kernel does not hand out: for those it is computed beside.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import torch

from .delta_rule import Decay, Write
from .fused_memory import delta_chunk as torch_delta_chunk


LARGEST_HEAD = 256
Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def delta_chunk(
    state: torch.Tensor,
    rest: torch.Tensor | None,
    keys: torch.Tensor,
    gradients: torch.Tensor,
    recalled: torch.Tensor,
    rates: torch.Tensor,
    erasing: torch.Tensor | None,
    decay: Decay,
    *,
    ends: bool = True,
    momentum: bool = False,
    sums: torch.Tensor | None = None,
    tokens: int = 0,
) -> Write:
    """`delta_rule.delta_chunk`, by a kernel where one serves."""
    kernel = None
    if ends and erasing is not None:
        kernel = find_kernel(state)
    if kernel is None or erasing is None:
        return torch_delta_chunk(
            state, rest, keys, gradients, recalled, rates, erasing, decay,
            ends=ends, momentum=momentum, sums=sums, tokens=tokens,
        )  # fmt: skip
    own = None
    if tokens:
        own = torch_delta_chunk(
            state[:, :1, :tokens], None if rest is None else rest[:, :1, :tokens], keys[:, :1],
            gradients[:, :1, :tokens], recalled[:, :1, :tokens], rates, erasing[:, :1], decay, ends=False, tokens=tokens,
        ).tokens  # fmt: skip
    # rates / erasing is |k|^2; where a rate has underflowed beta is 0 and the value does not count.
    driven = gradients * (rates / erasing.masked_fill(erasing == 0, 1))
    if rest is None:
        after = _by_kernel(kernel, state, keys, driven, erasing, decay)
    else:
        after = rest + _by_kernel(kernel, state - rest, keys, driven + rest @ keys, erasing, decay)
    summed = None
    if momentum:
        summed = _by_kernel(kernel, torch.zeros_like(state) if sums is None else sums, keys, driven, erasing, decay)
    return Write(after, summed, own)


def find_kernel(state: torch.Tensor) -> Kernel | None:
    """`chunk_comba` where it is installed and serves a state `[G, n, out, in]`."""
    if state.device.type != "cuda" or max(state.shape[2:]) > LARGEST_HEAD or os.environ.get("HOPE_KERNELS") == "off":
        return None
    if state.dtype == torch.float64:
        return None
    try:
        return importlib.import_module("fla.ops.comba").chunk_comba
    except ImportError:
        return None


def _by_kernel(
    kernel: Kernel,
    state: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    erasing: torch.Tensor,
    decay: Decay,
) -> torch.Tensor:
    """
    The state at the chunk's end, `[G, n, out, in]`, of S_t = alpha (S - e (S k + value) k^T).

    Heads and their states are one axis for the kernel: `[1, C, G n, features]`, states `[1, G n, in, out]`.
    """
    groups, count = keys.shape[:2]
    whole = decay.whole.expand(groups, count, 1, 1)
    log_before = decay.before.expand(groups, count, 1, -1).log()
    log_alpha = torch.cat([log_before[..., 1:], whole.log()], -1) - log_before
    by_token = keys.flatten(0, 1).permute(2, 0, 1)[None]
    _, final = kernel(
        q=by_token,
        k=by_token,
        v=-values.flatten(0, 1).permute(2, 0, 1)[None],
        p=by_token,
        g=log_alpha.flatten(0, 2).mT[None],
        beta=(log_alpha.exp() * erasing.expand(groups, count, 1, -1)).flatten(0, 2).mT[None],
        scale=1.0,
        initial_state=state.flatten(0, 1).mT[None],
        output_final_state=True,
    )
    return final[0].mT.unflatten(0, (groups, count))
