"""
hope convert: a pretrained Transformer becomes a Hope model, equal to it until it learns.

Prints what became of every tensor, what a sequence's memory takes, and how far logits and greedy tokens are from the
source's; all of it is also in conversion_report.json, beside the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .weights_options import add_weights_options


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn a pretrained Transformer into a Hope model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="directory of safetensors, .gguf file, or name on the hub")
    parser.add_argument("out", type=Path, help="new directory for the model")
    levels = parser.add_argument_group("levels")
    levels.add_argument(
        "--strategy",
        choices=("depth", "split", "stack"),
        default="depth",
        help="each layer's MLP becomes one level, is divided among levels, or is the slowest of a chain (default: depth)",
    )
    levels.add_argument(
        "--periods",
        type=periods,
        default=(512, 2048, 8192),
        metavar="TOKENS,...",
        help="tokens per update of each level, fastest first, 'never' for one that does not learn (default: 512,2048,8192)",
    )
    levels.add_argument(
        "--lr",
        type=rates,
        default=0.1,
        metavar="RATE,...",
        help="inner learning rates, one or one per level (default: 0.1)",
    )
    levels.add_argument("--learning-layers", type=layers, metavar="LAYERS", help="layers that learn (default: all)")
    mixers = parser.add_argument_group("attention")
    mixers.add_argument(
        "--window", type=int, metavar="TOKENS", help="let attention over everything slide, with this window"
    )
    mixers.add_argument(
        "--sinks", type=int, default=4, metavar="TOKENS", help="first tokens that stay in its view (default: 4)"
    )
    mixers.add_argument(
        "--mixer",
        type=layers,
        default=(),
        metavar="LAYERS",
        help="layers whose attention the self-modifying memory replaces, e.g. 3,7-9; the logits change",
    )
    mixers.add_argument(
        "--rope-length",
        type=int,
        metavar="TOKENS",
        help="of sources whose rotary angles depend on it: the text length to read all texts for",
    )
    files = parser.add_argument_group("files")
    add_weights_options(files)
    files.add_argument("--tokenizer", help="directory of a tokenizer, in place of the source's")
    files.add_argument("--revision", help="branch, tag or commit on the hub")
    files.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, from whom you trust")
    files.add_argument(
        "--remote-code",
        action="store_true",
        help="save the code too: trust_remote_code=True then loads the model where this package is not installed",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from modeling_hope.conversion import Recipe, convert_checkpoint

    recipe = Recipe(
        strategy=arguments.strategy,
        periods=arguments.periods,
        learning_rates=arguments.lr,
        window=arguments.window,
        attention_sinks=arguments.sinks,
        learning_layers=arguments.learning_layers,
        mixer_layers=arguments.mixer,
        rope_length=arguments.rope_length,
        dtype=arguments.dtype,
    )
    report = convert_checkpoint(
        arguments.source,
        arguments.out,
        recipe,
        tokenizer=arguments.tokenizer,
        revision=arguments.revision,
        check=not arguments.no_check,
        remote_code=arguments.remote_code,
        allow_pickle=arguments.allow_pickle,
        max_shard_size=arguments.max_shard_size,
    )
    print(report.table())
    print(f"\n{'written to':<16} {arguments.out}")


def periods(text: str) -> tuple[int | None, ...]:
    """`"512,2048,never"` to `(512, 2048, None)`."""
    parts = [part.strip() for part in text.split(",")]
    if any(part != "never" and not part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of tokens or 'never', e.g. 512,2048,never")
    return tuple(None if part == "never" else int(part) for part in parts)


def rates(text: str) -> float | tuple[float, ...]:
    """`"0.1"` to `0.1`, `"0.1,0.05"` to `(0.1, 0.05)`."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers, e.g. 0.1 or 0.1,0.05") from None
    return found if len(found) > 1 else found[0]


def layers(text: str) -> tuple[int, ...]:
    """`"0,4-6"` to `(0, 4, 5, 6)`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first):
            raise argparse.ArgumentTypeError(f"{text!r}: give layers and ranges of them, e.g. 0,4-6")
        found += range(int(first), int(last) + 1)
    return tuple(found)
