"""
Streams of classes: text classification whose classes arrive some at a time, in an order fixed by a seed (CLINC150,
BANKING77, DBpedia, or classes that are invented).
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


SPLITS = ("train", "validation", "test")
# How labelled examples are written: question, a space, the class, and a line break between one and the next.
QUESTION, BETWEEN = "Query: {}\nIntent:", "\n"

# By split and class, texts.
Classes = dict[str, dict[str, list[str]]]
Rows = Iterable[tuple[str, str]]  # text and class


@dataclass(frozen=True)
class Example:
    """A text and the name of its class, as words."""

    text: str
    label: str


@dataclass(frozen=True)
class ClassTask:
    """Some classes, that arrive together."""

    classes: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True)
class Source:
    """
    Where the classes of a data set come from.

    Attributes:
        files: by split, the file in a local directory; a split that has none is cut from the training split.
        local: reads one of these files.
        hub: name, configuration and columns (text, class) on the hub, and by split its name there.
    """

    files: Mapping[str, str]
    local: Callable[[Path, str], Rows]
    hub: tuple[str, str | None, str, str]
    hub_splits: Mapping[str, str]


def class_stream(
    dataset: str,
    data: str | Path | None = None,
    *,
    seed: int = 0,
    tasks: int = 10,
    classes_per_task: int | None = None,
    train: int = 10,
    validation: int = 5,
    test: int = 5,
    words: int | None = 60,
) -> list[ClassTask]:
    """
    The tasks of a stream, in order.

    The seed decides the order of the classes, which examples are taken, and their order in a task. No text is in two
    splits: what is in the test split is left out of the others, and validation is left out of training.

    Args:
        dataset: one of `DATASETS`.
        data: directory of the data set's files; unset: the hub. Nothing is read for `"invented"`.
        tasks: how many.
        classes_per_task: classes in each; unset: as many as there are, evenly.
        train, validation, test: examples of each class in each split.
        words: of a text at most; unset: all.

    Raises:
        ValueError: there is no such data set, its files are missing or bad, or it has fewer classes or examples.
    """
    found = load_classes(dataset, data)
    names = sorted(set(found["train"]) & set(found["validation"]) & set(found["test"]))
    if min(tasks, train, test) < 1 or validation < 0 or (words is not None and words < 1):
        raise ValueError("`tasks`, `train`, `test` and `words` must be at least 1, `validation` at least 0.")
    each = classes_per_task or len(names) // tasks
    if each < 1 or each * tasks > len(names):
        raise ValueError(
            f"`tasks`: {tasks} tasks of {max(each, 1)} classes are more than the {len(names)} classes of {dataset!r}. Give "
            "fewer --tasks or --classes-per-task."
        )
    draw = random.Random(seed)
    draw.shuffle(names)
    wanted = {"train": train, "validation": validation, "test": test}
    stream = []
    for place in range(tasks):
        classes = tuple(names[place * each : (place + 1) * each])
        chosen: dict[str, tuple[Example, ...]] = {}
        for split in SPLITS:
            examples = []
            for name in classes:
                texts = found[split][name]
                if len(texts) < wanted[split]:
                    raise ValueError(
                        f"`{split}`: class {name!r} of {dataset!r} has {len(texts)} examples, fewer than {wanted[split]}. "
                        f"Give a smaller --{split}."
                    )
                taken = draw.sample(texts, wanted[split])
                examples += [Example(" ".join(text.split()[:words]), in_words(name)) for text in taken]
            draw.shuffle(examples)
            chosen[split] = tuple(examples)
        stream.append(ClassTask(tuple(map(in_words, classes)), **chosen))
    return stream


def load_classes(dataset: str, data: str | Path | None = None) -> Classes:
    """
    All texts by split and class, without doubles, every text in one split only.

    Raises:
        ValueError: see `class_stream`.
    """
    if dataset == INVENTED:
        return _invented()
    if dataset not in SOURCES:
        raise ValueError(f"`dataset`: there is no {dataset!r}: give one of {', '.join(DATASETS)}.")
    source = SOURCES[dataset]
    raw = _local(dataset, source, Path(data)) if data is not None else _hub(dataset, source)
    found: Classes = {split: {} for split in SPLITS}
    seen: set[str] = set()
    for split in reversed(SPLITS):  # what is in the test split is in no other
        for text, name in raw.get(split, ()):
            key = " ".join(text.lower().split())
            if key and key not in seen:
                seen.add(key)
                found[split].setdefault(name, []).append(text)
    if "validation" not in raw:
        for name, texts in found["train"].items():
            kept = len(texts) - max(len(texts) // 5, 1)
            found["validation"][name], found["train"][name] = texts[kept:], texts[:kept]
    return found


def in_words(name: str) -> str:
    """The name of a class as words: `"pin_change"` to `"pin change"`, `"MusicalWork"` to `"musical work"`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " "))
    return " ".join(spaced.lower().replace("?", "").split())


