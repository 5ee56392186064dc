"""Hope for Hugging Face Transformers: language models that learn while they read."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_hope import HopeCache
from .configuration_hope import HopeConfig
from .modeling_hope import HopeForCausalLM, HopeModel, HopePreTrainedModel
from .session_hope import HopeSession


AutoConfig.register("hope", HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)

__all__ = ["HopeCache", "HopeConfig", "HopeForCausalLM", "HopeModel", "HopePreTrainedModel", "HopeSession"]
