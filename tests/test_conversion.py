"""Pretrained Llamas become Hope models with the same logits."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from modeling_hope import HopeForCausalLM
from modeling_hope.conversion import convert

from .conftest import random_ids


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


def llama(seed=0, **fields):
    torch.manual_seed(seed)
    options = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 128, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**options, **fields})).eval()


@pytest.mark.parametrize("strategy", ["depth", "stack"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("odd", [False, True])
def test_logits_and_greedy_tokens_equal_the_source(strategy, rope, odd):
    options = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True} if odd else {}
    source = llama(rope_parameters=ROPES[rope], **options)
    with torch.no_grad():  # biases start at zero
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = convert(source, strategy=strategy, periods=(4, 8, 16))
    ids = random_ids(3, 20)
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[1, :7] = mask[2, :3] = 0
    with torch.no_grad():
        given, expected = model(ids, attention_mask=mask, learn="off").logits, source(ids, attention_mask=mask).logits
    difference = (given - expected).abs()[mask.bool()].max() / (expected.max() - expected.min())
    assert difference <= 1e-4 and model.conversion_report.logits["relative"] <= 1e-4
    options = {"attention_mask": mask, "max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    expected = source.generate(ids, **options)
    assert model.generate(ids, learn="off", **options).tolist() == expected.tolist()
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training


def test_strategies_place_the_mlps():
    source = llama()
    depth = convert(source, periods=(4, 8))
    assert depth.config.cms_levels_per_layer == [[0], [0], [1], [1]]
    stack = convert(source, strategy="stack", periods=(4, 8))
    assert stack.config.cms_levels_per_layer == [[0, 1]] * 4
    old = stack.model.layers[0].cms.level(1).up_proj.weight
    assert torch.equal(old, source.model.layers[0].mlp.up_proj.weight)
    added = stack.model.layers[0].cms.level(0)
    assert not added.down_proj.weight.any() and added.up_proj.weight.std() > 0
    some = convert(source, periods=(4,), learning_layers=[1, 3])
    assert some.config.cms_periods == [4, None] and some.config.cms_levels_per_layer == [[1], [0], [1], [0]]
    ids = random_ids(1, 17)
    for model in (depth, stack, some):  # and it learns
        with torch.no_grad():
            memory = model(ids).past_key_values
        assert memory.rows[0].updates[0] == 4


def test_a_directory_with_shards_and_tokenizer(tmp_path):
    source = llama()
    source.generation_config.temperature = 0.7
    source.generation_config.do_sample = True
    source.save_pretrained(tmp_path / "in", max_shard_size="8KB")
    words = {f"w{i}": i for i in range(40)}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
        )
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template="{{ messages }}")
    tokenizer.save_pretrained(tmp_path / "in")
    model = convert(tmp_path / "in", tmp_path / "out", window=32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, HopeForCausalLM) and loaded.config.sliding_window == 32
    assert loaded.generation_config.temperature == 0.7
    ids = random_ids(1, 30)
    with torch.no_grad():
        assert torch.equal(loaded(ids, learn="off").logits, model(ids, learn="off").logits)
        torch.testing.assert_close(loaded(ids, learn="off").logits, source(ids).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert set(report["tensors"]) == set(source.state_dict()) and report["memory_bytes_per_row"] == 4 * 4 * 3 * 16 * 24


def test_a_source_in_memory_is_left_as_it_is():
    source = llama().train()
    for parameter in source.parameters():
        parameter.data = parameter.data.bfloat16()
    model = convert(source, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert source.dtype == torch.bfloat16 and source.training
    assert model.generation_config is not source.generation_config


def test_tensors_that_hope_computes_are_ignored():
    source = llama()
    for layer in source.model.layers:
        layer.self_attn.register_module("rotary_emb", torch.nn.Module())
        layer.self_attn.rotary_emb.register_buffer("inv_freq", torch.ones(3))
    fates = convert(source, check=False).conversion_report.tensors
    assert fates["model.layers.0.self_attn.rotary_emb.inv_freq"].startswith("not needed")


def test_bad_sources_are_refused_and_nothing_is_written(tmp_path):
    llama().save_pretrained(tmp_path / "good", max_shard_size="8KB")
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "good", half)
    next(half.glob("*.safetensors")).unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    damaged = tmp_path / "damaged"
    llama().save_pretrained(damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-5])
    odd = llama()
    odd.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    out = tmp_path / "out"
    cases = [
        ((tmp_path / "empty", out), {}, "neither a directory"),
        ((half, out), {}, "lacks"),
        ((damaged, out), {}, "damaged"),
        ((odd, out), {}, "extra"),
        ((gpt, out), {}, "gpt2"),
        ((tmp_path / "good", tmp_path / "full"), {}, "not empty"),
        ((tmp_path / "good", out), {"strategy": "width"}, "strategy"),
        ((tmp_path / "good", out), {"periods": ()}, "periods"),
        ((tmp_path / "good", out), {"learning_layers": [9]}, "learning_layers"),
        ((tmp_path / "good", out), {"cms_variant": "independent"}, "cms_variant"),
        ((tmp_path / "good", out), {"periods": (4, 8), "learning_rates": [0.1]}, "cms_learning_rates"),
    ]
    for arguments, options, message in cases:
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            convert(*arguments, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "empty", "full", "good", "half"]
