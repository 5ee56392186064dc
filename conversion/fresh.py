"""Parameters of a Hope model that no source tensor becomes: they start as in a new model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator

import torch
from torch import nn

from modeling_hope import HopeForCausalLM


@torch.no_grad()
def fresh_parameters(
    model: HopeForCausalLM, names: Collection[str], zero: Collection[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Initial values of parameters, float32, one module at a time.

    Args:
        model: on the meta device.
        names: of the parameters.
        zero: those that are zero in the place of what a new model has.
    """
    for prefix, module in model.named_modules():
        own = {name: f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
        wanted = {name: whole for name, whole in own.items() if whole in names}
        if not wanted:
            continue
        real = copy.deepcopy(module)  # its children stay on the meta device
        for name in wanted:
            setattr(real, name, nn.Parameter(torch.empty_like(getattr(real, name), device="cpu")))
        model._init_weights(real)
        for name, whole in wanted.items():
            tensor = getattr(real, name).detach()
            yield whole, torch.zeros_like(tensor) if whole in zero else tensor
