"""Streams of classes as lm-eval's documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import datasets

from modeling_hope.eval.generators.class_streams import ClassTask, Example, class_stream
from modeling_hope.eval.studies.accuracy_matrix import average_accuracy, forgetting


QUESTION = "Query: {}\nIntent:"
BETWEEN = "\n\n"

Doc = dict[str, Any]
Found = tuple[int, int, float]  # after which task, of which, whether it was right


def stream(asked: str = "end", **metadata: Any) -> dict[str, datasets.Dataset]:
    """A task's examples in one document, then questions: of all tasks so far after `"each"`, or only at the `"end"`."""
    if asked not in ("end", "each"):
        raise ValueError(f"`asked` must be 'end' or 'each', got {asked!r}.")
    tasks = _tasks(metadata)
    docs = []
    for place, task in enumerate(tasks):
        docs.append(_doc(BETWEEN.join(map(_told, task.train)), "", place, -1))
        if asked == "each" or place + 1 == len(tasks):
            docs += [
                _doc(QUESTION.format(example.text), example.label, place, of)
                for of, earlier in enumerate(tasks[: place + 1])
                for example in earlier.test
            ]
    return {"test": datasets.Dataset.from_list(docs)}


def prompts(shots: int = 1, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions after the last task, each behind some examples of every class in mixed order."""
    tasks = _tasks(metadata)
    chosen = []
    for task in tasks:
        for name in task.classes:
            of_class = [example for example in task.train if example.label == name]
            if not 0 < int(shots) <= len(of_class):
                raise ValueError(
                    f"`shots` must lie between 1 and the {len(of_class)} examples of `train`, got {shots}."
                )
            chosen += of_class[: int(shots)]
    random.Random(metadata.get("seed", 0)).shuffle(chosen)
    start = BETWEEN.join([*map(_told, chosen), ""])
    docs = [
        _doc(start + QUESTION.format(example.text), example.label, len(tasks) - 1, of)
        for of, task in enumerate(tasks)
        for example in task.test
    ]
    return {"test": datasets.Dataset.from_list(docs)}


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, Found]:
    """Of a question, whether its class was named; nothing of a document of examples."""
    if doc["task"] < 0:
        return {}
    found = _found(doc, results)
    return {"accuracy": found, "forgetting": found}


def prompt_results(doc: Doc, results: Sequence[str]) -> dict[str, Found]:
    return {"accuracy": _found(doc, results)}


def average(items: Sequence[Found]) -> float:
    return average_accuracy(_matrix(items))


def fall(items: Sequence[Found]) -> float:
    """NaN where questions were asked at the end only."""
    found = forgetting(_matrix(items))
    return float("nan") if found is None else found


def _found(doc: Doc, results: Sequence[str]) -> Found:
    return doc["after"], doc["task"], float(results[0].strip().lower() == doc["label"])


def _matrix(items: Sequence[Found]) -> list[list[float]]:
    by_place: dict[int, dict[int, list[float]]] = {}
    for after, task, right in items:
        by_place.setdefault(after, {}).setdefault(task, []).append(right)
    return [
        [sum(found) / len(found) for _, found in sorted(by_place.get(after, {}).items())]
        for after in range(max(by_place) + 1)
    ]


def _tasks(metadata: dict[str, Any]) -> list[ClassTask]:
    names = ("data", "seed", "tasks", "classes_per_task", "train", "test")
    given = {name: metadata[name] for name in names if name in metadata}
    return class_stream(metadata["dataset"], given.pop("data", None), validation=0, **given)


def _told(example: Example) -> str:
    return f"{QUESTION.format(example.text)} {example.label}"


def _doc(text: str, label: str, after: int, task: int) -> Doc:
    """Examples are what a stream's memory goes on with: nobody told it the answers to questions."""
    read = "question" if task < 0 else "nothing"
    return {"text": text, "label": label, "after": after, "task": task, "hope_read": read}
