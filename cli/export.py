"""
hope export-transformer: a converted Hope model becomes a Transformer of its original family again.

With what memories learned, where they were consolidated into it, it can then be served wherever that family is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .weights_options import add_weights_options


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "export-transformer",
        help="write a converted model back to its original family",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="directory of a Hope model of the strategies depth or split")
    parser.add_argument("out", type=Path, help="new directory for the Transformer")
    add_weights_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from modeling_hope.conversion import export_transformer

    found = export_transformer(
        arguments.model,
        arguments.out,
        dtype=arguments.dtype,
        check=not arguments.no_check,
        max_shard_size=arguments.max_shard_size,
    )
    if found is not None:
        print("\n".join(f"{name:<16} {value}" for name, value in found.rows()))
    print(f"{'written to':<16} {arguments.out}")
