"""Granite 3 (dense): multipliers of embeddings, attention scores, residuals and logits."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, Family, same


GRANITE = Family(
    model_type="granite",
    prefix="model.",
    fields={
        **LLAMA_FIELDS,
        **same(
            "attention_bias",
            "mlp_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
    },
    modules=LLAMA_MODULES,
    unused=("use_cache",),
)
