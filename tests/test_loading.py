"""Dtypes, devices, vocabularies and copies: what a model and its memory go through besides reading."""

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from modeling_hope import HopeCache, HopeForCausalLM, HopeModel

from .conftest import MEMORY, assert_same_memory, random_ids, tiny_config, tiny_model


LOW = [torch.bfloat16, torch.float16]
STATIC = {**MEMORY, "adaptive_projections": ["k", "v"]}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("fields", [MEMORY, STATIC], ids=["adaptive", "static"])
def test_rates_and_decays_stay_in_float32(tmp_path, dtype, fields):
    """At its start a decay keeps 0.9995; rounded to bfloat16, 1 - alpha is off by 2%, and no small step moves it."""
    exact = tiny_model(dtype=torch.float32, cms_learn_rates=True, cms_learning_rates=0.3, **fields)
    exact.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    names = ("alpha_proj", "eta_proj", "memories.momentum", "log_learning_rates")
    assert kept == {name for name in exact.state_dict() if any(part in name for part in names)} and kept
    assert all(torch.equal(model.state_dict()[name], exact.state_dict()[name]) for name in kept)
    assert model.dtype == dtype
    cast = copy.deepcopy(model).to(dtype)  # the user's own cast is whole
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    ids = random_ids(2, 21)
    with torch.no_grad():
        expected = exact(ids, learn="off").logits
        for low in (model, cast):
            output, logits = low(ids), low(ids, learn="off").logits
            assert output.logits.dtype == logits.dtype == dtype and output.logits.isfinite().all()
            error = (logits.float() - expected).norm() / expected.norm()
            assert error < {torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    model.train()(ids, labels=ids).loss.backward()
    assert all(
        parameter.grad.dtype == parameter.dtype for parameter in model.parameters() if parameter.grad is not None
    )
    # A memory is the same model's, however that was brought to the dtype.
    output.past_key_values.save_pretrained(tmp_path / "memory")
    for same in (model, cast, exact):
        assert HopeCache.from_pretrained(tmp_path / "memory", model=same).seen == [21, 21]
    with torch.no_grad():
        cast.model.norm.weight[0] *= 1.05
    with pytest.raises(ValueError, match="other weights"):
        HopeCache.from_pretrained(tmp_path / "memory", model=cast)
    cast.save_pretrained(tmp_path / "low")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "low", dtype="auto").dtype == dtype


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("offloaded", ["first", "last", "all"])
def test_an_offloaded_model_reads_as_the_model_and_does_not_learn(tmp_path, offloaded):
    whole, ids = tiny_model(dtype=torch.float32), random_ids(2, 9)
    whole.save_pretrained(tmp_path)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    on_disk = {"first": parts[1:2], "last": parts[2:3], "all": parts[:4] + parts[5:]}[offloaded]
    places = {part: "disk" if part in on_disk else "cpu" for part in parts}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    with torch.no_grad():
        learned = whole(random_ids(2, 8, seed=1)).past_key_values
        open_segment = whole(random_ids(2, 10, seed=1)).past_key_values
        for memory in (HopeCache(whole.config, 2), learned):
            ours, theirs = memory.clone(), memory.clone()
            expected = whole(ids, attention_mask=mask, past_key_values=theirs, learn="off").logits
            logits = model(ids, attention_mask=mask, past_key_values=ours, learn="off").logits
            torch.testing.assert_close(logits, expected, **CLOSE)
            assert_same_memory(ours, theirs, **CLOSE)
        for memory, learn in ((learned, "all"), (open_segment, "off")):
            before = memory.clone()
            with pytest.raises(ValueError, match="`device_map` has offloaded a level that learns"):
                model(ids, past_key_values=memory, learn=learn)
            assert_same_memory(memory, before, rtol=0, atol=0)
        options = {"max_new_tokens": 4, "learn": "off"}
        assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))
        ours.save_pretrained(tmp_path / "memory", model=model)
    for loader in (model, whole):
        loaded = HopeCache.from_pretrained(tmp_path / "memory", model=loader)
        assert_same_memory(loaded, ours, rtol=0, atol=0)
        assert {tensor.device.type for tensor in loaded.tensors().values()} == {"cpu"}


