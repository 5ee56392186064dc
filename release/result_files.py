"""
Files of results, as `hope eval`, `hope study` and `hope train` write them: which checkpoint they are of, and their figures.

Nothing else comes into a card's `model-index`. A file says by `checkpoint` (see `conversion.identity`) what it is of. The hub's
form knows data by `dataset_type` alone: figures of one go under one heading, whatever their `dataset_name`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult


TASK = "text-generation"
Checkpoint = Mapping[str, str]


@dataclass(frozen=True)
class ResultFile:
    """
    Attributes:
        name: of the file.
        kind: `"training"`, `"lm-eval"` or the name of a study.
        content: as the JSON has it.
        results: in the hub's form.
        command: that produced it.
    """

    name: str
    kind: str
    content: dict[str, Any]
    results: list[EvalResult]
    command: str


def read_result_file(path: Path, checkpoint: Checkpoint, content: dict[str, Any] | None = None) -> ResultFile:
    """
    Args:
        checkpoint: that the results should be of.
        content: of the file, where it was read already.

    Raises:
        ValueError: it is no such file, of another checkpoint, of a quick run that measures nothing, or has no figures.
    """
    content = load_json(path) if content is None else content
    kind = kind_of(content)
    if kind is None:
        raise ValueError(
            f"{path} is no file of results: give the JSON that `hope eval --output_path`, `hope study` or `hope train` writes."
        )
    results: Iterator[EvalResult]
    if kind == "training":
        check_checkpoint(path, content.get("checkpoint"), checkpoint)
        results, command = training_results(content), "hope train recipe.yaml"
    elif kind == "lm-eval":
        check_checkpoint(path, (content["config"].get("hope") or {}).get("checkpoint"), checkpoint)
        results, command = lm_eval_results(content), lm_eval_command(content)
    else:
        if content["settings"].get("quick"):
            raise ValueError(f"{path} is of a quick form of the study, which measures nothing: run it without --quick.")
        if kind not in STUDIES:
            raise ValueError(
                f"{path} is of the study {kind!r}, which makes models of its own: of a released checkpoint there are "
                f"{', '.join(STUDIES)}."
            )
        models = content.get("checkpoints") or {}
        ours = [name for name, found in models.items() if found == dict(checkpoint)]
        if not ours:
            check_checkpoint(path, next(iter(models.values()), None), checkpoint)
        results, command = STUDIES[kind](content, ours[0]), content["command"]
    found = list(results)
    if not found:
        raise ValueError(f"{path} has no figures.")
    return ResultFile(path.name, kind, content, found, command)


def load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    return content if isinstance(content, dict) else {}


def kind_of(content: Mapping[str, Any]) -> str | None:
    """`"training"`, `"lm-eval"`, the name of a study, or `None` for anything else."""
    if isinstance(content.get("study"), str) and isinstance(content.get("settings"), dict):
        return content["study"]
    if isinstance(content.get("results"), dict) and isinstance(content.get("config"), dict):
        return "lm-eval"
    if {"parameters", "tokens", "steps", "seconds"} <= content.keys():
        return "training"
    return None


def check_checkpoint(path: Path, found: Checkpoint | None, wanted: Checkpoint) -> None:
    if not found:
        raise ValueError(
            f"{path} does not say which checkpoint it is of: measure the directory that is released, with this version and by "
            "`hope eval`, `hope study` or `hope train`."
        )
    if dict(found) == dict(wanted):
        return
    other = "other weights" if found.get("weights") != wanted["weights"] else "the same weights with another config"
    raise ValueError(f"{path} is of another model: {other}. Measure this one, or leave the file out.")


def training_results(content: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Perplexity of each source, and of all, with learning off and on."""
    for name, value in content.items():
        base, learning = name.removesuffix("_learning"), name.endswith("_learning")
        head, _, source = base.partition("/")
        if head == "eval_perplexity" and is_number(value):
            yield EvalResult(
                task_type=TASK,
                task_name="language modelling",
                dataset_type=source or "all",
                dataset_name=f"{source or 'all sources'}, held-out documents",
                metric_type="perplexity",
                metric_name=f"perplexity, learning {'on' if learning else 'off'}",
                metric_value=value,
            )


