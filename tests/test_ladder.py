"""The ladder: rungs of equal size, learning rates by their perplexity, finished runs that are passed over."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from modeling_hope.eval.studies import ladder_documents
from modeling_hope.training import ladder, rungs
from modeling_hope.training.ladder_runs import tuned_rates
from modeling_hope.training.recipe import read_recipe
from modeling_hope.training.rungs import RUNGS, config_of, count
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
    rates, inner = tuned_rates(out, "transformer"), tuned_rates(out, "hope_attention", inner=True)
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
    ladder.main(["report", *shared, "--results", str(results)])
    report = json.loads((results / "ladder.json").read_text())
    assert [(run["rung"], run["seed"], run["learning_rate"]) for run in report["runs"]] == [(n, 0, best) for n in names]
    assert ["eval_perplexity_learning" in run for run in report["runs"]] == [False, True]
    assert [(run["rung"], run["learning_rate"], run["steps"]) for run in report["defaults"]] == [
        ("chunk_read", 0.003, 1)
    ]
    assert report["runs"][1]["config"]["cms_learning_rates"] == best_inner
    assert (results / "ladder.png").is_file()
    documents = {"runs": str(out), "documents": [str(test)], "tokens": 100, "out": str(tmp_path / "long")}
    assert ladder_documents.STUDY.run(ladder_documents.STUDY.settle(documents), say=lambda line: None)
    found = json.loads((tmp_path / "long" / "ladder_documents.json").read_text())
    assert [(each["rung"], each["reading"]) for each in found["perplexity"]] == [
        ("transformer", "frozen"),
        ("hope_attention", "frozen"),
        ("hope_attention", "learning"),
    ]
    for name in names:
        model, _ = ladder_documents.load_run(str(out / f"{name}-0"), "cpu")
        assert model.config.layer_windows == [SMALL["sequence_length"]] and model.config.layer_sinks == [0]
    written = capsys.readouterr().out
    assert "| hope_attention | attention, and three levels that learn" in written


def test_what_evaluates_knows_what_was_trained_and_not_what_trains():
    """And training knows nothing of evaluation."""
    for folder, forbidden in (("training", r"eval"), ("eval", r"training\.(ladder|train|trainer|data)")):
        for path in (Path(__file__).parents[1] / folder).rglob("*.py"):
            assert not re.search(rf"(from|import) modeling_hope\.{forbidden}\b", path.read_text()), path
    assert "from ." not in Path(rungs.__file__).read_text()