def test_an_update_that_waits_is_not_applied_by_an_offloaded_model(tmp_path):
    """Its learned rate lies on the disk."""
    fields = {"cms_learn_rates": True, "cms_learning_rates": 0.3, "cms_periods": [4, 8, 16]}
    whole = tiny_model(dtype=torch.float32, **fields)
    whole.save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        memory = whole(random_ids(1, 4)).past_key_values
        before = memory.clone()
        with pytest.raises(ValueError, match="device_map"):
            model(random_ids(1, 4), past_key_values=memory, learn="off")
    assert_same_memory(memory, before, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_is_resized(tmp_path, tied):
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=tied, pad_token_id=3)
    ids = random_ids(1, 9) % 25
    with torch.no_grad():
        old, expected = model(ids).past_key_values, model(ids, learn="off").logits
    old.save_pretrained(tmp_path / "memory")
    for size, multiple, rows in ((50, None, 50), (30, None, 30), (45, 16, 48)):
        resized = copy.deepcopy(model)
        table = resized.resize_token_embeddings(size, pad_to_multiple_of=multiple)
        assert table is resized.get_input_embeddings() is resized.model.embed_tokens
        assert resized.get_output_embeddings() is resized.lm_head and len(table.weight) == rows
        assert (resized.lm_head.weight is table.weight) == tied
        assert resized.config.vocab_size == resized.model.config.vocab_size == rows
        with torch.no_grad():
            logits = resized(ids, learn="off", labels=ids).logits
            assert logits.shape[-1] == rows
            torch.testing.assert_close(logits[..., :30], expected[..., :30])
            memory = HopeCache(resized.config)
            assert resized.generate(ids, past_key_values=memory, max_new_tokens=6, learn="all").max() < rows
            if rows > 40:
                resized(torch.full((1, 4), rows - 1), past_key_values=memory)
            with pytest.raises(ValueError, match=f"vocab_size` is 40 in the memory and {rows} in the model"):
                resized(ids, past_key_values=old)
        with pytest.raises(ValueError, match=f"vocab_size` is 40 in the memory and {rows} in the model"):
            HopeCache.from_pretrained(tmp_path / "memory", model=resized)
        resized.save_pretrained(tmp_path / "resized")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in resized.state_dict().items())
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with pytest.raises(ValueError, match="pad_token_id"):
        model.resize_token_embeddings(3)
    assert model.config.vocab_size == 40
    table = torch.nn.Embedding(40, 16)
    model.set_input_embeddings(table)
    assert model.model.embed_tokens is table


def test_sizes_that_do_not_match_are_refused_or_left_to_be_trained(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=44)
    other, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, vocab_size=44, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert other(random_ids(1, 9)).logits.isfinite().all()


@pytest.mark.usefixtures("family")
def test_copies_of_a_model_and_forks_of_a_memory():
    model, ids = tiny_model(), random_ids(1, 21)
    with torch.no_grad():
        expected = model(ids)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)):
            assert torch.equal(other(ids).logits, expected.logits)
        memory = expected.past_key_values
        memory.notes["said"] = ["so"]
        forks = copy.copy(memory), copy.deepcopy(memory), copy.deepcopy(expected).past_key_values
        for fork in forks:
            assert fork.nbytes() == memory.nbytes()
            assert all(fork.tensors()[name] is tensor for name, tensor in memory.tensors().items())
            fork.notes["said"].append("more")
            model(ids, past_key_values=fork)
    assert memory.seen == [21] and memory.notes == {"said": ["so"]}
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(memory)


def test_what_transformers_asks_of_every_model():
    config = tiny_config()
    model = HopeForCausalLM(config)
    assert model.get_decoder() is model.base_model is model.model and model.model.get_decoder() is model.model
    embeddings = model.get_input_embeddings().weight.numel()
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == embeddings
    assert isinstance(AutoModel.from_config(config), HopeModel)
    low = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert low(random_ids(1, 9)).logits.dtype == torch.bfloat16
    assert type(config).from_dict(config.to_diff_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
