"""The directory of a run: what it may hold when a run begins or goes on, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .recipe import SAVED, TrainingRecipe
from .yaml_numbers import load


MODEL, RESULT, TEXT = "model", "result.json", "text.sha256"


def write(path: Path, text: str) -> None:
    """Whole or not at all, whenever the run is killed."""
    staged = path.with_name(f"{path.name}.part")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def check_directory(recipe: TrainingRecipe, out: Path, resume: bool) -> None:
    """
    Raises:
        ValueError: the directory holds a run that is not to be resumed, or there is none, or it is of another recipe,
            or nothing can be written there.
    """
    saved = out / SAVED
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"`out`: nothing can be written to {out}, as {there} is no directory or is read-only. Give another."
        )
    if not resume:
        if (out / RESULT).is_file() or any(out.glob("checkpoint-*")):
            raise ValueError(f"`out`: {out} holds a run. `--resume` goes on with it; another needs another directory.")
        return
    if not saved.is_file():
        raise ValueError(f"`--resume`: {out} holds no run ({SAVED} is missing). Leave it out to begin one.")
    known = TrainingRecipe.from_fields(load(saved.read_text(encoding="utf-8")))
    differing = [name for name, value in vars(known).items() if name != "out" and value != getattr(recipe, name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"`--resume`: the run in {out} has `{name}` {getattr(known, name)!r} and not {getattr(recipe, name)!r}: "
            "its losses would be others. Leave out what differs, or begin another run."
        )


def check_text(out: Path, digest: str) -> None:
    """
    Raises:
        ValueError: the run in this directory was begun with other text.
    """
    known = out / TEXT
    if known.is_file() and known.read_text().strip() != digest:
        raise ValueError(
            "`--resume`: `train` or `validation` holds other text than when the run was begun: its losses would be "
            "others. Give the text of then, or begin another run."
        )


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end, of which the trainer's state is the last file."""
    found = []
    for path in out.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
            found.append((state["global_step"], path))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the run was killed while it wrote this one
    return max(found)[1] if found else None
