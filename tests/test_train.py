"""`hope train`: recipes, text, rows, evaluation, resuming, and what is refused before the first step."""

import argparse
import dataclasses
import json
import math
import sys
from itertools import pairwise

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.cli.main import main
from modeling_hope.cli.train import add_to, recipe_of
from modeling_hope.conversion.identity import identify
from modeling_hope.release.result_files import read_result_file
from modeling_hope.training.memory_figures import memory_figures
from modeling_hope.training.recipe import DECIDED, RECIPES, REFUSED, TrainingRecipe, read_recipe
from modeling_hope.training.rows import Rows, Tokens, collate, targets
from modeling_hope.training.run_directory import last_checkpoint
from modeling_hope.training.sources import Document, Reader
from modeling_hope.training.tokenizer import train_tokenizer
from modeling_hope.training.train import train
from modeling_hope.training.trainer import training_arguments

from .conftest import random_ids, tiny_config, tiny_model


PROSE = "the keeper of the light saw nine ships and a goat come up the hill in the fog before the lamp was lit"
WORDS = PROSE.split()
TINY = {
    "train_tokenizer": 270,
    "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "cms_periods": [16, 32]},
    "sequence_length": 32,
    "batch_size": 2,
    "steps": 4,
    "log_every": 1,
    "memory_tokens": 0,
    "plots": False,
}


LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def text(seed, words=60):
    order = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in order.tolist())


@pytest.fixture
def corpus(tmp_path):
    """Two sources to train on, in shards, and both to evaluate on."""
    for split, seeds in (("train", range(8)), ("validation", range(8, 11))):
        (tmp_path / split).mkdir()
        for source in ("log", "letters"):
            lines = [{"text": text(seed, 10 + 17 * seed % 30), "source": source} for seed in seeds]
            (tmp_path / split / f"{source}-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def recipe_for(corpus, out="run", **fields):
    places = {"train": [str(corpus / "train")], "validation": [str(corpus / "validation")], "out": str(corpus / out)}
    return TrainingRecipe.from_fields({**TINY, **places, **fields})


def quietly(recipe, **options):
    return train(recipe, say=lambda line: None, **options)


def losses_of(out):
    return [entry["loss"] for line in (out / "figures.jsonl").open() if "loss" in (entry := json.loads(line))]


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_to(parser.add_subparsers())
    return recipe_of(parser.parse_args(["train", *flags]))


def test_a_recipe_that_cannot_be_is_refused_by_the_name_of_its_field(tmp_path):
    good = {"out": "run", "train": ["a.txt"], "steps": 1, "train_tokenizer": 300}
    assert type(TrainingRecipe.from_fields({**good, "learning_rate": 1, "epochs": None}).learning_rate) is float
    for fields, named in (
        ({"stpes": 3}, "no field `stpes`"),
        ({"steps": "many"}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 0}, "`steps` must be 1 or more"),
        ({"steps": None}, "one of `steps` and `epochs`"),
        ({"epochs": 1.0}, "one of `steps` and `epochs`"),
        ({"train": []}, "`train` is empty"),
        ({"out": ""}, "`out` is not set"),
        ({"layout": "stacked"}, "`layout` must be one of packed"),
        ({"optimizer": "adam"}, "`optimizer` must be one of adamw"),
        ({"schedule": "cosin"}, "`schedule` must be one of linear"),
        ({"learning_rate": math.nan}, "`learning_rate`"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"warmup": 1.5}, "`warmup`"),
        ({"train_tokenizer": 100}, "`train_tokenizer` must be 258"),
        ({"train_tokenizer": None}, "needs a tokenizer"),
        ({"model": "m"}, "`train_tokenizer`"),
        ({"validation": ["a"], "validation_fraction": 0.1}, "leave one out"),
        ({"evaluate_every": 5}, "`evaluate_every` needs text"),
        ({"evaluate_learning": ["maybe"]}, "`evaluate_learning` must be one of off, on"),
        ({"level_periods": "often"}, "`level_periods`"),
        ({"arguments": {"learning_rate": 1.0}}, "`arguments` has `learning_rate`"),
        ({"arguments": {"lerning": 1.0}}, "no such field"),
        ({"arguments": {"logging_first_step": False}}, "`arguments` has `logging_first_step`"),
        ({"arguments": {"save_only_model": True}}, "a killed run could not go on"),
        ({"seed": -1}, "`seed` must be 0 or more"),
        ({"seed": 2**32}, "`seed` must be below"),
    ):
        with pytest.raises((ValueError, StrictDataclassError), match=named):
            TrainingRecipe.from_fields({**good, **fields})
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "twice.yaml").write_text("steps: 1\nepochs: 2\nsteps: 3\n")
    (tmp_path / "numbers.yaml").write_text("learning_rate: 1e-3\noptimizer_options: {betas: [.9, 5e-1]}\nout: '1e-3'\n")
    numbers = {"learning_rate": 1e-3, "optimizer_options": {"betas": [0.9, 0.5]}, "out": "1e-3"}
    assert read_recipe(tmp_path / "numbers.yaml") == numbers
    (tmp_path / "latin.yaml").write_bytes(b"out: caf\xe9\n")
    for name, named in (("twice.yaml", "`steps` stands there twice.*line 3"), ("latin.yaml", "latin.yaml is no UTF-8")):
        with pytest.raises(ValueError, match=named):
            read_recipe(tmp_path / name)
    for name, named in (("list.yaml", "holds no fields"), ("broken.yaml", "no recipe"), ("none.yaml", "smoke")):
        with pytest.raises(ValueError, match=named):
            read_recipe(tmp_path / name)


