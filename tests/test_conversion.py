"""What convert() does with any source: levels placed, files and choices, refusals. Families have a file of their own."""

import dataclasses
import json
import shutil
from argparse import ArgumentTypeError

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from modeling_hope import HopeConfig, HopeForCausalLM
from modeling_hope.cli.convert import layers, periods, rates
from modeling_hope.conversion import ConversionReport, Recipe, convert, export_transformer
from modeling_hope.conversion.families import FAMILIES
from modeling_hope.conversion.family import always

from .conftest import random_ids
from .stock_models import CONFIGS, stock_model


def llama(seed=0, **fields):
    torch.manual_seed(seed)
    options = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 128, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**options, **fields})).eval()


def test_strategies_place_the_mlps():
    source = llama()
    depth = convert(source, periods=(4, 8), check=False)
    assert depth.config.cms_levels_per_layer == [[0], [0], [1], [1]]
    stack = convert(source, strategy="stack", periods=(4, 8), check=False)
    assert stack.config.cms_levels_per_layer == [[0, 1]] * 4
    old = stack.model.layers[0].cms.level(1).up_proj.weight
    assert torch.equal(old, source.model.layers[0].mlp.up_proj.weight)
    added = stack.model.layers[0].cms.level(0)
    assert not added.down_proj.weight.any() and added.up_proj.weight.std() > 0
    some = convert(source, periods=(4,), learning_layers=[1, 3])
    assert some.config.cms_periods == [4, None] and some.config.cms_levels_per_layer == [[1], [0], [1], [0]]
    split = convert(source, strategy="split", periods=(4, 8, 16, 32, None), learning_rates=[0.1, 0.1, 0.2, 0.3, 0.0])
    assert split.config.cms_levels_per_layer == [[0, 1, 2, 3, 4]] * 4 and split.config.cms_variant == "independent"
    assert split.config.intermediate_size == [5, 5, 5, 5, 4]
    parts = [split.model.layers[1].cms.level(level).down_proj.weight for level in range(5)]
    assert torch.equal(torch.cat(parts, 1), source.model.layers[1].mlp.down_proj.weight)
    mixed = convert(source, strategy="split", periods=(4, 8), learning_layers=[2], learning_rates=[0.1, 0.2])
    assert mixed.config.cms_levels_per_layer == [[2], [2], [0, 1], [2]]
    assert mixed.config.intermediate_size == [12, 12, 24] and mixed.config.cms_learning_rates == [0.1, 0.2, 0.2]
    ids = random_ids(1, 17)
    for model in (depth, stack, some, split, mixed):  # and it learns
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
    report = ConversionReport.load(tmp_path / "out")
    assert set(report.fates) == set(source.state_dict()) and set(report.origins) == set(model.state_dict())
    assert report.memory_bytes["saved"] == 4 * 4 * 3 * 16 * 24 and report == model.conversion_report


