"""What a run leaves to look at: its figures as JSON lines, plots of losses and of the memory, a table of perplexities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


FIGURES, LOSSES, MEMORY = "figures.jsonl", "losses.png", "memory.png"
# By the start of a figure's name, what its panel shows.
PANELS = {
    "memory/rate_": "rate of writing, by layer",
    "memory/decay_": "decay alpha, by layer",
    "memory/change_": "change of weights / initial, by layer",
    "levels/change_norm_": "norm of change, by level",
    "levels/updates_": "updates, by level",
    "levels/rate_": "learning rate, by level",
}
Entry = dict[str, Any]


def write_log(history: Sequence[Entry], out: Path, plots: bool = True) -> list[str]:
    """
    Write `figures.jsonl`, and the plots where matplotlib is installed.

    Args:
        history: Trainer's, an entry for everything logged, with its `step`.
        plots: whether to draw them.

    Returns:
        Names of the files written.
    """
    (out / FIGURES).write_text("".join(json.dumps(entry) + "\n" for entry in history))
    if not plots:
        return [FIGURES]
    try:
        import matplotlib
    except ImportError:
        return [FIGURES]
    matplotlib.use("Agg")
    return [
        FIGURES,
        *(name for plot, name in ((plot_losses, LOSSES), (plot_memory, MEMORY)) if plot(history, out / name)),
    ]


def series(history: Sequence[Entry], start: str) -> dict[str, tuple[list[int], list[float]]]:
    """Of all figures whose names begin so: the rest of the name, and steps and values."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith(start):
                steps, values = found.setdefault(name.removeprefix(start), ([], []))
                steps.append(entry["step"])
                values.append(value)
    return found


def plot_losses(history: Sequence[Entry], path: Path) -> bool:
    """The loss, and perplexities by source where there are any."""
    from matplotlib import pyplot

    evaluated = series(history, "eval_perplexity")
    figure, axes = pyplot.subplots(
        1 + bool(evaluated), sharex=True, squeeze=False, figsize=(8, 7 if evaluated else 4), layout="constrained"
    )
    for name, (steps, values) in series(history, "loss").items():
        axes[0, 0].plot(steps, values, label=f"training{name}", color="#888888")
    for name, (steps, values) in series(history, "eval_loss").items():
        axes[0, 0].plot(steps, values, label=f"evaluation{name.replace('_', ', ')}", marker=".")
    axes[0, 0].set_ylabel("loss, nats per token")
    if evaluated:
        for name, (steps, values) in evaluated.items():
            label = name.replace("_learning", "learning, ").replace("/", "").strip(", ") or "all"
            axes[1, 0].plot(steps, values, label=label, marker=".")
        axes[1, 0].set_ylabel("perplexity")
        axes[1, 0].set_yscale("log")
    return _save(figure, axes.flat, path)


def plot_memory(history: Sequence[Entry], path: Path) -> bool:
    """A panel for each kind of figure of the memory; `False` where there are none."""
    from matplotlib import pyplot

    panels = {title: lines for start, title in PANELS.items() if (lines := series(history, start))}
    if not panels:
        return False
    figure, axes = pyplot.subplots(
        -(-len(panels) // 2),
        2,
        sharex=True,
        squeeze=False,
        figsize=(10, 2.6 * -(-len(panels) // 2)),
        layout="constrained",
    )
    for ax, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        ax.set_title(title, fontsize=10)
        for name, (steps, values) in lines.items():
            ax.plot(steps, values, label=name, marker=".")
    return _save(figure, axes.flat, path)


def _save(figure: Any, axes: Any, path: Path) -> bool:
    from matplotlib import pyplot

    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.lines:
            ax.legend(frameon=False, fontsize=7)
        else:
            ax.set_visible(False)
    for ax in figure.axes[-2:]:
        ax.set_xlabel("steps")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def perplexity_table(metrics: dict[str, float]) -> str:
    """Perplexities by source, with learning beside where it was measured."""
    starts = {"perplexity": "eval_perplexity", "learning": "eval_perplexity_learning"}
    columns = {title: start for title, start in starts.items() if start in metrics}
    names = [name.partition("/")[2] for name in metrics if name.startswith("eval_perplexity/")]
    width = max(map(len, ["all", *names]))
    lines = [f"{'':<{width}}" + "".join(f"{title:>12}" for title in columns)]
    for name in [*names, ""]:
        cells = (metrics[f"{start}/{name}" if name else start] for start in columns.values())
        lines.append(f"{name or 'all':<{width}}" + "".join(f"{value:>12.2f}" for value in cells))
    return "\n".join(lines)
