"""Continual learning: classes that arrive some at a time, learned by Hope and by its rivals from the same backbone."""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub.dataclasses import strict

from modeling_hope.eval.generators.class_streams import DATASETS, INVENTED, ClassTask, class_stream
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.options import option
from modeling_hope.training.run_directory import RESULT, write

from .accuracy_matrix import average_accuracy, forgetting, mean_matrix, plot_matrices
from .class_prediction import Writer
from .continual_methods import (
    EWC,
    Backbone,
    Choice,
    ClassMeans,
    FineTuning,
    HopeConsolidated,
    HopeMemory,
    InContext,
    Joint,
    Learner,
    NativeInContext,
    Replay,
    ZeroShot,
)
from .document_settings import SMALL, load_reader, seed_of
from .study import PARTS, DeviceSettings, Part, Report, Result, SeededSettings, Study


ABOUT = """
Classes arrive some at a time and are never seen again (class-incremental learning; the paper's section 9.1). After each
task the model is asked for the class of test examples of all tasks so far, among all classes so far. Every method
begins with the same backbone, reads the same examples in the same order, names classes in the same way, and had four
settings tried, on validation examples of another order of the classes (joint training, which is no rival as it sees all
tasks at once, three; naming without examples, none). What Hope's settings have in common (period, window, what is learned
from, optimizer) was settled before, by looks at seven settings on validation examples of CLINC150; the range of
fine-tuning's rates by two, those of the other methods by none. ACC is the mean of the accuracies on the tasks after the
last one, F (forgetting) how far they fell, on the mean, from their best.
"""
TUNING, SEED = "tune", "seed"
TUNING_SEED = 1000  # of the order of classes that settings are chosen on; it is no seed of the study
STATE = "accuracies.json"


@dataclasses.dataclass(frozen=True)
class Method:
    """
    Attributes:
        about: what it is, for the table.
        learner: the class that does it.
        choices: what its settings are chosen from.
    """

    about: str
    learner: type[Learner]
    choices: tuple[Choice, ...]


HOPE = {"period": 64, "window": 64, "targets": "answers", "optimizer": "sgd"}
TRAINED = (
    {"rate": 3e-5, "passes": 1},
    {"rate": 1e-4, "passes": 1},
    {"rate": 3e-4, "passes": 1},
    {"rate": 1e-4, "passes": 3},
)
IN_CONTEXT = (
    {"chosen": "recent", "shots": None},
    {"chosen": "recent", "shots": 1},
    {"chosen": "balanced", "shots": None},
    {"chosen": "balanced", "shots": 1},
)
METHODS = {
    "hope": Method(
        "Hope: a memory reads the examples and its levels learn",
        HopeMemory,
        (
            {**HOPE, "rate": 0.25, "passes": 1},
            {**HOPE, "rate": 0.5, "passes": 1},
            {**HOPE, "rate": 1.0, "passes": 1},
            {**HOPE, "rate": 0.25, "passes": 3},
        ),
    ),
    "hope_consolidated": Method(
        "Hope, written into the weights after each task",
        HopeConsolidated,
        (
            {**HOPE, "rate": 0.5, "passes": 1, "strength": 1.0},
            {**HOPE, "rate": 1.0, "passes": 1, "strength": 1.0},
            {**HOPE, "rate": 1.0, "passes": 1, "strength": 0.5},
            {**HOPE, "rate": 0.25, "passes": 3, "strength": 1.0},
        ),
    ),
    "zero_shot": Method("no examples", ZeroShot, ({},)),
    "in_context": Method("in-context learning, the window of the backbone", InContext, IN_CONTEXT),
    "in_context_native": Method("in-context learning, native context", NativeInContext, IN_CONTEXT),
    "fine_tuning": Method("fine-tuning", FineTuning, TRAINED),
    "ewc": Method(
        "EWC",
        EWC,
        (
            {"rate": 1e-4, "passes": 1, "strength": 1e2},
            {"rate": 1e-4, "passes": 1, "strength": 1e6},
            {"rate": 3e-4, "passes": 1, "strength": 1e4},
            {"rate": 1e-4, "passes": 3, "strength": 1e4},
        ),
    ),
    "replay": Method("fine-tuning with replay, an example of each class kept", Replay, TRAINED),
    "joint": Method(
        "joint training on all tasks: the bound",
        Joint,
        (
            {"rate": 1e-4, "passes": 3},
            {"rate": 3e-4, "passes": 3},
            {"rate": 1e-4, "passes": 6},
        ),
    ),
    "class_means": Method(
        "means of classes, frozen states, no language model's answer",
        ClassMeans,
        (
            {"layer": 0.5, "shrinkage": 0.1},
            {"layer": 0.5, "shrinkage": 0.5},
            {"layer": 1.0, "shrinkage": 0.1},
            {"layer": 1.0, "shrinkage": 0.5},
        ),
    ),
}
# Values beyond which there are none to try.
LIMITS = {"passes": 1, "shots": 1, "layer": 1.0}


