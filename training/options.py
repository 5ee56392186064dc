"""Fields of settings that are also flags of a command, and what their values may be."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


def option(
    default: Any,
    group: str,
    says: str,
    choices: tuple[str, ...] = (),
    *,
    least: float | None = None,
    above: float | None = None,
) -> Any:
    """
    A field of a dataclass of settings.

    Args:
        default: its value, or a function that makes it. A list must not be empty, unless the default is the empty list.
        group: the flags that it stands with in a command's help.
        says: what it means, which is what the help says.
        choices: the values that it may have, or those in a list; none: any.
        least: the least number that it may be, or those in a list; none: any.
        above: what it must be more than.
    """
    metadata = {"group": group, "help": says, "choices": choices, "least": least, "above": above}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(settings: Any) -> None:
    """
    Raises:
        ValueError: a field's value is none that its `option` allows.
    """
    for field in dataclasses.fields(settings):
        name, value, allowed = field.name, getattr(settings, field.name), field.metadata
        if value == [] and field.default_factory is not list:
            raise ValueError(f"`{name}` is empty: give at least one{_of(allowed['choices'])}.")
        for one in value if isinstance(value, list) else [value]:
            if one is None:
                continue
            if allowed["choices"] and one not in allowed["choices"]:
                raise ValueError(f"`{name}` must be one{_of(allowed['choices'])}, got {one!r}.")
            if allowed["least"] is not None and not allowed["least"] <= one < math.inf:
                raise ValueError(f"`{name}` must be {allowed['least']} or more, got {one}.")
            if allowed["above"] is not None and not allowed["above"] < one < math.inf:
                raise ValueError(f"`{name}` must be above {allowed['above']}, got {one}.")


def _of(choices: tuple[str, ...]) -> str:
    return f" of {', '.join(choices)}" if choices else ""


def as_declared(settings: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values for fields of a dataclass, whole numbers as floats where floats are declared."""
    hints = typing.get_type_hints(settings)
    return {name: _as_float(value, hints[name]) for name, value in given.items()}


def _as_float(value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if list[float] in kinds and isinstance(value, list):
        return [_as_float(one, float) for one in value]
    return float(value) if float in kinds and type(value) is int else value
