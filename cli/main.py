"""The `hope` command: one subcommand per verb."""

from __future__ import annotations

import argparse
import sys

from huggingface_hub.errors import StrictDataclassError

from . import bench, chat, convert, demo, export, train


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hope", description="Language models that learn while they read.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, chat, convert, export, train, bench):
        command.add_to(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, StrictDataclassError) as error:
        # Of a strict config's error the last line says what is wrong.
        strict = isinstance(error, StrictDataclassError)
        message = (
            str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
            if strict
            else error
        )
        print(f"hope: {message}", file=sys.stderr)
        return 2
    except ImportError as error:
        extra = getattr(arguments, "extra", "demo")
        print(f"hope: {error}. Install the extra: pip install 'hope-transformers[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