@strict
@dataclasses.dataclass
class ContinualSettings(SeededSettings, DeviceSettings):
    """What `hope study continual` can be told."""

    model: str = option("converted", "backbone", "a Hope checkpoint that was converted from a Transformer")
    dataset: str = option("clinc150", "stream", "classes of which data set", DATASETS)
    data: str | None = option(None, "stream", "directory of the data set's files (default: the hub)")
    tasks: int = option(10, "stream", "how many", least=1)
    classes_per_task: int | None = option(
        None, "stream", "classes in each (default: as many as there are, evenly)", least=1
    )
    train: int = option(8, "stream", "examples of each class to learn from", least=1)
    test: int = option(3, "stream", "examples of each class to be asked for", least=1)
    methods: list[str] = option(lambda: list(METHODS), "methods", "which", tuple(METHODS))
    choices: int = option(4, "methods", "settings to try of each method, at most", least=1)
    tuning_tasks: int = option(5, "methods", "tasks of the stream that settings are chosen on", least=1)
    tuning_validation: int = option(3, "methods", "examples of each class to choose settings by", least=1)
    rows: int = option(32, "methods", "questions to ask at once", least=1)
    seeds: list[int] = option(lambda: [0], "study", "seeds of the order of classes (default: 0)", least=0)


def parts(settings: ContinualSettings) -> Mapping[str, Part]:
    made: dict[str, Part] = {}
    for name in settings.methods:
        for number in range(len(choices_of(settings, name))):
            made[f"{TUNING}/{name}/{number}"] = _tuning(settings, name, number)
        for seed in settings.seeds:
            made[f"{name}/{SEED}-{seed}"] = _run(settings, name, seed)
    return made


def choices_of(settings: ContinualSettings, name: str) -> tuple[Choice, ...]:
    return METHODS[name].choices[: settings.choices]


def _tuning(settings: ContinualSettings, name: str, number: int) -> Part:
    def part(directory: Path) -> Result:
        stream = tuning_stream(settings)
        choice = choices_of(settings, name)[number]
        learner = METHODS[name].learner(backbone_for(settings, stream), choice, TUNING_SEED)
        for task in stream:
            learner.learn(task)
        learner.finish()
        row = accuracies(learner, stream, "validation")
        return {"choice": choice, "accuracy": mean(row), "accuracies": row}

    return part


def _run(settings: ContinualSettings, name: str, seed: int) -> Part:
    def part(directory: Path) -> Result:
        choice, stream = tuned(settings, name), test_stream(settings, seed)
        learner = METHODS[name].learner(backbone_for(settings, stream), choice, seed)
        matrix, seconds = run_stream(learner, stream, directory)
        return {"choice": choice, "matrix": matrix, "learning_seconds": round(seconds, 1)}

    return part


def run_stream(learner: Learner, stream: list[ClassTask], directory: Path) -> tuple[list[list[float]], float]:
    """
    Learn task after task, and measure accuracy on all tasks so far after each.

    After each task what is needed to go on is written to the directory, and removed at the end.

    Returns:
        The matrix of accuracies, and the seconds that learning took.
    """
    done, matrix, seconds = 0, [], 0.0
    saved = sorted(directory.glob("task-*/" + STATE), key=lambda path: int(path.parent.name.partition("-")[2]))
    if saved:
        state = json.loads(saved[-1].read_text())
        matrix, seconds, done = state["matrix"], state["seconds"], len(state["matrix"])
        learner.load(saved[-1].parent, stream[:done])
    for learned in range(done + 1, len(stream) + 1):
        last = learned == len(stream)
        asked = last or not learner.only_at_end
        started = time.perf_counter()
        learner.learn(stream[learned - 1])
        if asked:
            learner.finish()
        seconds += time.perf_counter() - started
        matrix.append(accuracies(learner, stream[:learned], "test") if asked else [])
        if not last:
            _save(learner, directory / f"task-{learned}", {"matrix": matrix, "seconds": seconds})
    for left in directory.glob("task-*"):
        shutil.rmtree(left)
    return matrix, seconds


