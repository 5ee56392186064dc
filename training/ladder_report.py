"""What the ladder found: `ladder.json` with every figure, `ladder.md` with tables, `ladder.png`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import yaml

from .recipe import SAVED
from .run_log import FIGURES


if TYPE_CHECKING:
    from .ladder import Ladder, Rung

Run = dict[str, Any]
WINDOW = 10  # logged losses that a curve is smoothed over


def write_report(ladder: Ladder, rungs: dict[str, Rung], out: Path) -> None:
    """
    Write what the runs that came to their end have found.

    Raises:
        ValueError: none has.
    """
    runs = [_figures(ladder.place(name, seed), name, seed, result) for name, seed, result in ladder.results()]
    if not runs:
        raise ValueError(f"`out`: no run of the ladder in {ladder.out} has come to its end. Run `ladder run` first.")
    tuning = {name: ladder.tuned(name) for name in rungs if rungs[name].rate_of is None and ladder.is_tuned(name)}
    out.mkdir(parents=True, exist_ok=True)
    report = {"recipe": ladder.recipe, "tuning": tuning, "runs": runs}
    (out / "ladder.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "ladder.md").write_text(_tables(runs, rungs, tuning))
    _plot(ladder, runs, rungs, out / "ladder.png")
    print(_tables(runs, rungs, tuning))


def _figures(place: Path, name: str, seed: int, result: dict[str, Any]) -> Run:
    recipe = yaml.safe_load((place / SAVED).read_text())
    kept = {key: value for key, value in result.items() if key != "seconds" and not key.startswith("memory/")}
    return {
        "rung": name, "seed": seed, "learning_rate": recipe["learning_rate"], "config": recipe["config"], **kept
    }  # fmt: skip


def _of(runs: Sequence[Run], name: str) -> list[Run]:
    return [run for run in runs if run["rung"] == name]


def _tables(runs: Sequence[Run], rungs: dict[str, Rung], tuning: dict[str, dict[float, float]]) -> str:
    head = (
        "| | what it is | perplexity | learning | learning rate | tokens/s | peak MiB | parameters |\n"
        + "|---|---|"
        + "--:|" * 6
    )
    steps = [_row(name, rungs[name], _of(runs, name)) for name in rungs if not rungs[name].ablation and _of(runs, name)]
    parts = [name for name in rungs if rungs[name].ablation and _of(runs, name)]
    text = (
        "# The ladder\n\nPerplexity of held-out text, mean over seeds and each seed's in brackets, at equal parameters and tokens; "
        f"with levels learning as they read, where the model has some.\n\n{head}\n" + "\n".join(steps)
    )
    whole = _of(runs, "self_referential")
    if parts and whole:
        rows = [
            _row("self_referential", rungs["self_referential"], whole),
            *(_row(name, rungs[name], _of(runs, name)) for name in parts),
        ]
        text += f"\n\n## A part less, or one more\n\n{head}\n" + "\n".join(rows)
    if tuning:
        text += "\n\n## Learning rates\n\nPerplexity after a fifth of the tokens, seed 0.\n\n"
        rates = sorted({rate for found in tuning.values() for rate in found})
        text += "| |" + "".join(f" {rate:g} |" for rate in rates) + "\n|---|" + "--:|" * len(rates) + "\n"
        text += "\n".join(
            f"| {name} |" + "".join(f" {found[rate]:.1f} |" if rate in found else " |" for rate in rates)
            for name, found in tuning.items()
        )
    return text + "\n"


def _row(name: str, rung: Rung, runs: Sequence[Run]) -> str:
    def each(key: str) -> str:
        found = [run[key] for run in runs if key in run]
        return f"{mean(found):.2f} ({', '.join(f'{value:.2f}' for value in found)})" if found else ""

    first = runs[0]
    speed, peak = mean(run["tokens_per_second"] for run in runs), mean(run["peak_MiB"] for run in runs)
    cells = [
        name, rung.about, each("eval_perplexity"), each("eval_perplexity_learning"), f"{first['learning_rate']:g}",
        f"{speed:,.0f}", f"{peak:,.0f}", f"{first['parameters']:,}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _plot(ladder: Ladder, runs: Sequence[Run], rungs: dict[str, Rung], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in rungs if _of(runs, name)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for key, colour, label in (
        ("eval_perplexity", "black", "as trained"),
        ("eval_perplexity_learning", "tab:green", "learning"),
    ):
        points = [(run[key], names.index(run["rung"])) for run in runs if key in run]
        if points:
            left.scatter(*zip(*points, strict=True), color=colour, s=22, label=label)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("perplexity of held-out text, a point for each seed")
    left.legend(frameon=False)
    for name in names:
        if rungs[name].ablation:
            continue
        curves = [_curve(ladder.place(name, run["seed"])) for run in _of(runs, name)]
        length = min(map(len, curves))
        steps = [step for step, _ in curves[0][:length]]
        right.plot(steps, [mean(curve[i][1] for curve in curves) for i in range(length)], label=name, linewidth=1)
    right.set_xlabel("steps")
    right.set_ylabel("training loss, nats per token")
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curve(place: Path) -> list[tuple[int, float]]:
    """Steps and losses, each the mean over the last `WINDOW`."""
    entries = [json.loads(line) for line in (place / FIGURES).read_text().splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    return [
        (losses[i][0], mean(loss for _, loss in losses[i - WINDOW : i])) for i in range(WINDOW, len(losses))
    ]  # fmt: skip
