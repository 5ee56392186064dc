"""Which architectures can become Hope, and for the others why not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
OTHER_INPUTS = ("vision_config", "audio_config")
# What configs of state-space models call the size of their state.
STATES = ("state_size", "mamba_d_state", "ssm_state_size")
LANGUAGE_MODEL_HEADS = ("ForCausalLM", "LMHeadModel")


def check_architecture(config: Any, supported: Iterable[str]) -> None:
    """
    Refuse what cannot become a Hope model, by its config alone.

    Args:
        config: the source's Transformers config.
        supported: the `model_type`s of the families that can.

    Raises:
        ValueError: names what the architecture has that Hope has not, and what to do where something can be done.
    """
    supported = sorted(supported)
    reason = _reason(config, supported)
    if reason:
        raise ValueError(f"`source` cannot become a Hope model: {reason}")


def _reason(config: Any, supported: list[str]) -> str | None:
    model_type = config.model_type
    if model_type == "hope":
        return "it is one already."
    if getattr(config, "quantization_config", None) is not None:
        return (
            "it is quantized (`quantization_config`). Load it, call `dequantize()` on the model, save it and convert that, "
            "or convert the checkpoint it was quantized from."
        )
    text = getattr(config, "text_config", None)
    if text is not None or any(getattr(config, name, None) is not None for name in OTHER_INPUTS):
        return f"model_type {model_type!r} is multimodal. {_language_model(text, supported)}"
    experts = next((name for name in EXPERTS if (getattr(config, name, None) or 0) > 1), None)
    if experts or model_type.endswith("_moe") or model_type in ("mixtral", "dbrx"):
        told = f" (`{experts}` is {getattr(config, experts)})" if experts else ""
        return f"model_type {model_type!r} is a mixture of experts{told}, and Hope's levels have no router. Convert a dense model."
    if getattr(config, "is_encoder_decoder", False):
        return f"model_type {model_type!r} is an encoder-decoder. Convert a decoder."
    if model_type not in supported:
        if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return f"model_type {model_type!r} is an encoder: it sees what comes after. Convert a decoder."
        kind = "a state-space model" if any(hasattr(config, name) for name in STATES) else "not supported"
        return f"model_type {model_type!r} is {kind}. Supported are {', '.join(supported)}."
    for name in getattr(config, "architectures", None) or ():
        if not name.endswith(LANGUAGE_MODEL_HEADS):
            return (
                f"it is a {name}, which is no language model: its head would be lost, or it has none. "
                f"Convert its {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, 'causal language model')}."
            )
    return None


def _language_model(text: Any, supported: list[str]) -> str:
    """How to get at the language model of a multimodal one."""
    model_type = getattr(text, "model_type", None)
    if model_type not in supported:
        return "Convert a language model."
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return (
        f"Its language model alone can be converted: load it as `whole`, make `text = {name}(whole.config.text_config)`, "
        f"set `text.model = whole.model.language_model` and `text.lm_head = whole.lm_head`, and give `text`, or save it and "
        f"give the directory."
    )
