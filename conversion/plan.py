"""What becomes of a source: decided from its config and its headers before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import initialization as init

from modeling_hope import HopeConfig, HopeForCausalLM
from modeling_hope.auto_hope import AUTO_MAP

from .architecture import check_architecture
from .dtype import chosen_dtype
from .families import FAMILIES
from .family import Family
from .fresh import fresh_parameters
from .mixer import mixer_fields, take_over
from .recipe import Recipe
from .report import ConversionReport, fast_weight_bytes
from .rope import length_of_unscaled, rope_at, with_rope
from .route import Route, plan_routes
from .source import Source
from .strategy import LevelPlan, plan_levels
from .tensor_info import TensorInfo


# Of the source's config, what is true of the source alone.
NOT_EXPORTED = ("transformers_version", "_name_or_path", "auto_map", "dtype")
EMBEDDINGS = "model.embed_tokens.weight"


class ConversionPlan:
    """
    The way of every tensor of a source.

    Attributes:
        config: the Hope model's.
        dtype: of its weights.
        infos: shape and dtype of its parameters, by name.
        routes: of the source's tensors, by the source's name.
        fresh: parameters that no source tensor becomes.
        report: all that can be said before the weights are read.
        limit: most tokens on which it is equal to the source; `None` for any number.
        scaled: it reads with the rotary angles that the source has for longer texts alone.

    Raises:
        ValueError: the source is of no supported family, needs what Hope has not, has a tensor without a place or lacks
            one, or a choice does not go with it.
    """

    def __init__(self, source: Source, recipe: Recipe, remote_code: bool = False):
        check_architecture(source.config, FAMILIES)
        self.source, self.recipe = source, recipe
        self.family: Family = FAMILIES[source.config.model_type]
        self.family.check(source.config)
        self.levels, self.config = self._configs(remote_code)
        self.dtype = chosen_dtype(recipe.dtype, source.dtype)
        self.model = on_meta(self.config)
        self.infos = parameter_infos(self.model, self.dtype)
        self.shapes = {name: info.shape for name, info in self.infos.items()}
        self.routes, self.unneeded = self._check_tensors(self._routes())
        self.report = self._report()

    def _configs(self, remote_code: bool) -> tuple[LevelPlan, HopeConfig]:
        source, recipe = self.source.config, self.recipe
        fields = self.family.config_fields(source)
        layers = fields["num_hidden_layers"]
        plan = plan_levels(
            recipe.strategy,
            layers,
            fields["intermediate_size"],
            recipe.periods,
            recipe.learning_rates,
            recipe.learning_layers,
            fields.get("norm_placement", "pre"),
        )
        self.limit, self.unscaled, self.scaled = None, None, False
        for name in ("rope_parameters", "local_rope_parameters"):
            if fields.get(name) is not None:
                unscaled = length_of_unscaled(fields[name], source)
                if unscaled is not None:
                    self.unscaled = unscaled
                    self.scaled = (recipe.rope_length or 0) > unscaled
                    self.limit = None if self.scaled else unscaled
                fields[name] = rope_at(fields[name], source, recipe.rope_length)
        fields |= plan.fields | self._attention(layers)
        if recipe.mixer_layers:
            fields |= mixer_fields(fields, recipe.config)
        fields["converted_from"] = {
            name: value
            for name, value in json.loads(source.to_json_string(use_diff=False)).items()
            if name not in NOT_EXPORTED
        }
        if remote_code:
            fields["auto_map"] = dict(AUTO_MAP)
        config = HopeConfig(**(fields | dict(recipe.config)))
        for length in (recipe.window, config.longest_stream):
            if length is not None:
                self.limit = min(length, self.limit or length)
        return plan, config

    def _attention(self, layers: int) -> dict[str, Any]:
        """Mixers and windows: those of layers that slide stay, without sinks, for the source knows none."""
        recipe, native = self.recipe, self.family.windows(self.source.config)
        mixers = sorted(set(recipe.mixer_layers))
        if any(not 0 <= layer < layers for layer in mixers):
            raise ValueError(f"`mixer_layers` must lie between 0 and {layers - 1}, got {mixers}.")
        windows = [recipe.window if window is None else window for window in native]
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        for layer in mixers:
            kinds[layer], windows[layer] = "hope_memory", None
        sinks = [recipe.attention_sinks if window is None else 0 for window in native]
        sliding = [layer for layer in range(layers) if windows[layer] is not None]
        return {
            "layer_types": kinds,
            "sliding_window": _one_or_all(windows, sliding),
            "attention_sinks": _one_or_all(sinks, sliding or list(range(layers))),
        }

    def _routes(self) -> list[Route]:
        """As if every mixer were attention: where one is not, `take_over` has the last word."""
        config, shapes = self.config, self.shapes
        if self.recipe.mixer_layers:
            as_attention = HopeConfig.from_dict(
                {
                    **config.to_dict(),
                    "layer_types": ["full_attention"] * config.num_hidden_layers,
                    "sliding_window": None,
                }
            )
            shapes = {name: info.shape for name, info in parameter_infos(on_meta(as_attention), self.dtype).items()}
        self.attention_shapes = shapes
        return plan_routes(self.family, config, self.levels.places, shapes)

    def _check_tensors(self, routes: list[Route]) -> tuple[dict[str, Route], dict[str, str]]:
        """Every tensor of the source has a place, and every place a tensor, of its shape."""
        self.tied_twice: list[str] = []  # heads that should be equal to the embeddings
        wanted = {route.source: route for route in routes}
        infos, prefix = self.source.infos(), self.family.prefix
        found, unneeded = {}, {}
        known = wanted.keys() | self._tied_heads()
        for name, info in infos.items():
            full = self.family.canonical(name)
            if full not in known and not self.family.ignores(full):
                full = prefix + name
            if self.family.ignores(full):
                unneeded[name] = "Hope computes it"
            elif full not in wanted and full in self._tied_heads():
                unneeded[name] = "the embeddings are tied"
                self.tied_twice.append(name)
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

    def _report(self) -> ConversionReport:
        """Fates and origins; what no source tensor becomes is new."""
        report = ConversionReport(self.source.name, self.family.model_type, self.recipe.strategy)
        report.notes = self.family.notes(self.source.config) + self._notes()
        report.fates = {name: f"not needed: {reason}" for name, reason in self.unneeded.items()}
        meta = torch.device("meta")
        for name, route in self.routes.items():
            targets = []
            for part, origin in route.origins():
                placed = self._placed(part, torch.empty(self.attention_shapes[part], device=meta))
                if placed is not None:
                    targets.append(placed[0])
                    report.origins[placed[0]] = origin
            report.fates[name] = ", ".join(targets) or "not needed: the memory in the place of attention has none"
        self.fresh = [name for name in self.infos if name not in report.origins]
        for name in self.fresh:
            no_op = self._is_no_op(name)
            report.origins[name] = "new: zero, so that the level is a no-op" if no_op else "new: initialised"
        report.origins = {name: report.origins[name] for name in self.infos}
        infos = self.source.infos()
        report.source_parameters = sum(info.numel for name, info in infos.items() if name not in self.unneeded)
        report.parameters = sum(info.numel for info in self.infos.values())
        report.memory_bytes = fast_weight_bytes(self.model, self.dtype)
        return report

    def _notes(self) -> list[str]:
        notes = []
        if self.recipe.mixer_layers:
            layers = ", ".join(map(str, sorted(set(self.recipe.mixer_layers))))
            notes.append(
                f"attention of layers {layers}: replaced by the self-modifying memory, so that the model is not equal to its "
                "source before it is trained"
            )
        if self.recipe.window is not None:
            notes.append(f"sliding window {self.recipe.window}: equal to the source as far as the window reaches")
        if self.scaled:
            notes.append(f"rope: equal to the source in texts of {self.recipe.rope_length} tokens")
        elif self.unscaled is not None:
            notes.append(
                f"rope: equal to the source in texts of up to {self.unscaled} tokens, beyond which its angles depend on the "
                "length (see rope_length)"
            )
        return notes

    def _is_no_op(self, name: str) -> bool:
        return any(
            name == f"model.layers.{layer}.cms.levels.{level}.down_proj.{kind}"
            for layer, place in enumerate(self.levels.places)
            for level in place.added
            for kind in ("weight", "bias")
        )

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
        return with_rope(model, self.config.rope_parameters) if self.scaled else model

    @property
    def changes_function(self) -> bool:
        """Whether the model is not meant to equal the source."""
        return bool(self.recipe.mixer_layers)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the Hope model, once, in the order of the source's tensors; views where that is possible."""
        same: list[torch.Tensor] = []
        for name, tensor in self.source.tensors():
            route = self.routes.get(name)
            if self.tied_twice and (name in self.tied_twice or (route and EMBEDDINGS in route.targets)):
                same.append(tensor)
                if len(same) == 2 and not torch.equal(*same):
                    raise ValueError(
                        f"`source` has a {self.tied_twice[0]} that differs from its embeddings, and tie_word_embeddings=True in "
                        "its config: set it to false, or take the tensor out."
                    )
            if route is None:
                continue
            for part, piece in route.split(tensor):
                placed = self._placed(part, piece)
                if placed is not None:
                    yield placed
            del tensor
        zero = {name for name in self.fresh if self._is_no_op(name)}
        yield from fresh_parameters(self.model, self.fresh, zero)


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


def _one_or_all(values: list[Any], used: list[int]) -> Any:
    """One value where all that are used are the same."""
    found = {values[layer] for layer in used}
    return values if len(found) > 1 else next(iter(found), None)
