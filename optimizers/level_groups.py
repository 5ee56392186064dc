"""The parameters of a Hope model by the level of its continuum memory that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from modeling_hope.continuum_memory import HopeLevel


def level_groups(model: nn.Module, periods: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """
    Param groups for `MultiFrequency`: one for each level of a Hope model's continuum memory, and one for all else.

    Args:
        model: a Hope model, or one that holds one (PEFT). Parameters that need no gradient are left out.
        periods: for each level, fastest first, the steps from one of its updates to the next. `None`: as the levels
            do while they read, in proportion to `config.cms_periods`, the fastest at every step; a level that never
            learns there is trained at every step.

    Returns:
        Groups with `params`, `period`, and `level` (`None` for all else, whose period is 1). Empty ones are left out.

    Raises:
        ValueError: the model has no continuum memory; `periods` do not fit its levels.
    """
    levels, periods = level_of_parameters(model), level_periods(model, periods)
    groups: dict[int | None, dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            level = levels.get(parameter)
            period = 1 if level is None else periods[level]
            groups.setdefault(level, {"params": [], "period": period, "level": level})["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: (group["level"] is not None, group["level"]))


def level_of_parameters(model: nn.Module) -> dict[nn.Parameter, int]:
    """The level of each parameter of a level's MLP, adapters included."""
    levels = {
        p: module.level for module in model.modules() if isinstance(module, HopeLevel) for p in module.parameters()
    }
    if not levels:
        raise ValueError("`model` has no continuum memory: its parameters have no levels.")
    return levels


def level_periods(model: nn.Module, periods: Sequence[int] | None = None) -> list[int]:
    """Steps from one update of each level to the next: those given, or in proportion to `config.cms_periods`."""
    config: Any = model.config
    tokens = config.cms_periods
    if periods is None:
        fastest = min((period for period in tokens if period is not None), default=1)
        return [1 if period is None else round(period / fastest) for period in tokens]
    if len(periods) != len(tokens):
        raise ValueError(f"`periods` must be one for each of {len(tokens)} levels, got {len(periods)}.")
    return list(periods)
