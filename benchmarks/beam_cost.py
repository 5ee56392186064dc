"""
What a step of beam search costs with a memory that has learned.

    python -m modeling_hope.benchmarks.beam_cost [MODEL] [--beams 4] [--json FILE]

MODEL is a Llama-architecture checkpoint (directory or .gguf) whose MLPs learn; without one, a random model of self-modifying
memories, width 256 and 4 layers. In turns, in one process: decoding with beams, decoding as many rows that never change
places, and reordering a memory alone. Each beam has a memory of its own; what a copy adds in bytes is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from modeling_hope import HopeCache, HopeConfig, HopeForCausalLM
from modeling_hope.conversion import convert


PERIOD, PROMPT, SHORT, LONG, TIMES = 256, 600, 8, 40, 5
SIZES = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.model:
        model = convert(arguments.model, periods=(PERIOD,), learning_rates=0.1, window=1024, check=False)
    else:
        model = HopeForCausalLM(HopeConfig(**SIZES, cms_periods=[PERIOD])).eval()
    figures = beam_cost(model, arguments.beams)
    for name, value in figures.items():
        print(f"{name:<40} {value:,.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def beam_cost(model: HopeForCausalLM, beams: int) -> dict[str, Any]:
    memory = HopeCache(model.config)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
    model(prompt, past_key_values=memory, logits_to_keep=1)
    ways = {
        "beams": {"num_beams": beams, "do_sample": False},
        "rows": {"num_return_sequences": beams, "do_sample": True},
    }
    taken: dict[tuple[str, int], list[float]] = {(way, tokens): [] for way in ways for tokens in (SHORT, LONG)}
    for _ in range(TIMES):
        for (way, tokens), seconds in taken.items():
            started = time.perf_counter()
            model.generate(
                prompt[:, :1],
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                past_key_values=memory.clone(),
                **ways[way],
            )
            seconds.append(time.perf_counter() - started)
    # What both ends of a call cost is in the short one too. After beam search the returned words are read once more.
    steps = {
        way: (statistics.median(taken[way, LONG]) - statistics.median(taken[way, SHORT])) / (LONG - SHORT)
        for way in ways
    }
    one = memory.nbytes()
    memory.batch_repeat_interleave(beams)
    order = torch.tensor([beams - 1, *range(beams - 1)])
    reorders = []
    for _ in range(4 * TIMES):
        started = time.perf_counter()
        memory.reorder_cache(order)
        reorders.append(time.perf_counter() - started)
    return {
        "beams": beams,
        "step_of_beams_ms": steps["beams"] * 1e3,
        "step_of_rows_ms": steps["rows"] * 1e3,
        "ratio": steps["beams"] / steps["rows"],
        "reorder_ms": statistics.median(reorders) * 1e3,
        "one_row_MiB": one / 2**20,
        f"{beams}_beams_MiB": memory.nbytes() / 2**20,
    }


if __name__ == "__main__":
    main()
