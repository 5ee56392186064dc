"""
The ladder: from a Transformer to Hope, one change at a time, at equal parameters, tokens and tuning.

    python -m modeling_hope.training.corpus corpus
    python -m modeling_hope.training.ladder tune --out ladder      # learning rates, at a fifth of the tokens
    python -m modeling_hope.training.ladder run --out ladder       # every rung and ablation, two seeds
    python -m modeling_hope.training.ladder report --out ladder --results training/results

`tune` and `run` pass over what is there and go on with what was killed, so that several may share the work, each with
rungs or seeds of its own. A rung's levels have as many hidden units as make its parameters those of the recipe. All read
the same rows in the same order; a rung of the ladder has the learning rate that was best for it, an ablation Hope's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_hope  # noqa: F401  the Auto classes then know Hope

from .data import training_texts
from .ladder_report import write_report
from .recipe import TrainingRecipe, read_recipe
from .tokenizer import train_tokenizer
from .train import RESULT, train
from .trainer import DivergedError


FIRST_RATE = 1.5e-3
UNIT = 4  # levels have multiples of so many hidden units
TUNED_ON = 5  # a run's tokens over those of a run to tune with

ATTENTION = {"layer_types": "full_attention"}
# A matrix that every token is added to: no forgetting, no erasing, fixed projections, one level that never learns.
MATRIX = {
    "memory_depth": 1,
    "memory_objective": "dot",
    "memory_delta_decay": False,
    "memory_weight_decay": False,
    "memory_momentum": False,
    "memory_self_values": False,
    "memory_retention": "zero",
    "adaptive_projections": [],
    "cms_periods": [None],
}
TITANS = {
    "memory_delta_decay": False,
    "memory_self_values": False,
    "adaptive_projections": [],
    "cms_periods": [None],
}
SELF = {"cms_periods": [None]}


@dataclass(frozen=True)
class Rung:
    """
    Attributes:
        about: what it is, for the table.
        fields: of the config, beyond the recipe's.
        rate_of: the rung whose tuned learning rate it takes; unset: it is tuned itself.
        ablation: a part taken from the self-referential memory, or added, rather than a step toward Hope.
    """

    about: str
    fields: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    ablation: bool = False


def _without(about: str, **fields: Any) -> Rung:
    return Rung(about, {**SELF, **fields}, rate_of="self_referential", ablation=True)


LEARNING = {"cms_training": "first_order"}
RUNGS = {
    "transformer": Rung("Transformer++: Llama", {"model_type": "llama"}),
    "linear_attention": Rung("linear attention: a matrix memory that adds", MATRIX),
    "delta": Rung("and erases along the key: the delta rule", {**MATRIX, "memory_delta_decay": True}),
    "titans": Rung("a deep memory with momentum and decay: Titans", TITANS),
    "self_referential": Rung("and the delta term, and memories that make keys, values, rates and decays", SELF),
    "hope": Rung("and three levels that learn: Hope", LEARNING, rate_of="self_referential"),
    "hope_attention": Rung("attention, and three levels that learn: Hope-Attention", {**ATTENTION, **LEARNING}, rate_of="transformer"),
    "no_delta": _without("without the delta term (DGD)", memory_delta_decay=False),
    "no_momentum": _without("without momentum", memory_momentum=False),
    "no_weight_decay": _without("without weight decay", memory_weight_decay=False),
    "no_k": _without("keys by a linear map", adaptive_projections=["v", "eta", "alpha"]),
    "no_v": _without("values by a linear map", adaptive_projections=["k", "eta", "alpha"]),
    "with_q": _without("queries by a memory, too", adaptive_projections=["k", "v", "q", "eta", "alpha"]),
}  # fmt: skip


def config_of(rung: Rung, recipe: dict[str, Any], parameters: int, vocab_size: int) -> dict[str, Any]:
    """
    The fields of a rung's config, with as wide levels as bring it to `parameters`.

    Raises:
        ValueError: it has more without any level.
    """
    fields = copy.deepcopy({**recipe["config"], **rung.fields})
    if fields.get("model_type") == "llama":
        known = vars(AutoConfig.for_model("llama"))
        fields = {name: value for name, value in fields.items() if name == "model_type" or name in known}
        fields["initializer_range"] = fields["hidden_size"] ** -0.5  # as Hope's: with Llama's 0.02 it learns slower
    elif isinstance(kind := fields.get("layer_types"), str):
        fields["layer_types"] = [kind] * fields["num_hidden_layers"]
    narrow, wider = (count({**fields, "intermediate_size": width}, vocab_size) for width in (UNIT, 2 * UNIT))
    width = UNIT * (1 + round((parameters - narrow) / (wider - narrow)))
    if width < UNIT:
        raise ValueError(f"`parameters`: a rung has {narrow:,} with levels of {UNIT} units, more than {parameters:,}.")
    return {**fields, "intermediate_size": width}


def count(fields: dict[str, Any], vocab_size: int) -> int:
    """Parameters of a model of these fields."""
    fields = {**fields, "vocab_size": vocab_size}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type", "hope"), **fields)
        ).num_parameters()


@dataclass
class Ladder:
    """What all runs share: the recipe, its place, the tokenizer."""

    out: Path
    recipe: dict[str, Any]
    parameters: int

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

    def run(self, name: str, place: Path, seed: int, rate: float, **others: Any) -> dict[str, Any]:
        """What a run found: its result, if it has one, or that of running it, from its last checkpoint on."""
        if (place / RESULT).is_file():
            return json.loads((place / RESULT).read_text())
        tokenizer = self.tokenizer()
        size = len(AutoTokenizer.from_pretrained(tokenizer))
        fields = {
            **self.recipe,
            "train_tokenizer": None,
            "tokenizer": str(tokenizer),
            "config": config_of(RUNGS[name], self.recipe, self.parameters, size),
            "out": str(place),
            "seed": seed,
            "learning_rate": rate,
            "evaluate_every": None,
            **others,
        }
        return train(TrainingRecipe.from_fields(fields), resume=(place / "recipe.yaml").is_file())

    def tune(self, names: Sequence[str]) -> None:
        """Learning rates by factors of 2, from `FIRST_RATE` on, as long as perplexity falls, on both sides."""
        for name in names:
            if RUNGS[name].rate_of is not None:
                continue
            best = self._tuning_run(name, FIRST_RATE)
            for factor in (2.0, 0.5):
                rate, found = FIRST_RATE, best
                while (following := self._tuning_run(name, rate * factor)) < found:
                    rate, found = rate * factor, following
                if rate != FIRST_RATE:
                    break  # perplexity rises on the other side

    def _tuning_run(self, name: str, rate: float) -> float:
        place, steps = self.out / "tune" / f"{name}-{rate:g}", self.recipe["steps"] // TUNED_ON
        try:
            return float(self.run(name, place, 0, rate, steps=steps)["eval_perplexity"])
        except DivergedError:
            return math.inf

    def tuned(self, name: str) -> dict[float, float]:
        """
        Perplexity by learning rate.

        Raises:
            ValueError: it was not tuned.
        """
        own = RUNGS[name].rate_of or name
        results = {
            path.parent.name.rpartition(f"{own}-")[2]: path for path in (self.out / "tune").glob(f"{own}-*/{RESULT}")
        }
        if not results:
            raise ValueError(f"There is no learning rate of {own!r} yet: run `tune --rungs {own}` first.")
        found = {float(rate): json.loads(path.read_text())["eval_perplexity"] for rate, path in results.items()}
        return dict(sorted(found.items()))

    def is_tuned(self, name: str) -> bool:
        return any((self.out / "tune").glob(f"{name}-*/{RESULT}"))

    def place(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-{seed}"

    def results(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Name, seed and result of each run that came to its end."""
        for name in RUNGS:
            for path in sorted(self.out.glob(f"{name}-*/{RESULT}")):
                seed = path.parent.name.rpartition("-")[2]
                yield name, int(seed), json.loads(path.read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "report"))
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--recipe", default="ladder-2m", help="what the runs share")
    parser.add_argument("--parameters", type=int, default=2_100_000, help="of each model")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, help="of torch, in this process")
    parser.add_argument("--results", type=Path, default=Path("training/results"), help="where the report goes")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    ladder = Ladder(given.out, read_recipe(given.recipe), given.parameters)
    if given.what == "tune":
        ladder.tune(given.rungs)
    elif given.what == "run":
        for seed in given.seeds:
            for name in given.rungs:
                tuned = ladder.tuned(name)
                ladder.run(name, ladder.place(name, seed), seed, min(tuned, key=lambda rate: tuned[rate]))
    else:
        write_report(ladder, RUNGS, given.results)


if __name__ == "__main__":
    main()
