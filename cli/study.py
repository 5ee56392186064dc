"""
hope study: run one of the paper's studies, at a size that can be afforded.

Each writes its figures as JSON, a table as Markdown and a plot to --out. One that was killed goes on where it was, by the
same command; several processes may share one, each with parts of its own (--only).

    hope study NAME --help
    hope study NAME --quick
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from .field_flags import add_fields, given_fields


# By name: what it shows.
STUDIES: dict[str, str] = {
    "context": "perplexity against context used: frozen, learning, at the native context (figure 10)",
    "levels": "number of levels and slowest period, on documents and needles (figure 7)",
    "test_time_learning": "frozen against learning perplexity over long documents",
    "formal_languages": "small models learn the formal languages of table 5",
    "mad": "small models on the tasks of MAD, table 4",
    "ladder_documents": "the ladder's models on long documents, past what they were trained on",
    "optimizers": "the paper's optimizers on its two toys, Eq. 45 and 53, with tuned rivals",
    "continual": "classes that arrive some at a time: Hope, in-context learning, fine-tuning, EWC, replay",
}


def add_to(commands: Any) -> None:
    listed = "\n".join(f"    {name:20} {says}" for name, says in STUDIES.items())
    parser = commands.add_parser(
        "study",
        usage="hope study NAME [--FLAG VALUE]...",
        help="run one of the paper's studies",
        description=f"{__doc__}\n{listed}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=STUDIES, help=", ".join(STUDIES))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run, extra="eval")


def run(arguments: argparse.Namespace) -> None:
    study = import_module(f"modeling_hope.eval.studies.{arguments.name}").STUDY
    parser = argparse.ArgumentParser(
        prog=f"hope study {arguments.name}",
        description=study.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_fields(parser, study.settings)
    given = given_fields(parser.parse_args(arguments.flags), study.settings)
    study.run(study.settle(given), command=["hope", "study", arguments.name, *arguments.flags])
