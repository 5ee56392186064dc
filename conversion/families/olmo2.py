"""OLMo 2: norms after mixers and MLPs in the place of before, and of all queries and keys together."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, QK_NORM_MODULES, Derived, Family, same


OLMO2 = Family(
    model_type="olmo2",
    prefix="model.",
    fields={
        **LLAMA_FIELDS,
        **same("attention_bias"),
        "qk_norm": Derived((), lambda config: "all"),
        "norm_placement": Derived((), lambda config: "post"),
    },
    modules={
        **{name: target for name, target in LLAMA_MODULES.items() if not name.endswith("input_layernorm")},
        **QK_NORM_MODULES,
        "model.layers.{layer}.post_attention_layernorm": "model.layers.{layer}.output_layernorm",
        "model.layers.{layer}.post_feedforward_layernorm": "{mlp_output_norm}",
    },
    unused=("use_cache",),
)
