"""Mistral: Llama with a sliding window in every layer."""

from ..family import LLAMA_FIELDS, LLAMA_MODULES, ROTARY_BUFFERS, Family, windows_everywhere


MISTRAL = Family(
    model_type="mistral",
    prefix="model.",
    fields=LLAMA_FIELDS,
    modules=LLAMA_MODULES,
    windows=windows_everywhere,
    unused=("use_cache", "sliding_window"),
    ignored=ROTARY_BUFFERS,
)
