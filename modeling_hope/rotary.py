"""Rotary positions: the angles of a config, and how they turn queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from .configuration_hope import HopeConfig


Rotation = tuple[torch.Tensor, torch.Tensor]


class HopeRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, that may turn a part of a head only, and whose angles never depend on the length of a call."""

    @staticmethod
    def compute_default_rope_parameters(config: LlamaConfig, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[turned features / 2]` float32, and the factor of cosines and sines."""
        rope = config.rope_parameters
        turned = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, turned, 2, dtype=torch.float) / turned)), 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Rotation:
        """Positions `[batch, width]` to cosines and sines `[batch, width, turned features]`, in the dtype of `x`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class HopeRotaryEmbeddings(nn.ModuleDict):
    """
    The rotary embeddings that a model's attention layers use, by what `config.layer_ropes` calls them.

    As modules they are `global_rope` and `local_rope`: exported programs are Python, to which `global` is no name.
    """

    _z3_leaf = True  # as layers are: how often one is asked turns on the rows' lengths

    def __init__(self, config: HopeConfig):
        self.used = used_ropes(config)
        parameters = {"global": config.rope_parameters, "local": config.local_rope_parameters}
        super().__init__(
            {f"{rope}_rope": HopeRotaryEmbedding(_llama_config(config, parameters[rope])) for rope in self.used}
        )

    def of(self, rope: str) -> HopeRotaryEmbedding:
        return self[f"{rope}_rope"]  # type: ignore[return-value]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Rotation]:
        """As a `HopeRotaryEmbedding`, of each by its name."""
        return {rope: self.of(rope)(x, position_ids) for rope in self.used}


def used_ropes(config: HopeConfig) -> list[str]:
    """The ropes of a model's attention layers."""
    kinds = zip(config.layer_types or [], config.layer_ropes or [], strict=True)
    return sorted({rope for mixer, rope in kinds if mixer != "hope_memory" and rope is not None})


def _llama_config(config: HopeConfig, parameters: dict[str, Any] | None) -> LlamaConfig:
    """What Transformers' rotary embeddings look at, and with it their defaults and their validation."""
    return LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(parameters) if parameters else None,
    )


def turn(queries: torch.Tensor, keys: torch.Tensor, rotation: Rotation) -> Rotation:
    """Queries and keys `[batch, heads, width, head_dim]` turned by their positions, in their first features or in all."""
    cos, sin = rotation
    turned = cos.shape[-1]
    if turned == queries.shape[-1]:
        return apply_rotary_pos_emb(queries, keys, cos, sin)
    turned_queries, turned_keys = apply_rotary_pos_emb(queries[..., :turned], keys[..., :turned], cos, sin)
    return (
        torch.cat([turned_queries, queries[..., turned:]], dim=-1),
        torch.cat([turned_keys, keys[..., turned:]], dim=-1),
    )