def _save(learner: Learner, directory: Path, state: Result) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    learner.save(directory)
    write(directory / STATE, json.dumps(state))  # the last file: with it the rest is there
    for older in directory.parent.glob("task-*"):
        if older != directory:
            shutil.rmtree(older)


def accuracies(learner: Learner, tasks: list[ClassTask], split: str) -> list[float]:
    """Of each task, among the classes of all."""
    classes = [name for task in tasks for name in task.classes]
    examples = [getattr(task, split) for task in tasks]
    named = iter(learner.predict([example.text for part in examples for example in part], classes))
    return [mean(float(next(named) == example.label) for example in part) for part in examples]


def test_stream(settings: ContinualSettings, seed: int) -> list[ClassTask]:
    return _stream(settings, seed, settings.tasks, validation=0, test=settings.test)


def tuning_stream(settings: ContinualSettings) -> list[ClassTask]:
    """Another order of the classes, of which the first tasks are learned. Its test examples are not used."""
    return _stream(settings, TUNING_SEED, settings.tasks, validation=settings.tuning_validation, test=1)[
        : settings.tuning_tasks
    ]


def _stream(settings: ContinualSettings, seed: int, tasks: int, validation: int, test: int) -> list[ClassTask]:
    return class_stream(
        settings.dataset,
        settings.data,
        seed=seed,
        tasks=tasks,
        classes_per_task=settings.classes_per_task,
        train=settings.train,
        validation=validation,
        test=test,
    )


def tuned(settings: ContinualSettings, name: str) -> Choice:
    """
    The choice that was best in tuning, the first of those that were.

    Raises:
        ValueError: not all were tried.
    """
    tried = []
    for number in range(len(choices_of(settings, name))):
        path = Path(settings.out) / PARTS / TUNING / name / str(number) / RESULT
        if not path.is_file():
            raise ValueError(f"`only`: {name!r} is not tuned yet. Run --only '{TUNING}/{name}/*' first.")
        tried.append(json.loads(path.read_text()))
    return max(tried, key=lambda result: result["accuracy"])["choice"]


def backbone_for(settings: ContinualSettings, stream: Sequence[ClassTask]) -> Backbone:
    model, tokenizer = load_reader(settings.model, settings.device)
    writer = Writer(tokenizer)
    questions = [writer.question(example.text) for task in stream for example in (*task.validation, *task.test)]
    answers = [writer.answer(name) for task in stream for name in task.classes]
    return Backbone(model, tokenizer, settings.rows, max(map(len, questions)) + max(map(len, answers)))


def check(settings: ContinualSettings) -> None:
    if settings.tuning_tasks > settings.tasks:
        raise ValueError(
            f"`tuning_tasks` must be between 1 and the {settings.tasks} tasks, got {settings.tuning_tasks}."
        )
    if TUNING_SEED in settings.seeds:
        raise ValueError(f"`seeds`: {TUNING_SEED} is the order of classes that settings are chosen on. Give another.")
    if settings.model.startswith(SMALL):
        seed_of(settings.model, SMALL, "model")
    elif not (Path(settings.model) / "config.json").is_file():
        raise ValueError(
            f"`model`: {settings.model} is no checkpoint. Convert one, e.g. hope convert MODEL {settings.model} "
            "--periods 256 --window 1024, or give another with --model."
        )
    else:
        kind = json.loads((Path(settings.model) / "config.json").read_text()).get("model_type")
        if kind != "hope":
            raise ValueError(
                f"`model`: {settings.model} is a {kind!r} and no Hope model: convert it with hope convert."
            )
    test_stream(settings, settings.seeds[0])
    tuning_stream(settings)


