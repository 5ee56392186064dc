"""The formal languages of table 5, learned by small models of the ladder's rungs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from modeling_hope import HopeForCausalLM
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.options import option
from modeling_hope.training.plots import grouped_bars, new_figure, save_figure

from ..generators.formal_languages import LANGUAGES, LONGER, TRAINED, Language, draw
from .small_models import (
    STEPS,
    Data,
    Protocol,
    check_width,
    forget_checkpoints,
    rung_config,
    score,
    tune,
)
from .study import DeviceSettings, Part, Report, Result, SeededSettings, Study


# Table 5 of the paper: right on lengths seen and on longer ones, by language and by what the paper calls a model.
SOLVED = {"LSTM": (100.0, 100.0), "SRWM": (100.0, 100.0), "Hope": (100.0, 100.0)}
PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "parity": {
        **SOLVED,
        "DeltaNet": (98.2, 10.1),
        "linear attention": (78.1, 0.0),
        "Transformer": (46.4, 0.0),
    },
}
RUNG_OF_PAPER = {
    "hope": "Hope",
    "delta": "DeltaNet",
    "linear_attention": "linear attention",
    "transformer": "Transformer",
}
# Of the memories, chosen by training on lengths 2-25 and asking for 26-50: a rate from which writes can soon turn a sign,
# and no momentum, with which states are mixed with those of the chunk before.
FIELDS = {"memory_initial_rate": 1.0, "memory_momentum": False}
ONLY_BY_STATE = ("aa_star", "abab_star")  # where the paper has 100 for LSTM, SRWM and Hope, and 0 for the others


@strict
@dataclasses.dataclass
class FormalSettings(SeededSettings, DeviceSettings):
    languages: list[str] = option(
        lambda: list(LANGUAGES), "languages", f"of {', '.join(LANGUAGES)} (default: all)", tuple(LANGUAGES)
    )
    rungs: list[str] = option(
        lambda: ["hope", "delta", "transformer"],
        "models",
        f"of {', '.join(STEPS)} (default: hope delta transformer)",
        STEPS,
    )
    train: int = option(10_000, "languages", "strings to train on", least=1)
    test: int = option(
        1_000, "languages", "strings of each bin, and to tune with, where a language has so many", least=1
    )
    hidden: int = option(32, "models", "width", least=1)
    layers: int = option(2, "models", "layers", least=1)
    heads: int = option(2, "models", "heads", least=1)
    parameters: int = option(30_000, "models", "of each model, by the width of its levels")
    fields: dict[str, Any] = option(
        lambda: dict(FIELDS),
        "models",
        "fields of HopeConfig for the rungs with a memory, in the place of its defaults "
        f"(default: {' '.join(f'{name}={value}' for name, value in FIELDS.items())})",
    )
    rates: list[float] = option(
        lambda: [1e-3, 3e-3, 1e-2], "training", "learning rates to choose from (default: 0.001 0.003 0.01)", above=0
    )
    batch: int = option(32, "training", "strings in a step", least=1)
    epochs: int = option(30, "training", "at most", least=1)
    patience: int = option(5, "training", "epochs in a row with all that is held out right, and training ends", least=1)


def check(settings: FormalSettings) -> None:
    check_width(settings.hidden, settings.heads)
    for language in settings.languages:
        for rung in settings.rungs:
            config_for(settings, LANGUAGES[language], rung)


def config_for(settings: FormalSettings, language: Language, rung: str) -> Any:
    base = {
        "hidden_size": settings.hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "layer_ropes": [None] * settings.layers,  # no positions
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vocab_size = max(len(language.symbols), len(language.classes))
    return rung_config(rung, base, settings.parameters, vocab_size, settings.fields)


def read(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs, use_cache=False, learn="off").logits


def data_of(language: Language, words: list[str]) -> Data:
    return Data.of([(language.ids(word), language.label(word)) for word in words])


def learn(settings: FormalSettings, language: Language, rung: str, seed: int, place: Path) -> Result:
    """Train by every rate, choose one by what is held out, and test it."""
    strings = draw(language, seed, settings.train, settings.test, settings.test)

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return HopeForCausalLM(config_for(settings, language, rung)).to(settings.device)

    protocols = {
        f"rate-{rate:g}": Protocol(
            rate, 0.0, (0.9, 0.995), settings.batch, settings.epochs, patience=settings.patience, by="whole"
        )
        for rate in settings.rates
    }
    tuned = tune(
        make, read, data_of(language, strings.train), data_of(language, strings.held_out), protocols, seed, place
    )
    found = {
        "right": [_right(tuned.model, data_of(language, words)) for words in strings.bins],
        "strings": [len(words) for words in strings.bins],
        "chosen": tuned.chosen,
        "epochs": {name: len(curve) for name, curve in tuned.curves.items()},
        "held_out": {name: 100 * curve[-1]["whole"] for name, curve in tuned.curves.items()},
        "parameters": sum(parameter.numel() for parameter in make().parameters()),
    }
    forget_checkpoints(place)
    return found


def _right(model: nn.Module | None, data: Data) -> float | None:
    return None if model is None else 100 * score(model, read, data).whole


def parts(settings: FormalSettings) -> Mapping[str, Part]:
    def part(language: str, rung: str, seed: int) -> Part:
        return lambda place: learn(settings, LANGUAGES[language], rung, seed, place)

    return {
        f"{language}/{rung}/seed-{seed}": part(language, rung, seed)
        for language in settings.languages
        for rung in settings.rungs
        for seed in settings.seeds
    }


def of_paper(language: str, model: str) -> tuple[float, float]:
    """What table 5 has for one of the models that it names."""
    if language in PAPER:
        return PAPER[language][model]
    return SOLVED.get(model, (0.0, 0.0)) if language in ONLY_BY_STATE else (100.0, 100.0)


def report(settings: FormalSettings, found: Mapping[str, Result]) -> Report:
    def cells(name: str, rung: str) -> list[Result]:
        return [found[f"{name}/{rung}/seed-{seed}"] for seed in settings.seeds]

    rows = [
        [
            LANGUAGES[name].title,
            *(", ".join(shown(result["right"]) for result in cells(name, rung)) for rung in settings.rungs),
        ]
        for name in settings.languages
    ]
    paper = [
        [f"{LANGUAGES[name].title}, paper", *(_paper_cell(name, rung) for rung in settings.rungs)]
        for name in settings.languages
    ]
    both = [row for pair in zip(rows, paper, strict=True) for row in pair]
    named = ["LSTM", "SRWM", "Hope", "DeltaNet", "linear attention", "Transformer"]
    whole = [
        [language.title, *(shown(of_paper(name, model)) for model in named)] for name, language in LANGUAGES.items()
    ]
    details = [
        _details(f"{LANGUAGES[name].title}, {rung}", cells(name, rung), len(settings.rates))
        for name in settings.languages
        for rung in settings.rungs
    ]
    fields = ", ".join(f"{name}={value}" for name, value in settings.fields.items())
    tables = "\n\n".join(
        [
            f"Strings with every position right, %: of the lengths trained on ({TRAINED[0]}-{TRAINED[1]}) / longer ones "
            f"({LONGER[0]}-{LONGER[1]}); by seed.",
            markdown_table(["language", *settings.rungs], both),
            "The paper's table 5, whole:",
            markdown_table(["language", *named], whole),
            f"The same for all: {settings.train:,} strings, Adam (0.9, 0.995) in steps of {settings.batch}, no positions, "
            f"at most {settings.epochs} epochs (the paper: 300), ended by {settings.patience} in a row with all that is "
            f"held out right; a learning rate of {', '.join(f'{rate:g}' for rate in settings.rates)}, chosen for each "
            "language, model and seed on held-out strings of the lengths trained on. (Irie et al. chose, and stopped, by "
            "the longer strings too.) Where a language has one word of a length, those are trained on, held out and "
            f"tested. Memories, of all rungs, are at their defaults{f', but for {fields}' if fields else ''}; no string is as long as the "
            "period of a level, so that none learns.",
            markdown_table(["", "parameters", "rate", "epochs", "held out, %", "minutes a rate"], details),
        ]
    )
    return Report(
        tables, {"parts": dict(found), "paper": _paper_figures(named)}, lambda path: plot(settings, found, path)
    )


def shown(shares: Sequence[float | None]) -> str:
    """Of strings of the lengths trained on, and of longer ones."""
    return " / ".join("diverged" if share is None else f"{share:.4g}" for share in shares)


def _details(title: str, results: list[Result], rates: int) -> list[str]:
    """A row for the seeds of one model on one language."""
    chosen = [(result, result["chosen"]) for result in results]
    return [
        title,
        f"{results[0]['parameters']:,}",
        ", ".join("-" if name is None else name.removeprefix("rate-") for _, name in chosen),
        ", ".join("-" if name is None else str(result["epochs"][name]) for result, name in chosen),
        ", ".join("-" if name is None else f"{result['held_out'][name]:.4g}" for result, name in chosen),
        ", ".join(f"{result['seconds'] / 60 / rates:.1f}" for result in results),
    ]


def _paper_cell(name: str, rung: str) -> str:
    return shown(of_paper(name, RUNG_OF_PAPER[rung])) if rung in RUNG_OF_PAPER else ""


def _paper_figures(named: list[str]) -> Result:
    return {name: {model: of_paper(name, model) for model in named} for name in LANGUAGES}


def plot(settings: FormalSettings, found: Mapping[str, Result], path: Path) -> None:
    figure, axes = new_figure(1, 2, size=(11, 3.5), sharey=True)
    titles = [LANGUAGES[name].title for name in settings.languages]
    for which, (axis, window) in enumerate(zip(axes, (TRAINED, LONGER), strict=True)):
        means = {
            rung: [
                mean(found[f"{name}/{rung}/seed-{seed}"]["right"][which] or 0.0 for seed in settings.seeds)
                for name in settings.languages
            ]
            for rung in settings.rungs
        }
        grouped_bars(axis, titles, means, rotation=20)
        axis.set_title(f"lengths {window[0]}-{window[1]}")
    axes[0].set_ylabel("strings right, %")
    axes[0].legend()
    save_figure(figure, path)


STUDY = Study(
    name="formal_languages",
    about="Formal languages (table 5): small models are trained on short strings and asked about longer ones.",
    settings=FormalSettings,
    quick={
        "languages": ["parity", "anbn"],
        "rungs": ["hope", "transformer"],
        "seeds": [0],
        "train": 32,
        "test": 8,
        "hidden": 8,
        "layers": 1,
        "heads": 1,
        "parameters": 2_000,
        "rates": [1e-3, 1e-2],
        "epochs": 1,
        "batch": 16,
    },
    parts=parts,
    report=report,
    check=check,
)
