"""
What a small self-modifying memory learns: multi-query recall and parity, and what each part of it is worth.

    python -m modeling_hope.eval.memory_tasks recall
    python -m modeling_hope.eval.memory_tasks parity --seeds 0 1 2
    python -m modeling_hope.eval.memory_tasks recall parity --ablate --seeds 0 1 2

Two layers of width 64 (2 heads, hidden width 32), AdamW (rate 3e-3, falling over the last quarter, betas 0.9 and 0.95),
batch 32. `recall`: 8 key-value pairs from a vocabulary of 64, then the 8 keys in another order, each to be answered with
its value. `parity`: bit strings of 2 to 24, after every bit whether their number of ones is odd; a string counts when
every position is right. Evaluated on fresh data.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import get_wsd_schedule

from modeling_hope import HopeConfig, HopeForCausalLM


BATCH, TEST_BATCHES, REPORT_EVERY, WARMUP = 32, 16, 125, 50
LEARNING_RATE = 3e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no self-generated values": {"memory_self_values": False},
    "no delta term": {"memory_delta_decay": False},
    "no momentum": {"memory_momentum": False},
}

# Tokens `[batch, width]`, and what each position has to predict, -100 where nothing.
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A task: batches from a generator, what counts as right, and how long a training may take."""

    batch: Callable[[torch.Generator], Batch]
    by_string: bool
    vocab_size: int
    steps: int
    target: float


def recall_batch(generator: torch.Generator) -> Batch:
    """8 pairs of a key (0-31) and a value (32-63), then the keys in another order, each followed by its value."""
    keys = torch.rand(BATCH, 32, generator=generator).argsort(1)[:, :8]
    values = torch.randint(32, 64, (BATCH, 8), generator=generator)
    order = torch.rand(BATCH, 8, generator=generator).argsort(1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    ids = torch.stack([torch.cat([keys, asked], 1), torch.cat([values, answers], 1)], 2).flatten(1)
    targets = torch.full_like(ids, -100)
    targets[:, 16::2] = answers
    return ids, targets


def parity_batch(generator: torch.Generator) -> Batch:
    """Bit strings of lengths 2 to 24, padded on the right."""
    bits = torch.randint(2, (BATCH, 24), generator=generator)
    lengths = torch.randint(2, 25, (BATCH, 1), generator=generator)
    return bits, (bits.cumsum(1) % 2).masked_fill(torch.arange(24) >= lengths, -100)


TASKS = {
    "recall": Task(recall_batch, by_string=False, vocab_size=64, steps=1500, target=0.95),
    "parity": Task(parity_batch, by_string=True, vocab_size=2, steps=600, target=0.95),
}


def make_model(task: Task, seed: int, **fields: Any) -> HopeForCausalLM:
    torch.manual_seed(seed)
    config = HopeConfig(
        vocab_size=task.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        memory_hidden_size=32,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )
    return HopeForCausalLM(config)


@torch.no_grad()
def accuracy(model: HopeForCausalLM, task: Task, seed: int) -> float:
    """On fresh data: of answers, or of whole strings."""
    model.eval()
    generator = torch.Generator().manual_seed(10_000 + seed)
    right = []
    for _ in range(TEST_BATCHES):
        ids, targets = task.batch(generator)
        hits = model(ids, use_cache=False, learn="off").logits.argmax(-1) == targets
        asked = targets != -100
        right.append((hits | ~asked).all(1) if task.by_string else hits[asked])
    model.train()
    return torch.cat(right).float().mean().item()


def training(
    model: HopeForCausalLM, task: Task, steps: int, seed: int = 0, learning_rate: float = LEARNING_RATE
) -> Iterator[tuple[int, float]]:
    """Train in place; yields each step's number and loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_wsd_schedule(optimizer, WARMUP, steps // 4, num_training_steps=steps, decay_type="linear")
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        ids, targets = task.batch(generator)
        loss = F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step, loss.item()


def train(task: Task, seed: int, learning_rate: float, log: Callable[[str], None], **fields: Any) -> dict[str, Any]:
    """Train until the target is reached or the steps are used up; returns the accuracy by step."""
    model = make_model(task, seed, **fields)
    curve, started = {}, time.perf_counter()
    for step, loss in training(model, task, task.steps, seed, learning_rate):
        if step % REPORT_EVERY == 0 or step == task.steps:
            curve[step] = accuracy(model, task, seed)
            seconds = time.perf_counter() - started
            log(f"  seed {seed} step {step:5d}  loss {loss:.3f}  right {curve[step]:.1%}  {seconds:.0f} s")
            if curve[step] >= task.target:
                break
    return {"seed": seed, "steps": step, "right": curve[step], "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--ablate", action="store_true", help="also the same model without one part, and another")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--fields", type=json.loads, default={}, help="fields of HopeConfig, as JSON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)

    variants = VARIANTS if arguments.ablate else {"default": {}}
    results: dict[str, Any] = {}
    for name in arguments.tasks:
        for variant, fields in variants.items():
            print(f"{name}, {variant}", flush=True)
            results[f"{name}, {variant}"] = [
                train(
                    TASKS[name], seed, arguments.lr, lambda line: print(line, flush=True), **(fields | arguments.fields)
                )
                for seed in arguments.seeds
            ]
    print(f"\n{'':<40}  right (steps), by seed")
    for label, runs in results.items():
        print(f"{label:<40}  " + "  ".join(f"{run['right']:.1%} ({run['steps']})" for run in runs))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
