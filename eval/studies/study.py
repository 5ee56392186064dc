"""
A study: parts that are computed once each and kept, and a report of them all.

    OUT/settings.json       what the study was begun with
    OUT/parts/KEY/          a part's own files, and `result.json` once it came to its end
    OUT/NAME.json, .md, .png    the report: figures, tables and a plot, with command, seeds and versions
"""

import dataclasses
import json
import math
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict

from modeling_hope.conversion.identity import identify_directory
from modeling_hope.training.options import as_declared, check_options, option
from modeling_hope.training.run_directory import RESULT, write


SETTINGS, PARTS = "settings.json", "parts"
# What a study may be gone on with otherwise than it was begun.
FREE = ("out", "only", "threads")

Result = dict[str, Any]
Part = Callable[[Path], Result]  # given the part's own directory, for what it needs to go on after it was killed


@strict
@dataclasses.dataclass
class StudySettings:
    """
    What every study can be told. A study's own settings are a subclass, `strict` too, whose fields are flags of
    `hope study`.
    """

    out: str = option("", "study", "directory of the study (default: studies/NAME, or studies/NAME-quick)")
    quick: bool = option(False, "study", "a small form of the study, in seconds: to see that it runs, not to measure")
    only: list[str] = option(
        list, "study", "run only parts of these names (* and ? as in a shell), so that several may share a study"
    )
    threads: int | None = option(None, "study", "of torch, in this process", least=1)


@strict
@dataclasses.dataclass
class SeededSettings(StudySettings):
    """Of a study that draws at random."""

    seeds: list[int] = option(lambda: [0, 1], "study", "seeds (default: 0 1)", least=0)


@strict
@dataclasses.dataclass
class DeviceSettings(StudySettings):
    """Of a study whose models may be on any device."""

    device: str = option("cpu", "study", "where models are: cpu, cuda, cuda:1")


