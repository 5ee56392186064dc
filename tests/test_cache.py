"""HopeCache: forks, reordering, what it reports, and files."""

import json

import pytest
import torch

from modeling_hope import HopeCache
from modeling_hope.fast_weights import LevelMemory

from .conftest import assert_same_memory, random_ids, tiny_model


pytestmark = pytest.mark.usefixtures("family")


@pytest.fixture
def model(family):
    return tiny_model()


@torch.no_grad()
def read(model, memory, ids, **kwargs):
    return model(ids, past_key_values=memory, **kwargs).logits


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
    read(model, memory, random_ids(3, 13))
    alone = []
    for row in range(3):
        alone.append(HopeCache(model.config))
        read(model, alone[-1], random_ids(3, 13)[[row]])
    bytes_of_changes = sum(t.nbytes for name, t in memory.tensors().items() if "levels" in name)
    memory.reorder_cache(torch.tensor([2, 0, 0]))
    memory.batch_repeat_interleave(2)
    assert memory.batch_size == 6 and memory.seen == [13] * 6
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
    memory.reset(levels=[0])
    norms = [level["change_norm"] for level in memory.summary()["rows"][0]["levels"]]
    assert norms[0] == 0 < norms[1] and memory.seen == [17] and memory.rows[0].pairs[0] == 0
    with pytest.raises(ValueError, match="levels"):
        memory.reset(levels=[3])
    assert memory.to("cpu") is memory and read(model, memory, random_ids(1, 9)).isfinite().all()
    moved = {
        name: tensor.device.type for name, tensor in memory.to("meta").tensors().items() if not name.endswith("learn")
    }
    assert set(moved.values()) == {"meta"} and any("change" in name for name in moved)


def test_bytes_count_all_that_is_held():
    model = tiny_model(dtype=torch.float32)
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 8))
    read(model, memory, random_ids(1, 1))  # with sums of slow weights and changes
    changes = sum(t.nbytes for name, t in memory.tensors().items() if ".change." in name)
    others = sum(t.nbytes for name, t in memory.tensors().items() if ".change." not in name)
    assert changes and memory.nbytes() >= 2 * changes + others


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


@pytest.mark.parametrize("tokens", [2, 4, 11, 16])
def test_saved_and_loaded_it_goes_on(model, tmp_path, tokens):
    memory = HopeCache(model.config, 2)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, 1:2] = False
    read(model, memory, random_ids(2, tokens), attention_mask=mask)
    memory.notes["topic"] = ["bees"]
    memory.save_pretrained(tmp_path, model=model)
    loaded = HopeCache.from_pretrained(tmp_path, model=model)
    assert_same_memory(loaded, memory, rtol=0, atol=0)
    assert loaded.notes == memory.notes == memory.clone().notes
    follow = random_ids(2, 9, seed=1)
    assert torch.equal(read(model, loaded, follow), read(model, memory, follow))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]


def test_a_pending_token_and_embeddings_are_saved(tmp_path):
    model = tiny_model(eos_token_id=None)
    memory = HopeCache(model.config)
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 3, 16, dtype=torch.float64), past_key_values=memory)
        model.generate(random_ids(1, 3), past_key_values=memory, max_new_tokens=4, do_sample=False)
    memory.save_pretrained(tmp_path)
    loaded = HopeCache.from_pretrained(tmp_path, model=model)
    assert loaded.rows[0].pending == memory.rows[0].pending is not None
    assert_same_memory(loaded, memory, rtol=0, atol=0)


def test_another_dtype_of_the_model_reads_it_and_another_model_does_not(model, tmp_path):
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 9))
    memory.save_pretrained(tmp_path)  # the model it was used with is the one it belongs to
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = tiny_model().to(dtype)
        with torch.inference_mode():
            loaded = HopeCache.from_pretrained(tmp_path, model=cast)
            loaded.select([0, 0])
        assert read(cast, loaded, random_ids(2, 9)).isfinite().all() and loaded.seen == [18, 18]
    with torch.no_grad():
        model.model(random_ids(1, 3), past_key_values=memory)
    memory.save_pretrained(tmp_path)
    assert HopeCache.from_pretrained(tmp_path, model=model).seen == [12]
    tuned = tiny_model()
    for parameter in tuned.parameters():
        parameter.data *= 1.005
    with pytest.raises(ValueError, match="other weights"):
        HopeCache.from_pretrained(tmp_path, model=tuned)
    with pytest.raises(ValueError, match="other weights"):
        HopeCache.from_pretrained(tmp_path, model=tiny_model(seed=1))
    with pytest.raises(ValueError, match="cms_periods"):
        HopeCache.from_pretrained(tmp_path, model=tiny_model(cms_periods=[4, 12, None]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "memory.json").unlink(), "holds no memory"),
        (lambda path: (path / "memory.json").write_text("{"), "damaged"),
        (lambda path: (path / "memory.json").write_text("[]"), "version"),
        (lambda path: _edit(path, format_version=2), "version 2"),
        (lambda path: _edit(path, rows=[{}]), "cannot be used"),
        (lambda path: (path / "memory.safetensors").write_bytes(b"nothing"), "damaged"),
        (
            lambda path: (path / "memory.safetensors").write_bytes((path / "memory.safetensors").read_bytes()[:-9]),
            "damaged",
        ),
    ],
)
def test_damaged_files_are_refused(model, tmp_path, damage, message):
    memory = HopeCache(model.config)
    read(model, memory, random_ids(1, 9))
    memory.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        HopeCache.from_pretrained(tmp_path, model=model)


def _edit(path, **fields):
    description = json.loads((path / "memory.json").read_text())
    (path / "memory.json").write_text(json.dumps(description | fields))
