"""Rows of several memories joined into a batch, and taken out again."""

import pytest
import torch

from modeling_hope import HopeCache
from modeling_hope.memory_rows import RowSize, join_rows, take_row

from .conftest import assert_same_memory, random_ids, read, tiny_model


pytestmark = pytest.mark.usefixtures("family")
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


def test_rows_joined_read_on_as_alone(model):
    """Each at its own phase of chunks, segments and windows, some with nothing read; in and out again at any time."""
    size = RowSize(model)
    lengths = (17, 0, 3, 8)
    alone, joined = memories_of(model, lengths), join_rows(memories_of(model, lengths), model)
    for turn in range(2):
        for column in range(7 if turn else 5):
            ids = random_ids(len(alone), 1, seed=100 * turn + column)
            logits = read(model, joined, ids, learn="all")
            for row, memory in enumerate(alone):
                torch.testing.assert_close(read(model, memory, ids[row : row + 1], learn="all")[0], logits[row])
        taken = [take_row(joined, row, model) for row in range(len(alone))]
        for memory, other in zip(taken, alone, strict=True):
            assert_same_memory(memory, other, **TOLERANCE)
            assert memory.columns == other.columns and memory.nbytes() <= size.at(memory.seen[0])
        # In another order, some joined among themselves before.
        alone = [alone[row] for row in (3, 1, 0, 2)]
        joined = join_rows([join_rows([taken[3], taken[1]], model), *(taken[row] for row in (0, 2))], model)
    assert all(memory.rows[0].updates[0] >= 2 for memory in alone)


def test_a_row_taken_out_is_saved_and_is_a_fork(model, tmp_path):
    first, second = memories_of(model, (5, 33))
    joined = join_rows([first, second], model)
    taken = take_row(joined, 0, model)
    taken.save_pretrained(tmp_path, model)
    assert_same_memory(HopeCache.from_pretrained(tmp_path, model=model), first, rtol=0, atol=0)
    before = first.clone()
    read(model, joined, random_ids(2, 9), learn="all")
    for memory in (first, taken):
        assert_same_memory(memory, before, rtol=0, atol=0)


def test_what_cannot_be_joined(model):
    with pytest.raises(ValueError, match="another model"):
        join_rows([HopeCache(model.config), HopeCache(tiny_model(hidden_size=32).config)], model)
    with pytest.raises(ValueError, match="offloading"):
        join_rows([HopeCache(model.config), HopeCache(model.config, offloading=True)], model)
    empty = join_rows([HopeCache(model.config), HopeCache(model.config, 2)], model)
    assert empty.batch_size == 3 and empty.seen == [0, 0, 0]
