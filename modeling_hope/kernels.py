"""
Which implementation writes a chunk: one function decides. Everything works without a kernel.

On a CUDA device with `flash-linear-attention` installed, the states at a chunk's end come from its `chunk_comba`, which
is this rule exactly: for the change S = (W - R)^T,

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,    p = k, beta = alpha e, v = -g b / e

It takes float32, multiplies in TF32 where the device does, and serves keys of at most 256 features. `HOPE_KERNELS=off` in
the environment turns it off, as a gradient of a gradient needs, and training on a device that FLA's backward pass refuses
(Hopper with Triton 3.4 to 3.7.0). Reads within a chunk need u_t itself, which the kernel does not hand out: for those it is
computed beside.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from .delta_rule import Chunk, Decay, Write
from .fused_memory import delta_chunk as torch_delta_chunk


logger = logging.get_logger(__name__)

LARGEST_HEAD = 256
Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def delta_chunk(chunk: Chunk) -> Write:
    """`delta_rule.delta_chunk`, by a kernel where one serves."""
    state, rest, keys, gradients, _, rates, erasing, decay, ends, momentum, sums, tokens = chunk
    kernel = find_kernel(state) if ends else None
    if kernel is None or erasing is None:
        return torch_delta_chunk(chunk)
    own = torch_delta_chunk(_of_reads(chunk)).tokens if tokens else None
    # rates / erasing is |k|^2; where a rate has underflowed beta is 0 and the value does not count.
    driven = gradients * (rates / erasing.masked_fill(erasing == 0, 1))
    if rest is None:
        after = _by_kernel(kernel, state, keys, driven, erasing, decay)
    else:
        after = rest + _by_kernel(kernel, state - rest, keys, driven, erasing, decay)
    summed = None
    if momentum:
        summed = _by_kernel(kernel, torch.zeros_like(state) if sums is None else sums, keys, driven, erasing, decay)
    return Write(after, summed, own)


def _of_reads(chunk: Chunk) -> Chunk:
    """The rows of the first state that are read within the chunk, for their u_t alone."""
    wanted = slice(None), slice(1), slice(chunk.tokens)
    return chunk._replace(
        state=chunk.state[wanted],
        rest=None if chunk.rest is None else chunk.rest[wanted],
        keys=chunk.keys[:, :1],
        gradients=chunk.gradients[wanted],
        recalled=chunk.recalled[wanted],
        erasing=None if chunk.erasing is None else chunk.erasing[:, :1],
        ends=False,
    )


def find_kernel(state: torch.Tensor) -> Kernel | None:
    """`chunk_comba` where it is installed and serves a state `[G, n, out, in]`."""
    if state.device.type != "cuda" or state.shape[3] > LARGEST_HEAD or os.environ.get("HOPE_KERNELS") == "off":
        return None
    return None if state.dtype == torch.float64 else installed_kernel()


@functools.cache
def installed_kernel() -> Kernel | None:
    try:
        return importlib.import_module("fla.ops.comba").chunk_comba
    except ModuleNotFoundError:
        return None
    except Exception as error:
        logger.warning(
            f"flash-linear-attention is installed and does not load, so memories are written in torch: {error}"
        )
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

    For the kernel n are the heads, and G the batch: `[G, C, n, features]`, states `[G, n, in, out]`.
    """
    groups, count, _, size = keys.shape
    # From one token to the next, and to the chunk's end: what no product of decays has underflowed in.
    alpha = torch.cat([decay.between.diagonal(1, -2, -1), decay.after[..., -1]], -1).expand(groups, count, size)
    log_alpha = alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log()
    by_token = _Once.apply(keys.permute(0, 3, 1, 2))
    _, final = kernel(
        q=by_token,
        k=by_token,
        v=-_Once.apply(values).permute(0, 3, 1, 2),
        p=by_token,
        g=_Once.apply(log_alpha).mT,
        beta=_Once.apply(alpha * erasing.expand(groups, count, 1, size).squeeze(2)).mT,
        scale=1.0,
        initial_state=_Once.apply(state).mT,
        output_final_state=True,
    )
    return final.mT


class _Once(torch.autograd.Function):
    """Itself; a gradient of its gradient, which the kernel cannot give, is refused."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient
