"""
hope chat: a conversation that goes on where it stopped.

What is said and read is in the model's memory, which `--memory` keeps in a directory: it is written after every turn, and
loaded when the conversation is taken up again. Ctrl-C stops an answer, Ctrl-D ends the conversation.
"""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_hope.chat_turns import ChatTurns
from modeling_hope.memory_files import DESCRIPTION_FILE, STAGING, TENSORS_FILE
from modeling_hope.turn import LEARN


if TYPE_CHECKING:
    from modeling_hope import HopeSession


# Names of what a save has made and not finished.
LEFTOVERS = (STAGING, TENSORS_FILE)
# What goes wrong in a conversation and does not end it.
ERRORS = (ValueError, TypeError, OSError, RuntimeError)


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="a conversation that remembers after you quit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="directory or hub name of a Hope model, with a tokenizer that has a chat template"
    )
    parser.add_argument("--memory", type=Path, metavar="DIR", help="where the memory is kept; made if there is none")
    parser.add_argument("--system", help="system prompt, for a conversation that begins")
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="a text to read first, each time the command is run"
    )
    parser.add_argument(
        "--learn", choices=LEARN, default="prompt", help="from what it is told, also what it says, or nothing"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (default: %(default)s)"
    )
    sampling = parser.add_mutually_exclusive_group()
    sampling.add_argument("--temperature", type=float, metavar="T", help="sample, at this temperature")
    sampling.add_argument("--greedy", action="store_true", help="take the likeliest token, always")
    parser.add_argument("--seed", type=int, help="random seed for sampling")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.set_defaults(run=run, extra="chat")


