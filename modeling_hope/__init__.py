"""Hope for Hugging Face Transformers: language models that learn while they read."""

from transformers import AutoConfig

from .auto_hope import (
    AUTO_CLASSES,
    HopeCache,
    HopeConfig,
    HopeForCausalLM,
    HopeForQuestionAnswering,
    HopeForSequenceClassification,
    HopeForTokenClassification,
    HopeModel,
    HopePreTrainedModel,
    HopeSession,
    consolidate,
)


AutoConfig.register("hope", HopeConfig, exist_ok=True)
for auto_class, hope_class in AUTO_CLASSES.items():
    auto_class.register(HopeConfig, hope_class, exist_ok=True)

__all__ = [
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeForQuestionAnswering",
    "HopeForSequenceClassification",
    "HopeForTokenClassification",
    "HopeModel",
    "HopePreTrainedModel",
    "HopeSession",
    "consolidate",
]
