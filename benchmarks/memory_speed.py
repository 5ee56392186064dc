"""
How fast a model with a self-modifying memory reads and trains, next to others of its size: one model, one length.

    python -m modeling_hope.benchmarks.memory_speed --measure hope --length 512

`hope bench` runs this once for each line of its table, in a process of its own, and prints them side by side. The last
line printed is JSON. On the CPU, in float32, in train mode, on random tokens and untrained weights:

    forward     seconds of each pass that makes logits `[batch, length, vocab]` of ids, under `no_grad`
    train       seconds of each forward and backward pass of the next-token loss, no optimizer's step included
    peak_MiB    of resident memory during the training passes (Linux), of which before_MiB were there before them

The models:

    hope                 every layer's mixer a self-modifying memory, heads of 64, chunks of 64 as titans has, else the
                         defaults of HopeConfig; its levels are plain MLPs, as in training unless `cms_training` says
                         otherwise. The gradient goes through the memory's updates.
    hope-saving-memory   the same, with each layer's activations made again in the backward pass.
    hope-short-chunks    the same with the default chunks, of 16.
    llama                Transformers' Llama, heads of 64, attention with sdpa, an MLP of 8/3 widths.
    titans               titans-pytorch 0.5.5, which has no such model ready-made: blocks of its NeuralMemory (which
                         norms its input) and of a SwiGLU MLP of Llama's width, both residual, embedding and head. Heads
                         of 64, chunks of 64 tokens, `batch_size` 64, so that what a chunk writes depends on what those
                         before it wrote, as it does in hope; else its defaults: an MLP of 64 - 256 - 64 for each head,
                         and momentum. The gradient goes through the updates.
    titans-at-start      the same with `batch_size` unset: the gradients of all chunks are taken at once, at the memory's
                         initial weights. Its fastest setting.
    titans-defaults      `NeuralMemory(dim=width, chunk_size=64)`, all else the package's defaults: one head as wide as
                         the model, `batch_size` unset.
    nested-learning      nested-learning 0.2.0, block_variant "hope_selfmod" with the memories of its preset
                         pilot_selfmod_paper_faithful: those that project are written every 8 tokens, the main one
                         every 64, which is within a few percent of its fastest chunks. They have one head, as wide as
                         the model; it offers no other. One level of its MLP of 4 widths, which has Llama's parameters;
                         its period is beyond every length, so that it stays as it is, as hope's levels do here.
                         Forward is one pass that updates the memories. Updates run under `no_grad`, and the package
                         trains around them: a pass that only reads the initial memories, its backward pass, and a pass
                         that updates. So does train here; no gradient goes through the updates. What tells it to
                         update is a teaching signal, of which the memories need no more than that it is there: ones,
                         in place of the further forward pass that would make it.
    decoding             hope in eval mode, one row: bytes of the mixers' states after so many tokens, and seconds per
                         further token, over a whole number of chunks, measured in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


HEAD_DIM = 64
CHUNK = 64
PIECE = 4096
# A pass that takes longer than this is not repeated, and needs no other to warm up.
PATIENCE_SECONDS = 30
# nested-learning asks for a huggingface_hub too old for Transformers; what of it is measured needs nothing besides torch.
PEERS = {
    "titans": "pip install titans-pytorch==0.5.5",
    "titans-at-start": "pip install titans-pytorch==0.5.5",
    "titans-defaults": "pip install titans-pytorch==0.5.5",
    "nested-learning": "pip install --no-deps nested-learning==0.2.0",
}
SIZES = {
    "width": (256, "hidden size, a multiple of 64"),
    "layers": (4, "of each model"),
    "vocab": (1024, "size of the vocabulary"),
    "batch": (2, "rows"),
    "threads": (1, "of torch"),
    "repeats": (5, "passes after one to warm up; fewer of slow ones"),
}


@dataclass
class Measured:
    """A model and the two passes that are timed; both take ids `[batch, length]`."""

    model: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    train: Callable[[torch.Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=(*MODELS, "decoding"), required=True)
    parser.add_argument("--length", type=int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument(
        "--seen", type=int, nargs=2, default=(1024, 65536), help="decoding: tokens read before (default: 1024 65536)"
    )
    add_sizes(parser)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.measure == "decoding":
        print(json.dumps(decoding(arguments)))
        return
    try:
        measured = MODELS[arguments.measure](arguments)
    except ImportError:
        if arguments.measure not in PEERS:
            raise
        print(json.dumps({"absent": f"not installed ({PEERS[arguments.measure]})"}))
        return
    print(json.dumps(cost(measured, arguments)))


def add_sizes(parser: argparse.ArgumentParser) -> None:
    for name, (default, meaning) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")


def cost(measured: Measured, sizes: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each pass, and the peak memory of those that train."""
    ids = torch.randint(sizes.vocab, (sizes.batch, sizes.length))

    def train() -> None:
        measured.model.zero_grad()
        measured.train(ids)

    # Before any other pass, whose freed memory would still be resident.
    gc.collect()
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of loading
    before = resident("VmRSS")
    trained = seconds(train, sizes.repeats)
    peak = resident("VmHWM")
    with torch.no_grad():
        read = seconds(lambda: measured.forward(ids), sizes.repeats)
    parameters = sum(parameter.numel() for parameter in measured.model.parameters())
    return {"parameters": parameters, "forward": read, "train": trained, "peak_MiB": peak, "before_MiB": before}


def seconds(thing: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each of up to so many calls, after one that warms up."""
    found: list[float] = []
    while len(found) <= times and sum(found) < PATIENCE_SECONDS:
        started = time.perf_counter()
        thing()
        found.append(time.perf_counter() - started)
    return found[1:] or found


def resident(field: str) -> float | None:
    """MiB that the process holds (`VmRSS`) or has held at most (`VmHWM`); `None` where Linux is not there to tell."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{field}:")[1].split()[0]) / 1024 if status.exists() else None


