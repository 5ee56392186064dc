"""Hope for Hugging Face Transformers: language models that learn while they read."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_hope import HopeCache
from .configuration_hope import HopeConfig
from .heads_hope import HopeForQuestionAnswering, HopeForSequenceClassification, HopeForTokenClassification
from .modeling_hope import HopeForCausalLM, HopeModel, HopePreTrainedModel


AutoConfig.register("hope", HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
AutoModelForQuestionAnswering.register(HopeConfig, HopeForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(HopeConfig, HopeForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HopeConfig, HopeForTokenClassification, exist_ok=True)

__all__ = [
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeForQuestionAnswering",
    "HopeForSequenceClassification",
    "HopeForTokenClassification",
    "HopeModel",
    "HopePreTrainedModel",
]
