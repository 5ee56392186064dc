"""YAML in which a number may be written as in Python: `1e-4`, which YAML 1.1 takes for text, is one too."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Reads it."""


class Dumper(yaml.SafeDumper):
    """Writes it: text that looks like such a number stands in quotes."""


for kind in (Loader, Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load(text: str) -> Any:
    """
    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader)
