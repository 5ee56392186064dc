"""The norms of mixers, levels, queries and keys."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .configuration_hope import HopeConfig


class HopeRMSNorm(LlamaRMSNorm):
    """Llama's, that keeps float64 where it is given float64, and may add a constant to its weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, offset: float = 0.0):
        super().__init__(hidden_size, eps)
        self.offset = offset

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        wide = hidden_states.to(torch.promote_types(dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.offset:
            return (wide * (self.offset + self.weight.to(wide.dtype))).to(dtype)
        return self.weight * wide.to(dtype)

    def initialise(self) -> None:
        init.constant_(self.weight, 1.0 - self.offset)


def make_norm(config: HopeConfig) -> nn.Module:
    """A norm over `hidden_size` features, of the kind that the config names."""
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return HopeRMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_weight_offset)


def norms_around(config: HopeConfig, placement: str) -> tuple[nn.Module, nn.Module]:
    """The norms before and after a mixer or a level; `nn.Identity` where there is none."""
    before = nn.Identity() if placement == "post" else make_norm(config)
    after = nn.Identity() if placement == "pre" else make_norm(config)
    return before, after


def add(x: torch.Tensor, y: torch.Tensor, multiplier: float) -> torch.Tensor:
    """`x + multiplier * y`: a residual connection."""
    return x + y if multiplier == 1 else x + y * multiplier
