"""
hope release: check a model directory, write its card and its checksums, and push it to the hub.

    hope release MODEL --card model_cards/NAME --results RUN/result.json studies/NAME/NAME.json
    hope release MODEL --card model_cards/NAME --push owner/name
    hope release --card model_cards/NAME            renders the card again, without the weights

The card's directory has `facts.yaml`: what only you know of the model. Figures come from files of results alone, that `hope
eval`, `hope study` and `hope train` wrote of this very checkpoint. The model is loaded and used, by the code in its directory,
in a process that has torch and Transformers and not this package. Where a check fails, nothing is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "release",
        help="check a model, write its card and checksums, push it",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, nargs="?", help="directory of a Hope model that was saved with its code")
    parser.add_argument("--card", type=Path, required=True, metavar="DIR", help="directory with facts.yaml")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="of this checkpoint; kept in the card's directory",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="of an environment with torch and transformers alone (default: one is made of links)",
    )
    parser.add_argument("--push", metavar="REPO", help="upload to the hub: owner/name, as the facts have it")
    parser.add_argument("--private", action="store_true", help="where --push makes the repository")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from modeling_hope.conversion.quiet import quiet
    from modeling_hope.release import release, write_card
    from modeling_hope.release.check import table
    from modeling_hope.release.facts import read_facts
    from modeling_hope.release.push import check_can_push, push

    if arguments.model is None:
        if given := [name for name in ("results", "python", "push") if getattr(arguments, name)]:
            raise ValueError(f"`--{given[0]}` needs the model: hope release MODEL --card {arguments.card} ...")
        write_card(arguments.card)
        print(f"Written: {arguments.card}/README.md")
        return
    if arguments.push:
        named = read_facts(arguments.card).repository
        if named != arguments.push:
            raise ValueError(
                f"`--push`: the card tells people to load {named!r}: push it there, or mend `repository` in the facts."
            )
        check_can_push()
    with quiet():
        done = release(arguments.model, arguments.card, arguments.results, arguments.python)
    print(table(done.checks))
    print(
        f"\nWritten: {done.directory}/README.md, release.json, results/, SHA256SUMS; {arguments.card}/README.md, release.json"
    )
    if arguments.push:
        print(f"Pushed: {push(done.directory, arguments.push, done.checksums, arguments.private)}")
