"""What memories have learned, in the weights of a copy of their model."""

import copy

import pytest
import torch
from transformers.utils import logging

from modeling_hope import HopeCache, HopeForCausalLM, HopeSession, consolidate

from .conftest import random_ids, tiny_model


pytestmark = pytest.mark.usefixtures("family")


def memory_of(model, seed, tokens=16):
    """Of whole periods: nothing waits to be learned."""
    memory = HopeCache(model.config)
    with torch.no_grad():
        model(random_ids(1, tokens, seed=seed), past_key_values=memory)
    return memory


def without_levels(memory, levels=(0, 1, 2)):
    memory = memory.clone()
    memory.reset(levels=levels)
    return memory


@torch.no_grad()
def onward(model, memory, seed=9):
    return model(random_ids(1, 7, seed=seed), past_key_values=memory.clone(), learn="off").logits


def changes(memory, level=0, layer=0, row=0):
    return memory.layers[layer].levels[level][row].change


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fields", [{}, {"cms_variant": "nested"}, {"cms_fast_weights": "down_proj"}])
def test_one_memory_at_strength_1_gives_its_logits(family, dtype, fields, tmp_path):
    model = tiny_model(dtype=dtype, **fields)
    before = copy.deepcopy(model.state_dict())
    memory = memory_of(model, 1)
    consolidated = consolidate(model, memory)
    assert isinstance(consolidated, HopeForCausalLM) and consolidated.dtype == dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = onward(model, memory)
    assert torch.equal(onward(consolidated, without_levels(memory)), expected)
    assert not torch.equal(onward(model, without_levels(memory)), expected)
    # It saves, loads and learns on as any model.
    consolidated.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in consolidated.state_dict().items())
    assert memory_of(loaded, 2).rows[0].updates[0] > 0
    with pytest.raises(ValueError, match="other weights"):
        consolidate(consolidated, memory)


def test_under_inference_mode_it_makes_a_model_that_learns(family):
    model = tiny_model()
    with torch.inference_mode():
        grown = consolidate(model, memory_of(model, 1))
    assert memory_of(grown, 2).rows[0].segments > 0


def test_levels_strengths_and_weighted_means(family):
    model = tiny_model()
    memories = [memory_of(model, seed) for seed in (1, 2, 3)]
    slow = model.model.layers[0].cms

    def written(level, **kwargs):
        copied = consolidate(model, memories, **kwargs).model.layers[0].cms.level(level)
        return copied.up_proj.weight - slow.level(level).up_proj.weight

    def mean(level, shares):
        return sum(share * changes(m, level)["up_proj"] for share, m in zip(shares, memories, strict=True))

    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(written(0), mean(0, [1 / 3] * 3), **tolerance)
    torch.testing.assert_close(written(0, strength=0.25), mean(0, [1 / 12] * 3), **tolerance)
    torch.testing.assert_close(written(1, strength={0: 0.5, 1: -1}), -mean(1, [1 / 3] * 3), **tolerance)
    torch.testing.assert_close(written(0, memory_weights=[2, 0, 6]), mean(0, [0.25, 0, 0.75]), **tolerance)
    assert not written(1, strength={0: 1}).any() and written(0, strength={0: 1}).any()
    # Rows of one memory count as memories; one that has learned nothing counts too.
    pair = HopeCache(model.config, 2)
    with torch.no_grad():
        ids, mask = random_ids(2, 16, seed=1), torch.ones(2, 16)
        mask[1, 3:] = 0
        model(ids, attention_mask=mask, past_key_values=pair)
    halved = consolidate(model, pair).model.layers[0].cms.level(0).up_proj.weight - slow.level(0).up_proj.weight
    torch.testing.assert_close(halved, changes(pair)["up_proj"] / 2, **tolerance)


def test_what_cannot_be_is_refused(family):
    model = tiny_model()
    memory = memory_of(model, 1)
    for kwargs, named in (
        ({"strength": {3: 1.0}}, "strength"),
        ({"strength": {}}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"memory_weights": [1, 1]}, "memory_weights"),
        ({"memory_weights": [0]}, "memory_weights"),
        ({"memory_weights": [-1.0]}, "memory_weights"),
    ):
        with pytest.raises(ValueError, match=f"`{named}`"):
            consolidate(model, memory, **kwargs)
    for memories in ("memory", HopeSession):
        with pytest.raises(ValueError, match="`memories` is a"):
            consolidate(model, memories)
    with pytest.raises(ValueError, match=r"model\.config"):
        HopeCache(model)
    with pytest.raises(ValueError, match="empty"):
        consolidate(model, [])
    with pytest.raises(ValueError, match="another model"):
        consolidate(tiny_model(cms_periods=[4, 12, None]), memory)
    with pytest.raises(ValueError, match="other weights"):
        consolidate(tiny_model(seed=1), memory)
    # A cast is the same model; what was learned in float64 may be consolidated into it.
    assert consolidate(tiny_model().float(), memory).dtype == torch.float32
    adapted = tiny_model()
    adapted.model.layers[1].cms.level(0).up_proj = torch.nn.Sequential(adapted.model.layers[1].cms.level(0).up_proj)
    with pytest.raises(ValueError, match=r"layers\.1.*Sequential"):
        consolidate(adapted, HopeCache(adapted.config))


def test_what_rounding_loses_is_told(family, caplog):
    model = tiny_model(dtype=torch.bfloat16, cms_learning_rates=[1e-4, 1e-4, 0])
    memory = memory_of(model, 1)
    logging.enable_propagation()
    try:
        consolidate(model, memory)
    finally:
        logging.disable_propagation()
    assert "% of the change" in caplog.text
