"""release(): a model directory is checked, and where all is right it gets its card, its results and its checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from .absolute_paths import mapped, without_paths
from .card import render, usage
from .check import Check, run_checks, table
from .description import Description, describe
from .directory_checks import directory_checks, no_other_card
from .facts import read_facts
from .fresh_environment import STEPS, try_in_fresh_environment
from .model_directory import CARD, CHECKSUMS, DESCRIPTION, RESULTS, ModelDirectory
from .result_files import ResultFile, kind_of, load_json, read_result_file


@dataclasses.dataclass(frozen=True)
class Release:
    """
    Attributes:
        directory: of the model.
        checks: all of them, passed.
        checksums: SHA-256 by file.
    """

    directory: Path
    checks: list[Check]
    checksums: dict[str, str]


def release(
    directory: str | Path, card: str | Path, results: Iterable[str | Path] = (), python: str | None = None
) -> Release:
    """
    Check a model directory, and write `README.md`, `release.json`, `results/` and `SHA256SUMS` into it, in this order.

    The card's directory gets the first three as well, so that the card can be rendered again without the weights.

    Args:
        directory: of the model.
        card: directory with `facts.yaml`, and with `results/` of earlier calls.
        results: further files of results, of this checkpoint, which are kept in the card's directory. Of absolute paths in
            them the last names are.
        python: of an environment that has torch and Transformers alone; unset, one is made for the time being.

    Raises:
        ValueError: the directory is no model, the facts or a file of results cannot be, or a check failed: the message has
            the table of checks, with what to do. Nothing is written then.
        OSError: the files cannot be written.
    """
    model, card = ModelDirectory(directory), Path(card)
    facts = read_facts(card)
    contents = result_contents(card, results)
    digests = {f"{RESULTS}/{name}": _digest(text) for name, text in contents.items()}
    checks = run_checks(directory_checks(model, facts, card, digests))
    if failed := [check for check in checks if not check.passed]:
        later = [Check(name, None, "needs what failed") for name in STEPS]
        raise ValueError(_failure(failed, [*checks, *later]))
    files = [_result(name, text, model.checkpoint) for name, text in contents.items()]
    description = describe(model)
    checks += try_in_fresh_environment(model.path, usage(str(model.path.resolve()), description.chat), python)
    if failed := [check for check in checks if not check.passed]:
        raise ValueError(_failure(failed, checks))
    description = description.with_checks(_without_place(checks, model.path))
    text = render(facts, description, [(file, digests[f"{RESULTS}/{file.name}"]) for file in files])
    written = {f"{RESULTS}/{name}": result for name, result in contents.items()}
    written |= {DESCRIPTION: description.as_json(), CARD: text}
    checksums = {name: model.sha256(name) for name in model.files if name not in model.written_here}
    checksums |= {name: _digest(content) for name, content in written.items()}
    checksums = {name: checksums[name] for name in sorted(checksums)}
    sums = "".join(f"{digest}  {name}\n" for name, digest in checksums.items())
    stale = [model.path / name for name in model.written_here - {*written, CHECKSUMS}]
    write_all({place / name: content for place in (card, model.path) for name, content in written.items()})
    for path in stale:  # results of an earlier release
        path.unlink()
    write_all({model.path / CHECKSUMS: sums})
    return Release(model.path, checks, checksums)


def render_again(card: str | Path) -> str:
    """
    The card, from what lies in its directory: facts, the description that a release left there, and files of results.

    Raises:
        ValueError: one of them is missing or cannot be.
    """
    card = Path(card)
    facts, description = read_facts(card), Description.load(card)
    contents = result_contents(card, ())
    files = [(_result(name, text, description.checkpoint), _digest(text)) for name, text in contents.items()]
    return render(facts, description, files)


def write_card(card: str | Path) -> None:
    """
    Render a card again, in its directory.

    Raises:
        ValueError: as in `render_again`, or the one that is there was not rendered.
    """
    path = Path(card) / CARD
    text = render_again(card)
    no_other_card(path)
    write_all({path: text})


def result_contents(card: Path, further: Iterable[str | Path]) -> dict[str, str]:
    """
    Text of the card's files of results by name, and of further ones by the name that they are to have there.

    Raises:
        ValueError: one cannot be read, or two would have one name.
    """
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted((card / RESULTS).glob("*.json"))}
    new: dict[str, str] = {}
    for path in map(Path, further):
        content = load_json(path)
        kind = kind_of(content)
        name = path.name if kind in (None, "lm-eval") else f"{kind}.json"
        if name in new:
            raise ValueError(
                f"`results`: two files would be called {name}: give them one after the other, or rename one."
            )
        new[name] = json.dumps(mapped(content, without_paths), indent=1, ensure_ascii=False) + "\n"
    return dict(sorted({**found, **new}.items()))


def _result(name: str, text: str, checkpoint: Mapping[str, str]) -> ResultFile:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}.") from None
    return read_result_file(Path(name), checkpoint, content if isinstance(content, dict) else {})


def write_all(files: Mapping[Path, str]) -> None:
    """Write all files, or, where one cannot be written, none."""
    staged = {path: path.with_name(f".{path.name}.part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged[path].write_text(content, encoding="utf-8")
        for path, part in staged.items():
            part.replace(path)
    finally:
        for part in staged.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _failure(failed: list[Check], checks: list[Check]) -> str:
    count = f"{len(failed)} of {len(checks)} checks failed, and nothing was written"
    return f"{count}: {', '.join(check.name for check in failed)}.\n\n{table(checks)}"


def _without_place(checks: list[Check], path: Path) -> list[Check]:
    """Of what the checks found, without where the directory lay."""
    return [
        dataclasses.replace(check, found=without_paths(check.found.replace(str(path.resolve()), ".")))
        for check in checks
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
