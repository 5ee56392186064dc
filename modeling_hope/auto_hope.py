"""
Which Auto class finds which of Hope's, and the one file that remote code is loaded by.

Code is saved with models of a registered class, by Transformers' own `HopeForCausalLM.register_for_auto_class()` or, for
all at once, `HopeConfig.register_for_auto_class()`; and with any model that came with code.

From a directory, Transformers loads each file that an `auto_map` names as a package of its own. Naming one file for all
makes config, models and memories those of one package. Whatever else a user without this package needs is imported here:
`get_class_from_dynamic_module("auto_hope.HopeCache", directory)`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache_hope import HopeCache
from .configuration_hope import HopeConfig
from .consolidation import consolidate
from .heads_hope import HopeForQuestionAnswering, HopeForSequenceClassification, HopeForTokenClassification
from .modeling_hope import HopeForCausalLM, HopeModel, HopePreTrainedModel
from .session_hope import HopeSession


AUTO_CLASSES = {
    AutoModel: HopeModel,
    AutoModelForCausalLM: HopeForCausalLM,
    AutoModelForQuestionAnswering: HopeForQuestionAnswering,
    AutoModelForSequenceClassification: HopeForSequenceClassification,
    AutoModelForTokenClassification: HopeForTokenClassification,
}

AUTO_MAP = {
    auto_class.__name__: f"auto_hope.{hope_class.__name__}"
    for auto_class, hope_class in {AutoConfig: HopeConfig, **AUTO_CLASSES}.items()
}

# `Trainer` shifts labels for label smoothing where a class bears one of these names; registering adds none.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HopeConfig.model_type] = HopeForCausalLM.__name__

__all__ = [
    "AUTO_CLASSES",
    "AUTO_MAP",
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
