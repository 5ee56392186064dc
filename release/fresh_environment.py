"""
An environment in which this package is not installed, made of links in a moment and without a network.

It has torch and Transformers with what these ask for, and nothing else: Python is started without its own packages (`-S`),
and finds the links alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from .check import Check


TRIAL = Path(__file__).with_name("trial.py")
STEPS = ("loads", "generates", "remembers", "how to use")
FIXES = {
    "loads": "load the directory with trust_remote_code=True where this package is not installed, and mend what it says",
    "generates": "load the directory, and generate; weights and tokenizer may not be of one model",
    "remembers": "the code in the directory is not as this package has it: save the model with its code again",
    "how to use": "run the lines of the card's `How to use it`, and mend what they say",
}


def try_in_fresh_environment(directory: Path, lines: str, python: str | None = None) -> list[Check]:
    """
    Load a model through its own code, generate, remember, and run what its card says, in a process that has not this package.

    Args:
        lines: Python, of the card.
        python: of an environment that has torch and Transformers alone; unset, one is made.
    """
    with tempfile.TemporaryDirectory(prefix="hope-release-") as folder:
        work = Path(folder)
        packages = None if python else str(link_packages(work / "packages"))
        results = work / "results.json"
        request = {"packages": packages, "directory": str(directory.resolve()), "lines": lines, "results": str(results)}
        (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (work / "cwd").mkdir()
        flags = ["-I"] if python else ["-I", "-S"]
        try:
            done = subprocess.run(
                [python or sys.executable, *flags, str(TRIAL), str(work / "request.json")],
                env=_environment(work),
                cwd=work / "cwd",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            return _checks({"loads": {"error": f"{python} cannot be run: {error.strerror}"}})
        findings = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        if done.returncode and not any("error" in finding for finding in findings.values()):
            last = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
            findings[STEPS[len(findings)]] = {"error": last[0]}
        return _checks(findings)


def _checks(findings: dict[str, Any]) -> list[Check]:
    checks = []
    for name in STEPS:
        finding = findings.get(name)
        if finding is None:
            checks.append(Check(name, None, "needs what failed"))
        elif "error" in finding:
            checks.append(Check(name, False, finding["error"], FIXES[name]))
        else:
            checks.append(Check(name, True, finding["found"]))
    return checks


def _environment(work: Path) -> dict[str, str]:
    """This one's, without settings or tokens of Python and the hub; offline, and with caches that end with the check."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "PYTHON", "TRANSFORMERS"))
    }
    home = {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**kept, **home, "TRANSFORMERS_VERBOSITY": "error", "PYTHONDONTWRITEBYTECODE": "1"}


def link_packages(folder: Path) -> Path:
    """Links to all that torch, Transformers and what they ask for have at the top of where they are installed."""
    folder.mkdir()
    waiting, known = ["torch", "transformers", "safetensors"], set()
    while waiting:
        name = waiting.pop()
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform, or an extra
        if (key := installed.metadata["Name"].lower()) in known:
            continue
        known.add(key)
        for entry in {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / entry).exists():
                (folder / entry).symlink_to(Path(str(installed.locate_file(entry))).resolve())
        for asked in map(Requirement, installed.requires or []):
            if asked.marker is None or asked.marker.evaluate({"extra": ""}):
                waiting.append(asked.name)
    return folder
