"""
How much memory converting a sharded checkpoint takes at its peak.

    python -m modeling_hope.benchmarks.conversion_peak [--layers 14] [--width 2048] [--shard-size 700MB]

Makes a Llama checkpoint of random bfloat16 weights (by default 2.1 GB in shards of 700 MB) and converts it, as it is
and to float32, each in a process of its own (Linux), with output shards as large as the source's. Of each: the peak of
the process, what of it the imports alone take, the seconds, and whether the peak is at most 1.3 times the largest
source shard plus the largest output shard. Then every source tensor is looked for in what was written. Needs four times
the checkpoint's size on disk; `--directory` says where.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_hope.conversion import Recipe, convert_checkpoint
from modeling_hope.conversion.tensor_info import TensorInfo
from modeling_hope.conversion.writer import CheckpointWriter


BOUND = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--shard-size", default="700MB")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--measure", nargs=3, metavar=("SOURCE", "OUTPUT", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        source, output, dtype = arguments.measure
        measure(Path(source), Path(output), getattr(torch, dtype), arguments.shard_size)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as home:
        source = make_checkpoint(Path(home, "source"), arguments.layers, arguments.width, arguments.shard_size)
        print(f"source     {size(source):8,.0f} MB, largest shard {largest_shard(source):,.0f} MB")
        for dtype in ("bfloat16", "float32"):
            output = Path(home, dtype)
            figures = measured(source, output, dtype, arguments.shard_size)
            shards = BOUND * largest_shard(source) + largest_shard(output)
            print(
                f"{dtype:<10} {size(output):8,.0f} MB, largest shard {largest_shard(output):,.0f} MB   "
                f"peak {figures['peak']:,.0f} MB, of which imports {figures['imports']:,.0f} MB   "
                f"{figures['seconds']:.1f} s   {'within' if figures['peak'] <= shards else 'OVER'} {shards:,.0f} MB   "
                f"{count_equal(source, output)} tensors equal"
            )


def make_checkpoint(directory: Path, layers: int, width: int, shard_size: int | str) -> Path:
    """A Llama of random bfloat16 weights, of which one tensor at a time is in memory."""
    directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=32_000 if width >= 1024 else 256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        dtype=torch.bfloat16,
    )
    config.architectures = [LlamaForCausalLM.__name__]
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    infos = {name: TensorInfo.of(tensor) for name, tensor in shapes.items()}
    writer = CheckpointWriter(directory, infos, shard_size)
    generator = torch.Generator().manual_seed(0)
    for name, info in infos.items():
        writer.add(name, torch.empty(info.shape, dtype=info.dtype).normal_(std=0.02, generator=generator))
    writer.close()
    return directory


def measured(source: Path, output: Path, dtype: str, shard_size: int | str) -> dict[str, float]:
    """The figures of `measure`, taken in a process of its own."""
    command = [sys.executable, "-m", "modeling_hope.benchmarks.conversion_peak", "--shard-size", str(shard_size)]
    command += ["--measure", str(source), str(output), dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {name: float(value) for name, value in (part.split("=") for part in done.stdout.split())}


def measure(source: Path, output: Path, dtype: torch.dtype, shard_size: int | str) -> None:
    torch.set_num_threads(1)
    imports, started = peak(), time.perf_counter()
    convert_checkpoint(source, output, Recipe(dtype=dtype), check=False, max_shard_size=shard_size)
    print(f"imports={imports} peak={peak()} seconds={time.perf_counter() - started}")


def count_equal(source: Path, output: Path) -> int:
    """
    How many tensors a converted checkpoint has from its source, which may call them by other names.

    Raises:
        ValueError: one is missing, or not the same after the cast.
    """
    with ExitStack() as files:
        found = {fingerprint(shard, name): (shard, name) for shard, name in tensors(output, files)}
        count = 0
        for shard, name in tensors(source, files):
            there, as_name = found.get(fingerprint(shard, name), (None, None))
            if there is None:
                raise ValueError(f"{output} has no tensor that begins like {name}.")
            converted = there.get_tensor(as_name)
            if not torch.equal(shard.get_tensor(name).to(converted.dtype), converted):
                raise ValueError(f"{output}: {as_name} is not {name}.")
            count += 1
    return count


def tensors(directory: Path, files: ExitStack) -> Iterator[tuple[Any, str]]:
    for file in sorted(directory.glob("*.safetensors")):
        shard = files.enter_context(safe_open(file, framework="pt"))
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            yield shard, name


def fingerprint(shard: Any, name: str) -> tuple[Any, ...]:
    """The shape and first values of a tensor, which random weights share with no other."""
    tensor = shard.get_slice(name)
    return (*tensor.get_shape(), *tensor[:16].flatten()[:16].float().tolist())


def peak() -> float:
    """Of the memory of this process so far, in MB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def size(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6


def largest_shard(directory: Path) -> float:
    return max(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
