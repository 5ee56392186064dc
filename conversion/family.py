"""A family of Transformers, described: which config fields and which tensors of it are Hope's, by what name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """
    One `model_type`, in the words of its own config and state dict.

    Attributes:
        model_type: of the source's config.
        fields: fields of the source's config that are HopeConfig's, by the same name.
        tensors: pattern of a source tensor to its name in Hope. `{layer}` stands for a layer's number; `{mlp}` and
            `{mlp_norm}` in a target for where the strategy puts a layer's MLP and the norm before it.
        ignored: patterns of tensors that some checkpoints carry and Hope computes by itself.
        refuse: says why a config of this family cannot become a Hope model; `None` when it can.
        adapt: what else the config has to say, from the source's config.
    """

    model_type: str
    fields: tuple[str, ...]
    tensors: dict[str, str]
    ignored: tuple[str, ...] = ()
    refuse: Callable[[Any], str | None] = lambda config: None
    adapt: Callable[[Any], dict[str, Any]] = lambda config: {}

    def config_fields(self, config: Any) -> dict[str, Any]:
        """The HopeConfig fields that a source's config decides."""
        return {name: getattr(config, name) for name in self.fields} | self.adapt(config)

    def target(self, name: str, places: dict[str, str]) -> str | None:
        """
        Where a source tensor goes; `None` when the family does not know it.

        `places`: what the strategy puts for `{mlp}` and `{mlp_norm}`.
        """
        for pattern, target in self.tensors.items():
            match = _match(pattern, name)
            if match:
                return target.format(**places, **match.groupdict())
        return None

    def ignores(self, name: str) -> bool:
        return any(_match(pattern, name) for pattern in self.ignored)


def _match(pattern: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)"), name)
