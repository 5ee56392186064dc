"""The studies that read documents: what they read, how, and what their reports say of it."""

import json
import math
import re
from itertools import pairwise
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.cli.main import main
from modeling_hope.eval import long_documents
from modeling_hope.eval.reading import READINGS, Reading, feed, read_as, with_window
from modeling_hope.eval.studies import context, ladder_documents, levels, test_time_learning

from .conftest import assert_same_memory, chat_tokenizer, random_ids, tiny_config, tiny_model
from .stock_models import SHARED, stock_model


WINDOW = {
    "layer_types": ["sliding_attention"] * 2,
    "sliding_window": 8,
    "attention_sinks": 2,
    "cms_periods": [8, 16, None],
}


@torch.no_grad()
def plain_losses(model, ids, learn):
    """Token by token, each loss before the token is read."""
    memory, losses = HopeCache(model.config), []
    for token, following in pairwise(ids):
        logits = model(token[None, None], past_key_values=memory, learn=learn).logits[0, -1]
        losses.append(float(F.cross_entropy(logits, following)))
    return losses


@torch.no_grad()
def test_readings_equal_a_plain_loop(monkeypatch):
    monkeypatch.setattr("modeling_hope.eval.reading.TOKENS_PER_CALL", 13)
    model, ids = tiny_model(**WINDOW), random_ids(50)
    whole = {**WINDOW, "layer_types": ["full_attention"] * 2, "sliding_window": None}
    native = HopeForCausalLM(tiny_config(**whole)).double().eval()
    native.load_state_dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = {
        "frozen": plain_losses(model, ids, "off"),
        "learning": plain_losses(model, ids, "all"),
        "native": F.cross_entropy(native(ids[None], learn="off").logits[0, :-1], ids[1:], reduction="none").tolist(),
    }
    for kind in READINGS:
        assert read_as(kind, model, ids).losses == pytest.approx(expected[kind], rel=1e-5)
    assert expected["learning"][8:] != pytest.approx(expected["frozen"][8:], rel=1e-3)
    assert expected["native"][12:] != pytest.approx(expected["frozen"][12:], rel=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    reading = Reading(expected["frozen"], 0.0, {})
    assert reading.perplexity(0.5) == pytest.approx(math.exp(mean(expected["frozen"][24:])))


def test_a_memory_that_is_fed_some_tokens_at_a_time_has_read_them(monkeypatch):
    monkeypatch.setattr("modeling_hope.eval.reading.TOKENS_PER_CALL", 13)
    model, ids = tiny_model(**WINDOW), random_ids(50)
    fed, whole, mask = model.new_memory(), model.new_memory(), torch.arange(50) % 3 > 0
    last = feed(model, fed, ids, "all", mask)
    with torch.no_grad():
        logits = model(ids[None], past_key_values=whole, learn="all", learn_mask=mask[None]).logits
    torch.testing.assert_close(last, logits[0, -1])
    assert_same_memory(fed, whole, rtol=1e-9, atol=1e-9)
    assert feed(model, fed, ids[:0], None) is None and fed.seen == [50]


def test_a_window_is_of_layers_that_see_everything_or_keep_sinks():
    mixed = tiny_model(**{**WINDOW, "sliding_window": [8, 8], "attention_sinks": [0, 2]})
    assert with_window(mixed, 32).config.layer_windows == [8, 32]
    assert with_window(tiny_model(**WINDOW), 32).config.layer_windows == [32, 32]
    hybrid = tiny_model(**{**WINDOW, "layer_types": ["hope_memory", "sliding_attention"], "num_memory_heads": 2})
    other = with_window(hybrid, 32)
    assert other.config.layer_types == hybrid.config.layer_types and other.config.layer_windows == [None, 32]
    free = tiny_model(**{**WINDOW, "layer_types": ["full_attention", "hope_memory"], "sliding_window": None})
    slides = with_window(free, 32)
    assert slides.config.layer_types == ["sliding_attention", "hope_memory"]
    assert slides.config.layer_windows == [32, None] and slides.config.layer_sinks == [2, 0]
    memories = tiny_model(layer_types=["hope_memory"] * 2, sliding_window=None)
    assert with_window(memories, 32) is memories


def test_models_stand_side_by_side_over_the_same_documents(tmp_path, capsys):
    for name, words in (("story", 70), ("tale", 90)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{9 + i * len(name) % 7}" for i in range(words)))
    for name, seed in (("converted", 0), ("trained", 1)):
        tiny_model(seed, **WINDOW, dtype=torch.float32).save_pretrained(tmp_path / name)
        chat_tokenizer().save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    flags = ["study", "test_time_learning", "--out", str(out), "--documents", str(tmp_path / "*.txt"), "--tokens", "64"]
    flags += ["--models", f"converted={tmp_path / 'converted'}", f"trained={tmp_path / 'trained'}"]
    assert main([*flags, "--only", "converted/*"]) == 0
    assert "6 of 12 parts are there" in capsys.readouterr().out
    assert main(flags) == 0
    figures, text = (
        json.loads((out / "test_time_learning.json").read_text()),
        (out / "test_time_learning.md").read_text(),
    )
    found = figures["readings"]
    model = HopeForCausalLM.from_pretrained(tmp_path / "converted")
    ids = chat_tokenizer()((tmp_path / "tale.txt").read_text(), return_tensors="pt").input_ids[0, :64]
    for kind in READINGS:
        expected = read_as(kind, model, ids)
        assert found[f"converted/{kind}/tale"]["second_half"] == pytest.approx(expected.perplexity(0.5), rel=1e-5)
    assert len({reading["second_half"] for reading in found.values()}) == 12
    gains = {
        document: 1
        - found[f"trained/learning/{document}"]["second_half"] / found[f"converted/native/{document}"]["second_half"]
        for document in ("story", "tale")
    }
    worst = min(gains, key=gains.get)
    row = next(line for line in text.splitlines() if line.startswith("| trained | converted, native context |"))
    worse = sum(gain < -0.01 for gain in gains.values())
    assert row.split(" | ")[2:] == [f"{mean(gains.values()):.1%}", f"{gains[worst]:.1%}", str(worse), f"{worst} |"]
    assert f"| tale | 64 | {found['converted/frozen/tale']['second_half']:.2f} |" in text
    assert (out / "test_time_learning.png").stat().st_size > 1000
    (tmp_path / "tale.txt").write_text("w9 " * 64 + "w10 " * 10)
    (out / "parts/trained/frozen/tale/result.json").write_text('{"tokens": 63, "seconds": 1}')
    assert main(flags) == 2 and "some readings of 'tale' have more tokens" in capsys.readouterr().err


def test_context_scores_the_same_tokens_after_more_and_more(tmp_path):
    settings = context.STUDY.settle({"quick": True, "out": str(tmp_path), "contexts": [16, 64, 100], "scored": 40})
    assert context.STUDY.run(settings, say=lambda line: None)
    figures = json.loads((tmp_path / "context.json").read_text())
    model, tokenizer = context.load_reader("small:0", "cpu")
    text = context.documents_of(settings)["generated-1"]()
    ids = tokenizer(text, return_tensors="pt").input_ids[0, :140]
    for kind in READINGS:
        found = figures["losses"][f"small/{kind}/generated-1"]["losses"]
        for before, loss in zip((16, 64, 100), found, strict=True):
            assert loss == pytest.approx(mean(read_as(kind, model, ids[100 - before :]).losses[-40:]), rel=1e-5)
    frozen, learning, _ = figures["perplexity"]
    assert frozen["by_context"][1] != learning["by_context"][1]


def test_levels_are_as_many_and_as_slow_as_asked_for(tmp_path):
    given = {"strategy": "stack", "levels": [1, 3], "slowest": [128], "needle_samples": 1, "seeds": [3, 4]}
    settings = levels.STUDY.settle({"quick": True, "out": str(tmp_path), **given})
    assert [levels.periods_of(settings, count, 128) for count in (1, 3)] == [[128], [32, 64, 128]]
    assert levels.STUDY.run(settings, say=lambda line: None)
    figures = json.loads((tmp_path / "levels.json").read_text())
    found = figures["results"]
    # Frozen and two configurations with two rates, each on two haystacks.
    assert len({result["loss"] for key, result in found.items() if "/needles/" in key}) == 10
    halves = {key: found[f"{key}/documents/generated-1"]["second_half"] for key in ("frozen", "1-levels/128/rate-0.1")}
    assert len({result["second_half"] for result in found.values() if "second_half" in result}) == 10
    gains = {each["rate"]: each["gains"] for each in figures["by_rate"] if each["configuration"] == "1-levels/128"}
    assert gains[0.1]["generated-1"] == pytest.approx(1 - halves["1-levels/128/rate-0.1"] / halves["frozen"])
    best = max(gains, key=lambda rate: gains[rate]["generated-0"])
    assert figures["gains"]["1-levels/128"]["generated-1"] == gains[best]["generated-1"] > 0
    model = levels._reader(settings, levels.Learner((32, 64, 128), 0.05))
    assert model.config.cms_periods == [32, 64, 128] and model.config.cms_levels_per_layer == [[0, 1, 2]] * 2
    assert model.config.cms_learning_rates == 0.05


def test_a_documents_rate_was_chosen_on_the_others():
    gains = {0.1: {"a": 0.3, "b": 0.1, "c": 0.1}, 0.2: {"a": 0.1, "b": 0.2, "c": 0.15}}
    assert levels.chosen_rates(gains) == ({"a": 0.2, "b": 0.1, "c": 0.1}, 0.1)
    assert levels.chosen_rates({**gains, 0.4: dict.fromkeys("abc", -math.inf)})[1] == 0.1  # diverged
    assert levels.chosen_rates({0.1: {"a": 0.3}}) == ({"a": 0.1}, 0.1)


def save_run(place, model, window):
    model.save_pretrained(place / "model")
    chat_tokenizer().save_pretrained(place / "model")
    (place / "result.json").write_text("{}")
    (place / "recipe.yaml").write_text(f"sequence_length: {window}")


def test_the_ladders_models_read_on_with_the_length_in_view_that_they_were_trained_on(tmp_path, capsys):
    llama = stock_model(LlamaConfig(**{**SHARED, "num_hidden_layers": 1}))
    hope = tiny_model(**{**WINDOW, "layer_types": ["full_attention"] * 2, "sliding_window": None}, dtype=torch.float32)
    save_run(tmp_path / "runs" / "transformer-0", llama, 16)
    save_run(tmp_path / "runs" / "hope_attention-1", hope, 16)
    (tmp_path / "runs" / "titans-0").mkdir()  # never came to its end
    for step, words in ((1, 110), (3, 120), (5, 130), (7, 90)):  # the last is too short
        (tmp_path / f"{step}.txt").write_text(" ".join(f"w{9 + i * step % 23}" for i in range(words)))
    out = tmp_path / "out"
    flags = ["study", "ladder_documents", "--out", str(out), "--tokens", "100"]
    flags += ["--runs", str(tmp_path / "runs"), "--documents", str(tmp_path / "*.txt")]
    assert main(flags) == 0
    assert "| hope_attention | learning | 1 |" in capsys.readouterr().out
    found = json.loads((out / "ladder_documents.json").read_text())["readings"]
    assert list(found) == ["transformer/0/frozen", "hope_attention/1/frozen", "hope_attention/1/learning"]
    assert len({json.dumps(result["losses"]) for result in found.values()}) == 3
    of_llama = found["transformer/0/frozen"]["losses"]
    assert sorted(of_llama) == ["1", "3", "5"]
    ids = chat_tokenizer()((tmp_path / "3.txt").read_text(), return_tensors="pt").input_ids[0, :100]
    with torch.no_grad():
        logits = torch.stack([llama(ids[None, max(end - 16, 0) : end]).logits[0, -1] for end in range(1, 100)])
    losses = F.cross_entropy(logits, ids[1:], reduction="none").tolist()
    assert of_llama["3"] == pytest.approx([mean(losses[:63]), mean(losses[63:])], rel=1e-5)

    assert main([*flags, "--most", "2"]) == 2 and "was begun with 32 and not 2" in capsys.readouterr().err
    (tmp_path / "9.txt").write_text("w9 " * 100)
    (out / "parts/transformer/0/frozen/result.json").unlink()
    assert main(flags) == 2 and "some readings are of other text than others" in capsys.readouterr().err
    (tmp_path / "9.txt").unlink()
    settings = {"runs": str(tmp_path / "runs"), "documents": [str(tmp_path / "*.txt")], "tokens": 500, "out": str(out)}
    with pytest.raises(ValueError, match="`tokens`: no document has 500"):
        ladder_documents.long_documents(ladder_documents.STUDY.settle(settings), chat_tokenizer())


class Numbers:
    """A tokenizer of texts that are token ids."""

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=torch.tensor([[int(word) for word in text.split()]]))


@torch.no_grad()
def test_a_needle_is_found_when_greedy_decoding_says_it():
    model, ids = tiny_model(**WINDOW), random_ids(1, 30)
    prompt = " ".join(map(str, ids[0].tolist()))
    for learn in (False, True):
        memory = HopeCache(model.config)
        said = model.generate(
            ids, past_key_values=memory, max_new_tokens=3, learn="prompt" if learn else "off", eos_token_id=-1
        )
        said = said[0, 30:].tolist()
        right, loss = levels.answered(model, Numbers(), prompt, " ".join(map(str, said)), learn=learn)
        wrong, more = levels.answered(
            model, Numbers(), prompt, " ".join(map(str, [*said[:2], (said[2] + 1) % 40])), learn=learn
        )
        assert right and not wrong and loss < more
    logits = model(torch.cat([ids, torch.tensor([said])], 1), learn="off").logits[0, 29:-1]
    loss = levels.answered(model, Numbers(), prompt, " ".join(map(str, said)), learn=False)[1]
    assert loss == pytest.approx(float(F.cross_entropy(logits, torch.tensor(said))), rel=1e-5)


def write_corpus(directory, documents, split="test"):
    (directory / split).mkdir(parents=True)
    for source, named in documents.items():
        lines = [json.dumps({"text": text, "source": source, "document": name}) for name, text in named.items()]
        (directory / split / f"{source}-00000.jsonl").write_text("\n".join(lines))


def test_documents_of_the_corpus_are_chosen_by_a_rule_that_knows_no_results(tmp_path):
    def text(seed, count=9000):
        return " ".join(f"w{9 + number}" for number in random_ids(count, seed=seed, vocab_size=30).tolist())

    write_corpus(tmp_path, {"b": {f"man/{i}": text(i, 8000 + 1000 * (i != 4)) for i in range(9)}, "a": {"one": "w9"}})
    chosen = long_documents.choose(tmp_path, chat_tokenizer())
    assert list(chosen) == ["b"] and set(chosen["b"].values()) == {0} and "man/4" not in chosen["b"]
    first, second, third = chosen["b"]
    # What the other splits have of them, whatever stands between the words.
    repeats = {"b": {"man/x": f"w10 {text(int(first[4:]))[:6000].upper().replace(' ', ', ')}"}}
    write_corpus(tmp_path, repeats, "train")
    write_corpus(tmp_path, {"c": {"man/y": " ".join(text(int(second[4:])).split()[300:750])}}, "validation")
    others = long_documents.choose(tmp_path, chat_tokenizer())
    assert list(others["b"])[:2] == [second, third] and len(others["b"]) == 3 and first not in others["b"]
    assert others["b"][second] == pytest.approx((450 - 12) / (9000 - 12)) and others["b"][third] == 0


def test_documents_are_found_by_name(tmp_path):
    named = {*long_documents.PACKAGED, *long_documents.IN_CORPUS}
    assert len(named) == len(long_documents.PACKAGED) + len(long_documents.IN_CORPUS) >= 20
    assert not {"speech-2026", "craft-handbook", "speech-2024"} & named
    write_corpus(tmp_path / "corpus", {"perl-doc": {"man3/DB_File": "text"}, "sqlite3-doc": {"other": "text"}})
    (tmp_path / "own.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    places = ["perl-doc.man3-DB_File", str(tmp_path / "own.jsonl"), "bayes-workflow"]
    found = long_documents.find_documents(places, str(tmp_path / "corpus"), "nowhere")
    assert list(found) == ["perl-doc.man3-DB_File", "own-00000", "own-00001", "bayes-workflow"]
    assert found["perl-doc.man3-DB_File"]() == "text" and found["own-00001"]() == "two"
    for places, said in (
        (["sqlite3-doc.oldnews"], "has no document 'oldnews' of sqlite3-doc"),
        ([], "has no test split of anarchism. Make it: python -m modeling_hope.training.corpus"),
        (["bayes-workflow", "bayes-workflow"], "two are called 'bayes-workflow'"),
        (["nothing.txt"], "nothing.txt names no text"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            long_documents.find_documents(places, str(tmp_path / "corpus"), "nowhere")


@pytest.mark.parametrize(
    ("study", "given", "said"),
    [
        (test_time_learning, {"models": {}}, "`models` is empty: give Hope checkpoints by name"),
        (test_time_learning, {"models": {"a": "nowhere"}}, "`models`: a=nowhere is no directory with a checkpoint"),
        (test_time_learning, {"tokens": 10}, "`tokens` is 10"),
        (test_time_learning, {"device": "abacus"}, "`device`: 'abacus' is not here"),
        (context, {"contexts": [64, 5000]}, "`contexts`: 5000 and 64 scored tokens are more than the 4096 that small"),
        (context, {"contexts": [0]}, "`contexts` and `scored` must be 1 or more"),
        (ladder_documents, {"runs": "nowhere"}, "`runs`: in nowhere no run of these `rungs` and `seeds`"),
        (ladder_documents, {"rungs": ["hop"]}, "`rungs`: there is no 'hop', only transformer"),
        (ladder_documents, {"most": 0}, "`most` is 0"),
        (levels, {"source": ""}, "`source` is empty"),
        (levels, {"source": "nowhere"}, "`source`: there is no nowhere"),
        (levels, {"levels": [7]}, "7 levels cannot end at 32 tokens"),
        (levels, {"levels": [0]}, "`levels` must be 1 or more"),
        (levels, {"source": "small:x"}, "`source`: after small: comes a seed"),
        (levels, {"rates": [0.1, 0.0]}, "`rates` must be above 0"),
        (
            levels,
            {"documents": ["generated:0"]},
            "`rates`: of a document the rate is taken that was best on the others",
        ),
        (levels, {"needle_samples": 0}, "`needle_samples` is 0"),
        (levels, {"needle_tokens": 100}, "`needle_tokens`: 100 tokens have no room for a haystack"),
        (levels, {"needles": "multivalue"}, "`needles`: multivalue asks for several values"),
    ],
)
def test_what_cannot_be_is_refused_before_a_part_is_run(study, given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        study.STUDY.settle({"quick": True, **given})


def test_a_document_that_is_too_short_is_named(tmp_path):
    (tmp_path / "note.txt").write_text("Too short.")
    given = {"quick": True, "out": str(tmp_path / "out"), "documents": [str(tmp_path / "note.txt")]}
    with pytest.raises(ValueError, match=r"`documents`: note has \d+ tokens, and 192 are needed"):
        context.STUDY.run(context.STUDY.settle(given), say=lambda line: None)


def test_quick_studies_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "ladder_documents", "--quick"]) == 0
    assert (tmp_path / "studies/ladder_documents-quick/ladder_documents.png").is_file()
    assert main(["study", "test_time_learning", "--quick"]) == 0
    text = (tmp_path / "studies/test_time_learning-quick/test_time_learning.md").read_text()
    assert "measures nothing" in text and text.count("| other | ") == 4
