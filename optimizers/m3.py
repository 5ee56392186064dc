"""Multi-scale Momentum Muon (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from .base import GroupOptimizer, State, at_least, below_one, each, whole
from .matrices import as_matrix, map_matrices
from .newton_schulz import newton_schulz


FORMS = ("ema", "literal")
LR_ADJUSTMENTS = (None, "original", "match_rms_adamw")


class M3(GroupOptimizer):
    """
    Multi-scale Momentum Muon (Algorithm 1, section 7.2): Muon with a second moment and a slow second memory.

    form="literal", as written, at step t with gradient g_t, and f = `slow_period`:

    ```
    M1 <- M1 + beta1 g_t          V <- V + beta2 g_t^2          O1 = NewtonSchulz(M1)
    W  <- W - lr (O1 + alpha O2) / (sqrt(V) + eps)
    after every f steps:  M2 <- M2 + beta3 sum of the last f gradients          O2 = NewtonSchulz(M2)
    ```

    (Its sums start at (k-1)f, which would count one gradient in two chunks: taken for a slip.) M1, M2 and V only ever
    grow: M1 and M2 weigh the first gradient like the last, and the steps shrink as 1/sqrt(t).

    form="ema", the default **[ours]**: averages instead of sums, with Adam's correction of their start,

    ```
    M1 <- beta1 M1 + (1 - beta1) g_t       V <- beta2 V + (1 - beta2) g_t^2       M2 <- beta3 M2 + (1 - beta3) mean of f
    W  <- W - lr (O1 + alpha O2) / (sqrt(V) / s + eps)          s = sqrt(mean V) of the parameter
    ```

    A direction that is orthogonalised does not grow with the gradient, so dividing it by sqrt(V) itself would step
    farther the smaller the gradient: V counts relative to its mean. `eps` then bounds what an entry can gain.

    A tensor of more than two dimensions is a matrix `[out, the rest]`. Vectors, and groups with ns_steps=0 (embeddings),
    have nothing to orthogonalise: O = M / s in the ema form, which is Adam with a slow memory, and O = M in the literal
    one. With alpha=0 and beta2=None the ema form is `torch.optim.Muon` on matrices, number for number where foreach=False
    (a product of stacked matrices may round otherwise in bfloat16).

    Args:
        params: parameters, or groups of them.
        lr, weight_decay, maximize, foreach: as in `GroupOptimizer`.
        betas: beta1, beta2 and beta3, each in [0, 1); beta2 `None` for no second moment.
        alpha: weight of the slow memory, 0 or more; 0 keeps none.
        slow_period: f, steps from one update of the slow memory to the next.
        eps: added to the denominator.
        form: "ema" or "literal".
        nesterov: look ahead, `O1 = NewtonSchulz(beta1 M1 + (1 - beta1) g)`; ema form only.
        ns_steps: Newton-Schulz steps; 0 for none.
        ns_dtype: what they are computed in.
        adjust_lr_fn: how the step of an orthogonalised matrix depends on its shape, as in `torch.optim.Muon`:
            "original" or `None`, times `sqrt(max(1, rows / cols))`; "match_rms_adamw", times
            `0.2 sqrt(max(rows, cols))`.

    State of a parameter, shaped and typed like it: `momentum` (M1), `second_moment` (V), `chunk` (the sum of the
    gradients since the last slow update), `slow_momentum` (M2), `slow_direction` (O2); and `step`, a float32 number.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float | None, float] = (0.95, 0.99, 0.9),
        alpha: float = 0.5,
        slow_period: int = 10,
        eps: float = 0.1,
        weight_decay: float = 0.0,
        form: str = "ema",
        nesterov: bool = False,
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "slow_period": slow_period,
            "eps": eps,
            "weight_decay": weight_decay,
            "form": form,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if len(options["betas"]) != 3:
            raise ValueError(f"`betas` must be beta1, beta2 and beta3, got {options['betas']}.")
        betas = {f"betas[{i}]": beta for i, beta in enumerate(options["betas"]) if i != 1 or beta is not None}
        below_one(betas, *betas)
        at_least(options, 0.0, "alpha", "eps")
        whole(options, 1, "slow_period")
        whole(options, 0, "ns_steps")
        if options["form"] not in FORMS:
            raise ValueError(f"`form` must be 'ema' or 'literal', got {options['form']!r}.")
        if options["nesterov"] and options["form"] == "literal":
            raise ValueError("`nesterov` is of the ema form: Algorithm 1 has none.")
        if options["adjust_lr_fn"] not in LR_ADJUSTMENTS:
            raise ValueError(
                f"`adjust_lr_fn` must be None, 'original' or 'match_rms_adamw', got {options['adjust_lr_fn']!r}."
            )
        if not (isinstance(options["ns_dtype"], torch.dtype) and options["ns_dtype"].is_floating_point):
            raise ValueError(f"`ns_dtype` must be a floating torch.dtype, got {options['ns_dtype']!r}.")

    def directions(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[State],
        at_once: bool,
    ) -> list[torch.Tensor]:
        beta1, beta2, _ = group["betas"]
        ema, alpha = group["form"] == "ema", group["alpha"]
        names = ["momentum"]
        names += ["second_moment"] if beta2 is not None else []
        names += ["chunk", "slow_momentum", "slow_direction"] if alpha else []
        for param, state in zip(params, states, strict=True):
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["step"] += 1
        steps = [int(state["step"]) for state in states]
        buffers = {name: [state[name] for state in states] for name in names}

        momentum = buffers["momentum"]
        if ema:
            each(momentum, at_once).lerp_(gradients, 1 - beta1)
        else:
            each(momentum, at_once).add_(gradients, alpha=beta1)
        if beta2 is not None:
            if ema:
                each(buffers["second_moment"], at_once).mul_(beta2)
            gain = 1 - beta2 if ema else beta2
            each(buffers["second_moment"], at_once).addcmul_(gradients, gradients, value=gain)

        ahead = momentum
        if group["nesterov"]:
            ahead = [g.lerp(m, beta1) for g, m in zip(gradients, momentum, strict=True)]
        directions = self._orthogonal(group, ahead, at_once, [1 - beta1**t for t in steps])
        if alpha:
            # What is not orthogonalised has yet to be divided by s; the slow memory's share is divided with it.
            directions = [d.clone() if d is m else d for d, m in zip(directions, ahead, strict=True)]
            each(directions, at_once).add_(buffers["slow_direction"], alpha=alpha)
        if beta2 is not None:
            directions = self._divided(group, directions, buffers["second_moment"], steps, at_once)
        shaped = [adjustment(group, param) for param in params]
        scaled = list(torch._foreach_mul(directions, shaped) if at_once else map(torch.mul, directions, shaped))

        if alpha:
            each(buffers["chunk"], at_once).add_(gradients)
            due = [state for state, step in zip(states, steps, strict=True) if step % group["slow_period"] == 0]
            if due:
                self._fold(group, due, at_once)
        return scaled

    def _fold(self, group: dict[str, Any], states: list[State], at_once: bool) -> None:
        """The chunk goes into the slow memory, whose direction then holds for the next chunk."""
        period, beta3, ema = group["slow_period"], group["betas"][2], group["form"] == "ema"
        slow, chunks = [s["slow_momentum"] for s in states], [s["chunk"] for s in states]
        if ema:
            each(slow, at_once).mul_(beta3)
        each(slow, at_once).add_(chunks, alpha=(1 - beta3) / period if ema else beta3)
        folds = [int(s["step"]) // period for s in states]
        directions = self._orthogonal(group, slow, at_once, [1 - beta3**k for k in folds])
        for state, found in zip(states, directions, strict=True):
            state["slow_direction"].copy_(found)
            state["chunk"].zero_()

    def _orthogonal(
        self, group: dict[str, Any], memories: list[torch.Tensor], at_once: bool, corrections: list[float]
    ) -> list[torch.Tensor]:
        """O of each memory, in its dtype: orthogonalised where it is a matrix, corrected for its start where not."""
        found = list(memories)
        matrices = [index for index, memory in enumerate(memories) if orthogonalised(group, memory)]

        def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
            return newton_schulz(matrix, group["ns_steps"], group["ns_dtype"])

        results = map_matrices(orthogonal, [as_matrix(memories[index]) for index in matrices], at_once=at_once)
        for index, result in zip(matrices, results, strict=True):
            found[index] = result.to(memories[index].dtype).reshape(memories[index].shape)
        if group["form"] == "ema":
            for index in set(range(len(found))).difference(matrices):
                found[index] = memories[index] / corrections[index]
        return found

    def _divided(
        self,
        group: dict[str, Any],
        directions: list[torch.Tensor],
        moments: list[torch.Tensor],
        steps: list[int],
        at_once: bool,
    ) -> list[torch.Tensor]:
        """Each direction divided by its denominator."""
        eps, found = group["eps"], list(directions)
        if group["form"] == "literal":
            return [direction / (v.sqrt() + eps) for direction, v in zip(directions, moments, strict=True)]

        def relative(direction: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return direction / (v.sqrt() / scale_of(v) + eps)

        matrices = [index for index, direction in enumerate(directions) if orthogonalised(group, direction)]
        lists = ([as_matrix(tensors[index]) for index in matrices] for tensors in (directions, moments))
        for index, result in zip(matrices, map_matrices(relative, *lists, at_once=at_once), strict=True):
            found[index] = result.reshape(directions[index].shape)
        for index in set(range(len(found))).difference(matrices):
            direction, v = as_matrix(directions[index]), as_matrix(moments[index])
            v = v / (1 - group["betas"][1] ** steps[index])
            found[index] = (relative(direction, v) / scale_of(v)).reshape(directions[index].shape)
        return found


def scale_of(v: torch.Tensor) -> torch.Tensor:
    """s = sqrt(mean V) of `[..., rows, cols]`, `[..., 1, 1]`."""
    return v.mean((-2, -1), keepdim=True).sqrt().clamp(min=torch.finfo(v.dtype).tiny ** 0.5)


def orthogonalised(group: Mapping[str, Any], tensor: torch.Tensor) -> bool:
    return group["ns_steps"] > 0 and tensor.dim() > 1


def adjustment(group: Mapping[str, Any], param: torch.Tensor) -> float:
    """What the learning rate is multiplied with for a parameter's shape."""
    if not orthogonalised(group, param):
        return 1.0
    rows, cols = as_matrix(param).shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1, rows / cols))
