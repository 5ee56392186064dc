"""convert(): a pretrained Transformer in, a Hope model out, with the same logits until it learns."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import initialization as init

from modeling_hope import HopeConfig, HopeForCausalLM
from modeling_hope.auto_hope import AUTO_MAP

from .comparison import compare
from .family import Family
from .llama import LLAMA
from .report import ConversionReport, fast_weight_bytes
from .source import Source, open_source
from .strategy import LevelPlan, plan_levels


FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA,)}


def convert(
    source: str | Path | PreTrainedModel,
    output_dir: str | Path | None = None,
    *,
    strategy: str = "depth",
    periods: Sequence[int | None] = (512, 2048, 8192),
    learning_rates: float | Sequence[float] = 0.1,
    window: int | None = None,
    attention_sinks: int = 4,
    learning_layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    check: bool = True,
    remote_code: bool = False,
    **config: Any,
) -> HopeForCausalLM:
    """
    Turn a pretrained Transformer into a Hope model.

    Args:
        source: a directory of safetensors, a GGUF file, or a model in memory.
        output_dir: where to save the model, its tokenizer and the report; must be empty or new. `None`: save nothing.
        strategy: `"depth"`: each layer's MLP becomes one level. `"stack"`: it is the slowest of a chain of levels, the
            others starting as no-ops.
        periods: tokens between updates of each level, fastest first; `None` for one that never learns.
        learning_rates: inner learning rate, one for all levels or one for each.
        window: make all attention sliding, with this window; `None` leaves it full.
        attention_sinks: first tokens that stay in view of a window.
        learning_layers: layers that learn; `None` for all.
        dtype: of the Hope model's weights.
        tokenizer: to save with a model given in memory.
        check: compare the logits with the source's, learning off, and refuse a difference over 1e-4 of their range
            (float32 only; with a window, on a probe that fits into it).
        remote_code: save the model's code with it, now and from then on, so that `trust_remote_code=True` loads it
            without this package.
        config: further fields of HopeConfig.

    Returns:
        The model, in `eval()` mode, with the report as `model.conversion_report`.

    Raises:
        ValueError: the source is no checkpoint or of an unsupported family, a tensor has no place or a place no tensor,
            or the output directory is not empty. Nothing is written then.
    """
    output = None if output_dir is None else _empty_directory(Path(output_dir))
    opened = open_source(source, tokenizer=tokenizer)
    family = _family(opened)
    plan = plan_levels(
        strategy, opened.config.num_hidden_layers, opened.config.intermediate_size, periods, learning_layers
    )
    fields = family.config_fields(opened.config) | plan.fields | {"cms_learning_rates": learning_rates}
    if isinstance(learning_rates, Sequence) and len(plan.fields["cms_periods"]) > len(periods):
        # One more for the level that never learns, which the plan has added.
        fields["cms_learning_rates"] = [*learning_rates, learning_rates[-1]]
    decided = sorted(set(plan.fields) & set(config))
    if decided:
        raise ValueError(f"`{decided[0]}` is decided by `strategy` and `periods`: leave it out.")
    fields |= {
        "attention_sinks": attention_sinks,
        "layer_types": ["full_attention" if window is None else "sliding_attention"] * opened.config.num_hidden_layers,
    }
    if window is not None:
        fields["sliding_window"] = window
    if remote_code:
        fields["auto_map"] = dict(AUTO_MAP)
    report = ConversionReport(opened.name, family.model_type, strategy)
    model = _build(HopeConfig(**(fields | config)), dtype)
    _fill(model, opened, family, plan, report)
    report.parameters = sum(parameter.numel() for parameter in model.parameters())
    report.memory_bytes = fast_weight_bytes(model)
    if opened.generation_config is not None:
        model.generation_config = copy.deepcopy(opened.generation_config)
    if check:
        report.comparison = compare(opened.model, lambda: model, opened.tokenizer, limit=window)
        if dtype == torch.float32 and report.comparison.relative > 1e-4:
            raise ValueError(
                f"The converted model's logits differ from the source's by {report.comparison.relative:.1e} of their range."
            )
    model.conversion_report = report
    if output is not None:
        _save(model, opened.tokenizer, report, output)
    return model


def _family(source: Source) -> Family:
    model_type = source.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"`source` is of model_type {model_type!r}; supported are {', '.join(sorted(FAMILIES))}.")
    family = FAMILIES[model_type]
    reason = family.refuse(source.config)
    if reason:
        raise ValueError(f"`source` cannot become a Hope model: {reason}")
    return family


def _build(config: HopeConfig, dtype: torch.dtype) -> HopeForCausalLM:
    """A model whose parameters hold nothing yet: every one is filled, or the conversion fails."""
    with init.no_init_weights():
        model = HopeForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # and not the angles of the rotary positions, which need float32
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def _fill(model: HopeForCausalLM, source: Source, family: Family, plan: LevelPlan, report: ConversionReport) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in source.tensors():
        report.source_parameters += tensor.numel()
        if family.ignores(name):
            report.fates[name] = "not needed: Hope computes it"
            continue
        layer = re.search(r"\.layers\.(\d+)\.", name)
        target = family.target(name, plan.places[int(layer[1])] if layer else {"mlp": "", "mlp_norm": ""})
        if target == "lm_head.weight" and model.config.tie_word_embeddings:
            target = "model.embed_tokens.weight"
        if target is None or target not in parameters:
            raise ValueError(f"`source` tensor {name!r} has no place in a Hope model.")
        if parameters[target].shape != tensor.shape:
            raise ValueError(
                f"`source` tensor {name!r} is {tuple(tensor.shape)}, its place {target!r} {tuple(parameters[target].shape)}."
            )
        parameters[target].copy_(tensor)
        report.fates[name], report.origins[target] = target, name
    for layer_module, levels in zip(model.model.layers, plan.added, strict=True):
        for level in levels:
            for module in layer_module.cms.levels[level].modules():
                model._init_weights(module)
            layer_module.cms.levels[level].down_proj.weight.zero_()
            model._init_weights(layer_module.cms.norms[level])
            added = {*layer_module.cms.levels[level].parameters(), *layer_module.cms.norms[level].parameters()}
            for name in (name for name, parameter in parameters.items() if parameter in added):
                report.origins[name] = "new: zero" if name.endswith("down_proj.weight") else "new: initialised"
    unfilled = [name for name in parameters if name not in report.origins and not name.endswith("log_learning_rates")]
    if unfilled:
        raise ValueError(f"`source` has no tensor for {', '.join(map(repr, unfilled))}.")
    for layer_module in model.model.layers:
        layer_module.cms.initialise()


def _describe(model: HopeForCausalLM, report: ConversionReport) -> None:
    config = model.config
    report.parameters = sum(parameter.numel() for parameter in model.parameters())
    maps = config.learned_maps
    learned = [
        getattr(layer.cms.level(level), name).weight.numel()
        for layer in model.model.layers
        for level in layer.cms.held
        if level in config.learning_levels
        for name in maps
    ]
    report.memory_bytes_per_row = 4 * sum(learned)


@torch.no_grad()
def compare_logits(model: HopeForCausalLM, source: Source) -> dict[str, float]:
    """Largest difference of the logits, learning off, on random tokens as many as a window has."""
    window = model.config.sliding_window or PROBE_TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, min(PROBE_TOKENS, window)), generator=generator)
    expected = source.model()(ids).logits
    given = model(ids, learn="off", use_cache=False).logits.float()
    difference, spread = float((given - expected).abs().max()), float(expected.max() - expected.min())
    return {"max_difference": difference, "range": spread, "relative": difference / spread}


def _empty_directory(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`output_dir` {path} exists and is not empty: give a new directory.")
    return path


def _save(model: HopeForCausalLM, tokenizer: Any, report: ConversionReport, output: Path) -> None:
    """Everything is written beside, then takes its name, so that a failure leaves nothing half-written."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        report.save(staged)
        staged.chmod(0o755)
        if output.exists():
            output.rmdir()
        staged.replace(output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
