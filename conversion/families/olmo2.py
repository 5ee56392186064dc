"""OLMo 2: norms after mixers and MLPs in the place of before, and of all queries and keys together."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, QK_NORM_MODULES, Family, always, same, without


OLMO2 = Family(
    model_type="olmo2",
    prefix="model.",
    fields={
        **LLAMA_FIELDS,
        **same("attention_bias"),
        "qk_norm": always("all"),
        "norm_placement": always("post"),
    },
    modules={
        **without(LLAMA_MODULES, "input_layernorm"),
        **QK_NORM_MODULES,
        "model.layers.{layer}.post_attention_layernorm": "model.layers.{layer}.output_layernorm",
        "model.layers.{layer}.post_feedforward_layernorm": "{mlp_output_norm}",
    },
    unused=("use_cache",),
)
