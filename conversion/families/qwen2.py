"""Qwen2 and Qwen2.5: biases of queries, keys and values."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, Family, always, windows_by_layer_type


QWEN2 = Family(
    model_type="qwen2",
    prefix="model.",
    fields={
        **LLAMA_FIELDS,
        "attention_bias": always(True),
        "attention_output_bias": always(False),
    },
    modules=LLAMA_MODULES,
    windows=windows_by_layer_type,
    unused=("use_cache", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)
