"""The tasks of MAD (table 4), learned by small models of the ladder's rungs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from modeling_hope import HopeConfig, HopeForCausalLM, HopeModel
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.options import option
from modeling_hope.training.plots import grouped_bars, new_figure, save_figure
from modeling_hope.training.rungs import ATTENTION, SELF, count

from ..generators.mad import TASKS, TEST_SEQUENCES, Setting, Task, sequences
from .small_models import STEPS, Data, Protocol, check_rungs, forget_checkpoints, rung_config, score, tune
from .study import Part, Report, Result, Study, StudySettings


# Table 4 of the paper, in the order of the tasks.
PAPER = {
    "Transformer": (49.4, 100.0, 47.9, 96.2, 83.7),
    "RWKV-7": (45.1, 100.0, 32.8, 95.6, 82.2),
    "Comba": (46.3, 100.0, 32.8, 96.4, 82.9),
    "Titans": (49.8, 100.0, 50.0, 99.4, 83.4),
    "Hope": (51.2, 100.0, 52.1, 99.7, 85.2),
}
# Two blocks of a mixer and a SwiGLU MLP, of these sizes in the Transformer; the others' levels make up for it.
LAYERS, HIDDEN, HEADS, MLP = 2, 128, 16, 352
BATCH, LAST_RATE = 128, 1e-6


@strict
@dataclasses.dataclass
class MADSettings(StudySettings):
    tasks: list[str] = option(lambda: list(TASKS), "tasks", f"of {', '.join(TASKS)} (default: all)", tuple(TASKS))
    rungs: list[str] = option(
        lambda: ["hope", "delta", "transformer"],
        "models",
        f"of {', '.join(STEPS)} (default: hope delta transformer)",
        STEPS,
    )
    reduced: bool = option(
        False, "training", "the reduced protocol: MAD's first setting of each task, 2 learning rates, 50 epochs"
    )
    rates: list[float] | None = option(
        None, "training", "learning rates to choose from (default: 1e-4 5e-4 1e-3; reduced: 5e-4 1e-3)"
    )
    decays: list[float] | None = option(None, "training", "weight decays to choose from (default: 0 0.1; reduced: 0)")
    epochs: int | None = option(None, "training", "epochs (default: 200; reduced: 50)")
    patience: int | None = option(
        None, "training", "epochs in a row with all validation right, and training ends (default: never; reduced: 5)"
    )
    variants: str | None = option(
        None,
        "tasks",
        "`all`: every difficulty that MAD averages over; `first`: the one that it varies (default: all; reduced: first)",
        ("all", "first"),
    )
    train: int | None = option(None, "tasks", "sequences to train on, at most")
    test: int = option(
        TEST_SEQUENCES, "tasks", "sequences of the test, and of the validation that protocols are chosen by"
    )
    hidden: int = option(HIDDEN, "models", "width")
    heads: int = option(HEADS, "models", "heads")
    fields: dict[str, Any] = option(
        dict, "models", "fields of HopeConfig for the rungs with a memory, in the place of its defaults"
    )
    device: str = option("cpu", "training", "of torch")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study comes to, of its settings and the protocol."""

    rates: list[float]
    decays: list[float]
    epochs: int
    patience: int | None
    variants: str

    @classmethod
    def of(cls, settings: MADSettings) -> Plan:
        full = cls([1e-4, 5e-4, 1e-3], [0.0, 0.1], 200, None, "all")
        protocol = cls([5e-4, 1e-3], [0.0], 50, 5, "first") if settings.reduced else full
        given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)}
        return dataclasses.replace(protocol, **{name: value for name, value in given.items() if value is not None})

    def settings(self, task: Task) -> dict[str, Setting]:
        return task.settings() if self.variants == "all" else {"first": task.first}


class Decoded(nn.Module):
    """
    MAD's model for compression: an encoder, of which the last position alone is decoded, with sines of a position added
    for each, by a plain MLP.
    """

    def __init__(self, config: HopeConfig):
        super().__init__()
        self.encoder = HopeModel(config)
        self.encoder.norm = nn.Identity()  # the decoder begins with one
        width = config.hidden_size
        self.decoder = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.RMSNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.RMSNorm(width),
            nn.Linear(width, config.vocab_size),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        read = self.encoder(inputs, use_cache=False).last_hidden_state[:, -1:]
        return self.decoder(read + sines(inputs.shape[1], read.shape[-1], read.device))


