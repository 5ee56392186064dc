"""Gemma 2: norms before and after, weights around 1, soft-caps, scaled embeddings, alternating windows."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, Derived, Family, Only, always, same, windows_by_layer_type


GEMMA_FIELDS = {
    **LLAMA_FIELDS,
    **same("attention_bias", "attn_logit_softcapping", "final_logit_softcapping"),
    "hidden_act": "hidden_activation",
    "attention_multiplier": Derived(("query_pre_attn_scalar",), lambda config: config.query_pre_attn_scalar**-0.5),
    "embedding_multiplier": Derived(("hidden_size",), lambda config: config.hidden_size**0.5),
    "norm_weight_offset": always(1.0),
    "norm_placement": always("both"),
}

GEMMA_MODULES = {
    **LLAMA_MODULES,
    "model.layers.{layer}.post_attention_layernorm": "model.layers.{layer}.output_layernorm",
    "model.layers.{layer}.pre_feedforward_layernorm": "{mlp_norm}",
    "model.layers.{layer}.post_feedforward_layernorm": "{mlp_output_norm}",
}

CAUSAL = {"use_bidirectional_attention": Only((None, False), "with which attention sees what is still to come")}

GEMMA2 = Family(
    model_type="gemma2",
    prefix="model.",
    fields=GEMMA_FIELDS,
    modules=GEMMA_MODULES,
    windows=windows_by_layer_type,
    only=CAUSAL,
    unused=("use_cache", "sliding_window", "layer_types"),
)
