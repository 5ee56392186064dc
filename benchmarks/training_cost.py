"""
What a training step costs: time, and activations kept for the backward pass, by mode and by the length of the text.

    python -m modeling_hope.benchmarks.training_cost [--layers N] [--hidden N] [--period N] [--segments N [N ...]]

A small model with random weights and attention, one level that learns, batches of one row. Kept activations are counted by autograd's hooks for
saved tensors: the most bytes at any time, each storage once, parameters left out. What `second_order` keeps beyond
`first_order` is bounded by `cms_max_backprop_updates`, however long the text is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from pathlib import Path
from typing import Any

import torch

from modeling_hope import HopeConfig, HopeForCausalLM


MODES: dict[str, dict[str, Any]] = {
    "static": {"cms_training": "static"},
    "first_order": {"cms_training": "first_order"},
    "second_order, 1 update": {"cms_training": "second_order", "cms_max_backprop_updates": 1},
    "second_order, 4 updates": {"cms_training": "second_order", "cms_max_backprop_updates": 4},
    "second_order, all": {"cms_training": "second_order", "cms_max_backprop_updates": None},
}
MIB = 2**20


class Saved:
    """A tensor that autograd keeps; gone when autograd lets it go."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class KeptActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps while this is entered: `peak`, the most at any time."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(self._keep, lambda saved: saved.tensor)
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.holders: dict[int, int] = {}
        self.bytes = self.peak = 0

    def _keep(self, tensor: torch.Tensor) -> Saved:
        saved, storage = Saved(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.own:
            self.bytes += size * (place not in self.holders)
            self.holders[place] = self.holders.get(place, 0) + 1
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(saved, self._release, place, size)
        return saved

    def _release(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.bytes -= size


def step(model: HopeForCausalLM, ids: torch.Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def measure(fields: dict[str, Any], mode: dict[str, Any], tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of a step, forward and backward, the median of `repeats`; and MiB of activations kept at its peak."""
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig(**fields, **mode)).train()
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    kept = KeptActivations(model)
    with kept:
        step(model, ids)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step(model, ids)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "kept_MiB": kept.peak / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument(
        "--period", type=int, default=16, help="tokens of a segment, after each of which a level updates"
    )
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16, 32], help="lengths of the text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    fields = {
        "vocab_size": 1000,
        "hidden_size": arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 4,
        "layer_types": ["sliding_attention"] * arguments.layers,
        "sliding_window": 4 * arguments.period,
        "cms_periods": [arguments.period, None],
        "cms_learning_rates": [0.1, 0.0],
    }
    figures = {
        name: {
            segments: measure(fields, mode, segments * arguments.period, arguments.repeats)
            for segments in arguments.segments
        }
        for name, mode in MODES.items()
    }
    for title, figure, form in (
        ("Kept activations, MiB, of so many segments", "kept_MiB", ".1f"),
        ("The same beyond first_order, MiB", None, ".1f"),
        ("A step, forward and backward, milliseconds", "seconds", ".0f"),
    ):
        print(f"{title:<46}" + "".join(f"{segments:>9}" for segments in arguments.segments))
        for name, by_length in figures.items():
            if figure is None:
                base = figures["first_order"]
                values = [by_length[n]["kept_MiB"] - base[n]["kept_MiB"] for n in arguments.segments]
            else:
                values = [by_length[n][figure] * (1e3 if figure == "seconds" else 1) for n in arguments.segments]
            print(f"  {name:<44}" + "".join(f"{value:>9{form}}" for value in values))
        print()
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
