"""Weights that differ from row to row: what a level learned, and linear maps that use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .slow_weights import check_on_device, is_linear


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LevelMemory:
    """
    What one row's level of one layer has learned. Never changed in place, so rows and forks may share it.

    Every tensor has the shape of its map's weight, `[out_features, in_features]`, in float32 or better.

    Attributes:
        change: by map, what is added to the slow weight; empty until the first update.
        initial: `nested` only, the change that the level restarts from; empty means zero.
        gradient: sum over the tokens learned since the last update; empty when there are none.
        momentum: inner optimizer `momentum` only; empty means zero.
    """

    change: Tensors = field(default_factory=dict)
    initial: Tensors = field(default_factory=dict)
    gradient: Tensors = field(default_factory=dict)
    momentum: Tensors = field(default_factory=dict)
    _merged: dict[str, tuple[torch.Tensor, tuple[int, int], torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def merged(self, name: str, slow: torch.Tensor) -> torch.Tensor:
        """
        Slow weight plus change, made once: reading two weights at every token would cost twice the time of one.

        Made again when the slow weight is another or was changed in place; a change through `.data` goes unseen.
        """
        state = (slow.data_ptr(), slow._version)
        known = self._merged.get(name)
        if known is None or known[0] is not slow or known[1] != state:
            known = self._merged[name] = (slow, state, (slow + self.change[name]).detach())
        return known[2]

    def forget_sum(self, name: str) -> None:
        """An adapter beside the slow weight may later be written into it, where no version tells."""
        self._merged.pop(name, None)

    def merged_weights(self) -> list[torch.Tensor]:
        """The sums made so far: held in memory, and not saved."""
        return [merged for _, _, merged in list(self._merged.values())]  # forks may be reading in other threads

    def with_change(self, change: Tensors, **fields: Tensors) -> LevelMemory:
        return replace(self, change=change, _merged={}, **fields)

    def detach(self) -> LevelMemory:
        """Without the graph of an outer gradient; itself where there is none."""
        tensors = (tensor for kind in MEMORY_TENSORS for tensor in getattr(self, kind).values())
        return self.map(torch.Tensor.detach) if any(tensor.requires_grad for tensor in tensors) else self

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LevelMemory:
        """With every tensor replaced."""
        kinds: dict[str, Any] = {
            kind: {name: function(tensor) for name, tensor in getattr(self, kind).items()} for kind in MEMORY_TENSORS
        }
        return LevelMemory(**kinds)


MEMORY_TENSORS = ("change", "initial", "gradient", "momentum")
NOTHING_LEARNED = LevelMemory()


class RowWeight(NamedTuple):
    """
    A map's weight for one row: `tensor` replaces the slow weight (`whole`), or is added to it.

    Both are the same map. A sum is rounded to the dtype of the weights, which a low precision cannot afford: there the
    two products are added instead.
    """

    tensor: torch.Tensor
    whole: bool


@dataclass
class LevelWeights:
    """
    The weights that a level of one layer uses in one run of the model.

    Attributes:
        rows: for each row, its weights by map; `None` for a row that uses the slow weights alone.
        traced: for each row, the tensors to take the gradient of, by map; empty unless the run is learned from.
        inputs, outputs: by map, `[batch, width, features]`, what went in and came out (without the bias), for the
            rules that need it (`dgd`).
        record: whether to record them.
        connected: whether an outer gradient flows through the update, and so through what is recorded.
        together: the maps of all rows at once, in the place of `rows`: from a map's name, module and input to its output.
    """

    rows: list[dict[str, RowWeight] | None]
    traced: list[Tensors] = field(default_factory=list)
    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    record: bool = False
    connected: bool = False
    together: Callable[[str, nn.Module, torch.Tensor], torch.Tensor] | None = None

    def linear(self, name: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The map `name` of every row, `[batch, width, in_features]` to `[batch, width, out_features]`."""
        if self.together is not None:
            return self.together(name, module, x)
        y = fast_linear(module, x, [row.get(name) if row else None for row in self.rows])
        if self.record and name in self.traced[0]:
            bias = getattr(module, "bias", None)
            y_alone = y if bias is None else y - bias
            self.inputs[name] = x if self.connected else x.detach()
            self.outputs[name] = y_alone if self.connected else y_alone.detach()
        return y


