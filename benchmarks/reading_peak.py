"""
Whether reading a long text takes more memory than reading a short one.

    python -m modeling_hope.benchmarks.reading_peak [--tokens 8192 65536]

A session with a small random model (width 128, 2 layers, a level of 512 tokens) reads random words, learning from them. For each
mixer and length, in a process of its own (Linux): the peak of the process, and the bytes of the memory afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from modeling_hope import HopeConfig, HopeForCausalLM, HopeSession


VOCABULARY = 256
MIXERS = {"sliding_attention": {"sliding_window": 256}, "hope_memory": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=(8192, 65536))
    parser.add_argument("--measure", choices=MIXERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.tokens[0])
        return
    for mixer in MIXERS:
        for tokens in arguments.tokens:
            command = [sys.executable, "-m", "modeling_hope.benchmarks.reading_peak"]
            options = ["--measure", mixer, "--tokens", str(tokens)]
            done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
            print(f"{mixer:<20} {tokens:>9,} tokens   {done.stdout.strip()}")


def measure(mixer: str, tokens: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = HopeConfig(**sizes, cms_periods=[512, None], **MIXERS[mixer])
    session = HopeSession(HopeForCausalLM(config).eval(), words_tokenizer())
    session.read(words(tokens), progress=False)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    held = session.memory.nbytes() / 1024
    print(f"peak {peak:,.0f} MiB   memory {held:,.0f} KiB, of which ids {8 * session.tokens / 1024:,.0f} KiB")


def words(count: int) -> Iterator[str]:
    chosen = random.Random(0)
    for _ in range(count):
        yield f" w{chosen.randrange(1, VOCABULARY)}"


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, `w0` to `w255`."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(VOCABULARY)}, "unk_token": "w0"}
    raw = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(raw, file)
        file.flush()
        return PreTrainedTokenizerFast(tokenizer_file=file.name)


if __name__ == "__main__":
    main()
