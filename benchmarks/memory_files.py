"""
What a memory takes on disk, how long saving and loading it takes, and what saving it in less space loses.

    python -m modeling_hope.benchmarks.memory_files MODEL DOCUMENT [--json FILE]

MODEL is a Llama-architecture checkpoint (directory or .gguf) whose MLPs learn from the first tokens of DOCUMENT, a text file.
The memory is saved and loaded in each way, and with it the tokens that follow are scored, nothing learned from them.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.conversion import convert, load_tokenizer


PERIOD, WINDOW, RATE = 256, 1024, 0.1
READ, SCORED = 1024, 512
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "low rank, 0.05": {"low_rank_error": 0.05},
    "low rank, 0.05, bfloat16": {"low_rank_error": 0.05, "dtype": torch.bfloat16},
    "low rank, 0.2, bfloat16": {"low_rank_error": 0.2, "dtype": torch.bfloat16},
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("document", type=Path)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    path = Path(arguments.model)
    tokenizer = load_tokenizer(path)
    text = arguments.document.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : READ + SCORED]
    if ids.shape[1] < READ + SCORED:
        parser.error(f"{arguments.document} has {ids.shape[1]} tokens: give one of {READ + SCORED}.")
    model = convert(path, periods=(PERIOD,), learning_rates=RATE, window=WINDOW, check=False)

    memory, frozen = HopeCache(model.config), HopeCache(model.config)
    model(ids[:, :READ], past_key_values=memory, logits_to_keep=1, learn="all")
    model(ids[:, :READ], past_key_values=frozen, logits_to_keep=1, learn="off")
    figures: dict[str, Any] = {"frozen": {"perplexity": perplexity(model, ids, frozen)}}
    figures["in memory"] = {"perplexity": perplexity(model, ids, memory), "MiB": memory.nbytes() / 2**20}
    for name, options in WAYS.items():
        with tempfile.TemporaryDirectory() as directory:
            started = time.perf_counter()
            saved = memory.save_pretrained(directory, model=model, **options)
            saving = time.perf_counter() - started
            started = time.perf_counter()
            loaded = HopeCache.from_pretrained(directory, model=model)
            loading = time.perf_counter() - started
        figures[name] = {
            "MiB": saved.bytes / 2**20,
            "save_seconds": saving,
            "load_seconds": loading,
            "relative_error": saved.relative_error,
            "worst_error": saved.worst_error,
            "perplexity": perplexity(model, ids, loaded),
        }
        print(saved)
    for name, found in figures.items():
        print(f"{name:<26}" + "  ".join(f"{key} {value:.4g}" for key, value in found.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def perplexity(model: HopeForCausalLM, ids: torch.Tensor, memory: HopeCache) -> float:
    """Of the tokens after those that a memory has read; the memory stays as it is."""
    logits = model(ids[:, READ:], past_key_values=memory.clone(), learn="off").logits
    return math.exp(F.cross_entropy(logits[0, :-1], ids[0, READ + 1 :]))


if __name__ == "__main__":
    main()
