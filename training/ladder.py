"""
The ladder: from a Transformer to Hope, one change at a time, at equal parameters, tokens and tuning.

    python -m modeling_hope.training.corpus corpus
    python -m modeling_hope.training.ladder tune --out ladder        # learning rates, at a fifth of the tokens
    python -m modeling_hope.training.ladder run --out ladder         # every rung and ablation, two seeds
    python -m modeling_hope.training.ladder defaults --out ladder    # other defaults of the memory, likewise
    python -m modeling_hope.training.ladder report --out ladder --results training/results

All pass over what is there and go on with what was killed, so that several may share the work, each with rungs or seeds
of its own. A rung's levels have as many hidden units as make its parameters those of the others. All read the same rows
in the same order. Rates are chosen on validation text, and the ladder is measured on test text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .data import training_texts
from .ladder_report import write_report
from .ladder_runs import PERPLEXITIES, run_place, tuned_rates, tuning_place
from .recipe import SAVED, TrainingRecipe, read_recipe
from .run_directory import RESULT
from .rungs import RUNGS, config_of
from .tokenizer import train_tokenizer
from .train import train
from .trainer import DivergedError


FIRST_RATE, FIRST_INNER_RATE = 6e-3, 1.0
TUNED_ON = 5  # a run's tokens over those of a run to tune with


def _walk(first: float, factor: float, perplexity: Callable[[float], float]) -> None:
    """Rates up by a factor from the first on, as long as perplexity falls; if it rises at once, down."""
    best = perplexity(first)
    for times in (factor, 1 / factor):
        rate, found = first, best
        while (following := perplexity(rate * times)) < found:
            rate, found = rate * times, following
        if rate != first:
            return


@dataclass
class Ladder:
    """What all runs share: the recipe, its place, the tokenizer."""

    out: Path
    recipe: dict[str, Any]
    parameters: int
    test: list[str]

    def tokenizer(self) -> Path:
        """Trained once, by the first to ask; whole as soon as it is there, as others may ask meanwhile."""
        place = self.out / "tokenizer"
        if not place.is_dir():
            recipe = TrainingRecipe.from_fields({**self.recipe, "out": str(self.out)})
            trained = train_tokenizer(training_texts(recipe), self.recipe["train_tokenizer"])
            staged = place.with_name(f"{place.name}.{os.getpid()}")
            trained.save_pretrained(staged)
            try:
                staged.rename(place)
            except OSError:  # another was faster, with the same
                shutil.rmtree(staged)
        return place

    def run(
        self, name: str, place: Path, seed: int, rate: float, inner_rate: float | None, **others: Any
    ) -> dict[str, Any]:
        """What a run found: its result, if it has one, or that of running it, from its last checkpoint on."""
        if (place / RESULT).is_file():
            return json.loads((place / RESULT).read_text())
        tokenizer = self.tokenizer()
        config = config_of(RUNGS[name], self.recipe, self.parameters, len(AutoTokenizer.from_pretrained(tokenizer)))
        fields = {
            **self.recipe,
            "train_tokenizer": None,
            "tokenizer": str(tokenizer),
            "config": config if inner_rate is None else {**config, "cms_learning_rates": inner_rate},
            "out": str(place),
            "seed": seed,
            "learning_rate": rate,
            "evaluate_every": None,
            **others,
        }
        return train(TrainingRecipe.from_fields(fields), resume=(place / SAVED).is_file())

    def short_run(
        self, name: str, place: Path, seed: int, rate: float, inner_rate: float | None = None
    ) -> dict[str, Any]:
        return self.run(name, place, seed, rate, inner_rate, steps=self.recipe["steps"] // TUNED_ON)

    def whole_run(self, name: str, seed: int) -> dict[str, Any]:
        rates = self.rate(name), self.inner_rate(name)
        return self.run(
            name, run_place(self.out, name, seed), seed, *rates, validation=self.test, validation_fraction=0.0
        )

    def tune(self, name: str) -> None:
        """The rates that a rung does not take from another."""
        rung = RUNGS[name]
        if rung.rate_of is None:
            _walk(FIRST_RATE, 2, lambda rate: self._perplexity(name, rate, None))
        if rung.learns and rung.inner_rate_of is None:
            _walk(FIRST_INNER_RATE, 3, lambda inner: self._perplexity(name, self.rate(name), inner))

    def _perplexity(self, name: str, rate: float, inner_rate: float | None) -> float:
        inner = inner_rate is not None
        place = tuning_place(self.out, name, rate if inner_rate is None else inner_rate, inner)
        try:
            return float(self.short_run(name, place, 0, rate, inner_rate)[PERPLEXITIES[inner]])
        except DivergedError:
            return math.inf

    def rate(self, name: str) -> float:
        """
        The learning rate that was best.

        Raises:
            ValueError: none was tried.
        """
        return self._best(RUNGS[name].rate_of or name, inner=False)

    def inner_rate(self, name: str) -> float | None:
        """The same of the levels' rate, where they learn."""
        rung = RUNGS[name]
        return self._best(rung.inner_rate_of or name, inner=True) if rung.learns else None

    def _best(self, name: str, inner: bool) -> float:
        tuned = tuned_rates(self.out, name, inner)
        if not tuned:
            raise ValueError(f"There is no learning rate of {name!r} yet: run `tune --rungs {name}` first.")
        return min(tuned, key=lambda rate: tuned[rate])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "defaults", "report"))
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--recipe", default="ladder-2m", help="what the runs share")
    parser.add_argument("--parameters", type=int, default=2_100_000, help="of each model")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--test", nargs="+", default=["corpus/test"], help="text that runs are measured on")
    parser.add_argument("--threads", type=int, help="of torch, in this process")
    parser.add_argument("--results", type=Path, default=Path("training/results"), help="where the report goes")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    ladder = Ladder(given.out, read_recipe(given.recipe), given.parameters, given.test)
    if given.what == "report":
        write_report(ladder.out, ladder.recipe, given.results)
        return
    if given.what == "tune":
        for name in given.rungs:
            ladder.tune(name)
        return
    for seed in given.seeds:
        for name in given.rungs:
            if given.what == "run" and RUNGS[name].kind != "defaults":
                ladder.whole_run(name, seed)
            elif given.what == "defaults" and (RUNGS[name].kind == "defaults" or name == "self_referential"):
                ladder.short_run(name, run_place(ladder.out / "defaults", name, seed), seed, ladder.rate(name))


if __name__ == "__main__":
    main()
