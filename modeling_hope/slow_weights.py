"""Slow weights that are no plain parameters on a device: offloaded by accelerate, quantized, or adapted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes; its parameters may be offloaded from there."""
    found = next(module.parameters()).device
    if found.type == "meta":
        for part in module.modules():
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return found


def stored_parameters(model: nn.Module) -> Iterator[torch.Tensor]:
    """A model's parameters as it is saved, in the order of their names: those offloaded are read one at a time."""
    # Making the state dict undoes what quantized weights become in use.
    state = model.state_dict()
    for name in sorted(name for name, _ in model.named_parameters()):
        found = load_offloaded_parameter(model, name) if state[name].is_meta else state[name]
        yield found if _is_plain(found) else found.dequantize()


def is_linear(module: nn.Module) -> bool:
    """Whether a map is the product with its weight and no more: no adapter beside it, and nothing quantized."""
    return type(module) is nn.Linear and _is_plain(module.weight)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (nn.Parameter, torch.Tensor)


def check_on_device(module: nn.Module) -> None:
    """Raise `ValueError` when a part that has to learn is offloaded."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            "`device_map` has offloaded a level that learns: keep the layers of learning levels on a device, or give "
            "learn='off'."
        )


def check_gradients(model: nn.Module) -> None:
    """
    Raise `ValueError` when a gradient would end without a word in a quantized map.

    bitsandbytes packs 4-bit weights, at their first use in `eval()` mode on a CPU, for a kernel that has no backward.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if not hasattr(weight, "quant_state") or weight.device.type != "cpu":
            continue
        packs = getattr(module, "support_avx512bf16_for_cpu", False) and not module.training
        if packs or getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "`quantization_config`: on this CPU bitsandbytes takes no gradient through 4-bit weights, which learning "
                "needs. Use a GPU, 8 bits or torchao, or give learn='off'."
            )
