"""Attention replaced by the self-modifying memory: a start from the attention's projections, not the same function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from modeling_hope import HopeConfig


# What the memory's slow maps take over from the attention's. Keys are made of z.
TAKEN_OVER = {"q_proj": "q_proj", "k_proj": "z_proj", "v_proj": "v_proj", "o_proj": "o_proj"}
# Values stay a slow map of the input, so that the attention's have a place.
ADAPTIVE = ("k", "eta", "alpha")


def mixer_fields(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """HopeConfig fields that give a memory the heads of the attention in `fields`, where `given` says nothing else."""
    chosen = {
        "num_memory_heads": fields["num_attention_heads"],
        "memory_head_dim": fields["head_dim"],
        "adaptive_projections": ADAPTIVE,
    }
    return {name: value for name, value in chosen.items() if name not in given}


def take_over(
    name: str, tensor: torch.Tensor, config: HopeConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, torch.Tensor] | None:
    """
    What a tensor of a layer's attention becomes in the memory that replaces it; `None` when it has no place.

    Keys and values are repeated for the heads that share them. Norms and biases have no place, and what is of another
    shape has none either.

    Args:
        name: what it would be in Hope's attention.
        shapes: of the Hope model's parameters.
    """
    layer, _, rest = name.rpartition(".mixer.")
    module, _, kind = rest.partition(".")
    if module not in TAKEN_OVER or kind != "weight":
        return None
    target = f"{layer}.mixer.{TAKEN_OVER[module]}.weight"
    if module in ("k_proj", "v_proj"):
        assert config.num_key_value_heads is not None and config.head_dim is not None
        shared = config.num_attention_heads // config.num_key_value_heads
        tensor = tensor.unflatten(0, (-1, config.head_dim)).repeat_interleave(shared, dim=0).flatten(0, 1)
    return (target, tensor) if shapes.get(target) == tuple(tensor.shape) else None
