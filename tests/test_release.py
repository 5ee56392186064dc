"""`hope release`: what a directory must be to be released, what its card says, and where that is from."""

import hashlib
import json
import pickle
import shutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

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
from modeling_hope.release.absolute_paths import absolute_paths, without_paths
from modeling_hope.release.check import Check
from modeling_hope.release.fresh_environment import STEPS, try_in_fresh_environment
from modeling_hope.release.push import push
from modeling_hope.release.result_files import read_result_file

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
def untried(monkeypatch):
    """Where the fresh environment is not what a test is about: it takes seconds."""
    checks = [Check(name, True, "not tried") for name in STEPS]
    monkeypatch.setattr(sys.modules[release.__module__], "try_in_fresh_environment", lambda *asked: checks)


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


def test_a_release_from_the_command_line(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[release.__module__], "try_in_fresh_environment", cache(try_in_fresh_environment))
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
        {"dataset": "allenai/choices", "config": "easy", "few_shot": 2, "documents": 12, "of": 100, "stderr": 0.1}
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
    (card / "README.md").write_text("# Mine")
    assert main(["release", "--card", str(card)]) == 2 and "would write over it" in capsys.readouterr().err


def test_the_code_and_the_lines_are_tried_where_the_package_is_not(place, capsys):
    model, card = place / "model", place / "card"
    before = contents(place)
    code, weights = (model / "session_hope.py").read_text(), load_file(model / "model.safetensors")
    asked = ["release", str(model), "--card", str(card)]

    (model / "session_hope.py").write_text(code.replace("def read(", "def reads("))
    assert main(asked) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "remembers ok" in said and "how to use FAILED AttributeError" in said and "nothing was written" in said
    (model / "session_hope.py").write_text(code)

    save_file({**weights, "model.norm.other": torch.zeros(3)}, model / "model.safetensors", metadata={"format": "pt"})
    assert main(asked) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "loads FAILED RuntimeError: unexpected keys: ['model.norm.other']" in said and "generates not run" in said

    assert main([*asked, "--python", sys.executable]) == 2
    assert "modeling_hope is installed in this environment" in " ".join(capsys.readouterr().err.split())
    assert main([*asked, "--python", "/no/python"]) == 2 and "cannot be run" in capsys.readouterr().err
    assert contents(place).keys() == before.keys()


def spoil_config(model, **fields):
    path = model / "config.json"
    write_json(path, {**json.loads(path.read_text()), **fields})


