"""How a Transformer's MLPs become the levels of a continuum memory (section 7.3: ad-hoc level stacking)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


STRATEGIES = ("depth", "stack")


@dataclass(frozen=True)
class LevelPlan:
    """
    Where a strategy puts each layer's MLP, and what it adds.

    Attributes:
        fields: the HopeConfig fields it decides.
        places: for each layer, what stands for `{mlp}` and `{mlp_norm}` in the targets of a family's tensors.
        added: for each layer, indices of levels that start as exact no-ops (down-projection zero).
    """

    fields: dict[str, Any]
    places: list[dict[str, str]]
    added: list[list[int]] = field(default_factory=list)


def plan_levels(
    strategy: str,
    layers: int,
    intermediate_size: int,
    periods: Sequence[int | None],
    learning_layers: Sequence[int] | None,
) -> LevelPlan:
    """
    The plan of a strategy.

    `depth`: each layer's MLP becomes one level; the layers are divided among the levels from the first (fastest) to the
    last. `stack`: each layer holds all levels, in a chain; its MLP is the slowest, the others start as no-ops.

    Args:
        learning_layers: layers whose levels learn; the others hold a level that never does. `None` for all.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}.")
    if not periods:
        raise ValueError("`periods` is empty: give at least one.")
    learning = list(range(layers)) if learning_layers is None else sorted(set(learning_layers))
    if any(not 0 <= layer < layers for layer in learning):
        raise ValueError(f"`learning_layers` must lie between 0 and {layers - 1}, got {learning}.")
    levels = len(periods)
    periods = list(periods)
    if len(learning) < layers and periods[-1] is not None:
        periods.append(None)
    if strategy == "depth":
        held = [[len(periods) - 1] for _ in range(layers)]
        for index, layer in enumerate(learning):
            held[layer] = [index * levels // len(learning)]
        places = [{"mlp": "cms.levels.0", "mlp_norm": "cms.norms.0"} for _ in range(layers)]
        sizes: int | list[int] = intermediate_size
        added: list[list[int]] = [[] for _ in range(layers)]
    else:
        held = [list(range(levels)) if layer in learning else [len(periods) - 1] for layer in range(layers)]
        places = [{"mlp": f"cms.levels.{len(h) - 1}", "mlp_norm": f"cms.norms.{len(h) - 1}"} for h in held]
        sizes = [max(intermediate_size // 4, 1)] * (levels - 1) + [intermediate_size] * (len(periods) - levels + 1)
        added = [list(range(len(h) - 1)) for h in held]
    fields = {
        "cms_variant": "sequential",
        "cms_periods": periods,
        "cms_levels_per_layer": held,
        "intermediate_size": sizes,
    }
    return LevelPlan(fields, places, added)