def run(arguments: argparse.Namespace) -> None:
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from modeling_hope import HopeSession

    if arguments.max_new_tokens < 1:
        raise ValueError("--max-new-tokens must be at least 1.")
    if arguments.temperature is not None and arguments.temperature <= 0:
        raise ValueError("--temperature must be above 0; --greedy takes the likeliest token.")
    if arguments.document and not arguments.document.is_file():
        raise ValueError(f"--document {arguments.document} is no file.")
    kept = arguments.memory is not None and holds_memory(arguments.memory)
    if arguments.memory is not None and not kept:
        check_free(arguments.memory)
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    with console.status("loading"):
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        ChatTurns(tokenizer)  # refuses one without a template
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
        model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        session = HopeSession.load(arguments.memory, model, tokenizer) if kept else HopeSession(model, tokenizer)
    if bars:
        logging.enable_progress_bar()
    if sys.stdin is None:
        raise ValueError("there is no standard input to read from.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    Conversation(session, console, arguments).run()


def holds_memory(directory: Path) -> bool:
    return (directory / DESCRIPTION_FILE).is_file()


def check_free(directory: Path) -> None:
    """Raise `ValueError` unless a directory is empty, but for what a save that was killed has left, or not there yet."""
    if not directory.exists():
        return
    names = [file.name for file in directory.iterdir()] if directory.is_dir() else [""]
    if not all(any(leftover.fullmatch(name) for leftover in LEFTOVERS) for name in names):
        raise ValueError(f"{directory} holds other things than a memory: give another directory.")


class Conversation:
    """A session at a terminal, or at the end of a pipe: lines come in, answers go out, slash commands are obeyed."""

    def __init__(self, session: HopeSession, console: Any, arguments: argparse.Namespace):
        self.session, self.console, self.arguments = session, console, arguments
        self.options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "learn": arguments.learn}
        if arguments.greedy or arguments.temperature is not None:
            self.options["do_sample"] = not arguments.greedy
        if arguments.temperature is not None:
            self.options["temperature"] = arguments.temperature
        self.kept = session.memory
        self.ended = False

    def run(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  lets input() edit lines and recall them
        self.greet()
        if self.arguments.document:
            self.attempt(self.read, str(self.arguments.document))
        while not self.ended and (line := self.ask()) is not None:
            if line:
                self.attempt(self.obey if line.startswith("/") else self.answer, line)

    def greet(self) -> None:
        if sys.stdin.isatty():
            known = f"It remembers {self.session.tokens:,} tokens." if self.session.tokens else "A new memory."
            self.note(f"{known} /help lists commands.")
        if self.arguments.system and self.session.conversation:
            self.complain("--system is left out: the conversation has begun. /reset begins another one.")

    def ask(self) -> str | None:
        """A line of the user's; `None` at the end."""
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            return line.strip() if line else None
        while True:
            try:
                return input("> ").strip()
            except EOFError:
                self.console.print()
                return None
            except KeyboardInterrupt:
                self.note("\nCtrl-D or /quit ends the conversation.")

    def attempt(self, action: Any, text: str) -> None:
        """Do it, and keep what has changed; what goes wrong is told in a line, and what is interrupted is over."""
        try:
            try:
                action(text)
            finally:
                self.keep()
        except KeyboardInterrupt:
            self.complain("Interrupted.")
        except ERRORS as error:
            self.complain(" ".join(str(error).split()))

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def complain(self, text: str) -> None:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True, highlight=False).print(text, style="red", markup=False)

    def answer(self, message: str) -> None:
        """Say it word by word; Ctrl-C ends it after the next one, and it stays what was said."""
        system = self.arguments.system if self.session.conversation is None else None
        stream: Any = self.session.chat(message, system=system, stream=True, **self.options)
        ended = False
        try:
            while not ended:
                try:
                    for piece in stream:
                        self.console.print(piece, end="", markup=False)
                    ended = True
                except KeyboardInterrupt:
                    stream.stop()
        finally:
            self.console.print()

    def obey(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"There is no command /{name}; /help lists those there are.")
        COMMANDS[name][0](self, argument.strip())

    def keep(self) -> None:
        """Save the memory, if there is a place for it and it is another one than was saved last."""
        if self.arguments.memory is not None and self.session.memory is not self.kept:
            self.session.save(self.arguments.memory)
            self.kept = self.session.memory

    def show(self, argument: str) -> None:
        from rich.table import Table

        summary = self.session.summary()
        losses = summary["last_losses"]
        told = [f"{summary['tokens']:,} tokens", f"{summary['bytes'] / 2**20:,.1f} MiB"]
        told += [f"{summary[f'segments_{kind}']:,} segments {kind}" for kind in ("learned", "skipped", "nonfinite")]
        self.console.print(", ".join(told), f"last loss {losses[-1]:.3f}" if losses else "no loss yet", sep=", ")
        table = Table()
        for heading in ("level", "period", "updates", "updates / tokens", "norm of change", "pairs waiting"):
            table.add_column(heading, justify="right")
        for index, level in enumerate(summary["levels"]):
            cells = [f"{level['updates']:,}", f"{level['frequency']:.5f}", f"{level['change_norm']:.3f}"]
            period = "never" if level["period"] is None else f"{level['period']:,}"
            table.add_row(str(index), period, *cells, f"{level['waiting_pairs']:,}")
        self.console.print(table)

    def fork(self, argument: str) -> None:
        directory = path(argument, "/fork DIR")
        own = self.arguments.memory
        if holds_memory(directory) or (own is not None and directory.resolve() == own.resolve()):
            raise ValueError(f"{directory} holds a memory already, or this conversation's: give another directory.")
        check_free(directory)
        self.session.save(directory)
        self.console.print(
            f"A fork is in {directory}: hope chat {self.arguments.model} --memory {directory}", markup=False
        )

    def save(self, argument: str) -> None:
        if not argument and self.arguments.memory is None:
            raise ValueError("/save DIR: say where, as there is no --memory.")
        directory = path(argument, "/save DIR") if argument else self.arguments.memory
        if not holds_memory(directory):
            check_free(directory)
        self.session.save(directory)
        self.console.print(f"Saved in {directory}.", markup=False)

    def reset(self, argument: str) -> None:
        levels = argument.replace(",", " ").split()
        if not all(level.isdecimal() for level in levels):
            raise ValueError("/reset [LEVELS]: numbers of levels, as /show counts them; none for everything.")
        self.session.reset([int(level) for level in levels] or None)
        self.console.print(f"Forgot what levels {', '.join(levels)} learned." if levels else "Forgot everything.")

    def read(self, argument: str) -> None:
        file = path(argument, "/read FILE")
        if not file.is_file():
            raise ValueError(f"{file} is no file.")
        before = self.session.tokens
        try:
            found = self.session.read(file, learn=self.options["learn"])
        except KeyboardInterrupt:
            self.complain(f"Interrupted after {self.session.tokens - before:,} tokens, which stay.")
            return
        loss = "" if found.loss is None else f", loss {found.loss:.3f}"
        self.console.print(f"Read {found.tokens:,} tokens in {found.seconds:,.1f} s{loss}.")

    def learn(self, argument: str) -> None:
        if argument not in LEARN:
            raise ValueError(f"/learn POLICY: one of {', '.join(LEARN)}; now it is {self.options['learn']}.")
        self.options["learn"] = argument
        self.console.print(f"From now on it learns from: {argument}.")

    def help(self, argument: str) -> None:
        for name, (_, usage, told) in COMMANDS.items():
            self.console.print(f"{f'/{name} {usage}':<18} {told}", markup=False)

    def quit(self, argument: str) -> None:
        self.ended = True


# By name: what it does, its argument, and what is told of it.
COMMANDS = {
    "show": (Conversation.show, "", "what the memory has read and learned"),
    "read": (Conversation.read, "FILE", "read a text"),
    "learn": (
        Conversation.learn,
        "POLICY",
        "learn from what it is told (prompt), also what it says (all), or nothing (off)",
    ),
    "save": (Conversation.save, "[DIR]", "write the memory, to the directory of --memory unless another is given"),
    "fork": (Conversation.fork, "DIR", "write a copy of the memory to a new directory, to be talked to by itself"),
    "reset": (Conversation.reset, "[LEVELS]", "forget everything, or what some levels have learned"),
    "help": (Conversation.help, "", "list the commands"),
    "quit": (Conversation.quit, "", "end the conversation, as Ctrl-D does"),
}


def path(argument: str, usage: str) -> Path:
    if not argument:
        raise ValueError(f"{usage}: a name is missing.")
    return Path(argument).expanduser()
