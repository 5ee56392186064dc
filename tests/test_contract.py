"""The streaming contract: eight lines, for any configuration, length, cut, padding and learn mask."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_hope import HopeCache
from modeling_hope.self_modifying_memory import SelfModifyingMemory

from .conftest import BLOCKS, MEMORY, TINY, assert_same_memory, random_ids, stirred, tiny_model


CONFIGS = [
    {},
    {"cms_variant": "nested", "cms_nested_rate": 0.4, "cms_decay": 0.1},
    {"cms_variant": "independent", "cms_aggregation": "gated", "cms_optimizer": "momentum"},
    {"cms_variant": "independent", "cms_aggregation": "attention", "cms_fast_weights": "down_proj"},
    {"cms_optimizer": "dgd", "cms_learning_rates": 0.05, "layer_types": ["sliding_attention"] * 2, "sliding_window": 3},
    {
        "cms_levels_per_layer": [[1], [0, 2]],
        "layer_types": ["full_attention"] * 2,
        "sliding_window": None,
        "cms_surprise_threshold": 3.7,
    },
    {"cms_periods": [None], "cms_learning_rates": 0.1},
    {"attn_implementation": "eager"},
    {**MEMORY, "projection_chunk_size": 3},
    {**MEMORY, "memory_chunk_size": 2, "projection_chunk_size": 4, "memory_read": "chunk", "cms_optimizer": "momentum"},
    {**MEMORY, "memory_chunk_size": 6, "projection_chunk_size": 3, "adaptive_projections": ["k", "q"]},
    {
        "layer_types": ["hope_memory", "sliding_attention"],
        "memory_chunk_size": 5,
        "projection_chunk_size": 5,
        "memory_retention": "zero",
    },
    {**MEMORY, "memory_chunk_size": 4, "projection_chunk_size": 4, "cms_periods": [None], "cms_learning_rates": 0.1},
    {**BLOCKS["gemma"], "cms_optimizer": "momentum"},
    {**BLOCKS["neox"], "cms_variant": "nested"},
    BLOCKS["gpt2"],
    BLOCKS["smollm"],
    {**BLOCKS["phi"], "cms_norm_placement": ["post", "pre", "both"]},
    {**BLOCKS["phi"], **MEMORY, "layer_types": ["hope_memory", "sliding_attention"], "sliding_window": [None, 3]},
]


@functools.cache
def model_of(index, dtype=torch.float64):
    fields = dict(CONFIGS[index])
    attention = fields.pop("attn_implementation", None)
    model = stirred(tiny_model(seed=index, dtype=dtype, **fields))
    if attention:
        model.set_attn_implementation(attention)
    return model


TOLERANCE = {torch.float64: {"rtol": 1e-8, "atol": 1e-9}, torch.float32: {"rtol": 2e-3, "atol": 2e-4}}
configs = st.integers(0, len(CONFIGS) - 1)
dtypes = st.sampled_from([torch.float64, torch.float64, torch.float32])
seeds = st.integers(0, 10**6)
contract = settings(max_examples=40, deadline=None)


@torch.no_grad()
def read_alone(model, ids, learn):
    """Logits and memory of one row read in one call."""
    memory = HopeCache(model.config)
    logits = model(ids[None], past_key_values=memory, learn="all", learn_mask=learn[None]).logits[0]
    return logits, memory


def row_of(memory, row):
    one = memory.clone()
    one.select([row])
    return one


def used_slots(memory, model):
    """The memory without the unused slots of a padded batch of keys."""
    for layer, decoder in zip(memory.layers, model.model.layers, strict=True):
        for kind in ("mixer", "opened"):
            state, seen = getattr(layer, kind), memory.seen[0]
            if state is None:
                continue
            if isinstance(decoder.mixer, SelfModifyingMemory):
                begin = seen if kind == "mixer" else seen - seen % model.config.segment_length
                count = begin % decoder.mixer.chunk_size
            else:
                count = decoder.mixer.layout.count(seen)
            tensors = {n: t[:, :, :count] if n in state.growing else t for n, t in state.tensors.items()}
            setattr(layer, kind, type(state)(**tensors))
    return memory


@contract
@given(configs, seeds, st.integers(1, 24))
def test_1_causal(index, seed, cut):
    model, ids = model_of(index), random_ids(1, 25, seed=seed)
    other = torch.cat([ids[:, :cut], random_ids(1, 25 - cut, seed=seed + 1)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :cut], model(other).logits[:, :cut], **TOLERANCE[torch.float64])


@contract
@given(configs, dtypes, seeds, st.lists(st.integers(1, 11), min_size=1, max_size=9))
def test_2_split_invariant(index, dtype, seed, pieces):
    model, total = model_of(index, dtype), sum(pieces)
    ids = random_ids(1, total, seed=seed)
    learn = torch.rand(1, total, generator=torch.Generator().manual_seed(seed)) < 0.8
    whole, memory = read_alone(model, ids[0], learn[0])
    streamed, parts, start = HopeCache(model.config), [], 0
    with torch.no_grad():
        for piece in pieces:
            part = slice(start, start + piece)
            parts.append(
                model(ids[:, part], past_key_values=streamed, learn="all", learn_mask=learn[:, part]).logits[0]
            )
            start += piece
    torch.testing.assert_close(torch.cat(parts), whole, **TOLERANCE[dtype])
    assert_same_memory(streamed, memory, **TOLERANCE[dtype])


@pytest.mark.parametrize("index", range(len(CONFIGS)))
def test_2_token_by_token(index):
    model, ids = model_of(index), random_ids(1, 19)
    whole, memory = read_alone(model, ids[0], torch.ones(19, dtype=torch.bool))
    streamed = HopeCache(model.config)
    with torch.no_grad():
        parts = [model(ids[:, [i]], past_key_values=streamed, learn="all").logits[0] for i in range(19)]
    torch.testing.assert_close(torch.cat(parts), whole, **TOLERANCE[torch.float64])
    assert_same_memory(streamed, memory, **TOLERANCE[torch.float64])


@contract
@given(configs, dtypes, seeds, st.data())
def test_3_and_4_batch_isolated_and_padding_invariant(index, dtype, seed, data):
    """Rows of any lengths, padded anywhere, in several calls: each as if alone and unpadded."""
    model = model_of(index, dtype)
    batch = data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(seed)
    memory, streams = HopeCache(model.config, batch), [[] for _ in range(batch)]
    learns, logits = [[] for _ in range(batch)], [[] for _ in range(batch)]
    for call in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.integers(1, 12))
        ids = torch.randint(TINY["vocab_size"], (batch, width), generator=generator)
        mask = torch.rand(batch, width, generator=generator) < 0.7
        learn = torch.rand(batch, width, generator=generator) < 0.8
        if call == 0:
            mask[torch.arange(batch), torch.randint(width, (batch,), generator=generator)] = True
        with torch.no_grad():
            out = model(ids, attention_mask=mask, past_key_values=memory, learn="all", learn_mask=learn).logits
        assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
        for row in range(batch):
            streams[row].append(ids[row, mask[row]])
            learns[row].append(learn[row, mask[row]])
            logits[row].append(out[row, mask[row]])
    for row in range(batch):
        alone, expected = read_alone(model, torch.cat(streams[row]), torch.cat(learns[row]))
        torch.testing.assert_close(torch.cat(logits[row]), alone, **TOLERANCE[dtype])
        assert_same_memory(used_slots(row_of(memory, row), model), expected, **TOLERANCE[dtype])


@contract
@given(configs, seeds, st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_5_interleaved_streams_do_not_touch(index, seed, pieces):
    model = model_of(index)
    ids = random_ids(2, sum(pieces), seed=seed)
    learn = torch.ones(sum(pieces), dtype=torch.bool)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memories, parts, start = [HopeCache(model.config) for _ in range(2)], [[], []], 0
    with torch.no_grad():
        for piece in pieces:
            for stream in range(2):
                part = ids[[stream], start : start + piece]
                parts[stream].append(model(part, past_key_values=memories[stream]).logits[0])
                model(random_ids(1, 10, seed=seed + start), use_cache=False)
            start += piece
    for stream in range(2):
        torch.testing.assert_close(
            torch.cat(parts[stream]), read_alone(model, ids[stream], learn)[0], **TOLERANCE[torch.float64]
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("index", range(len(CONFIGS)))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [False, True])
def test_6_grad_modes_and_train_mode(index, mode, training):
    model, ids = model_of(index), random_ids(1, 21)
    expected, memory = read_alone(model, ids[0], torch.ones(21, dtype=torch.bool))
    streamed, parts = HopeCache(model.config), []
    model.train(training)
    try:
        for step, start in enumerate(range(0, 21, 5)):
            # Calls in other modes in between: what one leaves must serve the other.
            with mode() if step % 2 == 0 else torch.no_grad():
                part = ids[:, start : start + 5]
                parts.append(model(part, past_key_values=streamed, learn="all").logits[0].detach())
    finally:
        model.eval()
    torch.testing.assert_close(torch.cat(parts), expected, **TOLERANCE[torch.float64])
    assert_same_memory(streamed, memory, **TOLERANCE[torch.float64])
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in streamed.tensors().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_6_dtypes(dtype):
    model, ids = tiny_model(dtype=dtype), random_ids(2, 30)
    exact = tiny_model()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        output, expected = model(ids), exact(ids)
    assert output.logits.dtype == dtype
    error = (output.logits.double() - expected.logits).norm() / expected.logits.norm()
    assert error < {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-5}[dtype]
    memory = output.past_key_values
    changes = [t for name, t in memory.tensors().items() if ".change." in name]
    assert changes and all(change.dtype == torch.float32 for change in changes)
    assert memory.rows[0].updates == expected.past_key_values.rows[0].updates


@contract
@given(configs, seeds, st.integers(1, 30))
def test_7_cache_invariant(index, seed, length):
    model, ids = model_of(index), random_ids(2, length, seed=seed)
    with torch.no_grad():
        kept = model(ids, use_cache=True)
        dropped = model(ids, use_cache=False)
    assert dropped.past_key_values is None and kept.past_key_values is not None
    torch.testing.assert_close(kept.logits, dropped.logits, **TOLERANCE[torch.float64])


def test_8_what_cannot_be_right_is_refused():
    model, ids = model_of(0), random_ids(1, 5)
    memory = model(ids).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        memory.crop(-1)
    assert not memory.is_croppable
    with pytest.raises(ValueError, match="assisted generation"):
        model.generate(ids, assistant_model=model, max_new_tokens=2)
    with pytest.raises(ValueError, match="assisted generation"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2)