def spoil_weights(model, name, change):
    tensors = load_file(model / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def checkpoint(model):
    (model / "checkpoint-10").mkdir()
    shutil.copy(model / "config.json", model / "checkpoint-10")


def earlier_results(model):
    (model / "results").mkdir()
    write_json(model / "results" / "mine.json", {})


def shorten(path):
    path.write_bytes(path.read_bytes()[:-40])


NORM = "model.norm.weight"
PICKLE = {"weight": torch.zeros(2)}
# What is done to a directory; the check that fails; what it says.
SPOILED = [
    (lambda m: torch.save(PICKLE, m / "optimizer.pt"), "safetensors only", "optimizer.pt: pickles"),
    (lambda m: torch.save(PICKLE, m / "renamed.txt"), "safetensors only", "renamed.txt: pickles"),
    (lambda m: (m / "old").write_bytes(pickle.dumps(PICKLE)), "safetensors only", "old: pickles"),
    (lambda m: (m / "model.gguf").write_text("x"), "safetensors only", "other forms"),
    (lambda m: (m / ".env").write_text("TOKEN=1"), "files", ".env"),
    (checkpoint, "files", "checkpoint-10/config.json"),
    (lambda m: (m / "lost").symlink_to("/nowhere"), "files", "links that lead nowhere"),
    (
        lambda m: tiny_model().new_memory().save_pretrained(m, model=tiny_model()),
        "no memory",
        "every token that was read",
    ),
    (
        lambda m: spoil_config(m, note="/home/ada/model"),
        "no absolute paths",
        "config.json says /home/ada/model at `note`",
    ),
    (lambda m: write_json(m / "more.json", {"a": [{"b": "see C:\\models\\x"}]}), "no absolute paths", "at `a[0].b`"),
    (lambda m: spoil_config(m, cms_periods=[4, 7]), "config", "cms_periods"),
    (lambda m: spoil_config(m, architectures=["HopeModel"]), "config", "['HopeModel']"),
    (lambda m: spoil_config(m, auto_map={}), "remote code", "register_for_auto_class"),
    (lambda m: (m / "packing.py").unlink(), "remote code", "packing.py missing"),
    (lambda m: shorten(m / "model.safetensors"), "weights", "damaged"),
    (lambda m: shutil.copy(m / "model.safetensors", m / "more.safetensors"), "weights", "more.safetensors: no index"),
    (lambda m: spoil_weights(m, NORM, lambda t: t / 0), "weights", "not finite"),
    (lambda m: [path.unlink() for path in m.glob("tokenizer*")], "tokenizer", "none"),
    (lambda m: chat_tokenizer(words=60).save_pretrained(m), "tokenizer", "no embedding"),
    (lambda m: (m / "LICENSE").unlink(), "licence", "no LICENSE"),
    (lambda m: (m / "LICENSE").write_text("Mine."), "licence", "not the text of apache-2.0"),
    (lambda m: (m / "README.md").write_text("# My model"), "own card", "would write over it"),
    (lambda m: (m / "SHA256SUMS").write_text(f"{'0' * 64}  LICENSE\n"), "checksums", "LICENSE: not as SHA256SUMS"),
    (lambda m: (m / "SHA256SUMS").write_text(f"{'0' * 64}  lost.py\n"), "checksums", "lost.py"),
    (lambda m: (m / "SHA256SUMS").write_text("what?\n"), "checksums", "holds no checksums"),
    (lambda m: (m / "../card/README.md").write_text("# My model"), "own card", "would write over it"),
    (earlier_results, "own results", "results/mine.json: not of this release"),
]


@pytest.mark.parametrize("spoil, name, says", SPOILED, ids=[f"{i}-{name}" for i, (_, name, _) in enumerate(SPOILED)])
def test_what_keeps_a_directory_from_being_released(place, spoil, name, says):
    model = place / "model"
    spoil(model)
    before = contents(place)
    with pytest.raises(ValueError) as raised:
        release(model, place / "card")
    said = " ".join(str(raised.value).split())
    assert f"{name} FAILED" in said and says in said and "fix:" in said and "loads not run" in said
    assert contents(place) == before


def test_what_is_no_model_and_facts_that_cannot_be(place, tmp_path, untried):
    model, card = place / "model", place / "card"
    for directory, config, says in (
        (tmp_path / "nothing", None, "is no directory"),
        (tmp_path / "empty", None, "config.json is missing"),
        (tmp_path / "broken", "{", "cannot be read"),
        (tmp_path / "llama", '{"model_type": "llama"}', "'llama': give a Hope model"),
    ):
        if directory.name != "nothing":
            directory.mkdir()
        if config:
            (directory / "config.json").write_text(config)
        with pytest.raises(ValueError, match=says):
            release(directory, card)
    with pytest.raises(ValueError, match=r"facts.yaml is missing(.|\n)*repository: owner/name"):
        release(model, tmp_path / "no-card")
    for change, says in (
        ({"summary": None}, "`summary`"),
        ({"licence": "mit"}, "no fact `licence`"),
        ({"compute": " "}, "`compute` is empty"),
        ({"license": "Apache 2.0"}, "the hub's name for it"),
        ({"license": "other"}, "`license_link` is missing"),
        ({"repository": "a/b/c"}, "owner/name"),
        ({"base_model": ["a/b/c"]}, "owner/name"),
        ({"limitations": "See /home/ada/notes.txt"}, "/home/ada/notes.txt: it tells of your machine"),
    ):
        facts = {name: value for name, value in {**FACTS, **change}.items() if value is not None}
        (card / "facts.yaml").write_text(yaml.safe_dump(facts))
        before = contents(place)
        with pytest.raises(ValueError, match=says):
            release(model, card)
        assert contents(place) == before
    (card / "facts.yaml").write_text("- one\n")
    with pytest.raises(ValueError, match="no `field: value` lines"):
        release(model, card)


def test_results_of_another_model_or_none_are_refused(place, tmp_path, untried):
    model, card = place / "model", place / "card"
    checkpoint, before = identify(model), contents(place)
    weights, config = {**checkpoint, "weights": "1" * 64}, {**checkpoint, "config": "1" * 64}
    for content, says in (
        (training_result(weights), "of another model: other weights"),
        (training_result(config), "the same weights with another config"),
        (study_result(weights), "of another model"),
        (lm_eval_result(weights), "of another model"),
        (training_result(None), "does not say which checkpoint"),
        (lm_eval_result(None), "does not say which checkpoint"),
        (study_result(checkpoint, checkpoints={}), "does not say which checkpoint"),
        (study_result(checkpoint, settings={"quick": True}), "run it without --quick"),
        (study_result(checkpoint, study="mad"), "makes models of its own"),
        (lm_eval_result(checkpoint, results={"choices": {"alias": "choices"}}), "has no figures"),
        ({"accuracy": 0.99}, "is no file of results"),
        (["accuracy"], "is no file of results"),
    ):
        with pytest.raises(ValueError, match=says):
            release(model, card, [write_json(tmp_path / "given.json", content)])
        assert contents(place) == before
    (tmp_path / "given.json").write_text("{")
    for path, says in ((tmp_path / "given.json", "is no JSON"), (tmp_path / "lost.json", "cannot be read")):
        with pytest.raises(ValueError, match=says):
            release(model, card, [path])
    twice = [write_json(tmp_path / name, study_result(checkpoint)) for name in ("a.json", "b.json")]
    with pytest.raises(ValueError, match="two files would be called"):
        release(model, card, twice)
    release(model, card, twice[:1])
    # Weights that were trained on are another model, and what was measured before is not theirs.
    spoil_weights(model, NORM, lambda tensor: tensor + 1)
    (model / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="of another model: other weights"):
        release(model, card)
    kept = (card / "results" / "test_time_learning.json").rename(tmp_path / "kept.json").read_bytes()
    with pytest.raises(ValueError, match="own results"):
        release(model, card)
    assert (model / "results" / "test_time_learning.json").read_bytes() == kept
    (model / "results" / "test_time_learning.json").unlink()
    release(model, card, [write_json(tmp_path / "new.json", training_result(identify(model)))])
    # What an earlier release wrote, and nobody has changed, goes with what it is of.
    (card / "results" / "training.json").unlink()
    release(model, card)
    assert not (model / "results" / "training.json").exists()


def test_perplexity_against_context_in_a_card(tmp_path):
    checkpoint = {"weights": "1" * 64, "config": "2" * 64}
    content = {
        "study": "context",
        "command": "hope study context --models ours=tiny",
        "settings": {"quick": False, "contexts": [16, 64], "scored": 40},
        "checkpoints": {"ours": checkpoint},
        "documents": ["story", "tale"],
        "perplexity": [
            {"model": "other", "reading": "frozen", "by_context": [1.0, 2.0]},
            {"model": "ours", "reading": "learning", "by_context": [9.5, None]},
        ],
    }
    (only,) = read_result_file(write_json(tmp_path / "context.json", content), checkpoint).results
    assert (only.metric_value, only.metric_name) == (9.5, "perplexity after 16 tokens, learning")
    assert only.dataset_name == "2 documents" and only.metric_args == {"scored": 40}


def test_a_checkpoint_is_known_by_its_numbers_and_what_it_computes(made, tmp_path):
    model = HopeForCausalLM.from_pretrained(made / "model")
    ours = identify(made / "model")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1 and identify(tmp_path / "shards") == ours
    model.config.cms_learning_rates = [0.1, 0.4, 0.0]
    model.save_pretrained(tmp_path / "rates")
    rates = identify(tmp_path / "rates")
    assert rates["weights"] == ours["weights"] and rates["config"] != ours["config"]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "changed")
    assert identify(tmp_path / "changed")["weights"] != ours["weights"]


