"""lm-eval's requests as documents: what is asked of each, and what its answer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from .lm_settings import READS


# Of a document, what a stream goes on with once it was answered: one of `READS`, before the setting `read`.
READ_FIELD = "hope_read"


def tell_tasks() -> None:
    """
    From now on the requests that lm-eval builds know their task, as `instance.task`: they carry a question, and what its
    answer is only the task can tell. `instance.cached`: they may come from lm-eval's cache of requests.
    """
    build = Task.build_all_requests
    if getattr(build, "tells", False):
        return

    @wraps(build)
    def build_and_tell(self: Any, **options: Any) -> None:
        build(self, **options)
        for instance in self.instances:
            instance.task, instance.cached = self, bool(options.get("cache_requests"))

    build_and_tell.tells = True  # type: ignore[attr-defined]
    Task.build_all_requests = build_and_tell


@dataclass
class Document:
    """
    What is asked of one document.

    Attributes:
        doc_id: its number in the task.
        requests: in the order of their `idx`, each once.
        places: for each, where its results belong in what was requested: one place for every repeat.
    """

    doc_id: int
    requests: list[Instance] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)

    def add(self, request: Instance, place: int) -> None:
        for index, known in enumerate(self.requests):
            if known is request:
                self.places[index].append(place)
                return
        self.requests.append(request)
        self.places.append([place])

    @property
    def asking(self) -> list[int]:
        """Requests that ask about the document; the others, without a context, how likely an answer is by itself."""
        asking = [index for index, request in enumerate(self.requests) if request.args[0]]
        return asking or list(range(len(self.requests)))

    @property
    def read(self) -> str | None:
        """
        What a stream goes on with, where the document says so itself.

        Raises:
            ValueError: it says what cannot be.
        """
        doc = self.requests[0].doc
        read = doc.get(READ_FIELD) if isinstance(doc, Mapping) else None
        if read not in (None, *READS):
            raise ValueError(f"`{READ_FIELD}` of {self.name} must be one of {', '.join(READS)}, got {read!r}.")
        return read

    @property
    def name(self) -> str:
        return f"task {self.requests[0].task_name}, document {self.doc_id}"


def documents_by_task(requests: Sequence[Instance]) -> dict[str, list[Document]]:
    """
    The documents of each task, in the order in which they are asked about first.

    Raises:
        ValueError: their order in a stream is not known, or they would be read twice.
    """
    tasks: dict[str, dict[int, Document]] = {}
    for place, request in enumerate(requests):
        name, number = request.task_name, request.doc_id
        if name is None or number is None:
            raise ValueError(
                "memory=stream needs requests that name their task and document, as lm-eval's tasks make them."
            )
        if getattr(request, "cached", False):
            raise ValueError(
                f"`cache_requests` cannot be with memory=stream, for cached requests keep an order that nothing checks: leave "
                f"it out (task {name})."
            )
        tasks.setdefault(name, {}).setdefault(number, Document(number)).add(request, place)
    for name, documents in tasks.items():
        task = getattr(next(iter(documents.values())).requests[0], "task", None)
        kinds = {instance.request_type for instance in task.instances} if task is not None else set()
        if len(kinds) > 1:
            raise ValueError(
                f"Task {name} makes requests of several types ({', '.join(sorted(kinds))}), which lm-eval runs one after the "
                "other: with memory=stream its documents would be read twice. Give memory=reset."
            )
    return {name: list(documents.values()) for name, documents in tasks.items()}


def gold_index(document: Document) -> int:
    """
    Which of the requests that score an answer scores the right one.

    Raises:
        ValueError: the task does not say.
    """
    first = document.requests[0]
    if len(document.requests) == 1:
        return 0
    task = _task(first)
    gold = task.doc_to_text(first.doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(first.doc)
    gold = gold[0] if isinstance(gold, list) else gold
    if isinstance(gold, str) and callable(getattr(task, "doc_to_choice", None)):
        choices = task.doc_to_choice(first.doc)
        gold = choices.index(gold) if gold in choices else None
    found = [index for index, request in enumerate(document.requests) if request.idx == gold]
    if not isinstance(gold, int) or not found:
        raise ValueError(
            f"`read=question_and_answer`: {document.name}: the task does not say which answer is right. Give another "
            "`read`."
        )
    return found[0]


def gold_text(request: Instance) -> str:
    """
    The right answer to a request to generate, as it follows the prompt: the first, where there are several.

    Raises:
        ValueError: the task is not known.
    """
    task = _task(request)
    target = task.doc_to_target(request.doc)
    target = target[0] if isinstance(target, list) and target else target
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(request.doc)[target]
    return delimited(request, "" if target == [] else str(target))


def delimited(request: Instance, answer: str) -> str:
    """An answer with what the task writes between question and answer, where neither has white space there."""
    task = getattr(request, "task", None)
    delimiter = " " if task is None else task.config.target_delimiter
    parted = request.args[0][-1:].isspace() or answer[:1].isspace()
    return answer if parted else delimiter + answer


def _task(request: Instance) -> Any:
    task = getattr(request, "task", None)
    if task is None:
        raise ValueError(
            "`read=question_and_answer` needs requests that lm-eval's tasks have built since the model was made, for only a "
            "task knows its answers. Build them anew, or give another `read`."
        )
    return task


def ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 7]` as `"0-2, 7"`: an order that can be read."""
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        runs.append(f"{found[0]}-{found[-1]}" if len(found) > 1 else f"{found[0]}")
    return ", ".join(runs)
