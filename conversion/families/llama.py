"""Llama 2 and 3: the architecture that Hope's blocks were named after."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, ROTARY_BUFFERS, Family, same


LLAMA = Family(
    model_type="llama",
    prefix="model.",
    fields={**LLAMA_FIELDS, **same("attention_bias", "mlp_bias")},
    modules=LLAMA_MODULES,
    unused=("use_cache", "pretraining_tp"),  # of which Transformers' own class makes no use
    ignored=ROTARY_BUFFERS,
)
