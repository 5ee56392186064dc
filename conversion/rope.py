"""Rotary positions whose angles depend on the length of a text, made those of one length."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel


def rope_at(rope: dict[str, Any], config: Any, length: int | None) -> dict[str, Any]:
    """
    The `rope_parameters` with which a model reads texts of every length as the source reads one of this length.

    A memory reads on without an end, and cannot know how long a text will be: `"dynamic"` and `"longrope"` become what
    they are at one length. The others are as they were.

    Args:
        rope: the source's.
        config: the source's.
        length: in tokens; `None` for the longest that the source reads with its angles unscaled.
    """
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        turned = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        factor, trained = rope["factor"], config.max_position_embeddings
        scale = factor * max(length or 0, trained) / trained - (factor - 1)
        kept = {name: value for name, value in rope.items() if name not in ("factor", "type")}
        return {**kept, "rope_type": "default", "rope_theta": rope["rope_theta"] * scale ** (turned / (turned - 2))}
    if kind == "longrope":
        trained = rope["original_max_position_embeddings"]
        factors = rope["long_factor"] if (length or 0) > trained else rope["short_factor"]
        factor = rope.get("factor") or config.max_position_embeddings / trained
        return {**rope, "factor": factor, "short_factor": factors, "long_factor": factors}
    return rope


def length_of_unscaled(rope: dict[str, Any], config: Any) -> int | None:
    """The longest text, in tokens, that the source reads with its angles unscaled; `None` when they never depend on it."""
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        return config.max_position_embeddings
    return rope["original_max_position_embeddings"] if kind == "longrope" else None


def with_rope(model: PreTrainedModel, rope: dict[str, Any] | None) -> PreTrainedModel:
    """A copy of a model of a family with one rope, reading with the angles of `rope`."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = dict(rope or {})
    fixed = copy.deepcopy(model)
    fixed.base_model.rotary_emb = type(fixed.base_model.rotary_emb)(config)
    return fixed


def same_angles(one: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    """Whether two `rope_parameters` that `rope_at` gave, of the same source, are of the same length."""
    return all((one or {}).get(name) == other.get(name) for name in ("rope_theta", "short_factor"))
