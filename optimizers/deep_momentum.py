"""Momentum whose memory is an MLP (Eq. 50)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from .base import PLAIN, GroupOptimizer, State, at_least, below_one, whole
from .matrices import as_matrix, map_matrices


class DeepMomentum(GroupOptimizer):
    """
    Deep Momentum Gradient Descent (Eq. 50).

    ```
    m_{i+1} = alpha m_i - memory_lr grad L2(m_i; u_i)         W_{i+1} = W_i - lr m_{i+1}(u_i)         u_i = grad L(W_i)
    ```

    The paper leaves memory and objective open ("must be designed carefully"; its example, `<m(u), 1>`, asks for the same
    update whatever the sign of u). **[ours]**: every parameter, a matrix of rows u_r (a vector is one row), has its own
    memory, a residual MLP as in Eq. 89 that maps a row of the gradient to what to descend along,

    ```
    m(u)_r = u_r + |u_r| W1 h_r         h_r = tanh(W2 a_r) / sqrt(hidden_size)         a_r = u_r / |u_r|
    L2(m; u) = -<m(u), u> / |u|^2
    ```

    a dot product with the gradient itself as the value, so that directions met again and again are amplified. W1 starts
    at zero (the first read is of what the first gradient wrote), W2 at random; decay is toward that start, since a
    memory whose two layers decay to zero has no gradient left. |h_r| < 1, so m(u) is at most
    `1 + memory_lr / (1 - momentum)` times u: bounded as momentum is, and it scales with the gradient. With memory_lr=0
    it is SGD.

    Args:
        params: parameters, or groups of them.
        lr, weight_decay, maximize, foreach: as in `GroupOptimizer`.
        momentum: alpha, in [0, 1).
        memory_lr: learning rate of the memory, 0 or more.
        hidden_size: hidden units of the memory. A parameter `[out, in]` takes three times `hidden_size * in` numbers.
        seed: of W2.

    State of a parameter, in its dtype: `output_weight` (W1) `[cols, hidden]`, `input_weight` (W2) and `start` (its
    initial value) `[hidden, cols]`.

    Raises:
        ValueError: a parameter is sharded (DTensor): a memory reads whole rows, the same on every process.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.9,
        memory_lr: float = 1.0,
        hidden_size: int = 64,
        weight_decay: float = 0.0,
        seed: int = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "memory_lr": memory_lr,
            "hidden_size": hidden_size,
            "weight_decay": weight_decay,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        below_one(options, "momentum")
        at_least(options, 0.0, "memory_lr")
        whole(options, 1, "hidden_size")
        whole(options, 0, "seed")

    def before(self, stepping: list[list[torch.Tensor]]) -> None:
        if not all(type(param) in PLAIN for params in stepping for param in params):
            raise ValueError(
                "DeepMomentum needs whole parameters, and some are sharded: use DeltaMomentum or M3 there."
            )

    def directions(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[State],
        at_once: bool,
    ) -> list[torch.Tensor]:
        keys = [as_matrix(gradient) for gradient in gradients]
        for key, state in zip(keys, states, strict=True):
            if not state:
                state.update(fresh_memory(key, group["hidden_size"], group["seed"]))

        def write_and_read(u: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, start: torch.Tensor) -> Any:
            w1, w2 = write(u, w1, w2, start, group["momentum"], group["memory_lr"])
            return read(u, w1, w2), w1, w2

        memories = [[state[name] for state in states] for name in ("output_weight", "input_weight", "start")]
        found = map_matrices(write_and_read, keys, *memories, at_once=at_once)
        for state, (_, w1, w2) in zip(states, found, strict=True):
            state["output_weight"].copy_(w1)
            state["input_weight"].copy_(w2)
        return [direction.view_as(param) for (direction, _, _), param in zip(found, params, strict=True)]


def fresh_memory(key: torch.Tensor, hidden_size: int, seed: int) -> State:
    # A generator of its own: the first step must not change what dropout draws.
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(hidden_size, key.shape[1], generator=generator, dtype=torch.float64).to(key)
    return {"output_weight": key.new_zeros(key.shape[1], hidden_size), "input_weight": start.clone(), "start": start}


def hidden(u: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a and h, `[..., rows, cols]` and `[..., rows, hidden]`, and |u_r| `[..., rows, 1]`."""
    norms = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    a = u / norms.clamp(min=torch.finfo(u.dtype).tiny)
    return a, torch.tanh(a @ w2.mT) / w2.shape[-2] ** 0.5, norms


def read(u: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """m(u), `[..., rows, cols]`."""
    _, h, norms = hidden(u, w2)
    return u + norms * (h @ w1.mT)


def write(
    u: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, start: torch.Tensor, alpha: float, rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """W1 and W2 after a step on L2, whose gradients are written out."""
    a, h, norms = hidden(u, w2)
    # |u_r|^2 / |u|^2, through ratios: squares of small gradients underflow.
    total = torch.linalg.vector_norm(norms, dim=(-2, -1), keepdim=True)
    share = (norms / total.clamp(min=torch.finfo(u.dtype).tiny)).square()
    inner = h.shape[-1] ** 0.5
    slope = (1 - (h * inner).square()) / inner
    towards_output = (share * a).mT @ h
    towards_input = ((a @ w1) * slope * share).mT @ a
    return alpha * w1 + rate * towards_output, start + alpha * (w2 - start) + rate * towards_input
