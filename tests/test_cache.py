"""HopeCache: forks, reordering, resetting, and what it reports."""

import json

import pytest
import torch

from modeling_hope import HopeCache
from modeling_hope.fast_weights import LevelMemory

from .conftest import random_ids, read, tiny_model


pytestmark = pytest.mark.usefixtures("family")


def test_a_fork_goes_on_by_itself(model):
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 10))
    before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    fork = memory.clone()
    assert fork.nbytes() == memory.nbytes()
    read(model, fork, random_ids(1, 10, seed=1))
    assert memory.seen == [10] and fork.seen == [20]
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.tensors().items())


def test_select_reorder_and_repeat_share_changes(model):
    memory = HopeCache(model.config, 3)
    read(model, memory, random_ids(3, 19))
    alone = []
    for row in range(3):
        alone.append(HopeCache(model.config))
        read(model, alone[-1], random_ids(3, 19)[[row]])
    bytes_of_changes = sum(t.nbytes for name, t in memory.tensors().items() if "levels" in name)
    memory.reorder_cache(torch.tensor([2, 0, 0]))
    memory.batch_repeat_interleave(2)
    assert memory.batch_size == 6 and memory.seen == [19] * 6
    storages = {t.data_ptr() for name, t in memory.tensors().items() if "levels" in name}
    assert len(storages) <= len([name for name in alone[0].tensors() if "levels" in name]) * 2
    assert memory.nbytes() < 6 * alone[0].nbytes() and bytes_of_changes > 0
    memory.batch_select_indices(torch.tensor([0, 2, 5]))
    follow = random_ids(1, 9, seed=3)
    expected = torch.cat([read(model, alone[row], follow) for row in (2, 0)])
    given = read(model, memory, follow.expand(3, -1))
    torch.testing.assert_close(given, expected[[0, 1, 1]], rtol=1e-8, atol=1e-9)


def test_reset(model):
    memory = HopeCache(model.config, 2)
    first = read(model, memory, random_ids(2, 11))
    memory.reset()
    assert memory.seen == [0, 0] and memory.get_seq_length() == 0
    torch.testing.assert_close(read(model, memory, random_ids(2, 11)), first)


def test_reset_of_levels_and_to(model):
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 17))
    before = memory.summary()["rows"]
    memory.reset(levels=())
    assert memory.summary()["rows"] == before
    for wrong in ([3], [-1], ["0"], [0, 0.5]):
        with pytest.raises(ValueError, match="levels"):
            memory.reset(levels=wrong)
    assert memory.summary()["rows"] == before
    memory.reset(levels=(level for level in (0, 0)))
    fast, slow, _ = memory.summary()["rows"][0]["levels"]
    assert fast["change_norm"] == fast["updates"] == fast["waiting_pairs"] == 0 < slow["change_norm"]
    assert memory.seen == [17] and slow == before[0]["levels"][1]
    assert memory.to("cpu") is memory and read(model, memory, random_ids(1, 9)).isfinite().all()
    moved = {
        name: tensor.device.type for name, tensor in memory.to("meta").tensors().items() if not name.endswith("learn")
    }
    assert set(moved.values()) == {"meta"} and any("change" in name for name in moved)


def test_what_rows_share_moves_as_one(model):
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 12))
    shared = memory.nbytes()
    memory.batch_repeat_interleave(3)
    mixers = sum(t.nbytes for name, t in memory.tensors().items() if ".mixer." in name or ".opened." in name)
    memory.to("meta")
    changes = {id(t) for name, t in memory.tensors().items() if ".levels." in name}
    assert len(changes) * 3 == len([name for name in memory.tensors() if ".levels." in name])
    assert len({id(m) for layer in memory.layers for rows in layer.levels.values() for m in rows if m.change}) <= 4
    assert shared < mixers + shared


def test_it_shows_itself_in_a_line(model):
    memory = HopeCache(model.config, 2)
    assert repr(memory) == "HopeCache(rows=2, tokens=0, updates=0, size=0.0 MiB)"
    read(model, memory, random_ids(2, 9), attention_mask=torch.tensor([[1] * 9, [0] * 4 + [1] * 5]))
    assert repr(memory).startswith("HopeCache(rows=2, tokens=5 to 9, updates=1 to 3, size=") and "\n" not in repr(
        memory
    )


def test_bytes_count_all_that_is_held():
    model = tiny_model(dtype=torch.float32)
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 8))
    read(model, memory, random_ids(1, 1))  # with sums of slow weights and changes
    changes = sum(t.nbytes for name, t in memory.tensors().items() if ".change." in name)
    others = {t.data_ptr(): t.nbytes for name, t in memory.tensors().items() if ".change." not in name}
    assert changes and memory.nbytes() >= 2 * changes + sum(others.values())


def test_a_slow_weight_changed_in_place_is_seen():
    model = tiny_model()
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 8))
    read(model, memory.clone(), random_ids(1, 1))  # makes sums of slow weights and changes
    fresh = memory.clone()
    for layer in fresh.layers:
        layer.levels = {level: [LevelMemory(m.change) for m in memories] for level, memories in layer.levels.items()}
    with torch.no_grad():
        model.model.layers[0].cms.levels[0].up_proj.weight.mul_(1.5)
    torch.testing.assert_close(read(model, memory, random_ids(1, 1)), read(model, fresh, random_ids(1, 1)))


def test_summary():
    model = tiny_model(cms_surprise_threshold=3.5)
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 26))
    summary = memory.summary()
    row = summary["rows"][0]
    assert summary["bytes"] == memory.nbytes() > 0
    assert row["tokens"] == 26 and row["segments_learned"] + row["segments_skipped"] == 6 == len(row["last_losses"])
    assert [level["updates"] for level in row["levels"]] == list(memory.rows[0].updates)
    assert row["levels"][0]["frequency"] == row["levels"][0]["updates"] / 26
    assert row["levels"][0]["change_norm"] > 0 == row["levels"][2]["change_norm"]
    json.dumps(summary)


def test_nothing_is_stored_until_the_first_update(model):
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 3))
    assert not any("levels" in name for name in memory.tensors())
    read(model, memory, random_ids(1, 1))
    changes = [name for name in memory.tensors() if ".change." in name]
    assert changes and all(".levels.0." in name for name in changes)
