"""Qwen3: norms of each head's queries and keys."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, QK_NORM_MODULES, Family, always, same, windows_by_layer_type


QWEN3 = Family(
    model_type="qwen3",
    prefix="model.",
    fields={**LLAMA_FIELDS, **same("attention_bias"), "qk_norm": always("head")},
    modules={**LLAMA_MODULES, **QK_NORM_MODULES},
    windows=windows_by_layer_type,
    unused=("use_cache", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)
