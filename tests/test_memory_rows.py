"""Rows of several memories joined into a batch, and taken out again."""

import pytest
import torch

from modeling_hope import HopeCache
from modeling_hope.fast_weights import NOTHING_LEARNED, LevelMemory, reading_weights
from modeling_hope.memory_rows import RowSize
from modeling_hope.row_stack import RowStack, stack_of

from .conftest import assert_same_memory, random_ids, read, tiny_model


every_mixer = pytest.mark.usefixtures("family")
TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}


def memories_of(model, lengths):
    """Memories that have read so many tokens, learning; one of 0 has read nothing."""
    memories = []
    for seed, length in enumerate(lengths):
        memory = HopeCache(model.config)
        if length:
            read(model, memory, random_ids(1, length, seed=seed), learn="all")
        memories.append(memory)
    return memories


@every_mixer
def test_rows_joined_read_on_as_alone(model):
    """Each at its own phase of chunks, segments and windows, some with nothing read; in and out again at any time."""
    size = RowSize(model)
    lengths = (17, 0, 3, 8)
    alone, joined = memories_of(model, lengths), model.join_memories(memories_of(model, lengths))
    for turn in range(2):
        for column in range(7 if turn else 5):
            ids = random_ids(len(alone), 1, seed=100 * turn + column)
            logits = read(model, joined, ids, learn="all")
            for row, memory in enumerate(alone):
                torch.testing.assert_close(read(model, memory, ids[row : row + 1], learn="all")[0], logits[row])
        taken = [model.take_memory(joined, row) for row in range(len(alone))]
        for memory, other in zip(taken, alone, strict=True):
            assert_same_memory(memory, other, **TOLERANCE)
            assert memory.columns == other.columns and memory.nbytes() <= size.at(memory.seen[0])
        # In another order, some joined among themselves before.
        alone = [alone[row] for row in (3, 1, 0, 2)]
        joined = model.join_memories([model.join_memories([taken[3], taken[1]]), *(taken[row] for row in (0, 2))])
    assert all(memory.rows[0].updates[0] >= 2 for memory in alone)


@every_mixer
def test_a_row_taken_out_is_saved_and_is_a_fork(model, tmp_path):
    first, second = memories_of(model, (5, 33))
    joined = model.join_memories([first, second])
    taken = model.take_memory(joined, 0)
    taken.save_pretrained(tmp_path, model)
    assert_same_memory(HopeCache.from_pretrained(tmp_path, model=model), first, rtol=0, atol=0)
    before = first.clone()
    read(model, joined, random_ids(2, 9), learn="all")
    for memory in (first, taken):
        assert_same_memory(memory, before, rtol=0, atol=0)


@every_mixer
def test_what_cannot_be_joined(model):
    with pytest.raises(ValueError, match="another model"):
        model.join_memories([HopeCache(model.config), HopeCache(tiny_model(hidden_size=32).config)])
    with pytest.raises(ValueError, match="offloading"):
        model.join_memories([HopeCache(model.config), HopeCache(model.config, offloading=True)])
    empty = model.join_memories([HopeCache(model.config), HopeCache(model.config, 2)])
    assert empty.batch_size == 3 and empty.seen == [0, 0, 0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"mlp_bias": True, "gated_mlp": False}, {"cms_fast_weights": "down_proj"}])
def test_a_stack_gives_what_each_row_alone_gives(dtype, fields):
    """Also for some rows of it, after updates, and after the slow weights were changed in place."""
    model = tiny_model(dtype=dtype, **fields)
    mlp, maps = model.model.layers[0].cms.level(0), model.config.learned_maps
    wide = torch.promote_types(dtype, torch.float32)

    def learned(seed):
        torch.manual_seed(seed)
        return LevelMemory({name: torch.randn_like(getattr(mlp, name).weight, dtype=wide) for name in maps})

    memories, stack = [learned(0), NOTHING_LEARNED, learned(1), learned(2)], RowStack()
    for turn in range(4):
        if turn == 1:
            memories[2] = learned(3)
        if turn == 2:
            memories[0], memories[1] = LevelMemory(memories[0].change, gradient=memories[0].change), learned(4)
        if turn == 3:
            mlp.down_proj.weight.mul_(2)
        stack.refresh(mlp, memories, maps, dtype)
        for rows in (None, [3, 1]):
            chosen = memories if rows is None else [memories[row] for row in rows]
            each = reading_weights(mlp, chosen, maps, merge=True)
            for name in ("up_proj", "down_proj"):
                module = getattr(mlp, name)
                x = torch.randn(len(chosen), 1, module.in_features, dtype=dtype)
                torch.testing.assert_close(stack.linear(name, module, x, rows), each.linear(name, module, x))


def test_a_stack_is_made_where_rows_differ_and_stay():
    first, second = LevelMemory({"up_proj": torch.ones(1)}), LevelMemory({"up_proj": torch.ones(1)})
    stacks = {}
    for memories, rows in (
        ([first], [0]),
        ([first] * 4, range(4)),
        ([first, second] * 2, [0]),
        ([NOTHING_LEARNED] * 2, [0, 1]),
    ):
        assert stack_of(stacks, (0, 0), memories, rows) is None and not stacks
    assert stack_of(stacks, (0, 0), [first, second], [0, 1]) is None
    assert stack_of(stacks, (0, 0), [first, second], [0, 1]) is stacks[0, 0]
