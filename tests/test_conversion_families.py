"""Every family, by every strategy: the same logits and tokens as Transformers' own class, and the same weights back."""

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_hope import HopeCache, HopeForCausalLM, consolidate
from modeling_hope.conversion import convert, export_transformer
from modeling_hope.conversion.families import FAMILIES
from modeling_hope.conversion.strategy import STRATEGIES

from .conftest import random_ids
from .stock_models import BIASES, CONFIGS, LONGROPE, SHARED, TRAINED, WINDOW, stock_model


PERIODS = (4, 8, 16)
LONGER = TRAINED + 8  # than any window, and than what was trained on


def padded_batch(width):
    ids, mask = random_ids(3, width), torch.ones(3, width, dtype=torch.int64)
    mask[1, : width // 3] = mask[2, : width // 5] = 0
    return ids, mask


@torch.no_grad()
def answers(model, width=LONGER, new=64):
    """Logits and greedy tokens in a padded batch, past windows and past the trained context."""
    ids, mask = padded_batch(width)
    learn, positions = {"learn": "off"}, {}
    if not isinstance(model, HopeForCausalLM):  # which counts padding where it is not told
        learn, positions = {}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    logits = model(ids, attention_mask=mask, **learn, **positions).logits[mask.bool()]
    tokens = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **learn
    )
    return logits, tokens.tolist()