def test_absolute_paths():
    text = "at /home/ada/x.txt, C:\\models\\tiny or ~/models, pretrained=/mnt/disk/tiny,memory=stream"
    assert absolute_paths(text) == ["/home/ada/x.txt", "C:\\models\\tiny", "~/models", "/mnt/disk/tiny"]
    assert without_paths(text) == "at x.txt, tiny or models, pretrained=tiny,memory=stream"
    for harmless in (
        "a/b/c",
        "./a/b",
        "../a/b",
        "https://a.b/c/d",
        "</think>",
        "/think",
        "and/or",
        "{{ a // b }}",
        "1/2/3",
    ):
        assert absolute_paths(harmless) == []


def test_a_disk_that_is_full_leaves_no_part_of_a_card(place, monkeypatch, untried):
    before = contents(place)
    write = Path.write_text

    def full(path, text, **options):
        if path.name == ".README.md.part" and "model" in path.parts:
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        release(place / "model", place / "card")
    assert contents(place) == before


def answer(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


class Hub:
    """What `push` asks of a `HfApi`."""

    def __init__(self, files=None):
        self.files = files

    def list_repo_tree(self, repository, recursive):
        if self.files is None:
            raise RepositoryNotFoundError("none", response=answer(404))
        kept = {True: lambda data: SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()), False: lambda data: None}
        folders = [SimpleNamespace(path="results")]
        return folders + [
            SimpleNamespace(path=name, size=len(data), lfs=kept[name.endswith(".safetensors")](data))
            for name, data in self.files.items()
        ]

    def create_repo(self, repository, private, exist_ok):
        self.files = {".gitattributes": b""} if self.files is None else self.files

    def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns):
        self.files |= {name: (Path(folder_path) / name).read_bytes() for name in allow_patterns}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


