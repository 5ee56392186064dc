"""
Throughput on a GPU: Hope's self-modifying memory next to FLA's Gated DeltaNet and a Llama with flash attention.

    pip install flash-linear-attention
    python -m modeling_hope.benchmarks.gpu_speed --json benchmarks/results/gpu_speed.json
    python -m modeling_hope.benchmarks.gpu_speed --device cpu --width 64 --layers 1 --vocab 256 --lengths 64 --tokens 128

All in one process, one model after the other, bfloat16, untrained, on random tokens; by default the shape known as 340M
(about 370M with an embedding and a head of their own). For each length, with as many rows as make up `--tokens`:

    train       tokens per second of forward and backward pass of the next-token loss, no optimizer's step included
    prefill     tokens per second of a forward pass that fills a cache and makes the last logits
    peak_GiB    of memory on the GPU while training

The models:

    hope                 every layer's mixer a self-modifying memory with chunks of 64 and heads of 64; `HOPE_KERNELS=off`
                         in the environment keeps it from FLA's `chunk_comba`.
    hope-saving-memory   the same, with each layer's activations made again in the backward pass.
    gated-deltanet       FLA's, 6 heads of 128 for a width of 1,024 (in proportion for others), values of twice that,
                         an MLP of Llama's width.
    llama                Transformers', heads of 64, attention by torch's flash kernel.

Before that, the errors of what writes a chunk, by torch and by the kernel, from inputs in float32 and from the same rounded
to bfloat16 (states and sums are float32 in a bfloat16 model too): the state at the chunk's end, what momentum adds up, u_t,
and the gradient at the state it began with, relative to `delta_rule.delta_chunk` in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling_hope import kernels
from modeling_hope.benchmarks.memory_speed import hope, hope_saving_memory, llama, llama_mlp_width, next_token_loss
from modeling_hope.delta_rule import Chunk, Write, decay_of
from modeling_hope.delta_rule import delta_chunk as reference_delta_chunk


SIZES = {"width": 1024, "layers": 24, "vocab": 32000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="default: 4096 16384")
    parser.add_argument("--tokens", type=int, default=16384, help="in a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="passes after one to warm up (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is to be seen; --device cpu runs it all, slowly, on a CPU.")
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1: the first pass only warms up.")
    if arguments.device.startswith("cuda"):
        torch.cuda.set_device(arguments.device)
    torch.manual_seed(0)

    figures: dict[str, Any] = {"device": device_name(arguments.device), "torch": torch.__version__}
    figures |= {"transformers": transformers.__version__, **{name: getattr(arguments, name) for name in SIZES}}
    figures["errors"] = errors(arguments.device)
    for kind, found in figures["errors"].items():
        shown = (f"{name} {error if isinstance(error, str) else f'{error:.1e}'}" for name, error in found.items())
        print(f"{kind:<20} " + "  ".join(shown), flush=True)
    print(f"\n{'':<20} {'length':>7} {'parameters':>12} {'train tok/s':>12} {'prefill tok/s':>14} {'peak GiB':>9}")
    figures["models"] = []
    for name in arguments.models:
        for length in arguments.lengths:
            found = measure(name, length, arguments)
            figures["models"].append({"model": name, "length": length} | found)
            print(f"{name:<20} {length:>7,} {row(found)}", flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def row(found: dict[str, Any]) -> str:
    if "absent" in found:
        return found["absent"]
    shown = [f"{found[step]:,.0f}" if isinstance(found[step], float) else found[step] for step in ("train", "prefill")]
    peak = "-" if found["peak_GiB"] is None else f"{found['peak_GiB']:.1f}"
    return f"{found['parameters']:>12,} {shown[0]:>12} {shown[1]:>14} {peak:>9}"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def errors(device: str) -> dict[str, dict[str, float | str]]:
    """Of one chunk of 64 tokens, heads and memories of 64, relative to the largest entry."""
    rows, memories, d, tokens = 16, 5, 64, 64
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    keys = torch.nn.functional.normalize(noise(rows, memories, d, tokens), dim=2)
    state, rest, gradients = noise(rows, memories, d, d) / 8, noise(rows, memories, d, d) / 8, noise(*keys.shape) / 8
    rates = noise(rows, 1, 1, tokens).sigmoid() * 2
    log_alpha = (noise(rows, tokens) + 6).sigmoid().log()

    def run(dtype: torch.dtype, write: Callable[..., Write]) -> dict[str, torch.Tensor | None]:
        wide = torch.promote_types(dtype, torch.float32)
        low_keys, low_gradients = (tensor.to(dtype).to(wide) for tensor in (keys, gradients))
        own, target = state.to(wide).requires_grad_(), rest.to(wide)
        b, decay = rates.to(wide), decay_of(log_alpha.to(wide))
        erasing = b.expand(-1, memories, -1, -1)
        recalled = own @ low_keys
        done = write(Chunk(own, target, low_keys, low_gradients, recalled, b, erasing, decay, momentum=True, tokens=d))
        assert done.state is not None
        (slope,) = torch.autograd.grad(done.state.square().sum(), own)
        return {"state": done.state, "sums": done.sums, "u": done.tokens, "gradient": slope}

    exact = run(torch.float64, reference_delta_chunk)
    found: dict[str, dict[str, float | str]] = {}
    ways = {"torch": kernels.torch_delta_chunk}
    if kernels.find_kernel(state.float()):
        ways["kernel"] = kernels.delta_chunk
    for way, write in ways.items():
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{way}, {str(dtype).removeprefix('torch.')}"
            try:
                found[label] = {name: relative(ours, exact[name]) for name, ours in run(dtype, write).items()}
            except RuntimeError as error:  # what a kernel refuses
                found[label] = {"failed": str(error).splitlines()[0]}
    return found


def relative(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert ours is not None and theirs is not None
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gated_deltanet(sizes: argparse.Namespace) -> Any:
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    config = GatedDeltaNetConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        head_dim=128,
        num_heads=max(1, sizes.width * 6 // 1024),
        expand_v=2,
        intermediate_size=llama_mlp_width(sizes.width),
        vocab_size=sizes.vocab,
    )
    return GatedDeltaNetForCausalLM(config)


MODELS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "hope": lambda sizes: hope(sizes).model,
    "hope-saving-memory": lambda sizes: hope_saving_memory(sizes).model,
    "gated-deltanet": gated_deltanet,
    "llama": lambda sizes: llama(sizes).model,
}


def measure(name: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each pass; a pass that does not fit says so in place of its figure."""
    if name == "gated-deltanet" and not (importlib.util.find_spec("fla") and arguments.device.startswith("cuda")):
        return {"absent": "needs a CUDA device and flash-linear-attention"}
    arguments.length = length
    gc.collect()  # of the model before this one
    model = MODELS[name](arguments).to(arguments.device, torch.bfloat16)
    ids = torch.randint(arguments.vocab, (max(1, arguments.tokens // length), length), device=arguments.device)
    # Hope's levels learn while they read; the others have none, and here it is the memory that is measured.
    off = {"learn": "off"} if name.startswith("hope") else {}

    def train() -> None:
        model.zero_grad()
        next_token_loss(model(ids, use_cache=False).logits.float(), ids).backward()

    @torch.no_grad()
    def prefill() -> None:
        model(ids, use_cache=True, logits_to_keep=1, **off)

    on_gpu = arguments.device.startswith("cuda")
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if on_gpu and name == "llama" else contextlib.nullcontext()
    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    with flash:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found["train"] = throughput(train, ids.numel(), arguments)
        found["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        model.zero_grad()
        found["prefill"] = throughput(prefill, ids.numel(), arguments)
    return found


def throughput(step: Callable[[], None], tokens: int, arguments: argparse.Namespace) -> float | str:
    taken = []
    try:
        for _ in range(arguments.repeats + 1):
            started = time.perf_counter()
            step()
            if arguments.device.startswith("cuda"):
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
    except torch.cuda.OutOfMemoryError:
        return "no memory"
    except RuntimeError as error:  # what a kernel refuses; the other models still count
        return f"failed: {str(error).splitlines()[0]}"
    return tokens / statistics.median(taken[1:])


if __name__ == "__main__":
    main()
