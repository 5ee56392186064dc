"""`hope release`: what a directory must be to be released, what its card says, and where that is from."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from modeling_hope import HopeConfig, HopeForCausalLM
from modeling_hope.cli.main import main
from modeling_hope.conversion.identity import identify
from modeling_hope.release import release, render_again
from modeling_hope.release import release as whole
from modeling_hope.release.absolute_paths import absolute_paths, without_paths
from modeling_hope.release.fresh_environment import STEPS
from modeling_hope.release.push import check_can_push, push

from .conftest import chat_tokenizer, tiny_model


ROOT = Path(__file__).parent.parent
FACTS = {
    "name": "Tiny Hope",
    "repository": "ada/tiny-hope",
    "license": "apache-2.0",
    "summary": "A tiny model, of forty words.",
    "training_data": "None: its weights are random.",
    "compute": "A moment.",
    "limitations": "It knows nothing.",
}
WRITTEN = {"README.md", "release.json", "SHA256SUMS"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that was saved with its code, with all that a release needs, and its card's directory."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HopeConfig, "_auto_class", None)
        HopeConfig.register_for_auto_class()
        tiny_model(dtype=torch.float32, cms_learning_rates=[0.7, 0.4, 0.0]).save_pretrained(place / "model")
    chat_tokenizer().save_pretrained(place / "model")
    shutil.copy(ROOT / "LICENSE", place / "model")
    (place / "card").mkdir()
    (place / "card" / "facts.yaml").write_text(yaml.safe_dump(FACTS))
    return place


@pytest.fixture
def place(made, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def without_trial(monkeypatch):
    """Where the fresh environment is not what a test is about: it takes seconds."""
    passed = [SimpleNamespace(name=name, passed=True, found="", fix="") for name in STEPS]
    checks = [type("Seen", (), vars(check)) for check in passed]
    del checks
    from modeling_hope.release.check import Check

    monkeypatch.setattr(
        "modeling_hope.release.release.try_in_fresh_environment",
        lambda *asked: [Check(name, True, "not tried") for name in STEPS],
    )


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def training_result(checkpoint, **fields):
    return {
        "eval_perplexity": 161.3123,
        "eval_perplexity/log": 150.5,
        "eval_perplexity_learning": 140.25,
        "parameters": 6416,
        "tokens": 7180,
        "steps": 20,
        "seconds": 3.0,
        "tokens_per_second": 4519,
        "peak_MiB": 535,
        "checkpoint": checkpoint,
        "recipe": {"train": ["/home/ada/corpus/train"], "steps": 20, "model": None, "out": "/home/ada/run"},
        **fields,
    }


def study_result(checkpoint, **fields):
    readings = {
        f"{name}/{kind}/story": {"second_half": value + extra, "tokens": 300}
        for name, extra in (("ours", 0), ("other", 100))
        for kind, value in (("frozen", 9.5), ("learning", 8.25), ("native", 9.0))
    }
    other = {"weights": "0" * 64, "config": "0" * 64}
    return {
        "study": "test_time_learning",
        "command": "hope study test_time_learning --models ours=/home/ada/models/tiny",
        "settings": {"quick": False},
        "checkpoints": {"other": other, "ours": checkpoint},
        "readings": readings,
        **fields,
    }


def lm_eval_result(checkpoint, **fields):
    return {
        "results": {
            "choices": {"alias": "choices", "acc,none": 0.25, "acc_stderr,none": 0.1, "perplexity,none": float("nan")}
        },
        "configs": {"choices": {"dataset_path": "allenai/choices", "dataset_name": "easy", "test_split": "test"}},
        "n-shot": {"choices": 2},
        "n-samples": {"choices": {"original": 100, "effective": 12}},
        "config": {
            "model_args": "pretrained=/home/ada/models/tiny,memory=stream",
            "limit": 12.0,
            "batch_size": 2,
            "hope": {"memory": "stream", "learn": "prompt", "checkpoint": checkpoint},
        },
        **fields,
    }


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_release_from_the_command_line(place, tmp_path, capsys):
    model, card = place / "model", place / "card"
    before, checkpoint = contents(model), identify(model)
    given = [
        write_json(tmp_path / "result.json", training_result(checkpoint)),
        write_json(tmp_path / "study.json", study_result(checkpoint)),
        write_json(tmp_path / "results_2026.json", lm_eval_result(checkpoint)),
    ]
    assert main(["release", str(model), "--card", str(card), "--results", *map(str, given)]) == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and "not run" not in printed
    for line in ("without this package", "goes on the same", "the card's 10 lines ran"):
        assert line in " ".join(printed.split())

    after = contents(model)
    assert {path: after[path] for path in before} == before
    kept = {f"results/{name}.json" for name in ("training", "test_time_learning", "results_2026")}
    assert {str(path) for path in after.keys() - before.keys()} == WRITTEN | kept
    sums = dict(line.split("  ")[::-1] for line in (model / "SHA256SUMS").read_text().splitlines())
    assert sums == {str(path): hashlib.sha256(after[path]).hexdigest() for path in after if str(path) != "SHA256SUMS"}
    assert not any(b"/home/ada" in text for path, text in after.items() if path not in before)

    read = ModelCard.load(model / "README.md")
    data = read.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.model_name == FACTS["name"] and "custom_code" in data.tags
    figures = [(each.dataset_name, each.metric_type, each.metric_value) for each in data.eval_results]
    assert sorted(figures) == sorted(
        [
            ("all sources, held-out documents", "perplexity", 161.3123),
            ("all sources, held-out documents", "perplexity", 140.25),
            ("log, held-out documents", "perplexity", 150.5),
            ("story", "perplexity", 9.5),
            ("story", "perplexity", 8.25),
            ("story", "perplexity", 9.0),
            ("choices", "acc", 0.25),
        ]
    )
    assert [each.metric_args for each in data.eval_results if each.metric_type == "acc"] == [
        {"few_shot": 2, "documents": 12, "of": 100, "stderr": 0.1}
    ]
    for said in (
        *(FACTS[name] for name in ("summary", "training_data", "compute", "limitations")),
        "7,180 tokens in 20 steps",
        "0.25 ± 0.1, of the first 12 of 100 documents",
        "hope eval --model_args pretrained=.,memory=stream --tasks choices --num_fewshot 2 --limit 12 --batch_size 2",
        "hope study test_time_learning --models ours=tiny",
        sums["results/training.json"][:16],
        "Memory and privacy",
        "sliding_attention",
    ):
        assert said in read.text
    assert len(read.text.split("```python\n")[1].split("\n```")[0].splitlines()) == 10

    # The card is made of what lies beside it, and a second release changes nothing.
    assert render_again(card) == (card / "README.md").read_text() == (model / "README.md").read_text()
    (card / "README.md").unlink()
    assert main(["release", "--card", str(card)]) == 0 and (card / "README.md").read_bytes() == after[Path("README.md")]
    assert main(["release", str(model), "--card", str(card)]) == 0 and contents(model) == after


def test_the_ten_lines_and_the_code_are_tried_without_the_package(place, capsys):
    model, card = place / "model", place / "card"
    before = contents(place)
    weights = load_file(model / "model.safetensors")
    extra = {**weights, "model.norm.other": torch.zeros(3)}
    for path, spoiled, named in (
        ("session_hope.py", "raise ImportError('nothing of this')\n", "nothing of this"),
        ("session_hope.py", (model / "session_hope.py").read_text().replace("def read(", "def reads("), "how to use"),
        ("generation_hope.py", "import modeling_hope.cli\n", "modeling_hope"),
    ):
        kept = (model / path).read_text()
        (model / path).write_text(spoiled)
        assert main(["release", str(model), "--card", str(card)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert named in said and "FAILED" in said and "fix:" in said and "nothing was written" in said
        (model / path).write_text(kept)
    save_file(extra, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["release", str(model), "--card", str(card), "--python", sys.executable]) == 2
    assert "modeling_hope is installed in this environment" in " ".join(capsys.readouterr().err.split())
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert contents(place).keys() == before.keys()
