"""
Models whose weights are sharded over processes.

A call that learns takes gradients on its way, as often as its rows have segments, and each process has rows of its own.
So nothing that waits for the other processes may happen within it: FSDP2's weights are made whole once, before the first
run, and are sharded again, with one reduction of their gradients, when the outer backward pass is done. The optimizer's
state, the master weights and what lies between two steps stay sharded. Calls that do not learn are FSDP2's own, layer by
layer. DDP and ZeRO-1 and 2 act on gradients that are accumulated, and learning accumulates none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


WAITS = (
    "gathers each layer's weights anew whenever it runs, forward and backward, and a call with a memory, or one that "
    "learns, runs the layers as often as its rows have segments: processes whose rows differ would wait for each other "
    "for ever."
)
NOT_BY_ZERO3 = (
    f"DeepSpeed ZeRO-3 {WAITS} Use FSDP2, or train with cms_training='static' and use_cache=False and evaluate "
    "with cms_learning=False."
)
NOT_BY_FSDP1 = f"FSDP1 {WAITS} Use FSDP2: `fsdp_version: 2` in Accelerate's configuration."
NOT_THE_WHOLE = (
    "FSDP2 shards layers of this model and not the model itself, so that no backward pass would reduce all of its "
    "gradients: call fully_shard(model) too, last, and call the model that it was given."
)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards weights of the model."""
    return bool(_units(model))


def check_sharding(model: nn.Module) -> None:
    """
    Raise `ValueError` where a call that learns could not go through: for ZeRO-3 and FSDP1.

    It is called before anything is read; recipes may call it once the model is prepared.
    """
    # Both leave their marks on parameters, and on modules.
    parameter = next(model.parameters())
    if hasattr(parameter, "ds_id"):
        raise ValueError(NOT_BY_ZERO3)
    if not _distributed():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = (isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if hasattr(parameter, "_fsdp_flattened") or any(units):
        raise ValueError(NOT_BY_FSDP1)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """
    Keep FSDP2's weights whole within, and with a gradient until the outer backward pass is done.

    Each process gathers once, whatever its rows hold, in the same order, and what runs within waits for nobody.
    """
    check_sharding(model)
    # The model itself, where it is a unit, is in its own forward and whole.
    states = [(unit, unit._get_fsdp_state()) for unit in _units(model) if unit is not model]
    if not states:
        yield
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    if any(state._is_root is not False for _, state in states):
        raise ValueError(NOT_THE_WHOLE)
    # Others are held by an earlier call whose backward pass is to come.
    taken = [(unit, state) for unit, state in states if state._training_state != TrainingState.PRE_BACKWARD]
    for unit, state in taken:
        unit.unshard()
        # As in the backward pass, when a layer is run again for its checkpoint: FSDP2's hooks cast what a unit reads and
        # leave all else alone. What ends the backward pass of the whole model reduces and shards every unit.
        state._training_state = TrainingState.PRE_BACKWARD
    done = False
    try:
        yield
        done = torch.is_grad_enabled()
    finally:
        if not done:
            for unit, state in taken:
                state._training_state = TrainingState.IDLE
                unit.reshard()


def in_every_gradient(x: torch.Tensor, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """
    `x`, with a gradient of zero for parameters that it may not depend on.

    Processes reduce their gradients together, and wait for each other where one has none for a parameter: whether it has
    must not turn on what its rows hold. Nor may the order in which gradients arrive, so that this comes before any other
    use of the parameters, in every call.
    """
    return x + 0 * sum(p.flatten()[0].to(x.dtype) for p in parameters if p.requires_grad)


def in_one_order(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """
    `x`, before which no gradient of the model's parameters arrives: all do once the backward pass is back at `x`.

    DeepSpeed's ZeRO-2 lays gradients end to end as they arrive, and reduces what lies at the same place in all processes.
    The order in which a backward pass takes its branches is each process's own: it turns on what it ran before, and on
    the thread that ran it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not any(p._post_accumulate_grad_hooks for p in parameters):
        return x
    return _After.apply(x, *parameters)


class _After(torch.autograd.Function):
    """The identity; parameters go into it, so that the gradients that they get elsewhere wait for its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: nn.Parameter) -> torch.Tensor:
        ctx.parameters = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient, *[None] * ctx.parameters


def _units(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 gathers each at once, in an order that all processes share."""
    if not _distributed():
        return []
    from torch.distributed.fsdp import FSDPModule

    units, states = [], set()
    for module in model.modules():
        if isinstance(module, FSDPModule) and id(state := module._get_fsdp_state()) not in states:
            states.add(id(state))
            units.append(module)
    return units


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
