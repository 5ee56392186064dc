"""How a Transformer's MLPs become the levels of a continuum memory (section 7.3: ad-hoc level stacking)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from modeling_hope import HopeConfig


STRATEGIES = ("depth", "split", "stack")


@dataclass(frozen=True)
class MlpPlace:
    """
    Where one layer's MLP is among the levels that the layer holds.

    Attributes:
        levels: for each level that holds a part of it, which one of the layer's, and the hidden units `start` to `stop`
            that it holds. Together they hold all.
        norm: which of the layer's norms are those around it.
        added: levels of the layer that hold none of it, and start as exact no-ops.
    """

    levels: tuple[tuple[int, int, int], ...]
    norm: int = 0
    added: tuple[int, ...] = ()


@dataclass(frozen=True)
class LevelPlan:
    """
    What a strategy makes of a model's MLPs.

    Attributes:
        fields: the HopeConfig fields it decides.
        places: each layer's.
    """

    fields: dict[str, Any]
    places: list[MlpPlace]


def plan_levels(
    strategy: str,
    layers: int,
    intermediate_size: int,
    periods: Sequence[int | None],
    learning_rates: float | Sequence[float],
    learning_layers: Sequence[int] | None,
    norm_placement: str,
) -> LevelPlan:
    """
    The plan of a strategy.

    `depth`: each layer's MLP becomes one level; the layers are divided among the levels from the first (fastest) to the
    last. `split`: each layer holds all levels side by side, and the hidden units of its MLP are divided among them, so
    that their sum is the MLP. `stack`: each layer holds all levels in a chain; its MLP is the slowest, the others start
    as no-ops.

    Args:
        learning_layers: layers whose levels learn; the others hold a level that never does. `None` for all.
        norm_placement: of the source's MLPs. Added levels have a norm before alone: one after would blow up the first
            little that they learn.

    Raises:
        ValueError: an argument is impossible; it is named.
    """
    levels = len(periods)
    learning = list(range(layers)) if learning_layers is None else sorted(set(learning_layers))
    if any(not 0 <= layer < layers for layer in learning):
        raise ValueError(f"`learning_layers` must lie between 0 and {layers - 1}, got {learning}.")
    if strategy == "split" and intermediate_size < levels:
        raise ValueError(f"`periods` has {levels} levels, and the MLPs {intermediate_size} hidden units to divide.")
    paces, rates = list(periods), learning_rates
    if len(learning) < layers and paces[-1] is not None:
        paces.append(None)
        if isinstance(rates, Sequence):
            rates = [*rates, rates[-1]]
    still, whole = [len(paces) - 1], MlpPlace(((0, 0, intermediate_size),))
    held, places = [still] * layers, [whole] * layers
    sizes = [intermediate_size] * len(paces)
    for index, layer in enumerate(learning):
        if strategy == "depth":
            held[layer] = [index * levels // len(learning)]
            continue
        held[layer] = list(range(levels))
        if strategy == "split":
            bounds = [0, *accumulate(_shares(intermediate_size, levels))]
            places[layer] = MlpPlace(tuple((level, *span) for level, span in enumerate(pairwise(bounds))))
        else:
            last = levels - 1
            places[layer] = MlpPlace(((last, 0, intermediate_size),), norm=last, added=tuple(range(last)))
    placements = [norm_placement] * len(paces)
    if strategy == "split":
        sizes[:levels] = _shares(intermediate_size, levels)
    elif strategy == "stack":
        sizes[: levels - 1] = [max(intermediate_size // 4, 1)] * (levels - 1)
        placements[: levels - 1] = ["pre"] * (levels - 1)
    fields = {
        "cms_variant": "independent" if strategy == "split" else "sequential",
        "cms_periods": paces,
        "cms_learning_rates": rates,
        "cms_levels_per_layer": held,
        "intermediate_size": sizes[0] if len(set(sizes)) == 1 else sizes,
        "cms_norm_placement": placements[0] if len(set(placements)) == 1 else placements,
    }
    if strategy == "split":
        fields["cms_aggregation"] = "sum"
    return LevelPlan(fields, places)


def places_of(config: HopeConfig) -> list[MlpPlace]:
    """
    Where a Hope model's layers hold one MLP each, as `depth` and `split` left it: read from the config.

    Raises:
        ValueError: the levels of a layer are no one MLP.
    """
    side_by_side = config.cms_variant == "independent" and config.cms_aggregation == "sum"
    places = []
    for layer, held in enumerate(config.cms_levels_per_layer or []):
        if len(held) > 1 and not side_by_side:
            raise ValueError(
                f"Layer {layer} holds {len(held)} levels in a chain, which no MLP of a Transformer is equal to: only models "
                "of the strategies 'depth' and 'split' can be exported."
            )
        bounds = [0, *accumulate(config.level_intermediate_sizes[level] for level in held)]
        places.append(MlpPlace(tuple((index, *span) for index, span in enumerate(pairwise(bounds)))))
    return places


def _shares(total: int, parts: int) -> list[int]:
    """`total` divided as evenly as it can be, the larger shares first."""
    return [total // parts + (part < total % parts) for part in range(parts)]
