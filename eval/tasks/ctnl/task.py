"""Invented languages, learned one after the other and then translated, as lm-eval's documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from modeling_hope.eval.generators.invented_languages import LANGUAGES, Course, Pair, courses


QUESTION = "{}: {}\nEnglish:"
BETWEEN = "\n\n"
PLACES = ("chrf_first", "chrf_second")

Doc = dict[str, Any]


def stream(
    learned: Sequence[int] = (0, 1), asked: Sequence[int] = (0, 1), **metadata: Any
) -> dict[str, datasets.Dataset]:
    """Each language's sentences in one document, then sentences to translate."""
    made = _courses(metadata, learned, asked)
    docs = [_doc(BETWEEN.join(_told(course, pair) for pair in course.train), "", -1) for course in _of(made, learned)]
    docs += [_doc(_question(made[place], pair), pair.english, place) for place in asked for pair in made[place].test]
    return {"test": datasets.Dataset.from_list(docs)}


def prompts(
    learned: Sequence[int] = (0, 1), asked: Sequence[int] = (0, 1), **metadata: Any
) -> dict[str, datasets.Dataset]:
    """The same sentences to translate, each behind all that a stream would have learned."""
    made = _courses(metadata, learned, asked)
    told = [_told(course, pair) for course in _of(made, learned) for pair in course.train]
    docs = [
        _doc(BETWEEN.join([*told, _question(made[place], pair)]), pair.english, place)
        for place in asked
        for pair in made[place].test
    ]
    return {"test": datasets.Dataset.from_list(docs)}


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Translation and reference of a question; nothing of a document of sentences to learn from."""
    if doc["language"] < 0:
        return {}
    found = (results[0].strip(), doc["english"])
    return {"chrf": found, PLACES[doc["language"]]: found}


def chrf(items: Sequence[tuple[str, str]]) -> float:
    """Of all translations together, as sacrebleu has it, between 0 and 100."""
    from sacrebleu import corpus_chrf

    translations, references = zip(*items, strict=True)
    return float(corpus_chrf(translations, [references]).score)


def _courses(metadata: dict[str, Any], learned: Sequence[int], asked: Sequence[int]) -> list[Course]:
    for name, places in (("learned", learned), ("asked", asked)):
        if not places or not set(places) <= set(range(LANGUAGES)):
            raise ValueError(f"`{name}` must name some of the languages 0 and 1, got {places}.")
    given = {name: metadata[name] for name in ("seed", "train", "test", "vocabulary") if name in metadata}
    return courses(**given)


def _of(made: Sequence[Course], places: Sequence[int]) -> list[Course]:
    return [made[place] for place in places]


def _question(course: Course, pair: Pair) -> str:
    return QUESTION.format(course.language.name, pair.said)


def _told(course: Course, pair: Pair) -> str:
    return f"{_question(course, pair)} {pair.english}"


def _doc(text: str, english: str, language: int) -> Doc:
    """What is told is what a stream's memory goes on with: nobody told it the answers to questions."""
    read = "question" if language < 0 else "nothing"
    return {"text": text, "english": english, "language": language, "hope_read": read}
