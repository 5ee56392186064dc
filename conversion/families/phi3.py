"""Phi-3, Phi-3.5 and Phi-4 (dense): fused projections, a rope that may turn a part of each head, a window."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, QKV, Family, Fused, same, windows_everywhere, without


PHI3 = Family(
    model_type="phi3",
    prefix="model.",
    fields={**LLAMA_FIELDS, **same("rope_parameters")},
    modules={
        **without(LLAMA_MODULES, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        "model.layers.{layer}.self_attn.qkv_proj": Fused(QKV),
        "model.layers.{layer}.mlp.gate_up_proj": Fused(("{mlp}.gate_proj", "{mlp}.up_proj")),
    },
    windows=windows_everywhere,
    training={"resid_pdrop": "dropout of what layers add", "embd_pdrop": "dropout of embeddings"},
    unused=("use_cache", "sliding_window", "original_max_position_embeddings"),
)
