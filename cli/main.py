"""The `hope` command: one subcommand per verb."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from huggingface_hub.errors import StrictDataclassError

from . import bench, chat, convert, demo, eval, export, release, study, train


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hope", description="Language models that learn while they read.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for command in (demo, chat, convert, export, train, eval, study, bench, release):
        command.add_to(commands)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[arguments.command].error(not_known(unknown, commands.choices[arguments.command]))
    try:
        arguments.run(arguments)
    except (ValueError, OSError, StrictDataclassError) as error:
        message = str(error)
        if isinstance(error, StrictDataclassError):  # its last line says what is wrong, after the name of an error
            message = message.strip().splitlines()[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
        print(f"hope: {message}", file=sys.stderr)
        return 2
    except ImportError as error:
        extra = getattr(arguments, "extra", "demo")
        print(f"hope: {error}. Install the extra: pip install 'hope-transformers[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def not_known(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What to say of words that a command does not take: of a flag, which one may be meant."""
    flag = words[0].partition("=")[0]
    meant = get_close_matches(flag, re.findall(r"--[\w-]+", parser.format_help()), n=1)
    return f"unrecognized argument {flag}" + (f", do you mean {meant[0]}?" if meant else "")


if __name__ == "__main__":
    sys.exit(main())
