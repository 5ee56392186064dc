"""The Hope model that a source becomes, decided from the source's config, and how far the two are equal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from modeling_hope import HopeConfig
from modeling_hope.auto_hope import AUTO_MAP

from .family import Family
from .mixer import mixer_fields
from .recipe import Recipe
from .rope import length_of_unscaled, rope_at
from .strategy import MlpPlace, plan_levels


# Of the source's config, what is true of the source alone.
NOT_EXPORTED = ("transformers_version", "_name_or_path", "auto_map", "dtype")


@dataclass(frozen=True)
class Target:
    """
    A Hope model to make.

    Attributes:
        config: its config.
        places: of each layer's MLP among the levels.
        limit: most tokens on which it is equal to the source; `None` for any number.
        scaled: it reads with the rotary angles that the source has for longer texts alone.
        notes: where it is not equal to the source, for the report.
    """

    config: HopeConfig
    places: list[MlpPlace]
    limit: int | None
    scaled: bool
    notes: list[str]


def plan_target(family: Family, source: Any, recipe: Recipe, remote_code: bool = False) -> Target:
    """
    The model that a recipe makes of a source.

    Args:
        source: its config.
        remote_code: have the config name the code that is saved with the model.

    Raises:
        ValueError: a choice does not go with the source.
    """
    fields = family.config_fields(source)
    layers = fields["num_hidden_layers"]
    levels = plan_levels(
        recipe.strategy,
        layers,
        fields["intermediate_size"],
        recipe.periods,
        recipe.learning_rates,
        recipe.learning_layers,
        fields.get("norm_placement", "pre"),
    )
    unscaled = _fix_ropes(fields, source, recipe.rope_length)
    fields |= levels.fields | _attention_fields(family.windows(source), recipe)
    if recipe.mixer_layers:
        fields |= mixer_fields(fields, recipe.config)
    told = json.loads(source.to_json_string(use_diff=False))
    fields["converted_from"] = {name: value for name, value in told.items() if name not in NOT_EXPORTED}
    if remote_code:
        fields["auto_map"] = dict(AUTO_MAP)
    config = HopeConfig(**(fields | dict(recipe.config)))
    scaled = unscaled is not None and (recipe.rope_length or 0) > unscaled
    limits = (recipe.window, config.longest_stream, None if scaled else unscaled)
    return Target(
        config,
        levels.places,
        min((limit for limit in limits if limit is not None), default=None),
        scaled,
        _notes(recipe, unscaled, scaled),
    )


def _fix_ropes(fields: dict[str, Any], source: Any, length: int | None) -> int | None:
    """Make ropes whose angles depend on the length of a text those of one length; the longest that none of them scales."""
    unscaled = []
    for name in ("rope_parameters", "local_rope_parameters"):
        rope = fields.get(name)
        if rope is not None:
            unscaled.append(length_of_unscaled(rope, source))
            fields[name] = rope_at(rope, source, length)
    return min((found for found in unscaled if found is not None), default=None)


def _attention_fields(native: list[int | None], recipe: Recipe) -> dict[str, Any]:
    """
    Mixers and windows: those of layers that slide stay, without sinks, for the source knows none.

    Args:
        native: each layer's window in the source.
    """
    layers, mixers = len(native), sorted(set(recipe.mixer_layers))
    if any(not 0 <= layer < layers for layer in mixers):
        raise ValueError(f"`mixer_layers` must lie between 0 and {layers - 1}, got {mixers}.")
    windows = [recipe.window if window is None else window for window in native]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    for layer in mixers:
        kinds[layer], windows[layer] = "hope_memory", None
    sinks = [recipe.attention_sinks if window is None else 0 for window in native]
    sliding = [layer for layer in range(layers) if windows[layer] is not None]
    return {
        "layer_types": kinds,
        "sliding_window": _one_or_all(windows, sliding),
        "attention_sinks": _one_or_all(sinks, sliding or list(range(layers))),
    }


def _one_or_all(values: list[Any], used: list[int]) -> Any:
    """One value where all that are used are the same."""
    found = {values[layer] for layer in used}
    return values if len(found) > 1 else next(iter(found), None)


def _notes(recipe: Recipe, unscaled: int | None, scaled: bool) -> list[str]:
    notes = []
    if recipe.mixer_layers:
        layers = ", ".join(map(str, sorted(set(recipe.mixer_layers))))
        notes.append(
            f"attention of layers {layers}: replaced by the self-modifying memory, so that the model is not equal to its "
            "source before it is trained"
        )
    if recipe.window is not None:
        notes.append(f"sliding window {recipe.window}: equal to the source as far as the window reaches")
    if scaled:
        notes.append(f"rope: equal to the source in texts of {recipe.rope_length} tokens")
    elif unscaled is not None:
        notes.append(
            f"rope: equal to the source in texts of up to {unscaled} tokens, beyond which its angles depend on the length "
            "(see rope_length)"
        )
    return notes
