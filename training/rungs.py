"""The ladder's rungs, from a Transformer to Hope one change at a time, and their configs at equal parameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_hope  # noqa: F401  the Auto classes then know Hope


UNIT = 4  # levels have multiples of so many hidden units

ATTENTION = {"layer_types": "full_attention"}
LEARNING = {"cms_training": "first_order"}
# One level that never learns.
SELF = {"cms_periods": [None]}
# Fixed projections, no delta term.
TITANS = {**SELF, "memory_delta_decay": False, "memory_self_values": False, "adaptive_projections": []}
# A matrix that every token is added to: no forgetting, no erasing.
MATRIX = {
    **TITANS,
    "memory_depth": 1,
    "memory_objective": "dot",
    "memory_weight_decay": False,
    "memory_momentum": False,
    "memory_retention": "zero",
}
UNWRITTEN = {"memory_max_rate": 1e-9}


@dataclass(frozen=True)
class Rung:
    """
    Attributes:
        about: what it is, for the table.
        fields: of the config, beyond the recipe's.
        rate_of: the rung whose tuned learning rate it takes; unset: it is tuned itself.
        inner_rate_of: the same of the rate that its levels learn with.
        kind: a `step` toward Hope; an `ablation` of the self-referential memory; or one of its `defaults`, chosen
            otherwise.
    """

    about: str
    fields: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    inner_rate_of: str | None = None
    kind: str = "step"

    @property
    def learns(self) -> bool:
        return "cms_training" in self.fields


def _memory(kind: str, about: str, **fields: Any) -> Rung:
    return Rung(about, {**SELF, **fields}, rate_of="self_referential", kind=kind)


RUNGS = {
    "transformer": Rung("Transformer++: Llama", {"model_type": "llama"}),
    "convolution": Rung("short convolutions and gates, no memory: nothing is ever written", {**MATRIX, **UNWRITTEN}),
    "linear_attention": Rung("linear attention: a matrix memory that adds", MATRIX),
    "delta": Rung("and erases along the key: the delta rule", {**MATRIX, "memory_delta_decay": True}),
    "titans": Rung("a deep memory with momentum and decay: Titans", TITANS),
    "self_referential": Rung("and the delta term, and memories that make keys, values, rates and decays", SELF),
    "hope": Rung(
        "and three levels that learn: Hope", LEARNING, rate_of="self_referential", inner_rate_of="hope_attention"
    ),
    "hope_attention": Rung(
        "attention, and three levels that learn: Hope-Attention", {**ATTENTION, **LEARNING}, rate_of="transformer"
    ),
    "no_delta": _memory("ablation", "without the delta term (DGD)", memory_delta_decay=False),
    "no_momentum": _memory("ablation", "without momentum", memory_momentum=False),
    "no_weight_decay": _memory("ablation", "without weight decay", memory_weight_decay=False),
    "no_k": _memory("ablation", "keys by a linear map", adaptive_projections=["v", "eta", "alpha"]),
    "no_v": _memory("ablation", "values by a linear map", adaptive_projections=["k", "eta", "alpha"]),
    "with_q": _memory("ablation", "queries by a memory, too", adaptive_projections=["k", "v", "q", "eta", "alpha"]),
    "chunk_read": _memory("defaults", "read as the chunk found it", memory_read="chunk"),
    "chunks_of_16": _memory("defaults", "chunks of 16 tokens", memory_chunk_size=16),
    "renewed_together": _memory("defaults", "keys and values renewed every 32 tokens, too", projection_chunk_size=32),
    "faster_start": _memory("defaults", "rates begin at 0.1", memory_initial_rate=0.1),
    "shorter_start": _memory("defaults", "decays begin at 0.995", memory_initial_decay=0.995),
}


def config_of(rung: Rung, recipe: dict[str, Any], parameters: int, vocab_size: int) -> dict[str, Any]:
    """
    The fields of a rung's config, with as wide levels as bring it to `parameters`.

    Raises:
        ValueError: it has more without any level.
    """
    fields = copy.deepcopy({**recipe["config"], **rung.fields})
    if fields.get("model_type") == "llama":
        known = vars(AutoConfig.for_model("llama"))
        fields = {name: value for name, value in fields.items() if name == "model_type" or name in known}
        fields["initializer_range"] = fields["hidden_size"] ** -0.5  # as Hope's: with Llama's 0.02 it learns slower
    elif isinstance(kind := fields.get("layer_types"), str):
        fields["layer_types"] = [kind] * fields["num_hidden_layers"]
    narrow, wider = (count({**fields, "intermediate_size": width}, vocab_size) for width in (UNIT, 2 * UNIT))
    width = UNIT * (1 + round((parameters - narrow) / (wider - narrow)))
    if width < UNIT:
        raise ValueError(f"`parameters`: a rung has {narrow:,} with levels of {UNIT} units, more than {parameters:,}.")
    return {**fields, "intermediate_size": width}


def count(fields: dict[str, Any], vocab_size: int) -> int:
    """Parameters of a model of these fields."""
    fields = {**fields, "vocab_size": vocab_size}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type", "hope"), **fields)
        ).num_parameters()
