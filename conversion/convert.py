"""convert(): a pretrained Transformer in, a Hope model out, with the same logits until it learns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init

from modeling_hope import HopeForCausalLM

from .comparison import compare
from .dtype import loses_nothing
from .identity import identify
from .plan import ConversionPlan
from .progress import tracked
from .recipe import Recipe
from .report import ConversionReport
from .source import Source, open_source
from .staging import check_output, staged_directory
from .writer import cast_finite, write_pretrained


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
    mixer_layers: Sequence[int] = (),
    rope_length: int | None = None,
    dtype: torch.dtype | str = "auto",
    tokenizer: Any = None,
    revision: str | None = None,
    check: bool = True,
    remote_code: bool = False,
    allow_pickle: bool = False,
    max_shard_size: int | str = "5GB",
    **config: Any,
) -> HopeForCausalLM:
    """
    Turn a pretrained Transformer into a Hope model, equal to it until it learns.

    Args:
        source: a directory of safetensors, a GGUF file, a name on the hub, or a model in memory.
        output_dir: where to save the model, its tokenizer and the report; must be empty or new. `None`: save nothing.
        strategy: `"depth"`: each layer's MLP becomes one level. `"split"`: its hidden units are divided among levels side
            by side. `"stack"`: it is the slowest of a chain of levels, the others starting as no-ops.
        periods: tokens between updates of each level, fastest first; `None` for one that never learns.
        learning_rates: inner learning rate, one for all levels or one for each.
        window: make attention over everything sliding, with this window; `None` leaves it. Layers that slide keep theirs.
        attention_sinks: first tokens that stay in view of that window.
        learning_layers: layers that learn; `None` for all.
        mixer_layers: layers whose attention the self-modifying memory replaces. The model is not equal to the source then.
        rope_length: where the source's rotary angles depend on the length of the text (`"dynamic"`, `"longrope"`), read
            all texts as it reads one of this many tokens. `None`: as one within the length it was first trained on.
        dtype: of the Hope model's weights, or its name; `"auto"` for the source's.
        tokenizer: to use in place of the source's own, or where it has none.
        revision: a branch, tag or commit on the hub.
        check: compare logits and greedy tokens with the source's, learning off, in float32, and refuse a difference over
            1e-4 of the logits' range where `dtype` loses nothing. One of the two models is in memory at a time.
        remote_code: save the model's code with it, now and from then on, so that `trust_remote_code=True` loads it
            without this package.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors; from whom you trust.
        max_shard_size: of the files saved, in bytes or as `"5GB"`.
        config: further fields of HopeConfig.

    Returns:
        The model, in `eval()` mode, with the report as `model.conversion_report`. See `convert_checkpoint` for models that
        are not to be in memory at all.

    Raises:
        ValueError: the source is no checkpoint or of an unsupported family, a tensor has no place or a place no tensor, an
            argument is impossible, or the output directory is not empty. Nothing is written then.
        OSError: there is not enough space, which leaves nothing behind either.
    """
    recipe = Recipe(
        strategy,
        periods,
        learning_rates,
        window,
        attention_sinks,
        learning_layers,
        mixer_layers,
        rope_length,
        dtype,
        config,
    )
    output = None if output_dir is None else Path(output_dir).expanduser()
    if output is not None:
        check_output(output)
    opened = open_source(source, tokenizer=tokenizer, revision=revision, allow_pickle=allow_pickle)
    plan = ConversionPlan(opened, recipe, remote_code)
    if output is not None:
        _write(plan, output, check, max_shard_size)
        model = HopeForCausalLM.from_pretrained(output)
    else:
        model = _build(plan)
        if check:
            _compare(plan, lambda: model if model.dtype == torch.float32 else copy.deepcopy(model).float())
    model.conversion_report = plan.report
    return model.eval()


def convert_checkpoint(
    source: str | Path | PreTrainedModel,
    output_dir: str | Path,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    check: bool = True,
    remote_code: bool = False,
    allow_pickle: bool = False,
    max_shard_size: int | str = "5GB",
) -> ConversionReport:
    """
    `convert` from files to files, a tensor at a time: with `check=False` neither model is ever in memory.

    Args:
        recipe: the choices of the conversion; unset, the defaults of `convert`, which says what the others are.

    Returns:
        The report, which is saved with the model.
    """
    check_output(output_dir)
    opened = open_source(source, tokenizer=tokenizer, revision=revision, allow_pickle=allow_pickle)
    plan = ConversionPlan(opened, recipe or Recipe(), remote_code)
    _write(plan, Path(output_dir), check, max_shard_size)
    return plan.report


def _write(plan: ConversionPlan, output: Path, check: bool, max_shard_size: int | str) -> None:
    needed = sum(info.nbytes for info in plan.infos.values())
    with staged_directory(output, needed) as staged:
        config = copy.deepcopy(plan.config)
        config.architectures, config.dtype = [HopeForCausalLM.__name__], plan.dtype
        write_pretrained(
            staged,
            _tracked(plan),
            plan.infos,
            config,
            _generation_config(plan.source),
            plan.source.tokenizer,
            max_shard_size,
        )
        if check:
            _compare(plan, lambda: HopeForCausalLM.from_pretrained(staged, dtype=torch.float32).eval())
        plan.report.checkpoint = identify(staged)
        plan.report.save(staged)


@torch.no_grad()
def _build(plan: ConversionPlan) -> HopeForCausalLM:
    with init.no_init_weights():
        model = HopeForCausalLM(plan.config)
    parameters = dict(model.named_parameters())
    for name, info in plan.infos.items():
        # Not the whole model's dtype: the angles of the rotary positions need float32.
        parameters[name].data = parameters[name].data.to(info.dtype)
    missing = dict.fromkeys(plan.infos)
    for name, tensor in _tracked(plan):
        parameters[name].copy_(cast_finite(name, tensor, parameters[name].dtype))
        del missing[name]
    assert not missing, missing
    model.tie_weights()
    model.generation_config = _generation_config(plan.source)
    return model.eval()


def _tracked(plan: ConversionPlan) -> Iterator[tuple[str, torch.Tensor]]:
    return tracked(plan.tensors(), sum(info.nbytes for info in plan.source.infos().values()), "Converting")


def _generation_config(source: Source) -> GenerationConfig:
    if source.generation_config is None:
        return GenerationConfig.from_model_config(source.config)
    return copy.deepcopy(source.generation_config)


def _compare(plan: ConversionPlan, given_model: Callable[[], HopeForCausalLM]) -> None:
    """Into the report; where the two should be equal, a difference is an error."""
    found = compare(plan.comparable_source, given_model, plan.source.tokenizer, limit=plan.target.limit)
    plan.report.comparison = found
    if loses_nothing(plan.source.dtype, plan.dtype) and not plan.changes_function:
        found.check("converted")