def report(settings: ContinualSettings, found: Mapping[str, Result]) -> Report:
    figures: dict[str, Any] = {"methods": {}, "tuning": {}, "edges": {}}
    rows, tried, matrices = [], [], {}
    for name in settings.methods:
        runs = [found[f"{name}/{SEED}-{seed}"] for seed in settings.seeds]
        each = [run["matrix"] for run in runs]
        averages, falls = [average_accuracy(matrix) for matrix in each], [forgetting(matrix) for matrix in each]
        matrices[name] = mean_matrix(each)
        choice = runs[0]["choice"]
        figures["methods"][name] = {
            "choice": choice,
            "accuracy": averages,
            "forgetting": falls,
            "matrix": matrices[name],
            "matrices": each,
        }
        learned = mean(run["learning_seconds"] for run in runs)
        rows.append([METHODS[name].about, _percent(averages), _percent(falls), f"{learned:,.0f}"])
        results = [found[f"{TUNING}/{name}/{number}"] for number in range(len(choices_of(settings, name)))]
        figures["tuning"][name] = [{"choice": r["choice"], "accuracy": r["accuracy"]} for r in results]
        figures["edges"][name] = edges(choice, choices_of(settings, name))
        tried += [
            [name, _said(r["choice"]), f"{100 * r['accuracy']:.1f}{' *' if r['choice'] == choice else ''}"]
            for r in results
        ]
    classes = settings.classes_per_task or len(test_stream(settings, settings.seeds[0])[0].classes)
    tables = [
        f"{settings.dataset}: {settings.tasks} tasks of {classes} classes, {settings.train} examples of each class to learn "
        f"from, {settings.test} to be asked for.\n",
        markdown_table(["method", "ACC, %", "F, points", "seconds to learn"], rows),
        _above_joint(matrices),
        "\nAccuracy on each task after the last:\n",
        markdown_table(
            ["method", *(str(task + 1) for task in range(settings.tasks))],
            [[name, *(f"{100 * accuracy:.0f}" for accuracy in matrix[-1])] for name, matrix in matrices.items()],
        ),
        f"\nSettings tried: accuracy on validation examples of the first {settings.tuning_tasks} tasks of another order of "
        "the classes; * was taken.\n",
        markdown_table(["method", "setting", "accuracy, %"], tried, names=2),
        _at_edges(figures["edges"]),
    ]
    return Report("\n".join(tables), figures, lambda path: plot_matrices(matrices, path))


def edges(choice: Choice, choices: Sequence[Choice]) -> list[str]:
    """The settings of which the least or the largest value that was tried is taken, so that one beyond may be better."""
    found = []
    for name, value in choice.items():
        tried = [one[name] for one in choices if isinstance(one[name], int | float)]
        if len(set(tried)) > 1 and value in (min(tried), max(tried)) and value != LIMITS.get(name):
            found.append(name)
    return found


def _at_edges(found: Mapping[str, Sequence[str]]) -> str:
    named = [f"{name} ({', '.join(settings)})" for name, settings in found.items() if settings]
    if not named:
        return ""
    return f"\nAt the edge of what was tried, so that these may do better with more: {', '.join(named)}."


def _above_joint(matrices: Mapping[str, Sequence[Sequence[float]]]) -> str:
    reached = {name: average_accuracy(matrix) for name, matrix in matrices.items()}
    above = [name for name, accuracy in reached.items() if accuracy > reached.get("joint", 1.0)]
    return f"\nAbove joint training, which is no bound here: {', '.join(above)}.\n" if above else ""


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):.1f}" + (f" ({min(known):.1f} to {max(known):.1f})" if len(known) > 1 else "")


def _said(choice: Choice) -> str:
    return ", ".join(f"{name} {value}" for name, value in choice.items()) or "-"


STUDY = Study(
    name="continual",
    about=ABOUT,
    settings=ContinualSettings,
    quick={
        "model": f"{SMALL}0",
        "dataset": INVENTED,
        "tasks": 3,
        "classes_per_task": 2,
        "train": 4,
        "test": 2,
        "choices": 1,
        "tuning_tasks": 2,
        "tuning_validation": 1,
    },
    parts=parts,
    report=report,
    check=check,
)