def test_a_source_in_memory_is_left_as_it_is():
    source = llama().train()
    for parameter in source.parameters():
        parameter.data = parameter.data.bfloat16()
    model = convert(source, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.of("global").inv_freq.dtype == torch.float32
    assert source.dtype == torch.bfloat16 and source.training
    assert model.generation_config is not source.generation_config


def test_a_padding_id_below_zero_is_none():
    model = convert(llama(pad_token_id=-1))
    assert model.config.pad_token_id is None and model.config.converted_from["pad_token_id"] == -1


def test_tensors_that_hope_computes_are_ignored():
    source = llama()
    for layer in source.model.layers:
        layer.self_attn.register_module("rotary_emb", torch.nn.Module())
        layer.self_attn.rotary_emb.register_buffer("inv_freq", torch.ones(3))
    fates = convert(source, check=False).conversion_report.fates
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
    bert = BertForMaskedLM(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    out = tmp_path / "out"
    cases = [
        ((tmp_path / "empty", out), {}, "neither a directory"),
        ((half, out), {}, "lacks"),
        ((damaged, out), {}, "damaged"),
        ((odd, out), {}, "extra"),
        ((bert, out), {}, "encoder"),
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


def test_a_memory_in_the_place_of_attention():
    """It starts from the attention's projections, whatever layout they had, says that it is not equal, and learns."""
    for name in ("llama", "gpt2", "gpt_neox", "gemma3"):
        source = stock_model(CONFIGS[name])
        whole = convert(source, periods=(4, 8), check=False)
        model = convert(source, periods=(4, 8), mixer_layers=[1, 3])
        assert [kind == "hope_memory" for kind in model.config.layer_types] == [False, True, False, True]
        report = model.conversion_report
        assert report.comparison.relative > 1e-3 and any("layers 1, 3" in note for note in report.notes)
        assert set(report.origins) == {name for name, _ in model.named_parameters()}
        attention, memory = whole.model.layers[3].mixer, model.model.layers[3].mixer
        shared = whole.config.num_attention_heads // whole.config.num_key_value_heads
        for theirs, ours, times in (("q", "q", 1), ("k", "z", shared), ("v", "v", shared), ("o", "o", 1)):
            weight = getattr(attention, f"{theirs}_proj").weight
            if times > 1:
                weight = weight.unflatten(0, (-1, attention.head_dim)).repeat_interleave(times, 0).flatten(0, 1)
            assert torch.equal(getattr(memory, f"{ours}_proj").weight, weight)
        assert torch.equal(model.model.layers[2].mixer.q_proj.weight, whole.model.layers[2].mixer.q_proj.weight)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        with torch.no_grad():
            assert model(random_ids(2, 20)).past_key_values.rows[0].updates[0] == 5
        with pytest.raises(ValueError, match=r"layers \[1, 3\]"):
            export_transformer(model, "nowhere")
    as_wished = convert(
        source, periods=(4,), mixer_layers=[0], num_memory_heads=2, adaptive_projections=("k", "v", "eta")
    )
    assert as_wished.config.num_memory_heads == 2 and as_wished.model.layers[0].mixer.v_proj is None
    fates = as_wished.conversion_report.fates
    assert fates["model.layers.0.self_attn.v_proj.weight"].startswith("not needed: the memory")
    with pytest.raises(ValueError, match="mixer_layers"):
        convert(source, mixer_layers=[4])


def test_dtypes(tmp_path):
    half = llama().bfloat16()
    half.save_pretrained(tmp_path / "half")
    assert convert(half).dtype == convert(tmp_path / "half").dtype == torch.bfloat16
    wide = convert(tmp_path / "half", dtype=torch.float32)
    assert wide.dtype == torch.float32 and wide.conversion_report.comparison.relative <= 1e-4
    narrow = convert(llama(), tmp_path / "out", dtype=torch.float16)
    assert narrow.dtype == torch.float16 and 1e-6 < narrow.conversion_report.comparison.relative < 1e-2
    mixed = llama()
    mixed.model.layers.bfloat16()
    assert convert(mixed, dtype=torch.float32).conversion_report.comparison.relative <= 1e-4
    large = llama()
    with torch.no_grad():
        large.model.norm.weight[0] = 1e6
    for output in (None, tmp_path / "large"):
        with pytest.raises(ValueError, match=r"norm.weight' has values too large for torch.float16"):
            convert(large, output, dtype=torch.float16, check=False)
    learned = convert(llama(), tmp_path / "rates", dtype=torch.bfloat16, cms_learn_rates=True, periods=(4, 8))
    rates = [p for name, p in learned.named_parameters() if name.endswith("log_learning_rates")]
    assert len(rates) == 4 and all(p.dtype == torch.float32 for p in rates)
    torch.testing.assert_close(rates[0].exp(), torch.tensor([0.1]))


def test_choices_are_checked_before_anything_is_read():
    cases = [
        ({"strategy": "width"}, "strategy"),
        ({"periods": ()}, "periods"),
        ({"periods": (4, 6)}, "cms_periods"),
        ({"periods": (4, 8), "learning_rates": [0.1]}, "cms_learning_rates"),
        ({"learning_rates": -1.0}, "cms_learning_rates"),
        ({"window": 0}, "window"),
        ({"rope_length": 0}, "rope_length"),
        ({"attention_sinks": -1}, "attention_sinks"),
        ({"dtype": torch.int8}, "dtype"),
        ({"dtype": "wide"}, "dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"config": {"cms_variant": "nested"}}, "cms_variant"),
        ({"config": {"cms_wide": 1}}, "cms_wide"),
    ]
    for fields, message in cases:
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            Recipe(**fields)
    assert Recipe(dtype="bfloat16").dtype == Recipe(dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="hidden units"):
        convert(llama(), strategy="split", periods=[2**n for n in range(1, 27)])


def test_lists_on_the_command_line():
    assert layers("0,4-6") == (0, 4, 5, 6) and layers(" 3 ") == layers("3-3") == (3,)
    assert periods("512, never") == (512, None) and rates("0.1") == 0.1 and rates("0.1,0.2") == (0.1, 0.2)
    for read, texts in ((layers, ("3-1", "", "1-", "-1", "a")), (periods, ("", "4,", "-4")), (rates, ("", "0.1,x"))):
        for text in texts:
            with pytest.raises(ArgumentTypeError, match="give"):
                read(text)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tmp_path):
    source = llama(tie_word_embeddings=True)
    tensors = source.state_dict()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    source.config.save_pretrained(tmp_path / "tied")
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    fates = convert(tmp_path / "tied", check=False).conversion_report.fates
    assert fates["lm_head.weight"] == "not needed: the embeddings are tied"
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        convert(tmp_path / "tied", tmp_path / "out", check=False)
    del tensors["lm_head.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(17)
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm.weight' is \(17,\), and should be \(16,\)"):
        convert(tmp_path / "tied", tmp_path / "out")
    tensors["model.norm.weight"] = torch.ones(16)
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor for 'model.layers.2.mlp.up_proj.weight'"):
        convert(tmp_path / "tied", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_right_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    source, hope = llama(), convert(llama(), periods=(4, 8), check=False)
    described = FAMILIES["llama"]
    wrong = dataclasses.replace(described, fields={**described.fields, "residual_multiplier": always(0.5)})
    monkeypatch.setitem(FAMILIES, "llama", wrong)
    for arguments in (source,), (source, tmp_path / "out"):
        with pytest.raises(ValueError, match="converted model's logits differ"):
            convert(*arguments)
    hope.config.converted_from["rms_norm_eps"] = 0.5
    with pytest.raises(ValueError, match="exported model's logits differ"):
        export_transformer(hope, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path):
    chain = convert(llama(), strategy="stack", periods=(4, 8), check=False)
    unknown, foreign = (convert(llama(), check=False) for _ in range(2))
    unknown.config.converted_from["model_type"] = "bert"
    foreign.config = PreTrainedConfig.from_dict(foreign.config.to_dict())  # as code loaded from its directory has it
    foreign.config.model_type = "hope"
    cases = [
        (unknown, "'bert' in its config"),
        (foreign, "trust_remote_code"),
        (chain, "in a chain"),
        (llama(), "give a Hope model"),
        (
            HopeForCausalLM(HopeConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
            "converted_from",
        ),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            export_transformer(model, tmp_path / "out")
    grown = convert(llama(), periods=(4,), check=False)
    grown.resize_token_embeddings(44)
    export_transformer(grown, tmp_path / "out", dtype=torch.bfloat16)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.config.vocab_size == 44 and back.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not empty"):
        export_transformer(grown, tmp_path / "out")
