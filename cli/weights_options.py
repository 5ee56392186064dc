"""Options of the commands that write a model's weights."""

from __future__ import annotations

from typing import Any


def add_weights_options(parser: Any) -> None:
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--max-shard-size", default="5GB", help="of a file of weights (default: 5GB)")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the two models, for which each is loaded in float32"
    )
