"""Momentum that overwrites what it holds along a gradient instead of adding to it (Eq. 49)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from .base import GroupOptimizer, State, at_least, below_one, each
from .matrices import as_matrix, map_matrices


class DeltaMomentum(GroupOptimizer):
    """
    Delta Momentum (Eq. 49, the delta rule where Eq. 33 has Hebb's; P_i = I).

    ```
    m_{i+1} = m_i (alpha I - delta g_i^T g_i) + g_i          W_{i+1} = W_i - lr m_{i+1}
    ```

    g `[out, in]` is the gradient, m the same shape. A tensor of more dimensions is `[out, the rest]`; a vector is one
    row, for which the rule reads `m (alpha I - delta g g^T)` with a column g, as the paper writes it. The learning rate
    stands outside of the memory, as in `torch.optim.SGD`: the same for a constant one, and a scheduler acts at once.
    With delta=0 it is SGD with momentum.

    As written, the memory is stable while delta |g|^2 < 1 + alpha and grows without bound beyond. `max_key_norm`
    **[ours]** scales the g of the delta term, not what is added, to a norm of at most this: with delta=1, a norm of 1
    is always stable, and gradients below it follow the equation to the letter. `None` never scales.

    Args:
        params: parameters, or groups of them.
        lr, weight_decay, maximize, foreach: as in `GroupOptimizer`.
        momentum: alpha, in [0, 1).
        delta: strength of the delta term, 0 or more; 1 in the paper.
        max_key_norm: Frobenius norm.

    State of a parameter: `momentum_buffer`, m, shaped and typed like it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.9,
        delta: float = 1.0,
        max_key_norm: float | None = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "delta": delta,
            "max_key_norm": max_key_norm,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        below_one(options, "momentum")
        at_least(options, 0.0, "delta")
        if options["max_key_norm"] is not None:
            at_least(options, 0.0, "max_key_norm")

    def directions(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[State],
        at_once: bool,
    ) -> list[torch.Tensor]:
        for param, state in zip(params, states, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        buffers = [state["momentum_buffer"] for state in states]
        erased: list[torch.Tensor] = []
        if group["delta"]:

            def along_key(m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
                return erasure(m, g, group["max_key_norm"])

            found = map_matrices(along_key, [*map(as_matrix, buffers)], [*map(as_matrix, gradients)], at_once=at_once)
            erased = [e.view_as(param) for e, param in zip(found, params, strict=True)]
        each(buffers, at_once).mul_(group["momentum"])
        if erased:
            each(buffers, at_once).add_(erased, alpha=-group["delta"])
        each(buffers, at_once).add_(gradients)
        return buffers


def erasure(m: torch.Tensor, g: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """m g^T g of `[..., out, in]`, g scaled to a Frobenius norm of at most `max_norm`, through the smaller product."""
    if max_norm is not None:
        norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
        g = g * (max_norm / norm.clamp(min=torch.finfo(g.dtype).tiny)).clamp(max=1.0)
    return (m @ g.mT) @ g if g.shape[-2] <= g.shape[-1] else m @ (g.mT @ g)
