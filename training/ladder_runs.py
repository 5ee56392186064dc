"""What lies in a ladder's directory: runs by rung and seed, and those that rates were tuned by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .run_directory import RESULT
from .rungs import RUNGS


PERPLEXITIES = ("eval_perplexity", "eval_perplexity_learning")  # what a rate, and the levels' own, are chosen by


def run_place(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}"


def finished_runs(out: Path) -> Iterator[tuple[str, int, Path]]:
    """Rung, seed and directory of each run that came to its end."""
    for name in RUNGS:
        for path in sorted(out.glob(f"{name}-*/{RESULT}")):
            yield name, int(path.parent.name.rpartition("-")[2]), path.parent


def tuning_place(out: Path, name: str, rate: float, inner: bool) -> Path:
    return out / "tune" / f"{_tuned(name, inner)}{rate:g}"


def tuned_rates(out: Path, name: str, inner: bool = False) -> dict[float, float]:
    """Perplexity by learning rate, or by the levels' own; empty where it was not tuned."""
    start, key = _tuned(name, inner), PERPLEXITIES[inner]
    found = {path.parent.name.removeprefix(start): path for path in (out / "tune").glob(f"{start}[0-9]*/{RESULT}")}
    return dict(sorted((float(rate), json.loads(path.read_text())[key]) for rate, path in found.items()))


def _tuned(name: str, inner: bool) -> str:
    return f"{name}-inner-" if inner else f"{name}-"
