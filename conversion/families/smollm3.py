"""SmolLM3: every fourth layer has no rotary positions, and may have a sliding window."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, Derived, Family, same, windows_by_layer_type


SMOLLM3 = Family(
    model_type="smollm3",
    prefix="model.",
    fields={
        **LLAMA_FIELDS,
        **same("attention_bias", "mlp_bias"),
        # The source's list says which layers do have positions, its name notwithstanding.
        "layer_ropes": Derived(
            ("no_rope_layers",), lambda config: ["global" if turned else None for turned in config.no_rope_layers]
        ),
    },
    modules=LLAMA_MODULES,
    windows=windows_by_layer_type,
    unused=("use_cache", "use_sliding_window", "sliding_window", "layer_types", "no_rope_layer_interval"),
)
