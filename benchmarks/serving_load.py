"""
Many sessions at once against one after another: the same answers, and how much sooner.

    python -m modeling_hope.benchmarks.serving_load [--sessions 64] [--turns 3] [--mixer hybrid] [--json FILE]

A small random model answers some turns of each session's conversation, greedily and learning:
first by a `HopeSession` for each, one at a time, then by an engine that is given all sessions at once. Every answer and
every memory is compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from modeling_hope import HopeCache, HopeConfig, HopeForCausalLM, HopeSession
from modeling_hope.serving.engine import Engine
from modeling_hope.serving.orders import Order
from modeling_hope.session_turn import text_turn


MIXERS = {
    "attention": ["full_attention", "sliding_attention"],
    "memory": ["hope_memory", "hope_memory"],
    "hybrid": ["hope_memory", "full_attention"],
}
VOCABULARY = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=64, metavar="N")
    parser.add_argument("--turns", type=int, default=3, metavar="N")
    parser.add_argument("--prompt", type=int, default=40, metavar="TOKENS", help="length of a turn's message")
    parser.add_argument("--answer", type=int, default=40, metavar="TOKENS", help="length of a turn's answer")
    parser.add_argument("--mixer", choices=MIXERS, default="hybrid")
    parser.add_argument("--hidden-size", type=int, default=64, metavar="N")
    parser.add_argument("--period", type=int, default=32, metavar="TOKENS", help="of the level that learns fastest")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--learn", choices=("all", "prompt", "off"), default="prompt")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    figures = measure(arguments)
    for name, value in figures.items():
        print(f"{name:<32} {value:.4g}" if isinstance(value, float) else f"{name:<32} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["answers_that_differ"]:
        raise SystemExit("Answers differ from those of sessions alone.")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = small_model(arguments), word_tokenizer()
    settings = {"max_new_tokens": arguments.answer}
    prompts = [
        [message(arguments, session, turn) for turn in range(arguments.turns)] for session in range(arguments.sessions)
    ]

    started, used = time.perf_counter(), time.process_time()
    alone, expected = [HopeSession(model, tokenizer) for _ in prompts], []
    for session, messages in zip(alone, prompts, strict=True):
        expected.append([session.generate(text, learn=arguments.learn, **settings) for text in messages])
    one_at_a_time, one_at_a_time_used = time.perf_counter() - started, time.process_time() - used

    started, used = time.perf_counter(), time.process_time()
    memories = [HopeCache(model.config) for _ in prompts]
    found: list[list[str]] = [[] for _ in prompts]
    with Engine(model, tokenizer, rows=arguments.sessions, waiting=arguments.sessions) as engine:
        for turn in range(arguments.turns):
            jobs = []
            for memory, messages in zip(memories, prompts, strict=True):
                order = Order.of_turn(
                    text_turn(memory, tokenizer, messages[turn]), model, arguments.learn, GenerationConfig(**settings)
                )
                jobs.append(engine.submit(order))
            for index, job in enumerate(jobs):
                answer = job.result()
                assert answer.memory is not None
                memories[index] = answer.memory
                found[index].append(answer.text)
        counts = engine.status()
    together, together_used = time.perf_counter() - started, time.process_time() - used

    tokens = arguments.sessions * arguments.turns * arguments.answer
    updates = [memory.rows[0].updates[0] for memory in memories]
    return {
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "sessions": arguments.sessions,
        "tokens_said": tokens,
        "fewest_updates_of_a_session": min(updates),
        "answers_that_differ": sum(a != b for a, b in zip(expected, found, strict=True)),
        "largest_difference_of_memories": max(
            difference(memory, session.memory) for memory, session in zip(memories, alone, strict=True)
        ),
        "one_at_a_time_seconds": one_at_a_time,
        "one_at_a_time_tokens_per_second": tokens / one_at_a_time,
        "together_seconds": together,
        "together_tokens_per_second": tokens / together,
        "steps_of_the_batch": counts["steps"],
        "times_faster": one_at_a_time / together,
        # Of the processor alone, which other work on the machine does not change.
        "one_at_a_time_cpu_seconds": one_at_a_time_used,
        "together_cpu_seconds": together_used,
        "times_less_cpu": one_at_a_time_used / together_used,
    }


def small_model(arguments: argparse.Namespace) -> HopeForCausalLM:
    """Weights are large enough for learning to change what is said."""
    torch.manual_seed(0)
    hidden, mixers = arguments.hidden_size, MIXERS[arguments.mixer]
    config = HopeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=mixers * 2,
        sliding_window=64 if arguments.mixer == "attention" else None,
        cms_periods=[arguments.period, 2 * arguments.period],
        cms_learning_rates=[0.5, 0.3],
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
    )
    return HopeForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word w0, w1 and so on."""
    known = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=known, unk_token="w0")


def message(arguments: argparse.Namespace, session: int, turn: int) -> str:
    """Of lengths that differ, so that sessions are at different phases of their segments."""
    generator = torch.Generator().manual_seed(1000 * session + turn)
    length = arguments.prompt + session % 7
    return " ".join(f"w{index}" for index in torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())


def difference(memory: HopeCache, other: HopeCache) -> float:
    """The largest difference of two memories' tensors, in parts of a tensor's largest entry, or of 1."""
    ours, theirs = memory.tensors(), other.tensors()
    if ours.keys() != theirs.keys() or memory.rows[0].updates != other.rows[0].updates:
        return float("inf")
    return max(
        float((ours[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1.0))
        for name, tensor in theirs.items()
        if tensor.is_floating_point() and tensor.numel() and tensor.shape == ours[name].shape
    )


if __name__ == "__main__":
    main()