def _local(dataset: str, source: Source, directory: Path) -> dict[str, list[tuple[str, str]]]:
    found = {}
    for split, name in source.files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(
                f"`data`: {directory} has no {name}, which holds {split} examples of {dataset!r}. Give the directory of "
                f"{', '.join(dict.fromkeys(source.files.values()))}, or leave --data out to take the hub's."
            )
        try:
            found[split] = list(source.local(path, split))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`data`: {path} is no file of {dataset!r} as it is published: {error}.") from None
        if not found[split]:
            raise ValueError(f"`data`: {path} holds no {split} examples of {dataset!r}.")
    return found


def _hub(dataset: str, source: Source) -> dict[str, list[tuple[str, str]]]:
    from datasets import load_dataset

    name, configuration, text, label = source.hub
    try:
        loaded = load_dataset(name, configuration)
    except Exception as error:  # whatever keeps the hub from being read, the way out is the same
        raise ValueError(
            f"`data`: {dataset!r} could not be loaded from the hub ({name}: {type(error).__name__}). Give a directory "
            f"that holds {', '.join(dict.fromkeys(source.files.values()))} with --data."
        ) from error
    found = {}
    for split, theirs in source.hub_splits.items():
        rows = loaded[theirs]
        feature = rows.features[label]
        names = [feature.int2str(value) for value in rows[label]] if hasattr(feature, "int2str") else list(rows[label])
        found[split] = [(t, n) for t, n in zip(rows[text], names, strict=True) if n != OUT_OF_SCOPE]
    return found


def _json_rows(path: Path, split: str) -> Rows:
    """CLINC150: one file, `{"train": [[text, class], ...], "val": ..., "test": ..., "oos_...": ...}`."""
    rows = json.loads(path.read_text(encoding="utf-8"))["val" if split == "validation" else split]
    return [(str(text), str(name)) for text, name in rows]


def _csv_rows(text: str, label: str) -> Callable[[Path, str], Rows]:
    """A file with a line of names of columns, of which two are read."""

    def rows(path: Path, split: str) -> Rows:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := {text, label} - set(reader.fieldnames or ()):
                raise ValueError(f"it has no column {min(missing)!r}")
            return [(row[text], row[label]) for row in reader if row[text] and row[label]]

    return rows


def _invented() -> Classes:
    """Classes of made-up words, three to each, that a small model can tell apart: for tests and quick forms."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2))

    filler = ["please", "the", "my", "tell me", "now", "a"]
    found: Classes = {split: {} for split in SPLITS}
    known: set[str] = set()
    while len(found["train"]) < 12:
        words = [word() for _ in range(3)]
        if known & set(words):
            continue
        known |= set(words)
        texts: list[str] = []
        while len(texts) < 60:
            text = " ".join([draw.choice(filler), *draw.choices(words, k=2), draw.choice(filler), draw.choice(words)])
            texts += [text] * (text not in texts)
        name = f"{words[0]}_{words[1]}"
        for split, part in zip(SPLITS, (texts[:30], texts[30:45], texts[45:]), strict=True):
            found[split][name] = part
    return found


OUT_OF_SCOPE = "oos"
INVENTED = "invented"
SOURCES = {
    "clinc150": Source(
        files=dict.fromkeys(SPLITS, "clinc150_full.json"),
        local=_json_rows,
        hub=("clinc_oos", "plus", "text", "intent"),
        hub_splits={split: split for split in SPLITS},
    ),
    "banking77": Source(
        files={"train": "banking77_train.csv", "test": "banking77_test.csv"},
        local=_csv_rows("text", "category"),
        hub=("banking77", None, "text", "label"),
        hub_splits={"train": "train", "test": "test"},
    ),
    # The 70 classes of the second of its three layers.
    "dbpedia": Source(
        files={"train": "DBPEDIA_train.csv", "validation": "DBPEDIA_val.csv", "test": "DBPEDIA_test.csv"},
        local=_csv_rows("text", "l2"),
        hub=("DeveloperOats/DBPedia_Classes", None, "text", "l2"),
        hub_splits={split: split for split in SPLITS},
    ),
}
DATASETS = (*SOURCES, INVENTED)
