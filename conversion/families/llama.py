"""Llama 2 and 3: the architecture that Hope's blocks were named after."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, ROTARY_BUFFERS, Family, Only, same


LLAMA = Family(
    model_type="llama",
    prefix="model.",
    fields={**LLAMA_FIELDS, **same("attention_bias", "mlp_bias")},
    modules=LLAMA_MODULES,
    only={"pretraining_tp": Only((1, None), "whose sliced products are not rebuilt; set it to 1")},
    unused=("use_cache",),
    ignored=ROTARY_BUFFERS,
)
