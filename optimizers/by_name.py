"""An optimizer by its name, as a recipe has it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .deep_momentum import DeepMomentum
from .delta_gradient_descent import DeltaGradientDescent
from .delta_momentum import DeltaMomentum
from .level_groups import level_of_parameters, proportional_periods
from .m3 import M3
from .multi_frequency import MultiFrequency


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "delta_gradient_descent": DeltaGradientDescent,
    "delta_momentum": DeltaMomentum,
    "deep_momentum": DeepMomentum,
    "m3": M3,
}
OURS_TO_GIVE = {"self", "params", "model"}


def make_optimizer(
    name: str, model: nn.Module, *, level_periods: Sequence[int] | str | None = None, **options: Any
) -> Optimizer:
    """
    An optimizer for a model's parameters that need gradients, in groups as is usual.

    Vectors (norms, biases) have no weight decay. M3 orthogonalises the matrices inside of the model, and neither the
    embeddings nor the output layer.

    Args:
        name: "adamw", "sgd", "delta_gradient_descent", "delta_momentum", "deep_momentum" or "m3".
        model: a Hope model, or any other where `level_periods` is not given.
        level_periods: steps from one update to the next, for each level of the continuum memory (`MultiFrequency`);
            "config" for those in proportion to `config.cms_periods`.
        options: of the optimizer, such as `lr` and `weight_decay`; and `reduction` of `MultiFrequency`.

    Raises:
        ValueError: the name, an option's name or its value is none that there is; the possible ones are named.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"Optimizer must be one of {', '.join(map(repr, OPTIMIZERS))}, got {name!r}.")
    kind = OPTIMIZERS[name]
    known = set(inspect.signature(kind).parameters) - OURS_TO_GIVE
    wrapping = {"reduction": options.pop("reduction")} if level_periods is not None and "reduction" in options else {}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{name!r} has no option `{unknown[0]}`. It has {', '.join(sorted(known))}.")
    if kind is DeltaGradientDescent:
        options["model"] = model
    groups = _groups(name, model, level_periods)
    if level_periods is None:
        return kind(groups, **options)
    return MultiFrequency(kind(groups, **options), **wrapping)


def _groups(name: str, model: nn.Module, level_periods: Sequence[int] | str | None) -> list[dict[str, Any]]:
    levels, periods = {}, []
    if level_periods is not None:
        levels = level_of_parameters(model)
        periods = proportional_periods(model.config) if level_periods == "config" else list(level_periods)  # type: ignore[arg-type]
        if len(periods) != len(model.config.cms_periods):  # type: ignore[union-attr, arg-type]
            raise ValueError(
                f"`level_periods` must be 'config' or one for each of {len(model.config.cms_periods)} levels, "  # type: ignore[union-attr, arg-type]
                f"got {level_periods!r}."
            )
    outer = _embeddings(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        own: dict[str, Any] = {}
        if level_periods is not None:
            own["period"] = periods[levels[parameter]] if parameter in levels else 1
        if parameter.dim() < 2:
            own["weight_decay"] = 0.0
        elif name == "m3" and parameter in outer:
            own["ns_steps"] = 0
        groups.setdefault(tuple(own.items()), {"params": [], **own})["params"].append(parameter)
    if not groups:
        raise ValueError("`model` has no parameter that needs a gradient.")
    return list(groups.values())


def _embeddings(model: nn.Module) -> set[nn.Parameter]:
    """Weights of embeddings, and of an output layer over the vocabulary."""
    found = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return found | ({output.weight} if output is not None else set())
