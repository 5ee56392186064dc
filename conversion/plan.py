"""What becomes of a source: decided from its config and its headers before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers import initialization as init

from modeling_hope import HopeConfig, HopeForCausalLM

from .architecture import check_architecture
from .dtype import chosen_dtype
from .families import FAMILIES
from .family import Family
from .fresh import fresh_parameters
from .mixer import take_over
from .recipe import Recipe
from .report import NEW, NOT_NEEDED, ConversionReport, fast_weight_bytes
from .rope import with_rope
from .route import Route, plan_routes
from .source import Source
from .target import plan_target
from .tensor_info import TensorInfo


EMBEDDINGS = "model.embed_tokens.weight"
TIED = "the embeddings are tied"


class ConversionPlan:
    """
    The way of every tensor of a source.

    Attributes:
        target: the Hope model to make.
        dtype: of its weights.
        infos: shape and dtype of its parameters, by name.
        routes: of the source's tensors, by the source's name.
        unneeded: source tensors that no parameter is made of, and why.
        fresh: parameters that no source tensor becomes.
        report: all that can be said before the weights are read.

    Raises:
        ValueError: the source is of no supported family, needs what Hope has not, has a tensor without a place or lacks
            one, or a choice does not go with it.
    """

    def __init__(self, source: Source, recipe: Recipe, remote_code: bool = False):
        check_architecture(source.config, FAMILIES)
        self.source, self.recipe = source, recipe
        self.family: Family = FAMILIES[source.config.model_type]
        self.family.check(source.config)
        self.target = plan_target(self.family, source.config, recipe, remote_code)
        self.config = self.target.config
        self.dtype = chosen_dtype(recipe.dtype, source.dtype)
        self.model = on_meta(self.config)
        self.infos = parameter_infos(self.model, self.dtype)
        self.shapes = {name: info.shape for name, info in self.infos.items()}
        self.attention_shapes = self._attention_shapes()
        self.routes, self.unneeded = self._check_tensors(
            plan_routes(self.family, self.config, self.target.places, self.attention_shapes)
        )
        fates, origins = self._trace()
        self.fresh = [name for name in self.infos if name not in origins]
        self.report = self._report(fates, origins)

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        """As if every mixer were attention: where one is not, `take_over` has the last word."""
        if not self.recipe.mixer_layers:
            return self.shapes
        attention = {"layer_types": ["full_attention"] * self.config.num_hidden_layers, "sliding_window": None}
        config = HopeConfig.from_dict(self.config.to_dict() | attention)
        return {name: info.shape for name, info in parameter_infos(on_meta(config), self.dtype).items()}

    def _check_tensors(self, routes: list[Route]) -> tuple[dict[str, Route], dict[str, str]]:
        """Every tensor of the source has a place, and every place a tensor, of its shape."""
        wanted = {route.source: route for route in routes}
        infos, prefix = self.source.infos(), self.family.prefix
        found, unneeded = {}, {}
        tied = self._tied_heads()
        known = wanted.keys() | tied
        for name, info in infos.items():
            full = self.family.canonical(name)
            if full not in known and not self.family.ignores(full):
                full = prefix + name
            if self.family.ignores(full):
                unneeded[name] = "Hope computes it"
            elif full not in wanted and full in tied:
                unneeded[name] = TIED
            elif full not in wanted:
                raise ValueError(f"`source` tensor {name!r} has no place in a Hope model.")
            else:
                found[name] = wanted.pop(full)
                expected = found[name].source_shape(self.attention_shapes)
                if info.shape != expected:
                    raise ValueError(
                        f"`source` tensor {name!r} is {info.shape}, and should be {expected} by the source's config."
                    )
        if wanted:
            raise ValueError(f"`source` has no tensor for {', '.join(map(repr, wanted))}.")
        return found, unneeded

    def _tied_heads(self) -> set[str]:
        heads = {f"{source}.weight" for source, target in self.family.modules.items() if target == "lm_head"}
        return heads if self.config.tie_word_embeddings else set()

    def _trace(self) -> tuple[dict[str, str], dict[str, str]]:
        """The fate of each source tensor, and the origin of each parameter that is made of one; as the report has them."""
        fates = {name: f"{NOT_NEEDED}: {reason}" for name, reason in self.unneeded.items()}
        origins: dict[str, str] = {}
        for name, route in self.routes.items():
            targets = []
            for part, origin in route.origins():
                placed = self._placed(part, torch.empty(self.attention_shapes[part], device="meta"))
                if placed is not None:
                    targets.append(placed[0])
                    origins[placed[0]] = origin
            fates[name] = ", ".join(targets) or f"{NOT_NEEDED}: the memory in the place of attention has none"
        return fates, origins

    def _report(self, fates: dict[str, str], origins: dict[str, str]) -> ConversionReport:
        """What no source tensor becomes is new."""
        no_ops, infos = self._no_ops(), self.source.infos()
        for name in self.fresh:
            origins[name] = f"{NEW}: zero, so that the level is a no-op" if name in no_ops else f"{NEW}: initialised"
        return ConversionReport(
            self.source.name,
            self.family.model_type,
            self.recipe.strategy,
            fates=fates,
            origins={name: origins[name] for name in self.infos},
            notes=self.family.notes(self.source.config) + self.target.notes,
            source_parameters=sum(info.numel for name, info in infos.items() if name not in self.unneeded),
            parameters=sum(info.numel for info in self.infos.values()),
            memory_bytes=fast_weight_bytes(self.model, self.dtype),
        )

    def _no_ops(self) -> set[str]:
        """Parameters that are zero in the levels that a strategy added, of which not all have a bias."""
        return {
            f"model.layers.{layer}.cms.levels.{level}.down_proj.{kind}"
            for layer, place in enumerate(self.target.places)
            for level in place.added
            for kind in ("weight", "bias")
        }

    def _placed(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Where a tensor goes that would be `name` if every mixer were attention."""
        if name in self.shapes and self.shapes[name] == tuple(tensor.shape) and not self._in_memory(name):
            return name, tensor
        return take_over(name, tensor, self.config, self.shapes)

    def _in_memory(self, name: str) -> bool:
        return any(name.startswith(f"model.layers.{layer}.mixer.") for layer in self.recipe.mixer_layers)

    def comparable_source(self) -> PreTrainedModel:
        """The source, with the rotary angles of the one length that was asked for."""
        model = self.source.model()
        return with_rope(model, self.config.rope_parameters) if self.target.scaled else model

    @property
    def changes_function(self) -> bool:
        """Whether the model is not meant to equal the source."""
        return bool(self.recipe.mixer_layers)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the Hope model, once, in the order of the source's tensors; views where that is possible."""
        for name, tensor in self._source_tensors():
            route = self.routes.get(name)
            for part, piece in route.split(tensor) if route else ():
                placed = self._placed(part, piece)
                if placed is not None:
                    yield placed
            del tensor
        yield from fresh_parameters(self.model, self.fresh, self._no_ops())

    def _source_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The source's; a head beside embeddings to which it is tied has to be equal to them."""
        heads = [name for name, reason in self.unneeded.items() if reason == TIED]
        twins = set(heads)
        if heads:
            twins |= {name for name, route in self.routes.items() if EMBEDDINGS in route.targets}
        seen: list[torch.Tensor] = []
        for name, tensor in self.source.tensors():
            if name in twins:
                seen.append(tensor)
                if len(seen) == 2 and not torch.equal(*seen):
                    raise ValueError(
                        f"`source` has a {heads[0]} that differs from its embeddings, and tie_word_embeddings=True in its "
                        "config: set it to false, or take the tensor out."
                    )
            yield name, tensor
            del tensor


def on_meta(config: HopeConfig) -> HopeForCausalLM:
    """The model without its numbers."""
    with torch.device("meta"), init.no_init_weights():
        model = HopeForCausalLM(config)
        model.tie_weights()
        return model


def parameter_infos(model: HopeForCausalLM, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """What a model's checkpoint holds, in a dtype; rates and decays stay in float32 or better, as they do on loading."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: TensorInfo(
            tuple(parameter.shape), wide if any(kept in name for kept in model._keep_in_fp32_modules_strict) else dtype
        )
        for name, parameter in model.named_parameters()
    }
