"""The paper's optimizers on its two toys (Eq. 45 and 53), beside tuned rivals."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from modeling_hope.optimizers import M3, DeepMomentum, DeltaGradientDescent, DeltaMomentum
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.options import option
from modeling_hope.training.plots import new_figure, save_figure
from modeling_hope.training.run_directory import write

from ..generators.toys import Valley, linear_tasks, psi, valleys
from .study import Part, Report, Result, SeededSettings, Study


TOYS = ("orthogonal", "overlapping", "valley")
STEPS_OF_TASK, BATCH, NOISE, OVERLAP = 50, 8, 0.1, 0.3
SOLVED = 1e-3  # psi below which a valley counts as solved
NEVER = math.inf

Params = Sequence[torch.Tensor]
Drawn = dict[str, Any]  # numbers, by the options of an optimizer


@dataclasses.dataclass(frozen=True)
class Rival:
    """
    Attributes:
        make: the optimizer, for parameters, the model and what was drawn.
        ranges: what is tuned, and between which values.
        linear: of those, what is drawn evenly; of the others it is the logarithm. A `max_norm` bounds the norm of every
            parameter's gradient.
        valley: whether it can be asked about the valley, which has no layers.
    """

    make: Callable[[Params, nn.Module | None, Drawn], torch.optim.Optimizer]
    ranges: dict[str, tuple[float, float]]
    linear: tuple[str, ...] = ()
    valley: bool = True

    def draw(self, random: Random) -> Drawn:
        drawn: Drawn = {}
        for name, (low, high) in self.ranges.items():
            value = (
                random.uniform(low, high)
                if name in self.linear
                else math.exp(random.uniform(math.log(low), math.log(high)))
            )
            drawn[name] = float(f"{value:.3g}")
        return drawn


def _sgd(params: Params, model: nn.Module | None, drawn: Drawn) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **{name: value for name, value in drawn.items() if name != "max_norm"})


def _adam(params: Params, model: nn.Module | None, drawn: Drawn) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, drawn["lr"], betas=(drawn["momentum"], 1 - drawn["beta2_from_1"]))


def _muon(params: Params, model: nn.Module | None, drawn: Drawn) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, drawn["lr"], weight_decay=0.0, momentum=drawn["momentum"])


def _dgd(params: Params, model: nn.Module | None, drawn: Drawn) -> torch.optim.Optimizer:
    assert model is not None
    return DeltaGradientDescent(params, model, **drawn)


def _delta(params: Params, model: nn.Module | None, drawn: Drawn) -> torch.optim.Optimizer:
    return DeltaMomentum(params, **drawn)


def _deep(params: Params, model: nn.Module | None, drawn: Drawn) -> torch.optim.Optimizer:
    return DeepMomentum(params, **drawn, hidden_size=16)


def _m3(params: Params, model: nn.Module | None, drawn: Drawn) -> torch.optim.Optimizer:
    betas = (drawn["momentum"], 0.99, 0.9)
    return M3(params, drawn["lr"], betas=betas, alpha=drawn["alpha"], foreach=True)


RATE, MOMENTUM = {"lr": (1e-4, 3.0)}, {"momentum": (0.0, 0.99)}
SMALL_RATE = {"lr": (1e-4, 1.0)}
RIVALS = {
    "SGD": Rival(_sgd, RATE),
    "SGD, weight decay": Rival(_sgd, {**RATE, "weight_decay": (1e-5, 1.0)}),
    "SGD, momentum": Rival(_sgd, {**RATE, **MOMENTUM}, ("momentum",)),
    "SGD, momentum, clipped": Rival(_sgd, {**RATE, **MOMENTUM, "max_norm": (1e-2, 10.0)}, ("momentum",)),
    "Adam": Rival(_adam, {**SMALL_RATE, **MOMENTUM, "beta2_from_1": (1e-3, 0.5)}, ("momentum",)),
    "Muon": Rival(_muon, {**SMALL_RATE, **MOMENTUM}, ("momentum",)),
    "DeltaGradientDescent": Rival(_dgd, {**RATE, "delta": (1e-4, 1.0)}, valley=False),
    "DeltaMomentum": Rival(_delta, {**RATE, **MOMENTUM, "delta": (1e-3, 1.0)}, ("momentum",)),
    "DeepMomentum": Rival(_deep, {**RATE, **MOMENTUM, "memory_lr": (1e-2, 10.0)}, ("momentum",)),
    "M3": Rival(_m3, {**SMALL_RATE, **MOMENTUM, "alpha": (1e-2, 2.0)}, ("momentum",)),
}
OURS = ("DeltaGradientDescent", "DeltaMomentum", "DeepMomentum", "M3")


@strict
@dataclasses.dataclass
class OptimizerSettings(SeededSettings):
    seeds: list[int] = option(lambda: [0, 1, 2, 3, 4], "study", "seeds of what is tested (default: 0 1 2 3 4)", least=0)
    toys: list[str] = option(lambda: list(TOYS), "toys", f"of {', '.join(TOYS)} (default: all)", TOYS)
    trials: int = option(64, "tuning", "settings of each optimizer that are drawn and tried", least=1)
    tuning_seeds: int = option(
        3, "tuning", "sets of tasks, or valleys, that settings are tried on; none is tested", least=1
    )
    tasks: int = option(8, "toys", "tasks learned one after the other", least=2)
    steps: int = option(500, "toys", "steps in a valley, at most", least=1)


def check(settings: OptimizerSettings) -> None:
    if tried := [seed for seed in settings.seeds if seed in tuning_seeds(settings)]:
        raise ValueError(f"`seeds`: {tried[0]} is one that settings are tried on. Give another.")


def tuning_seeds(settings: OptimizerSettings) -> range:
    return range(1_000, 1_000 + settings.tuning_seeds)


def clip(params: Params, drawn: Drawn) -> None:
    for param in params if "max_norm" in drawn else []:
        nn.utils.clip_grad_norm_([param], drawn["max_norm"])


def learn_tasks(rival: Rival, drawn: Drawn, seed: int, number: int, overlap: float) -> dict[str, float]:
    """
    Learn tasks one after the other, each for some steps.

    Returns:
        The mean loss of all tasks at the end, beyond the noise; and by how much those before the last have risen since
        they were learned.
    """
    tasks = linear_tasks(seed, number, overlap=overlap)
    out, width = tasks[0].weight.shape
    model = nn.Linear(width, out, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = rival.make([model.weight], model, drawn)
    generator = torch.Generator().manual_seed(seed)
    learned = []
    for task in tasks:
        for _ in range(STEPS_OF_TASK):
            x, y = task.batch(generator, BATCH, NOISE)
            optimizer.zero_grad()
            (model(x) - y).square().sum(1).mean().backward()
            clip([model.weight], drawn)
            optimizer.step()
        if not model.weight.isfinite().all():
            return {"loss": NEVER, "forgotten": NEVER}
        learned.append(task.excess(model.weight.detach()))
    last = [task.excess(model.weight.detach()) for task in tasks]
    risen = [now - then for now, then in zip(last[:-1], learned[:-1], strict=True)]
    return {"loss": sum(last) / number, "forgotten": sum(risen) / len(risen)}


def descend(rival: Rival, drawn: Drawn, among: list[Valley], steps: int) -> torch.Tensor:
    """
    The way down each valley, `[steps + 1, valleys, 2]`.

    What is optimized is the way gone since the start, so that no decay pulls to where the least is.
    """
    starts = torch.tensor([valley.start for valley in among])
    gone = [nn.Parameter(torch.zeros(1, 2)) for _ in among]
    optimizer = rival.make(gone, None, drawn)
    path = [starts]
    for _ in range(steps):
        optimizer.zero_grad()
        psi(starts + torch.cat(list(gone)), among).sum().backward()
        clip(gone, drawn)
        optimizer.step()
        path.append(starts + torch.cat([param.detach() for param in gone]))
    return torch.stack(path)


def steps_down(path: torch.Tensor, among: list[Valley]) -> list[float]:
    """After how many steps a valley is solved, and stays so."""
    above = torch.stack([~(psi(points, among) < SOLVED) for points in path])
    places = torch.arange(1, len(path) + 1)[:, None]
    last = (above * places).amax(0)
    return [NEVER if count == len(path) else float(count) for count in last.tolist()]


def mean_steps(found: list[float], steps: int) -> float:
    """What is not solved counts as twice the steps there were."""
    return sum(2 * steps if count == NEVER else count for count in found) / len(found)


def trial(settings: OptimizerSettings, toy: str, rival: Rival, drawn: Drawn) -> float:
    """The lower the better, on tasks or valleys that are not tested."""
    others = tuning_seeds(settings)
    if toy == "valley":
        among = [valley for seed in others for valley in valleys(seed, 2)]
        return mean_steps(steps_down(descend(rival, drawn, among, settings.steps), among), settings.steps)
    overlap = OVERLAP if toy == "overlapping" else 0.0
    losses = [learn_tasks(rival, drawn, seed, settings.tasks, overlap)["loss"] for seed in others]
    return sum(losses) / len(losses)


def compare(settings: OptimizerSettings, toy: str, name: str, place: Path) -> Result:
    """Try settings, choose the best, test it. Trials that are done are kept in `trials.jsonl`."""
    rival, random = RIVALS[name], Random(name)
    trials = place / "trials.jsonl"
    text = trials.read_text() if trials.is_file() else ""
    text = text[: text.rfind("\n") + 1]  # its last line is not whole where the study was killed
    write(trials, text)
    done = [json.loads(line) for line in text.splitlines()]
    with trials.open("a") as file:
        for number in range(settings.trials):
            drawn = rival.draw(random)
            if number >= len(done):
                result = trial(settings, toy, rival, drawn)
                done.append({"drawn": drawn, "score": result if math.isfinite(result) else None})
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
    best = min(done, key=lambda tried: NEVER if tried["score"] is None else tried["score"])
    drawn = best["drawn"]
    found: Result = {"drawn": drawn, "tuning_score": best["score"]}
    if toy == "valley":
        among = [Valley(), *(valley for seed in settings.seeds for valley in valleys(seed, 2))]
        path = descend(rival, drawn, among, settings.steps)
        counts = steps_down(path, among)
        return {
            **found,
            "score": mean_steps(counts, settings.steps),
            "steps": counts[0],
            "solved": sum(count != NEVER for count in counts),
            "valleys": len(counts),
            "path": path[:, 0].tolist(),
        }
    overlap = OVERLAP if toy == "overlapping" else 0.0
    runs = [learn_tasks(rival, drawn, seed, settings.tasks, overlap) for seed in settings.seeds]
    return {
        **found,
        "score": sum(run["loss"] for run in runs) / len(runs),
        "losses": [run["loss"] for run in runs],
        "forgotten": sum(run["forgotten"] for run in runs) / len(runs),
    }


def rivals(toy: str) -> list[str]:
    return [name for name, rival in RIVALS.items() if rival.valley or toy != "valley"]


def parts(settings: OptimizerSettings) -> Mapping[str, Part]:
    def part(toy: str, name: str) -> Part:
        return lambda place: compare(settings, toy, name, place)

    return {f"{toy}/{name.replace(', ', '-')}": part(toy, name) for toy in settings.toys for name in rivals(toy)}


def ranked(found: Mapping[str, Result], toy: str) -> list[tuple[str, Result]]:
    """From the best on, by the test."""
    both = [(name, found[f"{toy}/{name.replace(', ', '-')}"]) for name in rivals(toy)]
    return sorted(both, key=lambda pair: NEVER if pair[1]["score"] is None else pair[1]["score"])


def verdict(order: list[tuple[str, Result]]) -> str:
    """Who was best, and the better of the two sides against the other."""
    first = order[0][0]
    ours, theirs = (next(pair for pair in order if (pair[0] in OURS) == side) for side in (True, False))
    side = "of the paper's" if first in OURS else "a rival"
    return (
        f"Best: {first}, {side}. The best of the paper's, {ours[0]}, has {_number(ours[1]['score'])}, and the best rival, "
        f"{theirs[0]}, {_number(theirs[1]['score'])}."
    )


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def report(settings: OptimizerSettings, found: Mapping[str, Result]) -> Report:
    sections = [
        f"Each optimizer is tuned alike: {settings.trials} settings, drawn at random, are tried on {settings.tuning_seeds} "
        "seeds that are not tested, and the best is tested. Rows are ordered by the test."
    ]
    abouts = {
        "orthogonal": f"Orthogonal tasks (Eq. 45): {settings.tasks} tasks of linear regression one after the other, "
        f"{STEPS_OF_TASK} steps each, whose inputs lie in orthogonal directions. Mean loss of all tasks at the end, "
        "beyond the noise (0 at best, 1 for none learned), and by how much it has risen since each was learned.",
        "overlapping": f"The same with directions that overlap with those of the task before (cosine {OVERLAP:g}); one "
        "weight solves all tasks.",
        "valley": f"The curved valley (Eq. 53): mean steps until psi stays below {SOLVED:g}, of valleys up to a fifth "
        f"off the one with k = {Valley().k:g}, alpha = {Valley().alpha:g}, omega = {Valley().omega:g}, which the paper "
        f"does not give, and of that one from its start {Valley().start}; twice the {settings.steps} steps there are, "
        "where never. DeltaGradientDescent needs layers with inputs; with a constant one it is SGD with weight decay.",
    }
    orders = {toy: ranked(found, toy) for toy in settings.toys}
    for toy, order in orders.items():
        if toy == "valley":
            head = ["", "mean steps", "from the paper's start", "solved", "tuned"]
            rows = [
                [
                    name,
                    _number(result["score"]),
                    _number(result["steps"]),
                    f"{result['solved']} of {result['valleys']}",
                    _drawn(result),
                ]
                for name, result in order
            ]
        else:
            head = ["", "loss", "risen by", "seeds", "tuned"]
            rows = [
                [
                    name,
                    _number(result["score"]),
                    _number(result["forgotten"]),
                    ", ".join(map(_number, result["losses"])),
                    _drawn(result),
                ]
                for name, result in order
            ]
        sections += [abouts[toy], markdown_table(head, rows), verdict(order)]
    figures = {"parts": dict(found), "order": {toy: [name for name, _ in order] for toy, order in orders.items()}}
    return Report("\n\n".join(sections), figures, lambda path: plot(orders, path))


def _drawn(result: Result) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in result["drawn"].items())


def plot(orders: Mapping[str, list[tuple[str, Result]]], path: Path) -> None:
    figure, axes = new_figure(1, len(orders), size=(5.5 * len(orders), 4), squeeze=False)
    for axis, (toy, order) in zip(axes[0], orders.items(), strict=True):
        axis.set_title(toy)
        if toy == "valley":
            r, theta = torch.meshgrid(torch.linspace(-5, 5, 200), torch.linspace(-5, 5, 200), indexing="xy")
            depth = psi(torch.stack([r.flatten(), theta.flatten()], 1), [Valley()])
            axis.contour(r, theta, depth.view(200, 200).log(), 20, linewidths=0.3, colors="gray")
            for name, result in order:
                if name in ("SGD, momentum", "DeltaMomentum", order[0][0]):
                    # Where one diverged, JSON has no numbers.
                    way = torch.tensor([point for point in result["path"] if None not in point])
                    axis.plot(way[:, 0], way[:, 1], ".-", markersize=2, linewidth=0.7, label=name)
            axis.set(xlim=(-5, 5), ylim=(-5, 5), xlabel="r", ylabel="theta")
            axis.legend()
        else:
            names = [name for name, _ in order][::-1]
            axis.barh(names, [result["score"] or 0 for _, result in order][::-1])
            axis.set_xlabel("mean loss of all tasks")
    save_figure(figure, path)


STUDY = Study(
    name="optimizers",
    about="Optimizers on the paper's toys: orthogonal tasks (section 4.3) and the curved valley (section 4.4).",
    settings=OptimizerSettings,
    quick={"seeds": [0], "trials": 2, "tuning_seeds": 1, "tasks": 2, "steps": 5},
    parts=parts,
    report=report,
    check=check,
)
