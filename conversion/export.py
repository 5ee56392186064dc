"""export_transformer(): a converted Hope model becomes a Transformer of its original family again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_hope import HopeConfig, HopeForCausalLM

from .comparison import Comparison, compare
from .dtype import chosen_dtype, floating_dtype, loses_nothing
from .families import FAMILIES
from .family import Family
from .plan import on_meta, parameter_infos
from .progress import tracked
from .rope import length_of_unscaled, rope_at, same_angles, with_rope
from .route import Route, plan_routes
from .source import Source, open_source
from .staging import check_output, staged_directory
from .strategy import places_of
from .tensor_info import TensorInfo
from .writer import write_pretrained


# What may have changed in a Hope model since it was converted, and its family has by the same name.
CARRIED = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")


def export_transformer(
    model: str | Path | HopeForCausalLM,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    tokenizer: Any = None,
    check: bool = True,
    max_shard_size: int | str = "5GB",
) -> Comparison | None:
    """
    Write a Hope model back to the family it was converted from, for Transformers' own class to load.

    Of a model into which memories were consolidated, it writes what they learned. Tensors are written one at a time; an
    unchanged model gives the source's weights bit for bit. A sliding window that the conversion added is left behind: the
    family's own attention sees everything.

    Args:
        model: a directory, or a model in memory; of the strategies `depth` or `split`.
        output_dir: where to write; must be empty or new.
        dtype: of what is written; `"auto"` for the Hope model's.
        tokenizer: to save with a model given in memory.
        check: compare logits and greedy tokens of both, learning off, in float32, one of them in memory at a time.
        max_shard_size: of the files, in bytes or as `"5GB"`.

    Returns:
        The comparison, the Hope model being what is compared with; `None` with `check=False`.

    Raises:
        ValueError: the model was not converted, or holds what its family has no place for (levels in a chain, a
            self-modifying memory), or the output directory is not empty. Nothing is written then.
        OSError: there is not enough space, which leaves nothing behind either.
    """
    dtype = floating_dtype(dtype)
    check_output(output_dir)
    source = open_source(model, tokenizer=tokenizer)
    plan = ExportPlan(source.config)
    plan.config.dtype = wanted = chosen_dtype(dtype, source.dtype)
    infos = source.infos()
    plan.check_tensors(infos)
    written = {route.source: TensorInfo(route.source_shape(plan.shapes), wanted) for route in plan.routes}
    with staged_directory(output_dir, sum(info.nbytes for info in written.values())) as staged:
        tensors = tracked(source.tensors(), sum(info.nbytes for info in infos.values()), "Exporting")
        write_pretrained(
            staged,
            _joined(plan.routes, tensors),
            written,
            plan.config,
            _generation_config(source.generation_config),
            source.tokenizer,
            max_shard_size,
        )
        if not check:
            return None
        return _compare(source, staged, plan, exact=loses_nothing(source.dtype, wanted))


class ExportPlan:
    """
    The way back of a Hope model's tensors.

    Attributes:
        config: of the family.
        routes: of the family's tensors.
        shapes: of the Hope model's parameters.
        limit: most tokens on which both models are equal; `None` for any number.
        rope: the Hope model's, where the family reads with its angles in longer texts alone; else `None`.

    Raises:
        ValueError: the model was not converted, or holds what its family has no place for.
    """

    def __init__(self, hope: Any):
        origin, family = _origin(hope)
        fields = copy.deepcopy(origin)
        fields |= {name: getattr(hope, name) for name in CARRIED if name in fields}
        fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]]
        self.config = AutoConfig.for_model(**fields)
        self.shapes = {name: info.shape for name, info in parameter_infos(on_meta(hope), torch.float32).items()}
        self.routes = plan_routes(family, hope, places_of(hope), self.shapes)
        pairs = zip(hope.layer_windows, family.windows(self.config), strict=True)
        limits = [window for window, native in pairs if window is not None and window != native]
        self.rope, rope = None, family.config_fields(self.config).get("rope_parameters")
        unscaled = None if rope is None else length_of_unscaled(rope, self.config)
        if rope is not None and unscaled is not None:
            if same_angles(hope.rope_parameters, rope_at(rope, self.config, None)):
                limits.append(unscaled)
            else:
                self.rope = hope.rope_parameters
        self.limit = min((limit for limit in (*limits, hope.longest_stream) if limit is not None), default=None)

    def check_tensors(self, infos: Mapping[str, TensorInfo]) -> None:
        """Raise `ValueError` when a tensor of the Hope model is missing, or has no place in the family."""
        planned = {target for route in self.routes for target in route.targets}
        lacking = [name for name in planned if name not in infos]
        if lacking:
            raise ValueError(f"`model` has no tensor {', '.join(map(repr, lacking))}.")
        left = [name for name in infos if name not in planned and not name.endswith("log_learning_rates")]
        if left:
            raise ValueError(f"`model` tensor {left[0]!r} has no place in a {self.config.model_type} model.")


def _origin(hope: Any) -> tuple[dict[str, Any], Family]:
    """The config that a Hope model was converted from, and its family."""
    if hope.model_type != HopeConfig.model_type:
        raise ValueError(f"`model` is of model_type {hope.model_type!r}: give a Hope model.")
    if not isinstance(hope, HopeConfig):
        raise ValueError(
            "`model` is of the code that came with it (`trust_remote_code`), not of this package: save it and give its "
            "directory, or import modeling_hope before it is loaded."
        )
    if hope.converted_from is None:
        raise ValueError(
            "`model` was not converted from a Transformer (`converted_from` is not set in its config): there is no family "
            "to export it to."
        )
    memories = [layer for layer, kind in enumerate(hope.layer_types or []) if kind == "hope_memory"]
    if memories:
        raise ValueError(
            f"`model` has a self-modifying memory in the place of attention in layers {memories}, which no Transformer has."
        )
    family = FAMILIES.get(hope.converted_from.get("model_type", ""))
    if family is None:
        raise ValueError(
            f"`model` has a `converted_from` of model_type {hope.converted_from.get('model_type')!r} in its config, which is "
            f"none of {', '.join(sorted(FAMILIES))}."
        )
    return hope.converted_from, family


def _joined(routes: list[Route], tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each of the family's tensors, as soon as all that it is made of have come."""
    route_of = {target: route for route in routes for target in route.targets}
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        route = route_of.get(name)
        if route is None:
            continue
        held = waiting.setdefault(route.source, {})
        held[name] = tensor
        if len(held) == len(route.targets):
            yield route.source, route.join(waiting.pop(route.source))
        del tensor, held


def _generation_config(found: GenerationConfig | None) -> GenerationConfig:
    """Without what Hope alone knows."""
    kept = GenerationConfig() if found is None else copy.deepcopy(found)
    if hasattr(kept, "learn"):
        del kept.learn
    return kept


def _compare(source: Source, staged: Path, plan: ExportPlan, exact: bool) -> Comparison:
    """Of the exported model with the Hope model."""

    def exported() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(staged, dtype=torch.float32).eval()
        return model if plan.rope is None else with_rope(model, plan.rope)

    found = compare(source.model, exported, source.tokenizer, limit=plan.limit)
    if exact:
        found.check("exported")
    return found
