"""The ladder: rungs of equal size, learning rates by their perplexity, finished runs that are passed over."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_hope.training import ladder
from modeling_hope.training.ladder import RUNGS, config_of, count
from modeling_hope.training.ladder_reading import long_documents, strided
from modeling_hope.training.recipe import read_recipe
from modeling_hope.training.trainer import DivergedError


SMALL = {
    "train": ["docs/lighthouse.txt"],
    "separator": "\n\n",
    "validation_fraction": 0.2,
    "train_tokenizer": 260,
    "config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "memory_chunk_size": 8,
        "projection_chunk_size": 8,
        "cms_periods": [8, 16],
        "tie_word_embeddings": True,
    },
    "sequence_length": 32,
    "batch_size": 2,
    "steps": 5,
    "log_every": 1,
    "save_every": 1,
}


def test_rungs_are_of_one_size():
    recipe, size = read_recipe("ladder-2m"), 2_100_000
    for name, rung in RUNGS.items():
        assert abs(count(config_of(rung, recipe, size, 2048), 2048) / size - 1) < 0.005, name
    with pytest.raises(ValueError, match=r"`parameters`: a rung has .* more than 500,000"):
        config_of(RUNGS["hope"], recipe, 500_000, 2048)


def test_a_small_ladder(tmp_path, monkeypatch, capsys):
    path, out, results = tmp_path / "small.yaml", tmp_path / "out", tmp_path / "results"
    path.write_text(yaml.safe_dump(SMALL))
    test = tmp_path / "test.txt"
    test.write_text("The keeper wrote of a storm that nobody else had seen.\n\n" * 20)
    shared = ["--out", str(out), "--recipe", str(path), "--parameters", "60000", "--test", str(test)]
    with pytest.raises(ValueError, match="no learning rate of 'transformer' yet"):
        ladder.main(["run", *shared, "--rungs", "transformer"])
    with pytest.raises(ValueError, match="no run of the ladder"):
        ladder.main(["report", *shared])
    names = ["transformer", "hope_attention"]
    ladder.main(["tune", *shared, "--rungs", *names])
    places = {path.parent.name: path for path in out.glob("tune/*/result.json")}
    assert {"transformer-0.006", "transformer-0.012"} <= set(places)
    assert {name for name in places if name.startswith("hope")} >= {"hope_attention-inner-1", "hope_attention-inner-3"}
    ladder.main(["run", *shared, "--rungs", *names, "--seeds", "0"])
    of = ladder.Ladder(out, SMALL, 60000, [str(test)])
    rates, inner = of.tuned("transformer"), of.tuned("hope_attention", inner=True)
    assert len(rates) + len(inner) == len(places)
    best, best_inner = min(rates, key=rates.get), min(inner, key=inner.get)

    chosen = out / "tune" / "self_referential-0.003"
    chosen.mkdir()
    (chosen / "result.json").write_text('{"eval_perplexity": 2.0}')
    ladder.main(["defaults", *shared, "--rungs", "chunk_read", "--seeds", "0"])

    def diverge(*args, **kwargs):
        raise DivergedError("The loss is nan.")

    monkeypatch.setattr(ladder, "train", diverge)  # nothing is run twice
    assert of._perplexity("transformer", 1e3, None) == math.inf  # the tuning goes on
    ladder.main(["run", *shared, "--rungs", *names, "--seeds", "0"])
    monkeypatch.setattr(ladder, "LONG", 100)
    ladder.main(["read", *shared])
    ladder.main(["report", *shared, "--results", str(results)])
    report = json.loads((results / "ladder.json").read_text())
    assert [(run["rung"], run["seed"], run["learning_rate"]) for run in report["runs"]] == [(n, 0, best) for n in names]
    assert ["eval_perplexity_learning" in run for run in report["runs"]] == [False, True]
    assert [(run["rung"], run["learning_rate"], run["steps"]) for run in report["defaults"]] == [
        ("chunk_read", 0.003, 1)
    ]
    assert report["runs"][1]["config"]["cms_learning_rates"] == best_inner
    assert [list(run["long_documents"]) for run in report["runs"]] == [["frozen"], ["frozen", "learning"]]
    assert all(len(run["long_documents"]["frozen"]) == 1 for run in report["runs"])  # 0 to 64
    assert (results / "ladder.png").is_file()
    written = capsys.readouterr().out
    assert "| hope_attention | attention, and three levels that learn" in written
    assert "| hope_attention | learning |" in written


def test_a_transformer_reads_long_documents_in_windows_that_overlap_by_half():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    ids = torch.randint(50, (22,))
    with torch.no_grad():
        found = strided(model, ids, 8)
        for target, loss in enumerate(found.tolist(), 1):
            start = max((target - 4) // 4 * 4, 0)
            logits = model(ids[None, start:target]).logits[0, -1]
            assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[target]).item(), abs=1e-5)
        whole = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        torch.testing.assert_close(strided(model, ids, 22), whole)
    assert len(found) == 21


def test_long_documents_are_chosen_by_their_text_alone(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * (30 if name != "c" else 3))

    def tokenizer(text):
        return SimpleNamespace(input_ids=list(text.encode()))

    chosen = long_documents([str(tmp_path)], tokenizer, 20, 5)
    assert sorted(ids[0].item() for ids in chosen) == [97, 98] and all(len(ids) == 20 for ids in chosen)
    assert len(long_documents([str(tmp_path)], tokenizer, 20, 1)) == 1
    with pytest.raises(ValueError, match="`test`: no document has 40 tokens"):
        long_documents([str(tmp_path)], tokenizer, 40, 5)