@dataclasses.dataclass(frozen=True)
class Report:
    """
    Attributes:
        tables: Markdown, below the study's title.
        figures: for JSON.
        plot: draws the study into the file that it is given; none: there is nothing to draw.
    """

    tables: str
    figures: Result
    plot: Callable[[Path], None] | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """
    Attributes:
        name: as `hope study NAME` has it.
        about: what is studied, after the paper's table, figure or equation; the head of the report.
        settings: the dataclass of its settings.
        quick: settings that take the place of the defaults with `--quick`.
        parts: the parts, in their order, by names that are paths below `OUT/parts`.
        report: of the results of all parts.
        check: raises a `ValueError` that names the setting and the fix, before any part is run.
    """

    name: str
    about: str
    settings: type[StudySettings]
    quick: Mapping[str, Any]
    parts: Callable[[Any], Mapping[str, Part]]
    report: Callable[[Any, Mapping[str, Result]], Report]
    check: Callable[[Any], None] = lambda settings: None

    def settle(self, given: Mapping[str, Any]) -> StudySettings:
        """
        Settings from those that were given.

        Raises:
            ValueError: the study has no such setting, or not with such a value.
        """
        known = {field.name for field in dataclasses.fields(self.settings)}
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"`{unknown[0]}` is no setting of the study {self.name!r}: it has {', '.join(known)}.")
        if any(isinstance(field.type, str) for field in dataclasses.fields(self.settings)):
            raise TypeError(
                f"{self.settings.__name__} has types that are text, which `strict` does not check: leave out "
                "`from __future__ import annotations` where it is declared."
            )
        given = as_declared(self.settings, given)
        settings = self.settings(**{**(self.quick if given.get("quick") else {}), **given})
        settings.out = settings.out or f"studies/{self.name}{'-quick' if settings.quick else ''}"
        check_options(settings)
        if isinstance(settings, DeviceSettings):
            _check_device(settings.device)
        self.check(settings)
        return settings

    def run(self, settings: StudySettings, command: Sequence[str] = (), say: Callable[[str], None] = print) -> bool:
        """
        Run the parts that are missing, then write the report.

        Returns:
            Whether all parts are there, and so the report.

        Raises:
            ValueError: the directory holds a study with other settings, or no part has a name of `only`.
        """
        if settings.threads:
            torch.set_num_threads(settings.threads)
        out = Path(settings.out)
        parts = self.parts(settings)
        chosen = [key for key in parts if not settings.only or any(fnmatch(key, name) for name in settings.only)]
        if not chosen:
            raise ValueError(f"`only`: no part is called {settings.only[0]!r}: there are {', '.join(parts)}.")
        _hold(out, settings)
        missing = [key for key in chosen if not _result(out, key).is_file()]
        for place, key in enumerate(missing, 1):
            say(f"{self.name}: {key} ({place} of {len(missing)})")
            _result(out, key).parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            result = {**parts[key](_result(out, key).parent), "seconds": round(time.perf_counter() - started, 1)}
            _hold(out, settings)
            write(_result(out, key), json.dumps(_finite(result)) + "\n")
        done = [key for key in parts if _result(out, key).is_file()]
        if len(done) < len(parts):
            say(f"{self.name}: {len(done)} of {len(parts)} parts are there; the report comes with the last.")
            return False
        self._write_report(
            out, settings, {key: json.loads(_result(out, key).read_text()) for key in parts}, command, say
        )
        return True

    def _write_report(
        self,
        out: Path,
        settings: StudySettings,
        found: Mapping[str, Result],
        command: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        report = self.report(settings, found)
        about = {
            "study": self.name,
            "command": shlex.join(command),
            "settings": {name: value for name, value in vars(settings).items() if name not in FREE},
            "checkpoints": json.loads((out / SETTINGS).read_text(encoding="utf-8")).get("checkpoints", {}),
            "versions": {name: version(name) for name in ("torch", "transformers", "hope-transformers")},
            "machine": f"{torch.get_num_threads()} threads, {platform.machine()}",
            "seconds": round(sum(result["seconds"] for result in found.values())),
        }
        figures = _finite({**about, **report.figures})
        quick = "\nA quick form of the study: it shows that it runs, and measures nothing.\n" if settings.quick else ""
        drawn: list[int] = getattr(settings, "seeds", [])
        seeds = f"Seeds {', '.join(map(str, drawn))}. " if drawn else ""
        head = f"# {self.name}\n\n{self.about.strip()}\n{quick}\n{seeds}`{about['command']}`\n"
        write(out / f"{self.name}.json", json.dumps(figures, indent=1) + "\n")
        write(out / f"{self.name}.md", f"{head}\n{report.tables.strip()}\n")
        if report.plot is not None:
            report.plot(out / f"{self.name}.png")
        say(f"{head}\n{report.tables.strip()}\n")
        say(f"Written: {out / self.name}.json, .md{'' if report.plot is None else ', .png'}")


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device`: {name!r} is not here: {str(error).splitlines()[0]} Give another, e.g. cpu."
        ) from None


def _hold(out: Path, settings: StudySettings) -> None:
    """The directory is of these settings: from its first part's first file on, of no others."""
    told = {name: value for name, value in vars(settings).items() if name not in FREE}
    models = getattr(settings, "models", {})
    checkpoints = {name: found for name, place in models.items() if (found := identify_directory(place))}
    saved = out / SETTINGS
    begun = any(path.is_file() and path.stat().st_size for path in (out / PARTS).rglob("*"))
    if begun and saved.is_file():
        known = json.loads(saved.read_text(encoding="utf-8"))
        was = known.get("checkpoints", checkpoints)  # of studies that were begun before it was kept
        if other := [name for name in checkpoints if was.get(name) != checkpoints[name]]:
            raise ValueError(
                f"`models`: {other[0]} is another checkpoint than the study in {out} was begun with. Put the one of then in "
                "its place, or give another --out."
            )
        if differing := [name for name in told if known.get(name) != json.loads(json.dumps(told[name]))]:
            name = differing[0]
            raise ValueError(
                f"`{name}`: the study in {out} was begun with {known.get(name)!r} and not {told[name]!r}. Leave it as it "
                "was, or give another --out."
            )
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(saved, json.dumps({**told, "checkpoints": checkpoints}) + "\n")
    except OSError as error:
        raise ValueError(f"`out`: nothing can be written to {out}: {error.strerror}. Give another.") from None


def _result(out: Path, key: str) -> Path:
    return out / PARTS / key / RESULT


def _finite(value: Any) -> Any:
    """As JSON can hold it: what is infinite or no number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
