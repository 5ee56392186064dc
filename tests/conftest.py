import pytest
import torch

from modeling_hope import HopeConfig, HopeForCausalLM


TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "sliding_window": 6,
    "attention_sinks": 2,
    "layer_types": ["full_attention", "sliding_attention"],
    "cms_periods": [4, 8, None],
    "cms_learning_rates": [0.7, 0.4, 0.0],
    "initializer_range": 0.2,
}


MEMORY = {"layer_types": ["hope_memory"] * 2, "sliding_window": None, "num_memory_heads": 2, "memory_chunk_size": 3}
FAMILIES = {"attention": {}, "memory": MEMORY, "hybrid": {**MEMORY, "layer_types": ["hope_memory", "full_attention"]}}
_family = {}


@pytest.fixture(params=FAMILIES)
def family(request):
    """Runs a test for each kind of mixer: `tiny_config` builds what this says."""
    _family.update(FAMILIES[request.param])
    yield request.param
    _family.clear()


def tiny_config(**fields):
    return HopeConfig(**{**TINY, **_family, **fields})


def tiny_model(seed=0, dtype=torch.float64, **fields):
    """A small model with weights large enough for learning to show."""
    torch.manual_seed(seed)
    return HopeForCausalLM(tiny_config(**fields)).to(dtype).eval()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def random_ids(*shape, seed=0, vocab_size=TINY["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_same_memory(memory, other, **tolerance):
    """Same tensors, up to rounding, and the same records."""
    ours, theirs = memory.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for row, other_row in zip(memory.rows, other.rows, strict=True):
        for field in ("pairs", "updates", "segments", "skipped", "nonfinite", "pending"):
            assert getattr(row, field) == getattr(other_row, field), field
        assert row.losses == pytest.approx(other_row.losses, rel=tolerance.get("rtol"), abs=tolerance.get("atol"))
