"""The hope command, on a model and a document small enough to run in seconds."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_hope.auto_hope import AUTO_MAP
from modeling_hope.benchmarks import gpu_speed
from modeling_hope.cli.convert import periods
from modeling_hope.cli.main import main
from modeling_hope.conversion import ConversionReport
from modeling_hope.conversion.identity import identify
from modeling_hope.eval.documents import claims, fetch_document, markdown, strings, unlisted
from modeling_hope.eval.reading import read

from .test_conversion import llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of 60 words, and a document in them."""
    path = tmp_path_factory.mktemp("checkpoint")
    words = {f"w{i}": i for i in range(60)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    split = {"type": "WhitespaceSplit"}
    (path / "raw.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model})
    )
    llama(vocab_size=60).save_pretrained(path / "model")
    PreTrainedTokenizerFast(tokenizer_file=str(path / "raw.json")).save_pretrained(path / "model")
    ids = torch.randint(60, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    (path / "document.txt").write_text(" ".join(f"w{i}" for i in ids))
    return path


def test_demo(checkpoint, tmp_path, capsys):
    arguments = [
        "--model",
        str(checkpoint / "model"),
        "--document",
        str(checkpoint / "document.txt"),
        "--out",
        str(tmp_path),
    ]
    options = ["--window", "32", "--periods", "16,64", "--lr", "0.5", "--parts", "3", "--prompt", "w1 w2 w3"]
    assert main(["demo", *arguments, *options]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "0 - 100",
        "second half",
        "frozen, window 32",
        "frozen, native 128",
        "the same, token for token",
        "level 1",
    ):
        assert expected in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert (
        result["tokens"] == 300
        and set(result["readings"]) == {"frozen", "learning", "native"}
        and result["memory_recalled"]
    )
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_demo_names_what_is_wrong(checkpoint, tmp_path, capsys):
    common = ["demo", "--out", str(tmp_path)]
    assert main([*common, "--model", str(tmp_path), "--document", str(checkpoint / "document.txt")]) == 2
    assert "config.json" in capsys.readouterr().err
    assert main([*common, "--model", str(checkpoint / "model"), "--document", "nothing.txt"]) == 2
    assert "bayes-workflow" in capsys.readouterr().err


def test_convert(checkpoint, tmp_path, capsys):
    options = ["--periods", "8,never", "--dtype", "bfloat16", "--remote-code"]
    assert main(["convert", str(checkpoint / "model"), str(tmp_path / "out"), *options]) == 0
    assert "left over" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.cms_periods == [8, None]
    assert model.config.auto_map == AUTO_MAP and (tmp_path / "out" / "auto_hope.py").is_file()
    assert ConversionReport.load(tmp_path / "out").checkpoint == identify(tmp_path / "out")
    assert main(["convert", str(checkpoint / "model"), str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export-transformer", str(tmp_path / "out"), str(tmp_path / "back"), "--dtype", "float32"]) == 0
    assert "tokens the same" in capsys.readouterr().out
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == torch.float32 and back.config.model_type == "llama"
    assert main(["export-transformer", str(checkpoint / "model"), str(tmp_path / "again")]) == 2
    assert "give a Hope model" in capsys.readouterr().err


def test_periods(checkpoint, tmp_path, capsys):
    assert periods("512, 2048,never") == (512, 2048, None)
    with pytest.raises(SystemExit):
        main(["demo", "--periods", "often"])
    assert "'never'" in capsys.readouterr().err
    assert main(["convert", str(checkpoint / "model"), str(tmp_path / "out"), "--periods", "8,12"]) == 2
    assert "cms_periods" in capsys.readouterr().err


def test_read_takes_every_loss_before_learning_from_it(checkpoint):
    from modeling_hope.conversion import convert

    model = convert(checkpoint / "model", periods=(16,), learning_rates=0.5)
    ids = torch.randint(60, (600,), generator=torch.Generator().manual_seed(1))
    calls = []
    reading = read(model, ids, learn=True, progress=lambda tokens, loss: calls.append(tokens))
    with torch.no_grad():
        logits = model(ids[None], learn="all").logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    torch.testing.assert_close(torch.tensor(reading.losses), expected, rtol=1e-4, atol=1e-4)
    assert calls == [512, 600] and reading.memory["tokens"] == 600
    assert reading.perplexity() == pytest.approx(float(expected.double().mean().exp()), rel=1e-4)
    halves = reading.perplexity(0, 0.5), reading.perplexity(0.5)
    assert min(halves) <= reading.perplexity() <= max(halves)


def test_documents_are_cleaned():
    page = "---\nfront: x\n---\n# Title\n\nSome **bold** [link](http://x) text.\n\n```\ncode\n```\n| a | b |\n\n## Claims\nX\n## Other\nY"
    assert "front" not in markdown(page) and "code" not in markdown(page) and "| a" not in markdown(page)
    assert "Some bold link text." in markdown(page)
    assert "X" in claims(page) and "Y" not in claims(page)
    story = "It was a long and stormy night on the road to the village, and the rain fell so hard that nobody saw the rider come in at the gate."
    assert strings(f'"""{story}"""\nsay("{story} [b]End[/b]")\nshort = "no"') == f"{story} End"
    assert unlisted("   * one\n   * two\nText.\n") == "Text.\n"
    with pytest.raises(ValueError, match="bayes-workflow"):
        fetch_document("nothing", None)


def test_gpu_benchmark_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    found = tmp_path / "results" / "gpu_speed.json"
    sizes = "--width 64 --layers 1 --vocab 64 --lengths 64 --tokens 128 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["gpu_speed", "--device", "cpu", *sizes.split(), "--json", str(found)])
    gpu_speed.main()
    figures = json.loads(found.read_text())
    assert figures["errors"]["torch, float32"]["state"] < 1e-5
    assert figures["models"][0]["train"] > 0 and figures["models"][0]["prefill"] > 0
    assert "needs a CUDA device" in capsys.readouterr().out
