"""Gemma 3 (text): Gemma 2 with norms of queries and keys, and a rope of its own in the layers that slide."""

from ..family import (
    QK_NORM_MODULES,
    Derived,
    Family,
    always,
    rope_of_whole_heads,
    windows_by_layer_type,
    without,
)
from .gemma2 import CAUSAL, GEMMA_FIELDS, GEMMA_MODULES


GEMMA3 = Family(
    model_type="gemma3_text",
    prefix="model.",
    fields={
        **without(GEMMA_FIELDS, "attn_logit_softcapping"),
        "qk_norm": always("head"),
        "rope_parameters": Derived(
            ("rope_parameters",), lambda config: rope_of_whole_heads(config.rope_parameters["full_attention"])
        ),
        "local_rope_parameters": Derived(
            ("rope_parameters",), lambda config: rope_of_whole_heads(config.rope_parameters["sliding_attention"])
        ),
        "layer_ropes": Derived(
            ("layer_types",),
            lambda config: ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        ),
    },
    modules={**GEMMA_MODULES, **QK_NORM_MODULES},
    windows=windows_by_layer_type,
    only=CAUSAL,
    unused=("use_cache", "sliding_window", "attn_logit_softcapping"),  # of which Transformers' own class makes no use
)
