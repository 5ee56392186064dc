"""This package's tasks, asked of small models through lm-eval with a memory that is carried from document to document."""

import json
import random
from functools import partialmethod
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import modeling_hope.eval
from modeling_hope.cli.main import main
from modeling_hope.eval.generators.haystack import composed
from modeling_hope.eval.lm import HopeLM
from modeling_hope.training.tokenizer import train_tokenizer

from .conftest import tiny_model
from .test_class_streams import data  # noqa: F401


TASKS = Path(next(iter(modeling_hope.eval.__path__))) / "tasks"
TOKENS = 4  # of an answer: enough to tell answers apart
WINDOWS = {"layer_types": ["sliding_attention"] * 2, "sliding_window": [64, 16], "cms_periods": [32, 64, None]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """lm-eval's own index of 14,000 tasks takes ten seconds to build, its account of the environment one or two."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(islice(composed("to train on"), 300), 1000)


def small(tokenizer, **fields):
    return tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), **fields)


def load(family, name, **metadata):
    manager = TaskManager(include_path=str(TASKS / family), metadata=metadata)
    task = manager.load(name)["tasks"][name]
    task.set_config("generation_kwargs", {"max_gen_toks": TOKENS}, update=True)
    return task


def answers(lm, task, docs=None):
    """What is said to each document, and what the results say of the model."""
    if docs is not None:
        task.dataset["test"] = Dataset.from_list(docs)
    done = simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    [samples] = done["samples"].values()
    assert [sample["doc_id"] for sample in samples] == list(range(len(samples)))
    return [(sample["doc"], sample["resps"][0][0]) for sample in samples], done["config"]["hope"]


def said(found):
    """Answers by question; what is said to a document that teaches is of no interest."""
    return {doc["text"]: answer for doc, answer in found if doc["hope_read"] == "nothing"}


@pytest.mark.parametrize(
    ("family", "name", "sizes"),
    [
        ("class_incremental", "hope_class_incremental_clinc150", {"tasks": 2, "train": 2, "test": 1, "asked": "each"}),
        ("ctnl", "hope_ctnl", {"train": 6, "test": 2, "vocabulary": 3}),
    ],
)
def test_a_stream_learns_what_is_told_and_nothing_from_its_own_questions(
    data,  # noqa: F811
    tokenizer,
    family,
    name,
    sizes,
):
    task = load(family, name, data=str(data), **sizes)
    lm = HopeLM(small(tokenizer, **WINDOWS), tokenizer=tokenizer, memory="stream")
    first, about = answers(lm, task)
    docs = [doc for doc, _ in first]
    told = [index for index, doc in enumerate(docs) if doc["hope_read"] == "question"]
    asked = range(told[-1] + 1, len(docs))
    separator = len(tokenizer("\n\n").input_ids)
    read = sum(len(tokenizer(docs[index]["text"]).input_ids) + separator for index in told)
    assert about["streams"][name]["tokens"] == read and about["read"] is None
    assert set(about["streams"][name]["read"]) == {"question", "nothing"}

    mixed = [docs[index] for index in random.Random(1).sample(asked, len(asked))]
    again, _ = answers(lm, task, docs[: told[-1] + 1] + mixed)
    assert [doc for doc, _ in again] != docs and said(again) == said(first)
    # What was told decides what is said, and so would the questions if they were read.
    other, _ = answers(lm, task, [docs[index] for index in asked])
    assert said(other) != {text: answer for text, answer in said(first).items() if text in said(other)}
    read = [{**doc, "hope_read": None} for doc in docs[: told[-1] + 1] + mixed]
    lm = HopeLM(lm.model, tokenizer=tokenizer, memory="stream", read="question")
    worse, _ = answers(lm, task, read)
    assert {doc["text"]: answer for doc, answer in worse if doc["text"] in said(first)} != said(first)


def test_needles_are_asked_for_at_any_length_of_a_model_with_windows(tokenizer):
    model = small(tokenizer, max_position_embeddings=300, **WINDOWS)
    options = {"tokenizer": tokenizer, "lengths": [600, 1200], "samples": 1}
    task = load("needles", "hope_niah_number", **options)
    found, about = answers(HopeLM(model, tokenizer=tokenizer, memory="stream", read="nothing"), task)
    for doc, answer in found:
        ids = tokenizer(f"{doc['input']} {doc['gen_prefix']}", return_tensors="pt").input_ids
        assert ids.shape[1] > 300
        expected = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)
    assert about["streams"]["hope_niah_number"]["read"] == {"nothing": "0-1"}
    # Each document alone, read to its whole length, is the same.
    alone, about = answers(HopeLM(model, tokenizer=tokenizer, max_length=1200, batch_size=2), task)
    assert alone == found and about["cut"] == {}
    going_on, about = answers(HopeLM(model, tokenizer=tokenizer, memory="stream", read="question_and_answer"), task)
    assert going_on[0] == found[0] and going_on[1] != found[1]
    assert about["streams"]["hope_niah_number"]["tokens"] > sum(doc["length"] - 128 for doc, _ in found)


def test_a_needle_that_would_be_cut_off_is_refused(tokenizer, monkeypatch):
    options = {"tokenizer": tokenizer, "lengths": [600], "samples": 2}
    needles = load("needles", "hope_niah_number", **options)
    full, windows = (small(tokenizer, max_position_embeddings=400, **fields) for fields in ({}, WINDOWS))
    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "_model_generate", lambda *_, **__: pytest.fail("the model was asked"))
        for model, fix in (
            (full, r"Ask for shorter ones \(--metadata"),
            (windows, "give max_length=... in --model_args"),
        ):
            said = rf"hope_niah_number, document 0 is 600 tokens long, and the model reads max_length=400: .*{fix}"
            with pytest.raises(ValueError, match=said):
                answers(HopeLM(model, tokenizer=tokenizer), needles)
    # A document that states no length is cut as `hf` cuts it, and counted.
    plain = [{name: value for name, value in doc.items() if name != "max_length"} for doc in needles.dataset["test"]]
    needles.dataset["test"] = Dataset.from_list(plain)
    needles.config.process_results = lambda doc, results: {}
    found, about = answers(HopeLM(full, tokenizer=tokenizer, batch_size=2), needles)
    stock = simple_evaluate(
        HFLM(full, tokenizer=tokenizer, batch_size=2), tasks=[needles], bootstrap_iters=0, log_samples=True
    )
    assert [answer for _, answer in found] == [each["resps"][0][0] for each in stock["samples"]["hope_niah_number"]]
    assert about["cut"] == {"hope_niah_number": 2}


def test_lengths_are_those_that_a_model_reads(tokenizer, tmp_path, capsys):
    small(tokenizer, max_position_embeddings=2048, **WINDOWS).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def lengths(**arguments):
        docs = load("needles", "hope_niah_passkey", samples=1, **arguments).test_docs()
        return [doc["max_length"] for doc in docs]

    assert lengths(pretrained=str(tmp_path / "model")) == [1024, 2048]
    assert lengths(pretrained=str(tmp_path / "model"), max_length=10_000) == [1024, 2048, 4096, 8192]
    assert lengths(tokenizer=tokenizer) == [1024, 2048, 4096]
    assert lengths(tokenizer=tokenizer, max_length=10**6) == [1024 * 2**doubled for doubled in range(7)]
    with pytest.raises(ValueError, match=r"`lengths`: the model reads 512 tokens at once, and 1024 is the shortest"):
        lengths(tokenizer=tokenizer, max_length=512)

    model = ["--model_args", f"pretrained={tmp_path / 'model'},memory=stream", "--device", "cpu"]
    run = [
        "eval",
        *model,
        "--tasks",
        "hope_niah_passkey",
        "--metadata",
        '{"samples": 1}',
        "--gen_kwargs",
        "max_gen_toks=4",
    ]
    assert main(run) == 2
    said = capsys.readouterr().err
    assert "`read`: task hope_niah_passkey, document 0 asks a question" in said and "read=question_and_answer" in said
    run[2] += ",read=nothing"
    assert main([*run, "--output_path", str(tmp_path / "out.json")]) == 0
    [results] = [json.loads(path.read_text()) for path in tmp_path.glob("out*.json")]
    assert {"1024,none", "2048,none"} <= set(results["results"]["hope_niah_passkey"])
    assert results["config"]["hope"]["streams"]["hope_niah_passkey"]["documents"] == 2
