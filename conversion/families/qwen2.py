"""Qwen2 and Qwen2.5: biases of queries, keys and values."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, Derived, Family, windows_by_layer_type


QWEN2 = Family(
    model_type="qwen2",
    prefix="model.",
    fields={
        **LLAMA_FIELDS,
        "attention_bias": Derived((), lambda config: True),
        "attention_output_bias": Derived((), lambda config: False),
    },
    modules=LLAMA_MODULES,
    windows=windows_by_layer_type,
    unused=("use_cache", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)
