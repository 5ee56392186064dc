"""
A run: a recipe's text, tokenizer and model, trained, evaluated, logged and saved.

What the run's directory holds afterwards: `recipe.yaml`, `text.sha256`, by which other text is known on resuming,
`checkpoint-N/`, `model/` with the tokenizer, `figures.jsonl`, `losses.png` and `memory.png`, and `result.json`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback

from modeling_hope.conversion.identity import identify_directory

from .console import Console
from .data import check_apart, read_data, training_texts
from .models import check_same, load, make_config, make_model
from .recipe import SAVED, TrainingRecipe
from .run_directory import MODEL, RESULT, TEXT, check_directory, check_text, last_checkpoint, write
from .run_log import perplexity_table, write_log
from .tokenizer import train_tokenizer
from .trainer import HopeTrainer, not_written, training_arguments


Say = Callable[[str], None]


def train(
    recipe: TrainingRecipe, *, resume: bool = False, say: Say = print, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """
    Run a recipe.

    Args:
        resume: go on from the last whole checkpoint in `recipe.out`, to the same losses.
        say: told what goes on, a line at a time.
        callbacks: further ones, for Trainer.

    Returns:
        What `result.json` holds: the last evaluation (`eval_loss`, `eval_perplexity`, `eval_perplexity/SOURCE`, with
        `_learning` where levels learned), `parameters`, `tokens`, `steps`, `seconds`, `tokens_per_second`, the median
        of those logged, and `peak_MiB`; in the first process also `checkpoint`, by which a result is known to be of a model
        (`conversion.identity`), and the `recipe`.

    Raises:
        ValueError: the recipe cannot be run, or its directory holds another run: before the first step. Or the loss is
            no number; then checkpoints stay as they are.
    """
    out = Path(recipe.out)
    checkpoint = last_checkpoint(out) if resume else None
    check_directory(recipe, out, resume)
    started = time.perf_counter()
    arguments = training_arguments(recipe, begins=checkpoint is None)
    main = arguments.process_index == 0
    tell = say if main else _silent
    tell(recipe.as_yaml().rstrip())
    check_apart(recipe)
    tokenizer = make_tokenizer(recipe, (checkpoint or out / MODEL) if resume else None, tell)
    config = make_config(recipe, tokenizer)
    if checkpoint:
        check_same(config, checkpoint)
    data = read_data(recipe, tokenizer, tell)
    digest = data.digest()
    if resume:
        check_text(out, digest)
    model = make_model(recipe, config)
    # ZeRO-3 leaves none of them in a process, and says how many there were.
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    tell(f"{config.model_type} of {parameters:,} parameters, {data.describe()}")
    if main and not resume:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(out / MODEL)
        write(out / TEXT, digest + "\n")
        write(out / SAVED, recipe.as_yaml())  # last: a run that has it can be resumed
    trainer = HopeTrainer(
        model, arguments, recipe=recipe, pad=data.pad, evaluated=data.evaluated, probe=data.probe,
        train_dataset=data.train, processing_class=tokenizer, callbacks=list(callbacks),
    )  # fmt: skip
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(Console(tell))
    if resume:
        tell(f"going on from {checkpoint or 'the start: there is no whole checkpoint'}")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics = trainer.last_evaluation() if data.evaluated else {}
        save(trainer, out)
    finally:  # of a run that ends before, too
        files = write_log(trainer.state.log_history, out, recipe.plots) if main else []
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    result = {
        **metrics,
        "parameters": parameters,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_per_second": statistics.median_high(speeds) if speeds else None,
        "peak_MiB": round(peak_memory() / 2**20),
    }
    if main:
        result |= {"checkpoint": identify_directory(out / MODEL), "recipe": dataclasses.asdict(recipe)}
        write(out / RESULT, json.dumps(result, indent=2) + "\n")
        if metrics:
            tell(perplexity_table(metrics))
        tell(
            f"{result['tokens']:,} tokens in {result['seconds']:,.0f} s, {result['tokens_per_second'] or 0:,.0f} a "
            f"second in training, peak memory {result['peak_MiB']:,} MiB"
        )
        tell(f"written: {out}/{MODEL}, {RESULT}, {', '.join(files)}")
    return result


def save(trainer: HopeTrainer, out: Path) -> None:
    """
    Raises:
        OSError: it cannot be written.
    """
    try:
        trainer.save_model(str(out / MODEL))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise not_written("the model", str(out), error) from error


def make_tokenizer(recipe: TrainingRecipe, place: Path | None, say: Say) -> Any:
    """The recipe's, or the one that was trained for the run, which is in `place`."""
    if recipe.train_tokenizer is None:
        name = "tokenizer" if recipe.tokenizer else "model"
        return load(AutoTokenizer, getattr(recipe, name), name)
    if place is not None:
        return AutoTokenizer.from_pretrained(place)
    tokenizer = train_tokenizer(training_texts(recipe), recipe.train_tokenizer)
    say(f"a tokenizer of {len(tokenizer):,} tokens is trained")
    return tokenizer


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process; 0 where that is not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _silent(line: str) -> None:
    """Of processes beside the first."""