def lm_eval_results(content: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Every figure of every task that is a number, with its standard error."""
    hope = content["config"].get("hope") or {}
    used = ", ".join(f"{name} {hope[name]}" for name in ("memory", "read", "learn") if hope.get(name))
    for task, figures in content["results"].items():
        samples = (content.get("n-samples") or {}).get(task) or {}
        shots = (content.get("n-shot") or {}).get(task)
        about = (content.get("configs") or {}).get(task) or {}
        data = about.get("dataset_path")
        for key, value in figures.items():
            metric, comma, kept = key.partition(",")
            if not comma or not is_number(value) or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{kept}")
            details = {
                "dataset": data,
                "config": about.get("dataset_name"),
                "few_shot": shots,
                "documents": samples.get("effective"),
                "of": samples.get("original"),
            }
            if is_number(error):
                details["stderr"] = error
            name = metric if kept == "none" else f"{metric}, {kept}"
            yield EvalResult(
                task_type=TASK,
                dataset_type=task,
                dataset_name=task,
                dataset_split=about.get("test_split"),
                metric_type=metric,
                metric_name=f"{name} ({used})" if used else name,
                metric_value=value,
                metric_args={key: item for key, item in details.items() if item is not None},
            )


def lm_eval_command(content: Mapping[str, Any]) -> str:
    """`hope eval` with what the file says that it was run with; the model is the directory at hand."""
    config = content["config"]
    given = config.get("model_args") or {}
    if isinstance(given, str):
        given = dict(part.partition("=")[::2] for part in given.split(","))
    given = {**given, "pretrained": "."}
    words = ["hope", "eval", "--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
    words += ["--tasks", ",".join(content["results"])]
    shots = {count for count in (content.get("n-shot") or {}).values() if count}
    words += ["--num_fewshot", str(shots.pop())] if len(shots) == 1 else []
    for name in ("limit", "batch_size"):
        words += (
            [f"--{name}", f"{config[name]:g}" if is_number(config[name]) else str(config[name])]
            if config.get(name)
            else []
        )
    return shlex.join(words)


def test_time_learning_results(content: Mapping[str, Any], model: str) -> Iterator[EvalResult]:
    """Of each document, the second half's perplexity frozen, learning and frozen at the native context."""
    for key, figures in content["readings"].items():
        name, kind, document = key.split("/", 2)
        if name == model and is_number(figures["second_half"]):
            yield EvalResult(
                task_type=TASK,
                task_name="test-time learning",
                dataset_type=document,
                dataset_name=document,
                dataset_args={"tokens": figures["tokens"]},
                metric_type="perplexity",
                metric_name=f"perplexity of the second half, {READINGS[kind]}",
                metric_value=figures["second_half"],
            )


def context_results(content: Mapping[str, Any], model: str) -> Iterator[EvalResult]:
    """Perplexity of the same tokens after more and more text."""
    settings = content["settings"]
    for curve in content["perplexity"]:
        if curve["model"] != model:
            continue
        for tokens, value in zip(settings["contexts"], curve["by_context"], strict=True):
            if is_number(value):
                yield EvalResult(
                    task_type=TASK,
                    task_name="perplexity against context",
                    dataset_type="documents",
                    dataset_name=f"{len(content['documents'])} documents",
                    metric_type="perplexity",
                    metric_name=f"perplexity after {tokens:,} tokens, {READINGS[curve['reading']]}",
                    metric_value=value,
                    metric_args={"scored": settings["scored"]},
                )


# Kinds of readings, in words.
READINGS = {"frozen": "frozen", "learning": "learning", "native": "frozen, native context"}
STUDIES: dict[str, Callable[[Mapping[str, Any], str], Iterator[EvalResult]]] = {
    "test_time_learning": test_time_learning_results,
    "context": context_results,
}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
