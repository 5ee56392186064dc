"""The way of one tensor from a Transformer into Hope, and back: cut up here, put together there, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from modeling_hope import HopeConfig

from .family import Family, Fused
from .report import NEW
from .strategy import MlpPlace


@dataclass(frozen=True)
class Part:
    """
    Hope's tensors that together are one of a Transformer's, or one of those that are fused in it.

    Attributes:
        targets: their names, in order.
        sizes: how much of the tensor each has, along `axis`.
        axis: along which they lie side by side; `None` where they add up, all but the first starting at zero.
        rows: outputs of the part.
    """

    targets: tuple[str, ...]
    sizes: tuple[int, ...]
    axis: int | None
    rows: int

    def cut(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if self.axis is None:
            pieces = [tensor, *(torch.zeros_like(tensor) for _ in self.targets[1:])]
        else:
            pieces = list(tensor.split(list(self.sizes), dim=self.axis))
        yield from zip(self.targets, pieces, strict=True)

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pieces = [tensors[target] for target in self.targets]
        if len(pieces) == 1:
            return pieces[0]
        return torch.stack(pieces).sum(0) if self.axis is None else torch.cat(pieces, dim=self.axis)

    def origins(self, whole: str) -> Iterator[tuple[str, str]]:
        """Each target, and in words what it is of a tensor that is called `whole`."""
        start = 0
        for index, (target, size) in enumerate(zip(self.targets, self.sizes, strict=True)):
            if self.axis is None and index > 0:
                yield target, f"{NEW}: zero (the bias is in the first level)"
            elif self.axis is None or len(self.targets) == 1:
                yield target, whole
            else:
                yield target, f"{whole}, hidden units {start}-{start + size - 1}"
            start += size


@dataclass(frozen=True)
class Route:
    """
    One tensor of a Transformer.

    Attributes:
        source: its name.
        parts: what is fused in it; mostly one.
        by_head: how many heads' outputs alternate between the parts; `None` where each part's lie together.
        transposed: a weight `[in_features, out_features]`.
    """

    source: str
    parts: tuple[Part, ...]
    by_head: int | None = None
    transposed: bool = False

    @property
    def targets(self) -> list[str]:
        return [target for part in self.parts for target in part.targets]

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The source's tensor as Hope's, by name; views where that is possible."""
        if self.transposed:
            tensor = tensor.T
        rows = [part.rows for part in self.parts]
        if self.by_head:
            grouped = tensor.unflatten(0, (self.by_head, len(rows), -1))
            parts = [part.flatten(0, 1) for part in grouped.unbind(1)]
        else:
            parts = list(tensor.split(rows)) if len(rows) > 1 else [tensor]
        for part, piece in zip(self.parts, parts, strict=True):
            yield from part.cut(piece)

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hope's tensors, by name, as the source's."""
        parts = [part.join(tensors) for part in self.parts]
        if self.by_head:
            grouped = torch.stack([part.unflatten(0, (self.by_head, -1)) for part in parts], dim=1)
            tensor = grouped.flatten(0, 2)
        else:
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.T.contiguous() if self.transposed else tensor

    def source_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the source's tensor, from those of Hope's."""
        first = shapes[self.targets[0]]
        inner = first[1:]
        if self.parts[0].axis == 1:
            inner = (sum(self.parts[0].sizes),)
        shape = (sum(part.rows for part in self.parts), *inner)
        return tuple(reversed(shape)) if self.transposed else shape

    def origins(self) -> Iterator[tuple[str, str]]:
        """Each of Hope's tensors, and in words where it comes from."""
        for index, part in enumerate(self.parts):
            fused = f", part {index + 1} of {len(self.parts)}" if len(self.parts) > 1 else ""
            yield from part.origins(f"{self.source}{fused}")


def plan_routes(
    family: Family, config: HopeConfig, places: list[MlpPlace], shapes: Mapping[str, tuple[int, ...]]
) -> list[Route]:
    """
    The routes of a family's tensors, those that a model of this config has.

    Args:
        places: where each layer's MLP is.
        shapes: of the Hope model's parameters, by name.
    """
    routes = []
    for source, target in family.modules.items():
        fused = target if isinstance(target, Fused) else Fused((target,))
        by_head = config.num_attention_heads if fused.by_head else None
        for layer in range(config.num_hidden_layers) if "{layer}" in source else [None]:
            for kind in ("weight", "bias"):
                targets = {module: _targets(module, kind, layer, places) for module in fused.modules}
                if all(name in shapes for names in targets.values() for name in names):
                    parts = tuple(_part(module, kind, names, shapes) for module, names in targets.items())
                    name = f"{source.format(layer=layer)}.{kind}"
                    routes.append(Route(name, parts, by_head, fused.transposed and kind == "weight"))
    return routes


def _targets(module: str, kind: str, layer: int | None, places: list[MlpPlace]) -> list[str]:
    """Names of Hope's tensors of one module."""
    if layer is None:
        return [f"{module}.{kind}"]
    place, cms = places[layer], f"model.layers.{layer}.cms"
    names = {
        "layer": layer,
        "mlp_norm": f"{cms}.norms.{place.norm}",
        "mlp_output_norm": f"{cms}.output_norms.{place.norm}",
    }
    if "{mlp}" not in module:
        return [f"{module.format(**names)}.{kind}"]
    return [f"{module.format(mlp=f'{cms}.levels.{index}', **names)}.{kind}" for index, _, _ in place.levels]


def _part(module: str, kind: str, targets: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Part:
    """How tensors of one module share the hidden units of an MLP, if there are several."""
    first = shapes[targets[0]]
    if "{mlp}" not in module or len(targets) == 1:
        return Part(tuple(targets), (first[0],), 0, first[0])
    if not module.endswith(".down_proj"):
        sizes = tuple(shapes[target][0] for target in targets)
        return Part(tuple(targets), sizes, 0, sum(sizes))
    if kind == "bias":
        return Part(tuple(targets), (first[0],) * len(targets), None, first[0])
    return Part(tuple(targets), tuple(shapes[target][1] for target in targets), 1, first[0])
