"""The studies of what memories learn and keep: their tasks are what they say, and they run; the figures are slow."""

import sys

import pytest
import torch

from modeling_hope.eval import memory_health, memory_tasks
from modeling_hope.eval.memory_tasks import TASKS


def test_recall_asks_for_the_value_of_each_key():
    ids, targets = TASKS["recall"].batch(torch.Generator().manual_seed(0))
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8
        assert asked[:16] == [-100] * 16 and asked[17::2] == [-100] * 8
        assert asked[16::2] == row[17::2] == [pairs[key] for key in row[16::2]]


def test_parity_asks_whether_the_ones_so_far_are_odd():
    ids, targets = TASKS["parity"].batch(torch.Generator().manual_seed(0))
    lengths = {sum(target != -100 for target in row) for row in targets.tolist()}
    assert min(lengths) >= 2 and max(lengths) <= 24 and len(lengths) > 10
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        assert all(target in (-100, sum(row[: place + 1]) % 2) for place, target in enumerate(asked))


def test_a_study_trains_and_prints_its_table(monkeypatch, capsys):
    quick = {name: memory_tasks.Task(t.batch, t.by_string, t.vocab_size, 2, 0.95) for name, t in TASKS.items()}
    monkeypatch.setattr(memory_tasks, "TASKS", quick)
    monkeypatch.setattr(sys, "argv", ["memory_tasks", *TASKS, "--ablate"])
    memory_tasks.main()
    assert capsys.readouterr().out.count("(2)") == 2 * len(memory_tasks.VARIANTS)


@torch.no_grad()
def test_memories_start_alive():
    """64 pairs can be written, and 1,000 further tokens leave some of them."""
    found = memory_health.Bench(hidden=64).retained(
        memory_health.PAIR_RATE, memory_health.START_RATE, memory_health.START_DECAY
    )
    assert found.good, found


@pytest.mark.parametrize("retention", ["initial", "zero"])
def test_streams_are_read_and_judged(retention):
    model = memory_tasks.make_model(TASKS["recall"], 0, memory_retention=retention).eval()
    ids = torch.randint(64, (2, 1024), generator=torch.Generator().manual_seed(0))
    alone = memory_health.read_streams(model, ids[1:])[0]
    together = memory_health.read_streams(model, ids)[1]
    assert together["finite"] and len(together["pieces"]["logit"]) == 4
    assert together["halves"]["change"] == pytest.approx(alone["halves"]["change"], rel=1e-2)


def test_a_stream_that_grows_does_not_pass():
    steady = torch.ones(8, 2)
    tracks = dict.fromkeys(("logit", "largest", "high", "change"), steady)
    assert memory_health.verdict(tracks)["pass"]
    assert not memory_health.verdict(tracks | {"change": steady * torch.arange(1.0, 9.0)[:, None]})["pass"]
    assert not memory_health.verdict(tracks | {"logit": steady * torch.nan})["pass"]


def test_a_small_change_grows_less_the_seldomer_keys_and_values_are_renewed():
    often, seldom = (memory_health.small_changes_growth(0.4, renewal) for renewal in (16, 256))
    assert 0 < 3 * seldom < often
