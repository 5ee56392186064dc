"""Studies of small models and of optimizers: quick forms, trainings that go on after a kill, choices, refusals."""

import json
import math

import pytest
import torch
from torch import nn

from modeling_hope.cli.main import main
from modeling_hope.eval.generators.toys import Valley
from modeling_hope.eval.studies import formal_languages, mad, optimizers, small_models
from modeling_hope.eval.studies.small_models import Data, Protocol, fit, rung_config, score, tune


BASE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "bos_token_id": None, "eos_token_id": None}


def quick(tmp_path, name, *flags):
    assert main(["study", name, "--quick", "--out", str(tmp_path), *flags]) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    return json.loads((tmp_path / f"{name}.json").read_text()), (tmp_path / f"{name}.md").read_text()


def test_formal_languages_are_printed_beside_table_5(tmp_path):
    figures, text = quick(tmp_path, "formal_languages", "--languages", "anbn", "--fields", "memory_chunk_size=4")
    part = figures["parts"]["anbn/hope/seed-0"]
    assert (
        len(part["right"]) == 2 and set(part["epochs"]) == {"rate-0.001", "rate-0.01"} and part["strings"] == [25, 25]
    )
    assert abs(part["parameters"] - figures["parts"]["anbn/transformer/seed-0"]["parameters"]) < 200
    assert "| a^n b^n, paper | 100 / 100 | 100 / 100 |" in text and "memory_chunk_size=4" in text
    assert figures["paper"]["parity"]["DeltaNet"] == [98.2, 10.1] and figures["paper"]["aa_star"]["Transformer"] == [
        0,
        0,
    ]
    assert not list(tmp_path.glob("**/*.pt"))


def test_mad_is_printed_beside_table_4(tmp_path):
    figures, text = quick(tmp_path, "mad", "--tasks", "compression", "memorization")
    assert set(figures["means"]["class_accuracy"]["hope"]) == {"compression", "memorization"}
    compression = figures["parts"]["compression/hope/first/seed-0"]
    assert figures["means"]["class_accuracy"]["hope"]["compression"] == compression["class_accuracy"]
    assert f"| hope | {compression['class_accuracy']:.1f} | " in text  # what the paper's row is
    assert "| paper: Hope | 51.2 | 85.2 |" in text and "Here (reduced): 1 epochs" in text
    assert list(figures["parts"]["compression/hope/first/seed-0"]["validation"]) == ["rate-0.001-decay-0"]


def test_mads_protocols_are_what_they_are_called():
    full, reduced = (mad.Plan.of(mad.MADSettings(reduced=flag)) for flag in (False, True))
    assert full == mad.Plan([1e-4, 5e-4, 1e-3], [0.0, 0.1], 200, None, "all")
    assert (len(reduced.rates), reduced.epochs, reduced.variants) == (2, 50, "first")
    assert mad.Plan.of(mad.MADSettings(reduced=True, epochs=3)).epochs == 3
    settings = mad.MADSettings()
    assert len(mad.parts(settings)) == 52 * 3 * 2 and len(mad.parts(mad.MADSettings(reduced=True))) == 5 * 3 * 2


def test_optimizers_are_compared_on_both_toys(tmp_path):
    figures, text = quick(tmp_path, "optimizers")
    assert set(figures["order"]["orthogonal"]) == set(optimizers.RIVALS)
    assert set(figures["order"]["valley"]) == set(optimizers.RIVALS) - {"DeltaGradientDescent"}
    assert text.count("Best: ") == 3 and "beta2_from_1" in text
    trials = (tmp_path / "parts" / "orthogonal" / "SGD" / "trials.jsonl").read_text().splitlines()
    assert len(trials) == 2 and set(json.loads(trials[0])) == {"drawn", "score"}


def test_tuning_that_was_killed_goes_on_with_the_trials_that_are_missing(tmp_path, monkeypatch):
    settings = optimizers.OptimizerSettings(seeds=[0], trials=4, tuning_seeds=1, tasks=2)
    tried, trial = [], optimizers.trial

    def watched(*given):
        tried.append(given[-1])
        if len(tried) == 3:
            raise KeyboardInterrupt
        return trial(*given)

    monkeypatch.setattr(optimizers, "trial", watched)
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    with pytest.raises(KeyboardInterrupt):
        optimizers.compare(settings, "orthogonal", "Adam", tmp_path / "killed")
    with (tmp_path / "killed" / "trials.jsonl").open("a") as file:
        file.write('{"drawn": {"lr')  # killed while it wrote
    gone_on = optimizers.compare(settings, "orthogonal", "Adam", tmp_path / "killed")
    assert len(tried) == 5 and tried[2] == tried[3]
    assert gone_on == optimizers.compare(settings, "orthogonal", "Adam", tmp_path / "whole")
    kept = [(tmp_path / place / "trials.jsonl").read_text() for place in ("killed", "whole")]
    assert kept[0] == kept[1]


