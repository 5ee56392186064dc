"""
hope bench: how fast Hope's self-modifying memory reads and trains on a CPU, next to a Llama and to other memories.

Each model is measured in a process of its own, float32, untrained, on random tokens. What is run of each, and how it is
set up, is told by `python -m modeling_hope.benchmarks.memory_speed --help`. A package that is not installed is named
with the command that installs it, and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from modeling_hope.benchmarks.memory_speed import MODELS, PEERS, SIZES, add_sizes


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed and memory next to other models of the same size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 2048], help="tokens per row (default: 512 2048)"
    )
    add_sizes(parser)
    parser.add_argument(
        "--limit",
        type=float,
        default=300,
        help="skip a model at longer lengths when a shorter one predicts more seconds than this for a pass (default: %(default)s)",
    )
    parser.add_argument(
        "--seen",
        type=int,
        nargs=2,
        metavar="TOKENS",
        default=(1024, 65536),
        help="hope's decoding is measured after so many (default: 1024 65536)",
    )
    parser.add_argument(
        "--decoding", action=argparse.BooleanOptionalAction, default=True, help="also measure hope's decoding"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    if min(arguments.lengths) < 2 or arguments.width % 64:
        raise ValueError("--lengths must be at least 2, and --width a multiple of 64.")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    # Where no terminal says how wide it is, all columns fit.
    console = Console(width=None if sys.stdout.isatty() else 120)
    results: dict[int, dict[str, Any]] = {length: {} for length in sorted(arguments.lengths)}
    for length in results:
        for name in arguments.models:
            with console.status(f"{name}, {length:,} tokens"):
                skipped = too_slow(name, length, results, arguments.limit)
                results[length][name] = skipped or measure(arguments, name, "--length", str(length))
    speed_table(console, results, arguments)
    figures: dict[str, Any] = {"torch": torch.__version__, **{name: getattr(arguments, name) for name in SIZES}}
    figures["lengths"] = results
    if arguments.decoding:
        with console.status("decoding"):
            figures["decoding"] = measure(arguments, "decoding", "--seen", *map(str, arguments.seen))
        decoding_table(console, figures["decoding"])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(arguments: argparse.Namespace, name: str, *options: str) -> dict[str, Any]:
    """What a fresh process finds; `absent` says why it could not measure another's model."""
    sizes = [f"--{size}={getattr(arguments, size)}" for size in SIZES]
    command = [sys.executable, "-m", "modeling_hope.benchmarks.memory_speed", "--measure", name, *options, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if name not in PEERS:
            raise ValueError(f"{name} could not be measured: {reason}")
        return {"absent": f"failed with status {done.returncode}: {reason}"}
    return json.loads(done.stdout.splitlines()[-1])


def too_slow(name: str, length: int, results: dict[int, dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """Why not to measure a model: time grows at least as the length does."""
    for shorter, found in results.items():
        if shorter < length and "train" in found.get(name, {}):
            expected = statistics.median(found[name]["train"]) * length / shorter
            if expected > limit:
                told = f"by its {shorter:,} tokens, a pass would take {expected:,.0f} s or more"
                return {"absent": f"{length:,} tokens skipped: {told}; see --limit"}
    return None


def speed_table(console: Any, results: dict[int, dict[str, Any]], arguments: argparse.Namespace) -> None:
    from rich.table import Table

    title = (
        f"CPU, float32, threads {arguments.threads}, width {arguments.width}, layers {arguments.layers}, "
        f"vocabulary {arguments.vocab:,}, batch {arguments.batch}, torch {torch.__version__}"
    )
    made = Table(title=title, title_justify="left")
    made.add_column(no_wrap=True)
    forward, train = "forward", "forward and\nbackward"
    for heading in ("parameters", f"{forward}\nseconds", "tokens/s", f"{train}\nseconds", "tokens/s", "peak\nMiB"):
        made.add_column(heading, justify="right")
    for heading in (f"this / hope\n{forward}", f"this / hope\n{train}"):
        made.add_column(heading, justify="right")
    notes: dict[str, None] = {}
    for length, found in results.items():
        made.add_section()
        made.add_row(f"[bold]{length:,} tokens[/]")
        for name, figures in found.items():
            label = name.replace("hope-saving-memory", "hope, saving memory")
            if "absent" in figures:
                made.add_row(label, *["-"] * 8)
                notes[f"{label}: {figures['absent']}"] = None
                continue
            cells = [f"{figures['parameters']:,}"]
            for step in ("forward", "train"):
                taken = statistics.median(figures[step])
                cells += [f"{taken:.3f}", f"{arguments.batch * length / taken:,.0f}"]
            cells.append(f"{figures['peak_MiB']:,.0f}" if figures["peak_MiB"] else "-")
            cells += [ratio(found, name, step) for step in ("forward", "train")]
            made.add_row(label, *cells)
    console.print(made)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def ratio(found: dict[str, Any], name: str, step: str) -> str:
    """Another model's time for a pass, in times of hope's."""
    if step not in found.get("hope", {}):
        return "-"
    return f"{statistics.median(found[name][step]) / statistics.median(found['hope'][step]):.3g}x"


def decoding_table(console: Any, figures: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"hope decoding one row, means over {figures['tokens_decoded']} tokens"
    made = Table(title=title, title_justify="left")
    for heading in ("tokens seen", "memory, KiB", "per token, ms"):
        made.add_column(heading, justify="right")
    nbytes, taken = figures["nbytes"], figures["seconds_per_token"]
    for seen, held, each in zip(figures["tokens_seen"], nbytes, taken, strict=True):
        made.add_row(f"{seen:,}", f"{held / 1024:,.1f}", f"{each * 1e3:.2f}")
    made.add_section()
    made.add_row("ratio", f"{nbytes[1] / nbytes[0]:.2f}x", f"{taken[1] / taken[0]:.2f}x")
    console.print(made)
