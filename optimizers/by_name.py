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
from .level_groups import level_of_parameters, level_periods
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
# Of self-modifying memories: a norm's weights, and logits, of every head and memory. No maps, whatever their shapes.
SCALES = ("memories.gamma", "memories.momentum")
OURS_TO_GIVE = {"self", "params", "model"}


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    periods: Sequence[int] | str | None = None,
    rates_lr: float | None = None,
    **options: Any,
) -> Optimizer:
    """
    An optimizer for a model's parameters that need gradients, in groups as is usual.

    Norms, biases and what else is no map have no weight decay. M3 orthogonalises the matrices inside of the model, and neither the
    embeddings nor the output layer.

    Args:
        name: "adamw", "sgd", "delta_gradient_descent", "delta_momentum", "deep_momentum" or "m3".
        model: a Hope model, or any other where `periods` are not given.
        periods: steps from one update to the next, for each level of the continuum memory (`MultiFrequency`);
            "config" for those in proportion to `config.cms_periods`.
        rates_lr: learning rate of the levels' own rates, where they are parameters (`config.cms_learn_rates`): logarithms,
            which may need larger steps than weights. `None`: `lr`, as all else.
        options: of the optimizer, such as `lr` and `weight_decay`; and `reduction` of `MultiFrequency`.

    Raises:
        ValueError: the name, an option's name or its value is none that there is; the possible ones are named.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"Optimizer must be one of {', '.join(map(repr, OPTIMIZERS))}, got {name!r}.")
    kind = OPTIMIZERS[name]
    known = set(inspect.signature(kind).parameters) - OURS_TO_GIVE
    wrapping = {"reduction": options.pop("reduction")} if periods is not None and "reduction" in options else {}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{name!r} has no option `{unknown[0]}`. It has {', '.join(sorted(known))}.")
    if kind is DeltaGradientDescent:
        options["model"] = model
    groups = _groups(name, model, periods, rates_lr)
    try:
        optimizer = kind(groups, **options)
    except (TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{name!r} cannot be with these options, {options}: {error}.") from error
    return optimizer if periods is None else MultiFrequency(optimizer, **wrapping)


def _groups(
    name: str, model: nn.Module, periods: Sequence[int] | str | None, rates_lr: float | None
) -> list[dict[str, Any]]:
    paces: dict[nn.Parameter, int] = {}
    if periods is not None:
        if not hasattr(model.config, "cms_periods"):
            raise ValueError("`level_periods` is for models with levels, and `model` has none: leave it out.")
        steps = level_periods(model, None if periods == "config" else periods)  # type: ignore[arg-type]
        paces = {parameter: steps[level] for parameter, level in level_of_parameters(model).items()}
    outer = _embeddings(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own: dict[str, Any] = {}
        if rates_lr is not None and place.endswith("log_learning_rates"):
            own["lr"] = rates_lr
        if periods is not None:
            own["period"] = paces.get(parameter, 1)
        scale = parameter.dim() < 2 or place.endswith(SCALES)
        if scale:
            own["weight_decay"] = 0.0
        if name == "m3" and parameter.dim() > 1 and (scale or parameter in outer):
            own["ns_steps"] = 0
        groups.setdefault(tuple(own.items()), {"params": [], **own})["params"].append(parameter)
    if rates_lr is not None and not any("lr" in group for group in groups.values()):
        raise ValueError("`rates_lr` is for learned rates, and `model` has none: set `cms_learn_rates` in its config.")
    if not groups:
        raise ValueError("`model` has no parameter that needs a gradient.")
    return list(groups.values())


def _embeddings(model: nn.Module) -> set[torch.Tensor]:
    """Weights of embeddings, and of an output layer over the vocabulary."""
    found = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return found | ({output.weight} if output is not None else set())
