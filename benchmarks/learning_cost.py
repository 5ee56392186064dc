"""
What learning costs on a real model: reading, decoding, a segment's end, memory, and low precision.

    python -m modeling_hope.benchmarks.learning_cost MODEL DOCUMENT [--json FILE]

MODEL is a Llama-architecture checkpoint (directory or .gguf), DOCUMENT a text file, which is read again from its start
when it is too short. Frozen and learning are measured in turns, in one process, and the medians compared. Peak memory is that of
reading, in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.conversion import convert, load_tokenizer
from modeling_hope.eval.reading import read


PERIOD, WINDOW, RATE = 256, 1024, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("document", type=Path)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--peak-of", type=int, metavar="TOKENS", help="only read so many, learning, and print the peak memory"
    )
    arguments = parser.parse_args()

    path = Path(arguments.model)
    tokenizer = load_tokenizer(path)
    ids = tokenizer(arguments.document.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    model = convert(path, periods=(PERIOD,), learning_rates=RATE, window=WINDOW, check=False)
    if arguments.peak_of:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of loading
        read(model, ids.repeat(arguments.peak_of // len(ids) + 1)[: arguments.peak_of], learn=True)
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return

    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    figures |= reading_cost(model, ids[:4096])
    figures |= decoding_cost(model, ids[: 8 * PERIOD])
    figures |= precision(model, ids[:8192])
    command = [sys.executable, "-m", "modeling_hope.benchmarks.learning_cost", arguments.model, str(arguments.document)]
    for tokens in (8192, 32768):
        done = subprocess.run([*command, "--peak-of", str(tokens)], capture_output=True, text=True, check=True)
        figures[f"peak_MiB_{tokens}_tokens"] = float(done.stdout.split()[-1])
    figures["peak_ratio"] = figures["peak_MiB_32768_tokens"] / figures["peak_MiB_8192_tokens"]
    for name, value in figures.items():
        print(f"{name:<44} {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def in_turns(first: Callable[[], Any], second: Callable[[], Any], times: int) -> tuple[float, float]:
    """Median seconds of two things, measured in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(times + 1):
        for thing, found in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            thing()
            if repeat:  # the first warms up
                found.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def reading_cost(model: HopeForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Reading a document with learning against reading it frozen."""
    frozen, learning = in_turns(lambda: read(model, ids, learn=False), lambda: read(model, ids, learn=True), 3)
    return {
        "reading_frozen_tokens_per_second": len(ids) / frozen,
        "reading_learning_tokens_per_second": len(ids) / learning,
        "reading_ratio": learning / frozen,
    }


@torch.no_grad()
def decoding_cost(model: HopeForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """A decoded token after learning against a frozen one, away from a segment's end and at it."""
    memories = {}
    for name, learn in (("frozen", False), ("learned", True)):
        memories[name] = HopeCache(model.config)
        read(model, ids, learn=learn, memory=memories[name])
    token = ids[None, -1:]

    def decode(memory: HopeCache, learn: str) -> Callable[[], None]:
        def steps() -> None:
            fork = memory.clone()
            for _ in range(16):
                model(token, past_key_values=fork, learn=learn)

        return steps

    frozen, learned = in_turns(decode(memories["frozen"], "off"), decode(memories["learned"], "all"), 9)

    def last_of_segment() -> None:
        model(token, past_key_values=almost.clone(), learn="all")

    def segment() -> None:
        model(ids[None, -PERIOD:], past_key_values=memories["learned"].clone(), learn="all")

    almost = memories["learned"].clone()
    model(ids[None, 1 - PERIOD :], past_key_values=almost, learn="all")
    end, whole = in_turns(last_of_segment, segment, 5)
    return {
        "decode_frozen_ms": frozen / 16 * 1e3,
        "decode_learning_ms": learned / 16 * 1e3,
        "decode_ratio": learned / frozen,
        "segment_end_seconds": end,
        "segment_in_one_call_seconds": whole,
        "segment_end_ratio": end / whole,
    }


def precision(model: HopeForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Gain of learning in the second half of a document, in float32 and in bfloat16."""
    gains = {}
    for dtype in (torch.float32, torch.bfloat16):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        frozen, learning = read(model, ids, learn=False), read(model, ids, learn=True)
        gains[dtype] = 1 - learning.perplexity(0.5) / frozen.perplexity(0.5)
    return {
        "gain_float32": gains[torch.float32],
        "gain_bfloat16": gains[torch.bfloat16],
        "gain_bfloat16_to_float32": gains[torch.bfloat16] / gains[torch.float32],
    }


if __name__ == "__main__":
    main()
