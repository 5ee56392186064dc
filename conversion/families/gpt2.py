"""GPT-2: learned positions, LayerNorm, plain MLPs, and weights laid out as `Conv1D` has them."""

from typing import Any

from ..family import COMMON_FIELDS, QKV, Derived, Family, Fused, Only, always


def _attention_multiplier(config: Any) -> float | list[float]:
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    if not config.scale_attn_by_inverse_layer_idx:
        return scale
    return [scale / (layer + 1) for layer in range(config.n_layer)]


GPT2 = Family(
    model_type="gpt2",
    prefix="transformer.",
    fields={
        **COMMON_FIELDS,
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": Derived(("n_inner",), lambda config: config.n_inner or 4 * config.n_embd),
        "hidden_act": "activation_function",
        "attention_dropout": "attn_pdrop",
        "rms_norm_eps": "layer_norm_epsilon",
        "attention_multiplier": Derived(
            ("scale_attn_weights", "scale_attn_by_inverse_layer_idx"), _attention_multiplier
        ),
        "norm_type": always("layer_norm"),
        "attention_bias": always(True),
        "mlp_bias": always(True),
        "gated_mlp": always(False),
        "learned_positions": always(True),
        "layer_ropes": Derived((), lambda config: [None] * config.n_layer),
    },
    modules={
        "transformer.wte": "model.embed_tokens",
        "transformer.wpe": "model.embed_positions",
        "transformer.ln_f": "model.norm",
        "lm_head": "lm_head",
        "transformer.h.{layer}.ln_1": "model.layers.{layer}.input_layernorm",
        "transformer.h.{layer}.ln_2": "{mlp_norm}",
        "transformer.h.{layer}.attn.c_attn": Fused(QKV, transposed=True),
        "transformer.h.{layer}.attn.c_proj": Fused(("model.layers.{layer}.mixer.o_proj",), transposed=True),
        "transformer.h.{layer}.mlp.c_fc": Fused(("{mlp}.up_proj",), transposed=True),
        "transformer.h.{layer}.mlp.c_proj": Fused(("{mlp}.down_proj",), transposed=True),
    },
    only={"add_cross_attention": Only((False,), "whose layers read an encoder")},
    training={"resid_pdrop": "dropout of what layers add", "embd_pdrop": "dropout of embeddings"},
    unused=(
        "use_cache",
        "reorder_and_upcast_attn",  # scores are made in float32 or better anyway
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    ),
    ignored=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
)
