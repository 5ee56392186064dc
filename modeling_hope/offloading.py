"""Modules whose parameters do not lie where they compute: accelerate brings those in when a module is called."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes."""
    found = next(module.parameters()).device
    if found.type != "meta":
        return found
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    return next(torch.device(hook.execution_device) for hook in hooks if hasattr(hook, "execution_device"))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by its name, in the order of their names, those offloaded read one at a time."""
    for name, parameter in sorted(model.named_parameters(), key=lambda named: named[0]):
        yield name, load_offloaded_parameter(model, name) if parameter.is_meta else parameter.detach()


def check_not_offloaded(module: nn.Module) -> None:
    """Raise `ValueError` when a module that has to learn is not on a device."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            "`device_map` has offloaded a level that learns: keep the layers of learning levels on a device, or give "
            "learn='off'."
        )
