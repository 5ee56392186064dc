"""The ladder: rungs of equal size, learning rates by their perplexity, runs that are passed over where they are done."""

import json
import math

import pytest
import yaml

from modeling_hope.training import ladder
from modeling_hope.training.ladder import RUNGS, config_of, count
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
    shared = ["--out", str(out), "--recipe", str(path), "--parameters", "60000"]
    with pytest.raises(ValueError, match="no learning rate of 'transformer' yet"):
        ladder.main(["run", *shared, "--rungs", "transformer"])
    with pytest.raises(ValueError, match="no run of the ladder"):
        ladder.main(["report", *shared])
    names = ["transformer", "hope_attention"]
    ladder.main(["tune", *shared, "--rungs", *names])
    places = {path.parent.name: path for path in out.glob("tune/*/result.json")}
    assert {"transformer-0.0015", "transformer-0.003"} <= set(places)
    assert not any(name.startswith("hope") for name in places)  # it takes the other's
    ladder.main(["run", *shared, "--rungs", *names, "--seeds", "0"])
    tuned = {float(name.partition("-")[2]): json.loads(path.read_text()) for name, path in places.items()}
    best = min(sorted(tuned), key=lambda rate: tuned[rate]["eval_perplexity"])

    def diverge(*args, **kwargs):
        raise DivergedError("The loss is nan.")

    monkeypatch.setattr(ladder, "train", diverge)  # nothing is run twice
    assert ladder.Ladder(out, SMALL, 60000)._tuning_run("transformer", 1e3) == math.inf  # the tuning goes on
    ladder.main(["run", *shared, "--rungs", *names, "--seeds", "0"])
    ladder.main(["report", *shared, "--results", str(results)])
    report = json.loads((results / "ladder.json").read_text())
    assert [(run["rung"], run["seed"], run["learning_rate"]) for run in report["runs"]] == [(n, 0, best) for n in names]
    assert ["eval_perplexity_learning" in run for run in report["runs"]] == [False, True]
    assert (results / "ladder.png").is_file()
    assert "| hope_attention | attention, and three levels that learn" in capsys.readouterr().out