def fast_linear(module: nn.Module, x: torch.Tensor, rows: Sequence[RowWeight | None]) -> torch.Tensor:
    """`y_b = (W + Delta_b) x_b`, rows that share a weight in one product."""
    outputs = []
    for start, stop in _runs(rows):
        row, part = rows[start], x[start:stop]
        if row is None:
            outputs.append(module(part))
        elif row.whole:
            outputs.append(F.linear(part, row.tensor, module.bias))  # type: ignore[arg-type]
        elif _one_product(module, part):
            outputs.append(_ChangedLinear.apply(part, module.weight, row.tensor, module.bias))
        else:
            outputs.append(module(part) + F.linear(part, row.tensor.to(part.dtype)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _one_product(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the sum of slow weight and change may be used: nothing is lost by it, and nobody listens to the map's calls."""
    if not can_merge(module) or x.dtype != module.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    return not any(getattr(module, kind) for kind in HOOKS)


class _ChangedLinear(torch.autograd.Function):
    """
    `(W + Delta) x + bias`, whose gradients reach W and Delta alike, by one product each way.

    The sum is made anew in the backward pass: every segment has another, and keeping all would take the memory of a
    model each.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, change: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, change)
        return F.linear(x, weight + change, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, change = ctx.saved_tensors
        for_x, for_weight, for_change, for_bias = ctx.needs_input_grad
        by_map = gradient.flatten(0, -2).mT @ x.flatten(0, -2) if for_weight or for_change else None
        return (
            gradient @ (weight + change) if for_x else None,
            by_map if for_weight else None,
            by_map if for_change else None,
            gradient.flatten(0, -2).sum(0) if for_bias else None,
        )


def _runs(rows: Sequence[RowWeight | None]) -> list[tuple[int, int]]:
    """Bounds of the stretches of neighbouring rows that share one weight."""
    weights = [row.tensor if row else None for row in rows]
    starts = [i for i in range(len(rows)) if i == 0 or weights[i] is not weights[i - 1]]
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))


def can_merge(module: nn.Module) -> bool:
    """Whether slow weight plus change loses nothing that counts: a plain linear map in float32 or better."""
    if not is_linear(module) or module.weight.is_meta:
        return False
    return module.weight.dtype in (torch.float32, torch.float64)


def reading_weights(
    mlp: nn.Module, memories: Sequence[LevelMemory], maps: Sequence[str], merge: bool
) -> LevelWeights | None:
    """
    The weights to read with, nothing learned from the run.

    `merge`: use the sum of slow weight and change where nothing is lost by it. It is a constant: an outer gradient
    does not reach the slow weight through it.
    """
    rows: list[dict[str, RowWeight] | None] = []
    for memory in memories:
        if not memory.change:
            rows.append(None)
            continue
        weights = {}
        for name in maps:
            module = getattr(mlp, name)
            if merge and can_merge(module):
                weights[name] = RowWeight(memory.merged(name, module.weight), whole=True)
            else:
                memory.forget_sum(name)
                weights[name] = RowWeight(memory.change[name], whole=False)
        rows.append(weights)
    return LevelWeights(rows) if any(rows) else None


def learning_weights(
    mlp: nn.Module,
    memories: Sequence[LevelMemory],
    maps: Sequence[str],
    merge: bool,
    record: bool,
    connected: bool = False,
) -> LevelWeights:
    """
    The weights of a run that is learned from: an alias of its own for every row, to take the gradient of.

    Own aliases keep the gradient of a segment from leaking into another through old keys and values, and keep the
    rows apart though they share the slow weights.

    `connected`: an outer gradient flows through the update that this run makes.
    """
    check_on_device(mlp)
    rows: list[dict[str, RowWeight] | None] = []
    traced: list[Tensors] = []
    for memory in memories:
        weights = {}
        for name in maps:
            module = getattr(mlp, name)
            change = memory.change.get(name)
            if merge and change is None and is_linear(module):
                weights[name] = RowWeight(_alias(module.weight), whole=True)
            elif merge and can_merge(module):
                weights[name] = RowWeight(_alias(memory.merged(name, module.weight)), whole=True)
            else:
                known = _zero_change(module) if change is None else change
                # A change that an outer gradient flows through passes it on, whatever becomes of this update.
                alias = known.view_as(known) if known.requires_grad else _alias(known)
                weights[name] = RowWeight(alias, whole=False)
        rows.append(weights)
        traced.append({name: weight.tensor for name, weight in weights.items()})
    return LevelWeights(rows, traced, record=record, connected=connected)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers (no copy), a leaf of their own. Its gradient is asked for; an outer backward pass leaves none."""
    alias = tensor.detach().view_as(tensor).requires_grad_()
    alias.register_post_accumulate_grad_hook(_forget_gradient)
    return alias


def _forget_gradient(alias: torch.Tensor) -> None:
    alias.grad = None


def _zero_change(module: nn.Module) -> torch.Tensor:
    out_features, in_features = module.out_features, module.in_features
    weight = next(module.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    return torch.zeros(out_features, in_features, dtype=dtype, device=weight.device)  # type: ignore[call-overload]
