"""What the ladder found: `ladder.json` with every figure, `ladder.md` with tables, `ladder.png`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from .ladder_runs import finished_runs, run_place, tuned_rates
from .markdown_table import markdown_table
from .plots import new_figure, save_figure
from .recipe import SAVED
from .run_directory import RESULT
from .run_log import FIGURES
from .rungs import RUNGS


Run = dict[str, Any]
WINDOW = 10  # logged losses that a curve is smoothed over
ABOUT = """# The ladder

Perplexity of test text after the same tokens, at equal parameters: the mean over seeds, and each seed's in brackets;
and with levels learning as they read, where a model has some. Memories have a short convolution and an output gate, the
Transformer has none, as in the literature. What a memory holds besides its parameters, a row's state, is not counted.
"""
ABLATIONS = """
## A part less, or one more

Each with the learning rate that was best for the whole.
"""
DEFAULTS = """
## Other defaults

Perplexity of validation text after a fifth of the tokens.
"""
HEAD = ["", "what it is", "perplexity", "learning", "learning rate", "tokens/s", "peak MiB", "parameters"]


def write_report(ladder: Path, recipe: dict[str, Any], out: Path) -> None:
    """
    Write what the runs in the ladder's directory that came to their end have found.

    Raises:
        ValueError: none has.
    """
    runs = _runs(ladder)
    if not runs:
        raise ValueError(f"`out`: no run of the ladder in {ladder} has come to its end. Run `ladder run` first.")
    defaults = _runs(ladder / "defaults")
    tuning = {name: found for name in RUNGS if (found := tuned_rates(ladder, name))}
    inner = {name: found for name in RUNGS if (found := tuned_rates(ladder, name, inner=True))}
    text = "\n".join(_sections(runs, defaults, tuning, inner)) + "\n"
    report = {"recipe": recipe, "tuning": tuning, "inner_tuning": inner, "runs": runs, "defaults": defaults}
    out.mkdir(parents=True, exist_ok=True)
    (out / "ladder.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "ladder.md").write_text(text)
    _plot(ladder, runs, out / "ladder.png")
    print(text)


def _runs(out: Path) -> list[Run]:
    found = []
    for name, seed, place in finished_runs(out):
        recipe = yaml.safe_load((place / SAVED).read_text())
        result = json.loads((place / RESULT).read_text())
        kept = {key: value for key, value in result.items() if key != "seconds" and not key.startswith("memory/")}
        found.append({"rung": name, "seed": seed, **{key: recipe[key] for key in ("learning_rate", "config")}, **kept})
    return found


def _of(runs: Iterable[Run], name: str) -> list[Run]:
    return [run for run in runs if run["rung"] == name]


def _sections(
    runs: Sequence[Run], defaults: Sequence[Run], tuning: dict[str, Any], inner: dict[str, Any]
) -> Iterable[str]:
    whole = "self_referential"
    yield from (ABOUT, _table(runs, [name for name in RUNGS if RUNGS[name].kind == "step"]))
    yield from (ABLATIONS, _table(runs, [whole, *(name for name in RUNGS if RUNGS[name].kind == "ablation")]))
    yield from (DEFAULTS, _table(defaults, [whole, *(name for name in RUNGS if RUNGS[name].kind == "defaults")]))
    yield "\n## Learning rates\n\nPerplexity of validation text after a fifth of the tokens, seed 0.\n"
    yield _by_rate(tuning)
    yield "\nThe levels' own, perplexity while they learn:\n"
    yield _by_rate(inner)


def _table(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = [_row(name, found) for name in names if (found := _of(runs, name))]
    return markdown_table(HEAD, rows, names=2)


def _row(name: str, runs: Sequence[Run]) -> list[str]:
    def each(key: str, form: str, seeds: bool) -> str:
        found = [run[key] for run in runs if run.get(key) is not None]
        by_seed = f" ({', '.join(f'{value:{form}}' for value in found)})" if seeds else ""
        return f"{mean(found):{form}}{by_seed}" if found else ""

    perplexities = [each(key, ".2f", seeds=True) for key in ("eval_perplexity", "eval_perplexity_learning")]
    costs = [each(key, ",.0f", seeds=False) for key in ("tokens_per_second", "peak_MiB")]
    rate, size = f"{runs[0]['learning_rate']:g}", f"{runs[0]['parameters']:,}"
    return [name, RUNGS[name].about, *perplexities, rate, *costs, size]


def _by_rate(tuning: dict[str, dict[float, float]]) -> str:
    rates = sorted({rate for found in tuning.values() for rate in found})
    rows = [
        [name, *(f"{found[rate]:.1f}" if rate in found else "" for rate in rates)] for name, found in tuning.items()
    ]
    return markdown_table(["", *(f"{rate:g}" for rate in rates)], rows)


def _plot(ladder: Path, runs: Sequence[Run], path: Path) -> None:
    names = [name for name in RUNGS if _of(runs, name)]
    figure, (left, right) = new_figure(1, 2, size=(12, 5))
    kinds = {"eval_perplexity": ("black", "as trained"), "eval_perplexity_learning": ("tab:green", "learning")}
    for key, (colour, label) in kinds.items():
        points = [(run[key], names.index(run["rung"])) for run in runs if key in run]
        if points:
            left.scatter(*zip(*points, strict=True), color=colour, s=22, label=label)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("perplexity of test text, a point for each seed")
    left.legend(frameon=False)
    for name in names:
        if RUNGS[name].kind == "step":
            curves = [_curve(run_place(ladder, name, run["seed"])) for run in _of(runs, name)]
            points = [(at[0][0], mean(loss for _, loss in at)) for at in zip(*curves, strict=False)]
            right.plot(*zip(*points, strict=True), label=name, linewidth=1)
    right.set_xlabel("steps")
    right.set_ylabel("training loss, nats per token")
    right.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _curve(place: Path) -> list[tuple[int, float]]:
    """Steps and losses, each the mean over the last `WINDOW` that were logged."""
    entries = [json.loads(line) for line in (place / FIGURES).read_text().splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    recent = [losses[max(i - WINDOW, 0) : i] for i in range(min(WINDOW, len(losses)), len(losses) + 1)]
    return [(last[-1][0], mean(loss for _, loss in last)) for last in recent if last]