def llama_mlp_width(width: int) -> int:
    """8/3 of the width, in whole multiples of 64."""
    return 64 * -(-8 * width // (3 * 64))


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def of_transformers(model: Any) -> Measured:
    def train(ids: torch.Tensor) -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    return Measured(model.train(), lambda ids: model(ids, use_cache=False).logits, train)


def hope(sizes: argparse.Namespace, **fields: Any) -> Measured:
    from modeling_hope import HopeConfig, HopeForCausalLM

    config = HopeConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // HEAD_DIM,
        layer_types=["hope_memory"] * sizes.layers,
        # Every memory is renewed with the main one: as much work as there can be.
        **({"memory_chunk_size": CHUNK, "projection_chunk_size": CHUNK} | fields),
    )
    return of_transformers(HopeForCausalLM(config))


def hope_saving_memory(sizes: argparse.Namespace) -> Measured:
    measured: Any = hope(sizes)
    measured.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return measured


def hope_short_chunks(sizes: argparse.Namespace) -> Measured:
    return hope(sizes, memory_chunk_size=16, projection_chunk_size=16)


def llama(sizes: argparse.Namespace) -> Measured:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=llama_mlp_width(sizes.width),
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // HEAD_DIM,
        max_position_embeddings=max(sizes.length, 2048),
        attn_implementation="sdpa",
    )
    return of_transformers(LlamaForCausalLM(config))


class TitansBlock(nn.Module):
    """A neural memory, then a SwiGLU MLP, each added to what it reads, `[batch, length, width]`."""

    def __init__(self, width: int, options: dict[str, Any]):
        super().__init__()
        from titans_pytorch import NeuralMemory

        hidden = llama_mlp_width(width)
        self.memory = NeuralMemory(dim=width, chunk_size=CHUNK, **options)
        self.norm = nn.RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.memory(hidden)[0]
        gate, up = self.gate_up(self.norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


def titans(sizes: argparse.Namespace) -> Measured:
    return titans_of(sizes, heads=sizes.width // HEAD_DIM, dim_head=HEAD_DIM, batch_size=CHUNK)


def titans_of(sizes: argparse.Namespace, **options: Any) -> Measured:
    blocks = [TitansBlock(sizes.width, options) for _ in range(sizes.layers)]
    head = nn.Linear(sizes.width, sizes.vocab, bias=False)
    model = nn.Sequential(nn.Embedding(sizes.vocab, sizes.width), *blocks, nn.RMSNorm(sizes.width), head)
    return Measured(model, model, lambda ids: next_token_loss(model(ids), ids).backward())


def titans_at_start(sizes: argparse.Namespace) -> Measured:
    return titans_of(sizes, heads=sizes.width // HEAD_DIM, dim_head=HEAD_DIM)


def nested_learning(sizes: argparse.Namespace) -> Measured:
    from nested_learning.levels import LevelSpec
    from nested_learning.model import HOPEModel, ModelConfig

    still = LevelSpec(name="still", update_period=1 << 30)
    config = ModelConfig(
        vocab_size=sizes.vocab,
        dim=sizes.width,
        num_layers=sizes.layers,
        heads=sizes.width // HEAD_DIM,
        titan_level=still,
        cms_levels=[still],
        block_variant="hope_selfmod",
        self_mod_chunk_size=8,
        self_mod_chunk_size_memory=64,
        self_mod_use_skip=False,
    )
    model = HOPEModel(config)

    def updating(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, teach_signal=torch.ones(*ids.shape, sizes.width), fast_state=model.init_fast_state())

    def train(ids: torch.Tensor) -> None:
        next_token_loss(model(ids, fast_state=model.init_fast_state()), ids).backward()
        with torch.no_grad():
            updating(ids)

    return Measured(model, updating, train)


MODELS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "hope": hope,
    "hope-saving-memory": hope_saving_memory,
    "hope-short-chunks": hope_short_chunks,
    "llama": llama,
    "titans": titans,
    "titans-at-start": titans_at_start,
    "titans-defaults": titans_of,
    "nested-learning": nested_learning,
}


@torch.no_grad()
def decoding(sizes: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the mixers' states, and seconds per further token, after each of two numbers of tokens."""
    from modeling_hope import HopeCache

    from .learning_cost import in_turns

    model: Any = hope(sizes).model.eval()
    # A chunk's last token does the chunk's work: only whole chunks tell what a token costs.
    steps = 2 * max(model.config.memory_chunk_size, model.config.projection_chunk_size)
    ids = torch.randint(sizes.vocab, (1, max(sizes.seen)))

    def after(seen: int) -> Any:
        memory = HopeCache(model.config)
        for piece in ids[:, :seen].split(PIECE, dim=1):
            model(piece, past_key_values=memory, learn="off")
        return memory

    def decode(memory: Any) -> None:
        fork = memory.clone()
        for step in range(steps):
            model(ids[:, step : step + 1], past_key_values=fork, learn="off")

    few, many = (after(seen) for seen in sizes.seen)
    taken = in_turns(lambda: decode(few), lambda: decode(many), sizes.repeats)
    return {
        "tokens_seen": list(sizes.seen),
        "tokens_decoded": steps,
        "nbytes": [mixer_nbytes(memory) for memory in (few, many)],
        "seconds_per_token": [each / steps for each in taken],
    }


def mixer_nbytes(memory: Any) -> int:
    return sum(tensor.nbytes for name, tensor in memory.tensors().items() if ".mixer." in name)


if __name__ == "__main__":
    main()
