"""Parameters that step at several paces, each on its own period (Eq. 71 for any optimizer)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from .base import whole


ACCUMULATED = "accumulated_gradient"


class MultiFrequency(Optimizer):
    """
    Any optimizer, with groups that step on a period of their own.

    ```
    theta_{i+1} = theta_i - lr f(sum of the gradients of the last C steps)    if i = 0 mod C,    theta_i otherwise
    ```

    A group has the key `period` (C, in steps; 1 where it has none). At every `step` its gradients are added to a sum; at
    every C-th the wrapped optimizer steps the group with that sum, and the sum starts again at zero. A group of period 1
    is the wrapped optimizer's alone, untouched. `level_groups` makes the groups of a Hope model.

    It is handled as the wrapped optimizer is. Schedulers see its groups: the rate in force when a group steps counts.
    Clip between `backward` and `step` as ever: what is added up is the clipped gradient. `GradScaler` unscales before
    it is added, and a step that it skips is none. Gradients are those of the last `backward` after a step too, and may
    be dropped (`zero_grad`), by `model.zero_grad` as well.

    Args:
        optimizer: the optimizer to wrap, its groups with periods; or its class.
        params: with a class: parameters or groups, as the class takes them.
        reduction: what the wrapped optimizer gets of the gradients of a period: their "sum" (Eq. 71) or "mean".
        options: with a class: its options.

    The `state_dict` is the wrapped optimizer's, with the sum of each parameter in `accumulated_gradient` (float32 or
    better) of its state, and in each group `period` and `elapsed`, the steps since it last stepped: it is saved and
    goes on in the middle of a period.

    Raises:
        ValueError: a period is no whole number of at least 1; the wrapped optimizer evaluates the loss itself (LBFGS).
        RuntimeError: from `step`, before anything changed: a gradient to be added up is sparse.
    """

    def __init__(
        self,
        optimizer: Optimizer | type[Optimizer],
        params: Iterable[Any] | None = None,
        *,
        reduction: str = "sum",
        **options: Any,
    ):
        if reduction not in ("sum", "mean"):
            raise ValueError(f"`reduction` must be 'sum' or 'mean', got {reduction!r}.")
        if isinstance(optimizer, type):
            if params is None:
                raise ValueError("`params` is missing: an optimizer's class needs the parameters too.")
            optimizer = optimizer(params, **options)
        elif params is not None or options:
            raise ValueError("`params` and options go with an optimizer's class; this one has its own already.")
        if inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
            raise ValueError(f"{type(optimizer).__name__} evaluates the loss itself: it has no gradient to add up.")
        for group in optimizer.param_groups:
            check_period(group)
        self.optimizer = optimizer
        self.reduction = reduction
        self.accumulated: dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(optimizer.param_groups, {**optimizer.defaults, "period": 1, "elapsed": 0})
        self._share()

    def _share(self) -> None:
        """Groups and state are the wrapped optimizer's own."""
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            check_period(param_group)
            param_group.setdefault("period", 1)
            param_group.setdefault("elapsed", 0)
        if any(group is param_group for group in self.optimizer.param_groups):  # while it is constructed
            super().add_param_group(param_group)
        else:
            self.optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Add up, and step the groups whose period ends. `closure` evaluates the loss, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slow = [group for group in self.param_groups if group["period"] > 1]
        if any(p.grad is not None and p.grad.is_sparse for group in slow for p in group["params"]):
            raise RuntimeError("MultiFrequency does not support sparse gradients in groups with a period above 1")
        ends = [group["elapsed"] + 1 >= group["period"] for group in slow]
        if any(ends) or len(slow) < len(self.param_groups):
            given = [(p, p.grad) for group in slow for p in group["params"]]
            totals = [
                self._total(group, p) if end else None
                for group, end in zip(slow, ends, strict=True)
                for p in group["params"]
            ]
            try:
                for (p, _), total in zip(given, totals, strict=True):
                    p.grad = total
                self.optimizer.step()
            finally:
                for p, gradient in given:
                    p.grad = gradient
        # After it: what the wrapped optimizer refuses has changed nothing here.
        for group, end in zip(slow, ends, strict=True):
            group["elapsed"] = 0 if end else group["elapsed"] + 1
            for p in group["params"]:
                if end:
                    self.accumulated.pop(p, None)
                elif p.grad is not None:
                    self.accumulated[p] = self._sum(p, p.grad)
        return loss

    def _sum(self, p: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """With this step's gradient. Many small numbers are lost on a sum in half precision."""
        found = self.accumulated.get(p)
        wide = torch.promote_types(p.dtype, torch.float32)
        return gradient.to(wide, copy=True) if found is None else found.add_(gradient)

    def _total(self, group: dict[str, Any], p: torch.Tensor) -> torch.Tensor | None:
        """What the wrapped optimizer gets of a period that ends."""
        parts = [part for part in (self.accumulated.get(p), p.grad) if part is not None]
        if not parts:
            return None
        total = sum(part.to(torch.promote_types(p.dtype, torch.float32)) for part in parts)
        return (total / group["period"] if self.reduction == "mean" else total).to(p.dtype)  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        found = self.optimizer.state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in found["param_groups"] for index in group["params"]]
        state = dict(found["state"])
        for p, index in zip(parameters, saved, strict=True):
            if p in self.accumulated:
                state[index] = {**state.get(index, {}), ACCUMULATED: self.accumulated[p]}
        return {**found, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        places = dict(zip(saved, parameters, strict=False))
        sums, rest = {}, {}
        for index, found in state_dict["state"].items():
            own = {name: value for name, value in found.items() if name != ACCUMULATED}
            if ACCUMULATED in found and index in places:
                p = places[index]
                dtype = torch.promote_types(p.dtype, torch.float32)
                sums[p] = found[ACCUMULATED].to(device=p.device, dtype=dtype, copy=True)
            if own:
                rest[index] = own
        # It checks that the groups fit, and changes nothing when they do not.
        self.optimizer.load_state_dict({**state_dict, "state": rest})
        for group in self.param_groups:
            group.setdefault("period", 1)
            group.setdefault("elapsed", 0)
        self.accumulated = sums
        self._share()

    def __repr__(self) -> str:
        return f"MultiFrequency({self.optimizer!r})"


def check_period(group: Mapping[str, Any]) -> None:
    whole({"period": 1, **group}, 1, "period")
