"""Llama: the architecture that Hope's blocks were named after."""

from __future__ import annotations

from typing import Any

from .family import Family


def _attention(name: str) -> dict[str, str]:
    return {
        f"model.layers.{{layer}}.self_attn.{name}.{kind}": f"model.layers.{{layer}}.mixer.{name}.{kind}"
        for kind in ("weight", "bias")
    }


def _mlp(name: str) -> dict[str, str]:
    return {
        f"model.layers.{{layer}}.mlp.{name}.{kind}": f"model.layers.{{layer}}.{{mlp}}.{name}.{kind}"
        for kind in ("weight", "bias")
    }


def _refuse(config: Any) -> str | None:
    if getattr(config, "pretraining_tp", 1) not in (None, 1):
        return f"`pretraining_tp` is {config.pretraining_tp}: its sliced products are not rebuilt. Set it to 1."
    return None


LLAMA = Family(
    model_type="llama",
    fields=(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "attention_bias",
        "attention_dropout",
        "mlp_bias",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ),
    tensors={
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "model.layers.{layer}.input_layernorm.weight": "model.layers.{layer}.input_layernorm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight": "model.layers.{layer}.{mlp_norm}.weight",
        **_attention("q_proj"),
        **_attention("k_proj"),
        **_attention("v_proj"),
        **_attention("o_proj"),
        **_mlp("gate_proj"),
        **_mlp("up_proj"),
        **_mlp("down_proj"),
    },
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    refuse=_refuse,
)
