"""What the optimizers share: options checked by group, closures, gradients that are refused, the choice of a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer


PLAIN = (torch.Tensor, torch.nn.Parameter)
State = dict[str, Any]


class GroupOptimizer(Optimizer):
    """
    A `torch.optim.Optimizer` that is told one group's parameters, gradients and states at a time.

    Options that all of them have, and that any param group may set for itself:

        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled, as AdamW's: `W <- (1 - lr weight_decay) W` before the update.
        maximize: climb instead of descending.
        foreach: whether operations run over all tensors of a group at once, equal matrices stacked, or in a loop over
            the parameters, which gives the same. `None`: at once where all parameters are plain tensors on a GPU.

    Sparse gradients and complex parameters are refused, before anything has changed.
    """

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise `ValueError` when an option of a group is impossible; it is named."""
        lr = options["lr"]
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError(f"`lr` must be a number or a tensor of one element, got one of shape {tuple(lr.shape)}.")
        at_least(options, 0.0, "lr", "weight_decay")

    def directions(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[State],
        at_once: bool,
    ) -> list[torch.Tensor]:
        """What the parameters of a group descend along, of their gradients; states move on. Parameters do not change."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        Step once.

        Args:
            closure: evaluates the model again and returns the loss, which is then returned.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter complex; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepping = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for params in stepping:
            for param in params:
                if torch.is_complex(param):
                    raise RuntimeError(f"{type(self).__name__} does not support complex parameters")
                if param.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        self.before(stepping)
        for group, params in zip(self.param_groups, stepping, strict=True):
            if not params:
                continue
            gradients = [-p.grad if group["maximize"] else p.grad for p in params]
            at_once = group["foreach"]
            if at_once is None:
                at_once = all(type(p) in PLAIN and p.is_cuda for p in params)
            directions = self.directions(group, params, gradients, [self.state[p] for p in params], at_once)
            rate = float(group["lr"])
            if group["weight_decay"]:
                each(params, at_once).mul_(1 - rate * group["weight_decay"])
            each(params, at_once).add_(directions, alpha=-rate)
        return loss

    def before(self, stepping: list[list[torch.Tensor]]) -> None:
        """Last checks, by group the parameters about to step: whatever is raised here has changed nothing."""


class Each:
    """In-place arithmetic on a list of tensors, one by one: what `torch._foreach_*` does at once."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors = tensors

    def mul_(self, factor: float) -> Each:
        for tensor in self.tensors:
            tensor.mul_(factor)
        return self

    def add_(self, others: list[torch.Tensor], alpha: float = 1.0) -> Each:
        for tensor, other in zip(self.tensors, others, strict=True):
            tensor.add_(other, alpha=alpha)
        return self

    def lerp_(self, others: list[torch.Tensor], weight: float) -> Each:
        for tensor, other in zip(self.tensors, others, strict=True):
            tensor.lerp_(other, weight)
        return self

    def addcmul_(self, first: list[torch.Tensor], second: list[torch.Tensor], value: float) -> Each:
        for tensor, a, b in zip(self.tensors, first, second, strict=True):
            tensor.addcmul_(a, b, value=value)
        return self


class AtOnce(Each):
    """The same by `torch._foreach_*`, whose fast paths want one device and dtype a call; it sorts out the rest itself."""

    def mul_(self, factor: float) -> Each:
        torch._foreach_mul_(self.tensors, factor)
        return self

    def add_(self, others: list[torch.Tensor], alpha: float = 1.0) -> Each:
        torch._foreach_add_(self.tensors, others, alpha=alpha)
        return self

    def lerp_(self, others: list[torch.Tensor], weight: float) -> Each:
        torch._foreach_lerp_(self.tensors, others, weight)
        return self

    def addcmul_(self, first: list[torch.Tensor], second: list[torch.Tensor], value: float) -> Each:
        torch._foreach_addcmul_(self.tensors, first, second, value=value)
        return self


def each(tensors: list[torch.Tensor], at_once: bool) -> Each:
    return AtOnce(tensors) if at_once else Each(tensors)


def at_least(options: Mapping[str, Any], low: float, *names: str) -> None:
    """Raise `ValueError` unless these options are numbers of at least `low`; NaN is not."""
    for name in names:
        if not low <= options[name] < float("inf"):
            raise ValueError(f"`{name}` must be finite and {low:g} or more, got {options[name]}.")


def below_one(options: Mapping[str, Any], *names: str) -> None:
    """Raise `ValueError` unless these options lie in [0, 1)."""
    for name in names:
        if not 0 <= options[name] < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {options[name]}.")


def whole(options: Mapping[str, Any], low: int, *names: str) -> None:
    """Raise `ValueError` unless these options are whole numbers of at least `low`."""
    for name in names:
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"`{name}` must be a whole number of at least {low}, got {value!r}.")