class RefusingHub(Hub):
    def __init__(self, status):
        super().__init__()
        self.status = status

    def create_repo(self, *asked, **options):
        raise HfHubHTTPError("no", response=answer(self.status))


class LosingHub(Hub):
    def upload_folder(self, **asked):
        done = super().upload_folder(**asked)
        self.files["model.safetensors"] = b"other"
        return done


def test_a_push_and_what_keeps_it_from_the_hub(place, monkeypatch, untried, capsys):
    done = release(place / "model", place / "card")
    hub = Hub()
    for _ in range(2):
        assert push(done.directory, "ada/tiny-hope", done.checksums, api=hub) == "https://hub/ada/tiny-hope/commit/1"
        sent = {str(path): data for path, data in contents(place / "model").items()}
        assert hub.files == {".gitattributes": b"", **sent}
    for refusing, says in (
        (Hub({"pytorch_model.bin": b""}), "has pytorch_model.bin, which this release has not"),
        (RefusingHub(401), "hf auth login"),
        (RefusingHub(403), "may not write"),
        (LosingHub(), "has not model.safetensors as it was sent"),
        (HfApi(endpoint="http://127.0.0.1:9", token="hf_none"), "cannot be reached"),
    ):
        with pytest.raises(ValueError, match=says):
            push(done.directory, "ada/tiny-hope", done.checksums, api=refusing)
    monkeypatch.setattr("modeling_hope.release.push.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    before, asked = contents(place), ["release", str(place / "model"), "--card", str(place / "card"), "--push"]
    assert main([*asked, "ada/tiny-hope"]) == 2 and "no token" in capsys.readouterr().err
    assert (
        main([*asked, "ada/other"]) == 2 and "the card tells people to load 'ada/tiny-hope'" in capsys.readouterr().err
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*asked, "ada/tiny-hope"]) == 2 and "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert main(["release", "--card", str(place / "card"), "--push", "ada/tiny-hope"]) == 2
    assert "needs the model" in capsys.readouterr().err and contents(place) == before


def test_cards_of_the_repository_are_what_their_directories_make():
    cards = [path.parent for path in (ROOT / "model_cards").glob("*/facts.yaml")]
    assert cards
    for card in cards:
        assert (card / "README.md").read_text(encoding="utf-8") == render_again(card)
