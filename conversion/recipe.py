"""What a user wants of a conversion, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from modeling_hope import HopeConfig

from .dtype import floating_dtype
from .strategy import STRATEGIES


# HopeConfig fields that a conversion makes of the source and of these choices.
DECIDED = (
    "cms_variant",
    "cms_aggregation",
    "cms_periods",
    "cms_learning_rates",
    "cms_levels_per_layer",
    "cms_norm_placement",
    "layer_types",
    "sliding_window",
    "converted_from",
)


@dataclass(frozen=True)
class Recipe:
    """
    The choices of a conversion; those of `convert`, which says what they are.

    Raises:
        ValueError: one is impossible; it is named.
    """

    strategy: str = "depth"
    periods: Sequence[int | None] = (512, 2048, 8192)
    learning_rates: float | Sequence[float] = 0.1
    window: int | None = None
    attention_sinks: int = 4
    learning_layers: Sequence[int] | None = None
    mixer_layers: Sequence[int] = ()
    rope_length: int | None = None
    dtype: torch.dtype | str = "auto"
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {', '.join(map(repr, STRATEGIES))}, got {self.strategy!r}.")
        if not self.periods:
            raise ValueError("`periods` is empty: give at least one.")
        HopeConfig(cms_periods=list(self.periods), cms_learning_rates=self.learning_rates)
        for name in ("window", "rope_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1 token, got {value}.")
        if self.attention_sinks < 0:
            raise ValueError(f"`attention_sinks` must be 0 or more, got {self.attention_sinks}.")
        object.__setattr__(self, "dtype", floating_dtype(self.dtype))
        decided = sorted(set(self.config) & set(DECIDED))
        if decided:
            raise ValueError(
                f"`{decided[0]}` is decided by the source, `strategy`, `periods` and `window`: leave it out."
            )
        unknown = sorted(set(self.config) - set(HopeConfig.__dataclass_fields__))
        if unknown:
            raise ValueError(f"HopeConfig has no field `{unknown[0]}`.")