@torch.no_grad()
def test_a_valley_is_solved_when_it_stays_low():
    low, high = Valley().start, (0.0, 0.0)
    path = torch.tensor([[low], [high], [low], [high], [high]])
    assert optimizers.steps_down(path, [Valley()]) == [3.0]
    assert optimizers.steps_down(path[:3], [Valley()]) == [math.inf]
    assert optimizers.mean_steps([3.0, math.inf], 10) == 11.5


def test_an_optimizer_goes_down_a_valley_and_learns_tasks():
    path = optimizers.descend(
        optimizers.RIVALS["Adam"], {"lr": 0.1, "momentum": 0.9, "beta2_from_1": 0.1}, [Valley()], 300
    )
    assert path.shape == (301, 1, 2) and tuple(path[0, 0].tolist()) == Valley().start
    assert path[-1].norm() < 0.5 < path[0].norm()
    learned = optimizers.learn_tasks(optimizers.RIVALS["SGD"], {"lr": 0.3}, 0, 4, 0.0)
    assert learned["loss"] < 0.05 and abs(learned["forgotten"]) < 1e-5  # orthogonal tasks do not disturb each other
    overlapping = optimizers.learn_tasks(optimizers.RIVALS["SGD"], {"lr": 0.3}, 0, 4, 0.3)
    assert overlapping["forgotten"] > 1e-3


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("formal_languages", ["--languages", "dyck"], "invalid choice: 'dyck'"),
        ("formal_languages", ["--rungs", "mamba"], "`rungs` must be one of transformer"),
        ("formal_languages", ["--parameters", "10"], "`parameters`: a rung has"),
        ("formal_languages", ["--fields", "memory_depht=1"], "memory_depht"),
        ("formal_languages", ["--epochs", "0"], "`epochs` must be 1 or more"),
        ("formal_languages", ["--rates", "0"], "`rates` must be above 0, got 0"),
        ("formal_languages", ["--hidden", "7"], "`hidden`: 1 `heads` of one even width do not come to 7"),
        ("mad", ["--heads", "3"], "`hidden`: 3 `heads` of one even width do not come to 16. Give a multiple of 6"),
        ("mad", ["--device", "abacus"], "`device`: 'abacus' is not here"),
        ("optimizers", ["--trials", "x"], "Field 'trials' expected int"),
        ("optimizers", ["--seeds", "1000"], "`seeds`: 1000 is one that settings are tried on"),
        ("mad", ["--tasks", "noisy_recall"], "invalid choice: 'noisy_recall'"),
        ("mad", ["--variants", "some"], "variants"),
        ("optimizers", ["--toys", "hill"], "invalid choice: 'hill'"),
        ("optimizers", ["--trials", "0"], "`trials` must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, name, flags, said):
    try:
        code = main(["study", name, "--quick", "--out", str(tmp_path / "out"), *flags])
    except SystemExit as error:
        code = error.code
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_are_checked_without_flags_too():
    for study, given in (
        (formal_languages, {"languages": ["dyck"]}),
        (formal_languages, {"rungs": ["no_delta"]}),
        (mad, {"tasks": []}),
        (mad, {"decays": []}),
        (optimizers, {"toys": ["hill"]}),
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(given))}`"):
            study.STUDY.settle(given)


@pytest.mark.parametrize("name", small_models.STEPS)
def test_every_rung_has_the_parameters_asked_for_and_no_level_that_learns(name):
    config = rung_config(name, {**BASE, "layer_ropes": [None]}, 4_000, 4, {"memory_chunk_size": 5})
    model = formal_languages.HopeForCausalLM(config)
    assert abs(model.num_parameters() - 4_000) < 400 and config.cms_training == "static"
    assert (config.memory_chunk_size == 5) == (
        "attention" not in name.replace("linear_attention", "") and name != "transformer"
    )
    # No positions: with attention, two equal tokens in a row are read alike.
    ids = torch.zeros(1, 6, dtype=torch.long)
    if config.layer_types == ["full_attention"]:
        logits = formal_languages.read(model, ids)
        torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)


def looked_up(model, inputs):
    return model.table(inputs)


def some_data(rows=20):
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for _ in range(rows):
        tokens = torch.randint(5, (int(torch.randint(2, 7, (), generator=generator)),), generator=generator).tolist()
        sequences.append((tokens, [token % 3 for token in tokens]))
    return Data.of(sequences)


def test_scores_count_sequences_positions_and_classes():
    model = Lookup()
    with torch.no_grad():
        model.table.weight.copy_(torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 0, 9], [0, 0, 0], [0, 0, 0]]))
    data = Data.of([([0, 2, 1], [0, 2, 1]), ([0, 0], [0, -100]), ([2, 2], [2, 2])])
    assert data.lengths.tolist() == [3, 1, 2] and data.rows(torch.tensor([1])).inputs.shape == (1, 1)
    found = score(model, looked_up, data)
    assert (found.whole, found.positions) == (pytest.approx(2 / 3), pytest.approx(5 / 6))
    assert found.classes == pytest.approx(2 / 3)  # of 0, 1 and 2: all, none, all
    assert found.loss == pytest.approx(9 / 6, abs=1e-3)


def test_a_training_that_was_killed_comes_to_the_same_weights(tmp_path):
    data, protocol = some_data(), Protocol(0.1, 0.01, (0.9, 0.99), 4, 5, last_rate=1e-3)

    def trained(place, *stops):
        for epochs in (*stops, 5):
            torch.manual_seed(0)
            model = Lookup()
            cut = Protocol(**{**vars(protocol), "epochs": 5})
            if epochs < 5:
                object.__setattr__(cut, "ends", lambda curve, epochs=epochs: len(curve) >= epochs)
            curve = fit(model, looked_up, data, data, cut, 3, place)
        return model, curve

    whole, curve = trained(tmp_path / "whole")
    parts, others = trained(tmp_path / "parts", 1, 3)
    assert curve == others and len(curve) == 5
    torch.testing.assert_close(whole.table.weight, parts.table.weight, rtol=0, atol=0)


def test_the_protocol_that_is_best_on_what_is_held_out_is_chosen_and_training_ends_when_all_is_right(tmp_path):
    data = some_data(60)
    protocols = {
        str(rate): Protocol(rate, 0.0, (0.9, 0.995), 8, 30, patience=2, by="whole") for rate in (1e-4, 0.3, math.inf)
    }

    def make():
        torch.manual_seed(0)
        return Lookup()

    tuned = tune(make, looked_up, data, data, protocols, 0, tmp_path)
    assert tuned.chosen == "0.3" and len(tuned.curves["0.3"]) < 30 == len(tuned.curves["0.0001"])
    assert [point["whole"] for point in tuned.curves["0.3"][-2:]] == [1, 1] and len(tuned.curves["inf"]) == 1
    assert score(tuned.model, looked_up, data).whole == 1
    small_models.forget_checkpoints(tmp_path)
    assert not list(tmp_path.glob("**/*.pt"))


def test_where_all_protocols_diverge_there_is_no_score(tmp_path):
    protocols = {"a": Protocol(math.inf, 0.0, (0.9, 0.99), 4, 2), "b": Protocol(math.inf, 0.1, (0.9, 0.99), 4, 2)}
    tuned = tune(Lookup, looked_up, some_data(), some_data(), protocols, 0, tmp_path)
    assert tuned.chosen is None and tuned.model is None and list(tuned.curves) == ["a", "b"]


def test_a_report_says_what_diverged(tmp_path, monkeypatch):
    def diverges(make, read, train, held_out, protocols, seed, place):
        last = {"whole": 0.0, "positions": 0.0, "classes": 0.0, "loss": math.nan}
        return small_models.Tuned(None, None, {name: [last] for name in protocols})

    for study, flags, said in (
        (formal_languages, ["--languages", "anbn", "--rungs", "hope"], "diverged / diverged"),
        (mad, ["--tasks", "memorization", "--rungs", "hope"], "| hope | diverged |"),
    ):
        monkeypatch.setattr(study, "tune", diverges)
        figures, text = quick(tmp_path / study.STUDY.name, study.STUDY.name, *flags)
        assert said in text and all(part["chosen"] is None for part in figures["parts"].values())


def test_compression_is_decoded_from_the_last_position_alone():
    settings = mad.STUDY.settle({"quick": True})
    task = mad.TASKS["compression"]
    model = mad.Decoded(mad.config_for(settings, task.first, "transformer")).eval()
    inputs = torch.randint(15, (2, 32), generator=torch.Generator().manual_seed(0))
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    logits = mad.read(model, inputs)
    assert logits.shape == (2, 32, 16)
    added = mad.sines(32, settings.hidden, inputs.device)
    torch.testing.assert_close(seen[0] - added, (seen[0] - added)[:, :1].expand_as(seen[0]))
    assert len({tuple(row) for row in added.tolist()}) == 32