def assert_same(expected, given):
    assert (given[0] - expected[0]).abs().max() <= 1e-4 * (expected[0].max() - expected[0].min())
    assert given[1] == expected[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_the_source_s(name):
    source = stock_model(CONFIGS[name])
    expected = answers(source)
    for strategy in STRATEGIES:
        model = convert(source, strategy=strategy, periods=PERIODS, check=False)
        assert_same(expected, answers(model))
        memory = HopeCache(model.config)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            model(random_ids(1, 16), past_key_values=memory, learn="all")
        assert memory.rows[0].updates == (4, 2, 1)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("strategy", ["depth", "split"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_way_back_gives_the_same_weights(name, strategy, tmp_path):
    """And the same config, so that there are no logits to compare."""
    source = stock_model(CONFIGS[name])
    convert(source, tmp_path / "hope", strategy=strategy, periods=PERIODS, check=False, max_shard_size="8KB")
    export_transformer(tmp_path / "hope", tmp_path / "back", check=False, max_shard_size="9KB")
    back, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is type(source) and not any(report.values())
    given, expected = back.state_dict(), source.state_dict()
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype and torch.equal(given[name], tensor)
    ours, theirs = back.config.to_dict(), source.config.to_dict()
    assert {key for key in ours if ours[key] != theirs.get(key)} <= {"architectures", "dtype", "_name_or_path"}


@pytest.mark.parametrize("strategy", ["depth", "split"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3"])
def test_what_memories_learned_can_be_exported(name, strategy, tmp_path):
    source = stock_model(CONFIGS[name])
    model = convert(source, strategy=strategy, periods=PERIODS, check=False)
    memory = HopeCache(model.config, 2)
    with torch.no_grad():
        model(random_ids(2, 20), past_key_values=memory, learn="all")
    learned = consolidate(model, memory)
    found = export_transformer(learned, tmp_path / "back")
    assert found.relative <= 1e-4 and found.greedy_agreement == found.greedy_tokens == 64
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert (back(ids).logits - source(ids).logits).abs().max() > 1e-3


def test_every_field_of_a_family_s_config_is_spoken_of():
    """A field that Transformers adds has to be thought about."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    common |= {"pad_token_id", "bos_token_id", "eos_token_id"}
    for config in CONFIGS.values():
        family = FAMILIES[config.model_type]
        unspoken = {field.name for field in dataclasses.fields(config)} - common - family.fields_known()
        assert not unspoken, (config.model_type, unspoken)
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {**LONGROPE, "short_factor": [1.0, 1.1, 1.3], "long_factor": [2.0, 3.0, 5.0]},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_every_kind_of_rope(rope, tmp_path):
    parameters = {"rope_type": rope, "rope_theta": 500.0, **ROPES[rope]}
    source = stock_model(LlamaConfig(**SHARED, head_dim=6, rope_parameters=dict(parameters)))
    by_length = rope in ("dynamic", "longrope")
    model = convert(source, periods=PERIODS, check=by_length)
    assert any("length" in note for note in model.conversion_report.notes) == by_length
    if not by_length:
        assert_same(answers(source), answers(model))
        return
    assert model.conversion_report.comparison.relative <= 1e-4
    assert_same(answers(source, TRAINED - 12, new=12), answers(model, TRAINED - 12, new=12))
    # Longer texts are read by other angles: those of one length, which has to be given.
    ids, expected_answers = random_ids(2, LONGER), answers(source) if rope == "longrope" else None
    for strategy in ("depth", "split"):
        longer = convert(source, strategy=strategy, periods=PERIODS, rope_length=LONGER, check=expected_answers is None)
        with torch.no_grad():
            expected, given = source(ids).logits, longer(ids, learn="off").logits
            assert (given - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
            assert (given - model(ids, learn="off").logits).abs().max() > 1e-3
        if expected_answers is None:
            assert longer.conversion_report.comparison.relative <= 1e-4
        else:
            assert_same(expected_answers, answers(longer))
        export_transformer(longer, tmp_path / strategy)
    assert set(ROPES) | {"proportional"} >= set(ROPE_INIT_FUNCTIONS)


def test_phi3_with_longrope_in_a_part_of_each_head(tmp_path):
    rope = {**LONGROPE, "partial_rotary_factor": 0.5}
    fields = {**SHARED, "hidden_size": 32, "max_position_embeddings": 4 * TRAINED}
    config = Phi3Config(**fields, original_max_position_embeddings=TRAINED, rope_parameters=rope)
    source = stock_model(config)
    model = convert(source, periods=PERIODS)
    assert_same(answers(source, TRAINED - 12, new=12), answers(model, TRAINED - 12, new=12))
    longer = convert(source, periods=PERIODS, rope_length=2 * TRAINED)
    assert_same(answers(source), answers(longer))
    export_transformer(longer, tmp_path / "back")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.rope_parameters == config.rope_parameters


def test_a_part_of_each_head_is_turned_only_where_the_family_s_class_does():
    part = {"partial_rotary_factor": 0.5}
    for config in (
        LlamaConfig(**SHARED, rope_parameters={"rope_type": "default", "rope_theta": 100.0, **part}),
        LlamaConfig(**SHARED, rope_parameters={"rope_type": "proportional", "rope_theta": 100.0, **part}),
        Gemma3TextConfig(**SHARED, head_dim=8, sliding_window=WINDOW, **part),
    ):
        source = stock_model(config)
        assert_same(answers(source, new=16), answers(convert(source, periods=PERIODS), new=16))
    fails = LlamaConfig(**SHARED, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0, **part})
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5 with rope_type 'linear'"):
        convert(stock_model(fails))


def test_windows_that_are_added_leave_native_ones_alone():
    source = stock_model(CONFIGS["gemma3"])
    model = convert(source, periods=PERIODS, window=20, attention_sinks=3)
    assert model.config.layer_windows == [WINDOW, WINDOW, 20, WINDOW] and model.config.layer_sinks == [0, 0, 3, 0]
    ids = random_ids(1, 20)
    with torch.no_grad():
        expected, given = source(ids).logits, model(ids, learn="off").logits
    assert (given - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
    everywhere = convert(stock_model(CONFIGS["mistral"]), periods=PERIODS, window=20)
    assert (everywhere.config.sliding_window, everywhere.config.attention_sinks) == (WINDOW, 0)
    added = convert(stock_model(CONFIGS["llama"]), periods=PERIODS, window=20)
    assert (added.config.sliding_window, added.config.attention_sinks) == (20, 4)


def test_what_a_family_needs_and_hope_has_not_is_refused_by_name():
    cases = [
        (Gemma2Config(**SHARED, head_dim=6, use_bidirectional_attention=True), "use_bidirectional_attention"),
        (GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True), "add_cross_attention"),
    ]
    for config, field in cases:
        with pytest.raises(ValueError, match=field):
            convert(stock_model(config))
    # And so is a field that a Transformers to come may add, where it is set to something.
    family, config = FAMILIES["llama"], LlamaConfig(**SHARED, **BIASES)
    unaware = dataclasses.replace(family, fields={n: f for n, f in family.fields.items() if n != "attention_bias"})
    with pytest.raises(ValueError, match=r"attention_bias=True .* does not speak of"):
        unaware.check(config)
    unaware.check(LlamaConfig(**SHARED))


def test_bf16_stays_and_rounds_as_the_source_does():
    for name in ("gemma3", "granite", "llama"):
        source = stock_model(CONFIGS[name]).bfloat16()
        model = convert(source, periods=PERIODS)
        assert model.dtype == torch.bfloat16 and model.conversion_report.comparison.relative <= 1e-4
        ids = random_ids(1, 12)
        with torch.no_grad():
            expected, given = source(ids).logits.float(), model(ids, learn="off").logits.float()
        assert (given - expected).abs().max() <= 0.05 * (expected.max() - expected.min())