def sines(length: int, width: int, device: torch.device) -> torch.Tensor:
    """`[length, width]`: sines, then cosines, of wavelengths from 2 pi to 20,000 pi."""
    half = width // 2
    turns = torch.exp(torch.arange(half, device=device) * (-math.log(10_000) / max(half - 1, 1)))
    angles = torch.arange(length, device=device)[:, None] * turns
    return torch.cat([angles.sin(), angles.cos()], 1)


def read(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs) if isinstance(model, Decoded) else model(inputs, use_cache=False, learn="off").logits


def config_for(settings: MADSettings, setting: Setting, rung: str) -> HopeConfig:
    base = {
        "hidden_size": settings.hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": setting.length,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    width = MLP * settings.hidden // HIDDEN
    attention = {"layer_types": [ATTENTION["layer_types"]] * LAYERS}
    parameters = count({**base, **SELF, **attention, "intermediate_size": width}, setting.vocab_size)
    return rung_config(rung, base, parameters, setting.vocab_size, settings.fields)


def check(settings: MADSettings) -> None:
    if unknown := [name for name in settings.tasks if name not in TASKS]:
        raise ValueError(f"`tasks`: there is no {unknown[0]!r}, only {', '.join(TASKS)}.")
    if settings.variants not in (None, "all", "first"):
        raise ValueError(f"`variants` must be all or first, got {settings.variants!r}.")
    check_rungs(settings.rungs)
    plan = Plan.of(settings)
    for name, values in {
        "tasks": settings.tasks, "rungs": settings.rungs, "rates": plan.rates, "decays": plan.decays
    }.items():  # fmt: skip
        if not values:
            raise ValueError(f"`{name}` is empty: give at least one.")
    for name, number in {"epochs": plan.epochs, "train": settings.train, "test": settings.test}.items():
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {number}.")
    for task in settings.tasks:
        for rung in settings.rungs:
            config_for(settings, TASKS[task].first, rung)


def learn(settings: MADSettings, task: Task, setting: Setting, rung: str, seed: int, place: Path) -> Result:
    """Train by every rate and decay, choose by validation, and test."""
    plan = Plan.of(settings)
    number = min(setting.train, settings.train or setting.train)

    def data(kind: str, number: int, training: bool) -> Data:
        return Data.of(sequences(task, setting, f"{kind}-{seed}", number, training))

    def make() -> nn.Module:
        torch.manual_seed(seed)
        config = config_for(settings, setting, rung)
        return (Decoded(config) if task.decoded else HopeForCausalLM(config)).to(settings.device)

    protocols = {
        f"rate-{rate:g}-decay-{decay:g}": Protocol(
            rate, decay, (0.9, 0.999), BATCH, plan.epochs, LAST_RATE, plan.patience, by="positions"
        )
        for rate in plan.rates
        for decay in plan.decays
    }
    validation = data("validation", settings.test, False)
    tuned = tune(make, read, data("train", number, True), validation, protocols, seed, place)
    tested = score(tuned.model, read, data("test", settings.test, False))
    found = {
        "accuracy": 100 * tested.positions,
        "class_accuracy": 100 * tested.classes,
        "chosen": tuned.chosen,
        "validation": {name: 100 * curve[-1]["positions"] for name, curve in tuned.curves.items()},
        "epochs": {name: len(curve) for name, curve in tuned.curves.items()},
        "parameters": sum(parameter.numel() for parameter in tuned.model.parameters()),
    }
    forget_checkpoints(place)
    return found


def parts(settings: MADSettings) -> Mapping[str, Part]:
    plan = Plan.of(settings)

    def part(task: str, rung: str, setting: Setting, seed: int) -> Part:
        return lambda place: learn(settings, TASKS[task], setting, rung, seed, place)

    return {
        f"{task}/{rung}/{variant}/seed-{seed}": part(task, rung, setting, seed)
        for task in settings.tasks
        for rung in settings.rungs
        for variant, setting in plan.settings(TASKS[task]).items()
        for seed in settings.seeds
    }


def report(settings: MADSettings, found: Mapping[str, Result]) -> Report:
    plan = Plan.of(settings)

    def mean(task: str, rung: str, variants: list[str]) -> float:
        cells = [
            found[f"{task}/{rung}/{variant}/seed-{seed}"]["accuracy"] for variant in variants for seed in settings.seeds
        ]
        return sum(cells) / len(cells)

    means = {
        rung: {task: mean(task, rung, list(plan.settings(TASKS[task]))) for task in settings.tasks}
        for rung in settings.rungs
    }
    places = [list(TASKS).index(task) for task in settings.tasks]
    ours = [[rung, *(f"{by_task[task]:.1f}" for task in settings.tasks)] for rung, by_task in means.items()]
    paper = [[f"paper: {model}", *(f"{row[place]:.1f}" for place in places)] for model, row in PAPER.items()]
    details = [
        [
            f"{TASKS[task].title}, {variant}",
            *(f"{mean(task, rung, [variant]):.1f}" for rung in settings.rungs),
            *(found[f"{task}/{rung}/{variant}/seed-{settings.seeds[0]}"]["chosen"] for rung in settings.rungs),
        ]
        for task in settings.tasks
        for variant in plan.settings(TASKS[task])
    ]
    minutes = sum(result["seconds"] for result in found.values()) / 60
    runs = len(found) * len(plan.rates) * len(plan.decays)
    fields = ", ".join(f"{name}={value}" for name, value in settings.fields.items())
    heads = ["", *(TASKS[task].title for task in settings.tasks)]
    tables = "\n\n".join(
        [
            "Scored positions that are right, %: the mean over difficulties and seeds.",
            markdown_table(heads, [*ours, *paper]),
            "Protocols. MAD's, by which the paper measured: two blocks of width 128 with 16 heads, 12,800 sequences (256 "
            "in memorization), 200 epochs in batches of 128, AdamW, a cosine to 1e-6; every rate of 1e-4, 5e-4, 1e-3 with "
            "every decay of 0, 0.1, the best kept, by the test itself; the mean over all difficulties; 1,280 sequences of "
            f"test. Here{' (reduced)' if settings.reduced else ''}: {plan.epochs} epochs at most"
            f"{f', ended by {plan.patience} in a row with all validation right' if plan.patience else ''}; rates "
            f"{', '.join(f'{rate:g}' for rate in plan.rates)}; decays {', '.join(f'{decay:g}' for decay in plan.decays)}; "
            f"difficulties: {plan.variants}; width {settings.hidden}, {settings.heads} heads; "
            f"{f'at most {settings.train:,} sequences' if settings.train else 'as many sequences'}; {settings.test:,} of "
            "test, and others as many by which rate and decay are chosen; gradients of a norm of at most 1, 50 steps of "
            "warm-up; all rungs with the Transformer's parameters"
            f"{f'; memories with {fields}' if fields else ''}. Levels do not learn here. {runs} trainings, "
            f"{minutes / runs:.1f} minutes each.",
            markdown_table(["", *settings.rungs, *(f"{rung} chose" for rung in settings.rungs)], details),
        ]
    )
    return Report(
        tables, {"parts": dict(found), "means": means, "paper": PAPER}, lambda path: plot(settings, means, path)
    )


def plot(settings: MADSettings, means: Mapping[str, Mapping[str, float]], path: Path) -> None:
    figure, axis = new_figure(size=(9, 3.5))
    bars: dict[str, list[float]] = {rung: [by_task[task] for task in settings.tasks] for rung, by_task in means.items()}
    bars["paper: Hope"] = [PAPER["Hope"][list(TASKS).index(task)] for task in settings.tasks]
    grouped_bars(axis, [TASKS[task].title for task in settings.tasks], bars)
    axis.set_ylabel("right, %")
    axis.legend()
    save_figure(figure, path)


STUDY = Study(
    name="mad",
    about="MAD (table 4): small models trained on token tasks, compression, recall, copying and memorization.",
    settings=MADSettings,
    quick={
        "rungs": ["hope", "transformer"],
        "seeds": [0],
        "reduced": True,
        "train": 16,
        "test": 4,
        "epochs": 1,
        "rates": [1e-3],
        "hidden": 16,
        "heads": 2,
    },
    parts=parts,
    report=report,
    check=check,
)
