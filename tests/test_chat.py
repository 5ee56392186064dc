"""hope chat, in a pipe and at a real terminal."""

import io
import os
import shutil
import signal
import sys

import pexpect
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_hope import HopeSession
from modeling_hope.cli.main import main

from .conftest import assert_same_memory, chat_tokenizer, tiny_model
from .test_conversion import llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that says words only, and never ends an answer."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(dtype=torch.float32, eos_token_id=None, bos_token_id=None, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[:9] = 0
    model.save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def chat(checkpoint, monkeypatch, capsys):
    """Runs `hope chat` with lines of input: its exit status, what it says, and what it complains of."""

    def run(lines, *options, model=checkpoint):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        capsys.readouterr()
        status = main(["chat", str(model), *map(str, options)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def loaded(checkpoint, memory):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return HopeSession.load(memory, model, tokenizer) if memory else HopeSession(model, tokenizer)


def test_in_a_pipe(chat, checkpoint, tmp_path):
    """Answers are those of a session, and another run goes on where this one stopped."""
    options = ["--memory", tmp_path / "memory", "--greedy", "--max-new-tokens", 7, "--system", "w30 w31"]
    session, expected = loaded(checkpoint, None), []
    for message in ("w9 w10", "w11", "w12"):
        system = {} if expected else {"system": "w30 w31"}
        expected.append(session.chat(message, max_new_tokens=7, do_sample=False, **system))
    status, said, complained = chat(["w9 w10", "", "w11"], *options)
    assert (status, complained) == (0, "") and said.splitlines() == expected[:2]
    status, said, complained = chat(["w12", "/quit", "w13"], *options)
    assert status == 0 and said.splitlines() == expected[2:] and "--system is left out" in complained
    assert_same_memory(loaded(checkpoint, tmp_path / "memory").memory, session.memory, rtol=1e-5, atol=1e-6)


def test_commands(chat, checkpoint, tmp_path):
    (tmp_path / "document").write_text("w9 w10 w11 w12 " * 8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    memory, options = tmp_path / "memory", ["--max-new-tokens", 3, "--greedy"]
    lines = [
        f"/read {tmp_path / 'document'}",
        "/learn all",
        "w9",
        "/show",
        f"/fork {tmp_path / 'fork'}",
        f"/save {tmp_path / 'saved'}",
        "/save",
        "/reset 0,1",
        "/reset",
        "/help",
    ]
    status, said, complained = chat(lines, "--memory", memory, *options)
    assert (status, complained) == (0, "")
    for expected in (
        "Read 32 tokens",
        "learns from: all",
        "32",
        "updates",
        "0.23256",
        "A fork is in",
        "Saved in",
        "levels 0, 1",
    ):
        assert expected in said
    assert "Forgot everything" in said and "/read FILE" in said and "/quit" in said
    assert loaded(checkpoint, memory).tokens == 0
    forked, saved = (loaded(checkpoint, tmp_path / name) for name in ("fork", "saved"))
    assert forked.tokens > 32 and forked.conversation == "open"
    assert_same_memory(forked.memory, saved.memory, rtol=0, atol=0)

    lines = ["/bogus", "/", "/fork", f"/fork {tmp_path / 'fork'}", f"/fork {tmp_path / 'other'}", "/save", "/reset x"]
    lines += ["/reset 9", "/read", f"/read {tmp_path}", "/learn often", "/show"]
    status, said, complained = chat(lines, "--document", tmp_path / "document", *options)
    complaints = complained.splitlines()
    assert status == 0 and "32 tokens" in said and len(complaints) == 11
    expected = ["no command /bogus", "no command /", "/fork DIR", "holds a memory", "other things", "/save DIR"]
    expected += ["/reset [LEVELS]", "`levels` must lie", "/read FILE", "is no file", "/learn POLICY"]
    assert all(part in complaint for part, complaint in zip(expected, complaints, strict=True))
    assert sorted(os.listdir(tmp_path / "other")) == ["file"]


def test_what_is_wrong_is_told_before_anything_is_written(chat, checkpoint, tmp_path):
    memory, other = tmp_path / "memory", tmp_path / "model"
    chat(["w9"], "--memory", memory, "--max-new-tokens", 2)
    before = {file.name: file.read_bytes() for file in memory.iterdir()}
    tiny_model(seed=1, dtype=torch.float32, eos_token_id=None).save_pretrained(other)
    chat_tokenizer().save_pretrained(other)
    for model, options, expected in (
        (other, ["--memory", memory], "another model"),
        (checkpoint, ["--memory", checkpoint], "other things"),
        (checkpoint, ["--memory", checkpoint / "config.json"], "other things"),
        (checkpoint, ["--document", tmp_path / "none"], "no file"),
        (checkpoint, ["--temperature", 0], "--greedy"),
        (checkpoint, ["--max-new-tokens", 0], "at least 1"),
    ):
        status, said, complained = chat(["w9"], *options, model=model)
        assert (status, said) == (2, "") and expected in complained and complained.startswith("hope: ")
    assert {file.name: file.read_bytes() for file in memory.iterdir()} == before
    llama(vocab_size=40).save_pretrained(tmp_path / "llama")
    chat_tokenizer().save_pretrained(tmp_path / "llama")
    status, _, complained = chat(["w9"], model=tmp_path / "llama")
    assert status == 2 and "hope convert" in complained
    chat_tokenizer(template=None).save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "chat_template.jinja").unlink()
    assert "no chat template" in chat(["w9"], model=tmp_path / "llama")[2]


def terminal(checkpoint, memory, tokens):
    """`hope chat` at a terminal of its own, when it waits for the first line."""
    command = ["-m", "modeling_hope.cli.main", "chat", str(checkpoint), "--memory", str(memory), "--greedy"]
    child = pexpect.spawn(
        sys.executable,
        [*command, "--max-new-tokens", str(tokens)],
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        encoding="utf-8",
        timeout=120,
        dimensions=(40, 120),
        # Tests that run in the background ignore Ctrl-C, and what they start would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child.expect(r"\. /help lists commands\.\r\n> ")
    return child, child.before


def test_at_a_terminal(checkpoint, tmp_path):
    """Ctrl-C ends an answer, Ctrl-D the conversation; killed in the middle of the next answer, it goes on from the last."""
    memory = tmp_path / "memory"
    child, greeting = terminal(checkpoint, memory, 100_000)
    assert "A new memory" in greeting
    child.sendintr()
    child.expect("Ctrl-D or /quit")
    child.expect("> ")
    child.sendline("w9 w10")
    child.expect(r"(w\d+ +){20}")
    child.sendintr()
    child.expect(r"\r\n> ")
    child.sendline("/show")
    child.expect(r"(\d+) tokens.*norm of change")
    tokens = int(child.match[1])
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    shutil.copytree(memory, tmp_path / "copy")

    child, greeting = terminal(checkpoint, memory, 100_000)
    assert f"It remembers {tokens:,} tokens" in greeting
    child.sendline("w11")
    child.expect(r"(w\d+ +){20}")
    child.kill(signal.SIGKILL)
    child.expect(pexpect.EOF)
    child.close()
    assert child.signalstatus == signal.SIGKILL

    child, greeting = terminal(checkpoint, memory, 9)
    assert f"It remembers {tokens:,} tokens" in greeting
    child.sendline("w11")
    child.expect(r"w11\r\n(.*)\r\n> ")
    said = child.match[1].strip()
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0

    # The one that was never interrupted.
    session = loaded(checkpoint, tmp_path / "copy")
    assert session.tokens == tokens > 20
    assert said == session.chat("w11", max_new_tokens=9, do_sample=False)
    again = loaded(checkpoint, memory)
    assert again.memory.rows[0].ids.tolist() == session.memory.rows[0].ids.tolist()
    assert_same_memory(again.memory, session.memory, rtol=1e-5, atol=1e-6)
