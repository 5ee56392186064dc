"""
The families that can be converted, a file each.

To add one: describe it in a file (`qwen3.py` is one of the shortest; `Family` says what each attribute is), list it below,
and give `CONFIGS` in `tests/stock_models.py` a small config of it, with its odd options switched on. The tests then hold
it to its stock class by every strategy and on the way back, and to speak of every field of its config.
"""

from ..family import Family
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .smollm3 import SMOLLM3


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3, GRANITE, GPT_NEOX, GPT2,
    )
}  # fmt: skip
