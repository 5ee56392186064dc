"""hope convert: a pretrained Transformer becomes a Hope model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch


def add_to(commands: Any) -> None:
    parser = commands.add_parser("convert", help="turn a pretrained Transformer into a Hope model", description=__doc__)
    parser.add_argument("source", help="directory of safetensors, or a .gguf file")
    parser.add_argument("out", type=Path, help="new directory for the model")
    parser.add_argument("--strategy", default="depth", help="depth or stack (default: depth)")
    parser.add_argument(
        "--periods", type=periods, default=(512, 2048, 8192), help="tokens per update, e.g. 512,2048,never"
    )
    parser.add_argument("--lr", type=float, default=0.1, help="inner learning rate (default: 0.1)")
    parser.add_argument("--window", type=int, help="make all attention sliding, with this window")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="save the code too: trust_remote_code=True then loads the model where this package is not installed",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from modeling_hope.conversion import convert

    model = convert(
        arguments.source,
        arguments.out,
        strategy=arguments.strategy,
        periods=arguments.periods,
        learning_rates=arguments.lr,
        window=arguments.window,
        dtype=getattr(torch, arguments.dtype),
        remote_code=arguments.remote_code,
    )
    print(model.conversion_report.table())
    print(f"{'written to':<16} {arguments.out}")


def periods(text: str) -> tuple[int | None, ...]:
    """`"512,2048,never"` to `(512, 2048, None)`."""
    parts = [part.strip() for part in text.split(",")]
    if any(part != "never" and not part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of tokens or 'never', e.g. 512,2048,never")
    return tuple(None if part == "never" else int(part) for part in parts)