def test_a_flag_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--steps", "[")
    assert "argument --steps: '[' is no number" in capsys.readouterr().err


def test_flags_are_the_fields_of_a_file(tmp_path):
    fields = {
        "out": "run", "train": ["a.txt", "b"], "train_tokenizer": 300, "steps": 5, "learning_rate": 0.5, "epochs": None,
        "config": {"hidden_size": 8, "cms_periods": [4, None]}, "level_periods": [1, 2], "gradient_checkpointing": True,
        "optimizer": "m3", "optimizer_options": {"betas": [0.9, 0.9, 0.9]}, "report_to": ["tensorboard"],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    flags = "--out run --train a.txt b --train-tokenizer 300 --steps 5 --learning-rate 0.5 --epochs none --optimizer m3"
    flags += " --level-periods 1 2 --gradient-checkpointing --report-to tensorboard --config hidden_size=8"
    given = [*flags.split(), "--config", "cms_periods=[4, null]", "--optimizer-options", "betas=[0.9, 0.9, 0.9]"]
    recipe = parse(*given)
    assert (
        recipe == parse(str(tmp_path / "recipe.yaml")) == TrainingRecipe.from_fields(yaml.safe_load(recipe.as_yaml()))
    )
    changed = parse(str(tmp_path / "recipe.yaml"), "--config", "hidden_size=16", "--no-gradient-checkpointing")
    assert changed.config == {"hidden_size": 16, "cms_periods": [4, None]} and not changed.gradient_checkpointing
    words = parse(*given, "--level-periods", "config", "--separator", "none", "--evaluate-learning", "off")
    assert (words.level_periods, words.separator, words.evaluate_learning) == ("config", None, ["off"])
    other = parse(str(tmp_path / "recipe.yaml"), "--epochs", "2", "--tokenizer", "place")
    assert (other.steps, other.epochs, other.tokenizer, other.train_tokenizer) == (None, 2.0, "place", None)
    assert parse(*given, "--level-periods", "none").level_periods is None
    for path in RECIPES.glob("*.yaml"):
        continued = (
            ["--continue", "model", "--train", "a.txt", "--validation", "b.txt"] if path.stem == "continue" else []
        )
        assert parse(path.stem, "--out", "run", *continued).out == "run"


def test_any_other_field_of_transformers_arguments_is_taken(corpus):
    fields = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name in fields.keys() - DECIDED - REFUSED.keys():
        default = None if fields[name] is dataclasses.MISSING else fields[name]
        assert training_arguments(recipe_for(corpus, arguments={name: default}), begins=True).seed == 0
    with pytest.raises(ValueError, match="`arguments`: "):
        training_arguments(recipe_for(corpus, arguments={"dataloader_num_workers": "x"}), begins=True)


def test_a_tokenizer_gives_any_text_back(tmp_path):
    tokenizer = train_tokenizer((text(seed) for seed in range(3)), 280)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for sample in (text(9), "Ünïcode 灯台 🐐\n\ttabs  and \r\n spaces ", ""):
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
        assert again(sample).input_ids == tokenizer(sample).input_ids
    assert 260 < len(tokenizer) <= 280 and tokenizer.eos_token_id is not None
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer([], 200)


def some_tokens(lengths, vocab_size=40):
    ids = random_ids(sum(lengths), vocab_size=vocab_size).to(torch.int32)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return Tokens(ids, starts, ["log" if i % 2 else "letters" for i in range(len(lengths))])


@pytest.mark.parametrize("training", ["static", "first_order"])
def test_packed_rows_are_read_as_documents_alone(family, training):
    model = tiny_model(cms_training=training).train()
    tokens, length = some_tokens([5, 30, 9, 1, 14, 3]), 16
    rows = Rows(tokens, length, "packed", pad=0)
    assert torch.equal(torch.cat([row["input_ids"] for row in rows])[: len(tokens.ids)], tokens.ids.long())
    batch = collate(list(rows), pad=0)
    assert "attention_mask" not in batch
    with torch.no_grad():
        found = model(**batch, use_cache=False).loss * targets(batch)
        cuts = sorted({*range(0, len(tokens.ids), length), *tokens.starts.tolist()})
        parts = [tokens.ids[a:b].long()[None] for a, b in pairwise(cuts)]
        alone = [
            cross_entropy(model(p, use_cache=False).logits[0, :-1], p[0, 1:], reduction="sum")
            for p in parts
            if p.shape[1] > 1
        ]
    torch.testing.assert_close(found.double(), sum(alone).double(), rtol=1e-6, atol=1e-5)
    assert targets(batch) == sum(part.shape[1] - 1 for part in parts)


def test_packed_rows_are_documents_alone_to_a_llama():
    """What others are compared with reads the same."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA, vocab_size=40)).eval()
    tokens = some_tokens([5, 30, 9, 1, 14, 3])
    batch = collate(list(Rows(tokens, 16, "packed", pad=0)), pad=0)
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits.flatten(0, 1)[: len(tokens.ids)]
        cuts = sorted({*range(0, len(tokens.ids), 16), *tokens.starts.tolist()})
        alone = [model(tokens.ids[a:b].long()[None]).logits[0] for a, b in pairwise(cuts)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_layouts():
    tokens = some_tokens([5, 20, 1, 9])
    rows = Rows(tokens, 8, "documents", pad=0)
    assert [len(row["input_ids"]) for row in rows] == [5, 8, 8, 4, 8]  # a single token left over is no row
    batch = collate([rows[0], rows[1]], pad=7)
    assert batch["attention_mask"].sum(1).tolist() == [5, 8] and batch["input_ids"][0, 5:].tolist() == [7] * 3
    assert batch["labels"][0, 5:].tolist() == [-100] * 3 and targets(batch) == 4 + 7
    rows = Rows(tokens, 8, "concatenated", pad=0)
    assert len(rows) == 5 and "position_ids" not in rows[0] and rows[4]["labels"].tolist()[3:] == [-100] * 5
    assert sorted(tokens.shuffled(1).ids.tolist()) == sorted(tokens.ids.tolist())
    assert sum(len(part.ids) for part in tokens.by_source().values()) == len(tokens.ids)


@pytest.mark.parametrize("layout", ["packed", "documents", "concatenated"])
def test_perplexity_by_source_is_that_of_a_loop_by_hand(corpus, layout):
    recipe = recipe_for(
        corpus, layout=layout, steps=2, evaluate_learning=["off", "on"], token_cache=str(corpus / "cache")
    )
    found = quietly(recipe)
    model = AutoModelForCausalLM.from_pretrained(corpus / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(corpus / "run" / "model")
    ends = [tokenizer.eos_token_id]
    nats = {}
    for source in ("log", "letters"):
        documents = Reader().documents([str(corpus / "validation" / f"{source}-*.jsonl")])
        ids = [torch.tensor(tokenizer(document.text).input_ids + ends) for document in documents]
        if layout == "documents":
            parts = [part for document in ids for part in document.split(32)]
        else:
            stops = torch.tensor([len(document) for document in ids]).cumsum(0).tolist()
            cuts = sorted({*range(0, stops[-1], 32), stops[-1], *(stops if layout == "packed" else [])} | {0})
            parts = [torch.cat(ids)[a:b] for a, b in pairwise(cuts)]
        for suffix, learn in (("", "off"), ("_learning", "all")):
            with torch.no_grad():
                sums = [
                    cross_entropy(model(p[None], learn=learn).logits[0, :-1], p[1:], reduction="sum")
                    for p in parts
                    if len(p) > 1
                ]
            total, count = float(sum(sums)), sum(len(part) - 1 for part in parts)
            assert found[f"eval_perplexity{suffix}/{source}"] == pytest.approx(math.exp(total / count), rel=1e-5)
            nats.setdefault(suffix, []).append((total, count))
    for suffix, sums in nats.items():
        total, count = map(sum, zip(*sums, strict=True))
        assert found[f"eval_loss{suffix}"] == pytest.approx(total / count, rel=1e-5)
    assert found["eval_perplexity"] != found["eval_perplexity_learning"]
    kept = {path.name for path in (corpus / "cache").iterdir()}
    again = quietly(recipe_for(corpus, "again", **{"layout": layout, "steps": 2, "token_cache": str(corpus / "cache")}))
    assert again["eval_loss"] == found["eval_loss"] and kept == {path.name for path in (corpus / "cache").iterdir()}


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class KillAtSave(Kill):
    """The checkpoint of that step is written whole."""

    def on_step_end(self, args, state, control, **kwargs):
        pass

    def on_save(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control)


class Poison(TrainerCallback):
    """Its second step leaves a weight that is no number."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(model.parameters()).data[0] = math.nan


@pytest.mark.parametrize("mode", ["static", "second_order"])
def test_a_killed_run_goes_on_to_the_same_losses(corpus, mode):
    config = {**TINY["config"], "cms_training": mode, "cms_learn_rates": True}
    config["bos_token_id"] = 3  # Trainer takes the tokenizer's, which has none
    fields = {"steps": 6, "save_every": 2, "evaluate_every": 3, "accumulate": 2, "batch_size": 1, "config": config}
    fields |= {"level_periods": "config", "memory_tokens": 40, "evaluation_rows": 2, "log_every": 4}
    fields |= {"rates_learning_rate": 0.1} if mode == "second_order" else {}
    whole = quietly(recipe_for(corpus, "whole", **fields))
    recipe = recipe_for(corpus, **fields)
    with pytest.raises(KeyboardInterrupt):
        quietly(recipe, callbacks=[Kill(5)])
    (corpus / "run" / "checkpoint-4" / "trainer_state.json").write_text("{")  # killed while it was written
    assert last_checkpoint(corpus / "run").name == "checkpoint-2"
    with pytest.raises(ValueError, match="--resume` goes on"):
        quietly(recipe)
    with pytest.raises(ValueError, match="`learning_rate`"):
        quietly(recipe_for(corpus, **{**fields, "learning_rate": 0.5}), resume=True)
    more = corpus / "train" / "more.jsonl"
    more.write_text(json.dumps({"text": text(99)}) + "\n")
    with pytest.raises(ValueError, match="`train` or `validation` holds other text"):
        quietly(recipe, resume=True)
    more.unlink()
    resumed = quietly(recipe, resume=True)
    assert losses_of(corpus / "run") == losses_of(corpus / "whole")
    for name in ("eval_loss", "eval_perplexity/log", "tokens", "levels/change_norm_0"):
        assert resumed[name] == whole[name]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(corpus / run / "model") for run in ("run", "whole"))
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_a_run_killed_before_its_first_or_after_its_last_checkpoint_goes_on(corpus, monkeypatch):
    """It is evaluated before its first step, and takes no step beyond its last."""
    fields = {
        "steps": 3,
        "save_every": 1,
        "evaluate_every": 3,
        "schedule": "constant",
        "warmup": 0.0,
        "batch_size": 1,
    }
    whole = quietly(recipe_for(corpus, "whole", **fields))
    for out, kill, step in (("first", Kill(1), None), ("last", KillAtSave(3), "checkpoint-3")):
        recipe = recipe_for(corpus, out, **fields)
        with pytest.raises(KeyboardInterrupt):
            quietly(recipe, callbacks=[kill])
        if step:  # killed while it wrote the model, too
            (corpus / out / "model" / "tokenizer.json").write_text("{")
        assert last_checkpoint(corpus / out) == (corpus / out / step if step else None)
        resumed = quietly(recipe, resume=True)
        for name in ("steps", "tokens", "eval_loss"):
            assert resumed[name] == whole[name], (out, name)
        found, expected = (
            [
                {name: value for name, value in json.loads(line).items() if name in ("step", "loss", "eval_loss")}
                for line in (corpus / run / "figures.jsonl").open()
                if "loss" in line
            ]
            for run in (out, "whole")
        )
        assert [entry for entry in found if len(entry) > 1] == [entry for entry in expected if len(entry) > 1], out
        ours, theirs = (AutoModelForCausalLM.from_pretrained(corpus / run / "model") for run in (out, "whole"))
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    monkeypatch.setattr("modeling_hope.training.train.write", None)
    with pytest.raises(TypeError):
        quietly(recipe_for(corpus, "early", **fields))
    assert list((corpus / "early" / "model").iterdir())  # the tokenizer comes first: what has a recipe has all
    with pytest.raises(ValueError, match="holds no run"):
        quietly(recipe_for(corpus, "early", **fields), resume=True)


def test_a_full_disk_leaves_the_checkpoint_before(corpus, monkeypatch):
    saved = Trainer._save_optimizer_and_scheduler

    def full(self, place):
        if self.state.global_step == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file: no space left")
        saved(self, place)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    recipe = recipe_for(corpus, save_every=1, keep_checkpoints=1)
    with pytest.raises(OSError, match=r"`out`: the checkpoint of step 2 cannot be written .* Make room"):
        quietly(recipe)
    assert last_checkpoint(corpus / "run").name == "checkpoint-1"
    monkeypatch.undo()
    assert quietly(recipe, resume=True)["steps"] == 4


def test_training_on_with_learning_on(corpus):
    """Of a checkpoint that has no learned rates: under `second_order` they are learned."""
    quietly(recipe_for(corpus, "base", steps=1))
    base = str(corpus / "base" / "model")
    flags = "--sequence-length 64 --min-document-tokens 20 --steps 2 --accumulate 2 --learning-rate 1e-3"
    flags += " --warmup 0 --evaluate-every 2 --evaluation-rows 2 --memory-tokens 64 --no-plots --continue"
    common = [*flags.split(), base, "--train", str(corpus / "train"), "--validation", str(corpus / "validation")]
    second = "cms_training=second_order cms_learn_rates=true"
    for name, options in (
        ("first", []),
        ("second", ["--rates-learning-rate", "0.1", "--config", *second.split()]),
        ("control", ["--config", "cms_training=static"]),
    ):
        recipe = parse(*common, *options, "--out", str(corpus / name))
        result = quietly(recipe)
        assert ("eval_perplexity_learning" in result) == (name != "control")
        model = HopeForCausalLM.from_pretrained(corpus / name / "model")
        assert model.config.cms_training == recipe.config["cms_training"] and model.config.cms_periods == [16, 32]
        if name == "second":
            assert all(
                (cms.log_learning_rates.exp() - 0.1).abs().max() > 1e-3
                for cms in (layer.cms for layer in model.model.layers)
            )
            assert result["levels/rate_0"] == pytest.approx(model.model.layers[0].cms.learning_rate(0))


def test_what_cannot_be_trained_is_refused_before_the_first_step(corpus):
    quietly(recipe_for(corpus, "base", steps=1))
    base = str(corpus / "base" / "model")
    (corpus / "empty-00001.jsonl").write_text("\n")
    (corpus / "other.jsonl").write_text('{"content": "a"}\n')
    (corpus / "broken.jsonl").write_text('{"text"\n')
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (corpus / "half.jsonl").write_text('{"text": "caf\\ud83d"}\n')
    (corpus / "deep.jsonl").write_text("[" * 200_000)
    (corpus / "none.jsonl").write_text('{"text": null}\n')
    (corpus / "one.txt").write_text("a b c")
    train_tokenizer([text(0)], 300).save_pretrained(corpus / "larger")
    kept = {"train_tokenizer": None, "config": {}, "model": base}
    fewer = {"num_hidden_layers": 2, "layer_types": None, "layer_ropes": None, "cms_levels_per_layer": None}
    for name, fields, named in (
        ("empty shard", {"train": [str(corpus / "empty-*.jsonl")]}, "empty-00001.jsonl is empty"),
        ("both", {"validation": [str(corpus / "train" / "log-*.jsonl")]}, "log-00000.jsonl is trained on"),
        ("no field", {"train": [str(corpus / "other.jsonl")]}, "`text_field`"),
        ("no JSON", {"train": [str(corpus / "broken.jsonl")]}, "broken.jsonl, line 1"),
        ("no UTF-8", {"train": [str(corpus / "latin.txt")]}, "no UTF-8"),
        ("no UTF-8 line", {"train": [str(corpus / "latin.jsonl")]}, "latin.jsonl, line 1 is no UTF-8"),
        ("half a character", {"train": [str(corpus / "half.jsonl")]}, "half.jsonl, line 1 has half of a character"),
        ("deep", {"train": [str(corpus / "deep.jsonl")]}, "deep.jsonl, line 1 is no JSON"),
        ("null", {"train": [str(corpus / "none.jsonl")]}, r"it has text \(NoneType\)"),
        ("out", {"out": str(corpus / "one.txt")}, "`out`: nothing can be written"),
        ("below a file", {"out": str(corpus / "one.txt" / "run")}, "`out`: nothing can be written"),
        ("token cache", {"token_cache": str(corpus / "one.txt")}, "`token_cache`"),
        ("no model", {**kept, "model": str(corpus / "nothing")}, "`model`: .*nothing is no directory"),
        ("no tokenizer", {"train_tokenizer": None, "tokenizer": str(corpus / "train")}, "`tokenizer`: .*does not load"),
        ("no config", {"config_from": str(corpus / "nothing")}, "`config_from`: "),
        ("same split", {"train": ["datasets:a"], "validation": ["datasets:a::train"]}, "`validation`: .* trained on"),
        ("no file", {"train": [str(corpus / "nothing")]}, "names no text"),
        ("other file", {"train": [str(corpus / "base" / "model" / "config.json")]}, "is none of"),
        ("no documents", {"train": [str(corpus / "one.txt")], "min_document_tokens": 99}, "no document is left"),
        ("no evaluation", {"validation": [str(corpus / "one.txt")], "min_document_tokens": 7}, "to evaluate on"),
        ("dataset", {"train": [f"datasets:{corpus / 'nothing'}"]}, "does not load"),
        ("config field", {"config": {"hiden_size": 8}}, "`hiden_size`"),
        ("config value", {"config": {"cms_periods": [3, 4]}}, "cms_periods"),
        ("vocabulary", {"config": {"vocab_size": 100}}, "`vocab_size` 100"),
        ("larger tokenizer", {**kept, "tokenizer": str(corpus / "larger")}, "`vocab_size`"),
        ("other kind", {**kept, "config": {"model_type": "llama"}}, "model_type"),
        ("other shapes", {**kept, "config": {"hidden_size": 32, "head_dim": 8}}, "other shapes"),
        ("fewer weights", {**kept, "config": fewer}, "lacks"),
        ("optimizer", {"optimizer_options": {"beta": 1}}, "no option `beta`"),
        ("two rates", {"optimizer_options": {"lr": 1}}, "`optimizer_options` has `lr`"),
        ("option value", {"optimizer_options": {"betas": [0.9]}}, "'adamw' cannot be with these options"),
        ("no levels", {"level_periods": "config", "config": {"model_type": "llama", **LLAMA}}, "`level_periods` is"),
        ("schedule", {"schedule": "warmup_stable_decay"}, "`lr_scheduler_kwargs` in `arguments`"),
        ("rates", {**kept, "rates_learning_rate": 0.1}, "cms_learn_rates=true"),
        ("report", {"report_to": ["comet_ml"]}, "comet_ml is not installed"),
        ("no such report", {"report_to": ["none"]}, "`report_to` must be of"),
        ("levels", {"level_periods": [1, 2, 3]}, "one for each of 2 levels"),
    ):  # fmt: skip
        with pytest.raises((ValueError, StrictDataclassError), match=named):
            quietly(recipe_for(corpus, **{**{"steps": 1}, **fields}))
        assert not list((corpus / "run").glob("checkpoint-*")), name


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoints(corpus):
    recipe = recipe_for(corpus, learning_rate=1e18, weight_decay=0.0, warmup=0.0, save_every=1, steps=4)
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at step \d"):
        quietly(recipe)
    assert last_checkpoint(corpus / "run") is not None and losses_of(corpus / "run")
    with pytest.raises(ValueError, match=r"embed_tokens.weight` is not finite at step 2"):
        quietly(recipe_for(corpus, "poisoned", save_every=1), callbacks=[Poison()])
    assert [path.name for path in (corpus / "poisoned").glob("checkpoint-*")] == ["checkpoint-1"]
    config = json.loads((corpus / "run" / "checkpoint-1" / "config.json").read_text())
    path = corpus / "run" / "checkpoint-1" / "config.json"
    for checkpoint in (corpus / "run").glob("checkpoint-*"):
        (checkpoint / "config.json").write_text(json.dumps({**config, "cms_decay": 0.5}))
    with pytest.raises(ValueError, match="of another config: its `cms_decay`"):
        quietly(recipe, resume=True)
    assert path.is_file()


def test_any_config_and_datasets_without_a_network(corpus, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    records = [{"text": text(seed), "source": "log"} for seed in range(6)]
    datasets.Dataset.from_list(records).save_to_disk(corpus / "disk")
    datasets.Dataset.from_list(records).to_parquet(corpus / "parquet" / "train.parquet")
    found = [
        quietly(
            recipe_for(corpus, out, config={"model_type": "llama", **LLAMA}, train=[place], gradient_checkpointing=True)
        )
        for out, place in (("a", f"datasets:{corpus / 'disk'}"), ("b", f"datasets:{corpus / 'parquet'}::train"))
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hope-transformers\[train\]"):
        quietly(recipe_for(corpus, "c", train=[f"datasets:{corpus / 'disk'}"]))
    assert found[0]["eval_loss"] == found[1]["eval_loss"] and "eval_perplexity_learning" not in found[0]
    assert AutoModelForCausalLM.from_pretrained(corpus / "a" / "model").config.model_type == "llama"


def test_figures_of_a_memory(family):
    model = tiny_model(dtype=torch.float32).train()
    ids = random_ids(1, 30)[0]
    figures = memory_figures(model, ids)
    assert model.training and figures == memory_figures(model, ids)
    memory = HopeCache(model.config)
    with torch.no_grad():
        model.eval()(ids[None], past_key_values=memory, learn="all")
    for index, level in enumerate(memory.summary()["rows"][0]["levels"]):
        assert figures[f"levels/updates_{index}"] == level["updates"]
        assert figures[f"levels/change_norm_{index}"] == pytest.approx(level["change_norm"])
    assert figures["levels/rate_0"] == pytest.approx(0.7) and "levels/rate_2" not in figures
    remembering = [i for i, kind in enumerate(tiny_config().layer_types) if kind == "hope_memory"]
    assert {name for name in figures if name.startswith("memory/rate")} == {f"memory/rate_{i}" for i in remembering}
    for index in remembering:
        assert 0.005 < figures[f"memory/rate_{index}"] < 0.08 and 0.99 < figures[f"memory/decay_{index}"] < 1
        assert figures[f"memory/change_{index}"] > 0


def test_hope_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "run"
    flags = ["--steps", "10", "--evaluate-every", "5", "--report-to", "tensorboard"]
    assert main(["train", "smoke", "--out", str(out), *flags]) == 0
    printed = capsys.readouterr().out
    for expected in ("train_tokenizer: 300", "parameters", "tokens/s", "perplexity", "lighthouse", "result.json"):
        assert expected in printed
    names = {path.name for path in out.iterdir()}
    assert names >= {"recipe.yaml", "figures.jsonl", "losses.png", "memory.png", "result.json", "model"}
    assert list(out.rglob("events.out.tfevents.*"))
    assert '\nseparator: "\\n\\n"\n' in printed and "\n  cms_periods: [32, 64, 128]\n" in printed
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 10 and result["tokens_per_second"] > 0 and result["peak_MiB"] > 0
    read = read_result_file(out / "result.json", identify(out / "model"))
    assert [each.metric_value for each in read.results] == [
        result["eval_perplexity/lighthouse"],
        result["eval_perplexity"],
    ]
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == result["recipe"]
    assert losses_of(out)[-1] < losses_of(out)[0]
    assert main(["train", "smoke", "--out", str(out)]) == 2 and "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "smoke", "--out", str(out), "--stpes", "3"])
    assert "hope train: error: unrecognized argument --stpes, do you mean --steps?" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out), "--dry-run"]) == 0 and "steps: 10" in capsys.readouterr().out
    model, tokenizer = (kind.from_pretrained(out / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer.decode(model.generate(**tokenizer("The lamp", return_tensors="pt"), max_new_tokens=4)[0])


def test_documents_of_text_files(tmp_path):
    (tmp_path / "log-00001.txt").write_text("one\n\ntwo\n\n\n\nthree\n")
    (tmp_path / "more.md").write_text("four")
    (tmp_path / "year-2026.txt").write_text("five")
    found = list(Reader(separator="\n\n").documents([str(tmp_path)]))
    assert found == [
        Document("one", "log"),
        Document("two", "log"),
        Document("three", "log"),
        Document("four", "more"),
        Document("five", "year-2026"),
    ]
    assert [
        document.source for document in Reader().documents([str(tmp_path / "log*.txt"), str(tmp_path / "more.md")])
    ] == ["log", "more"]
