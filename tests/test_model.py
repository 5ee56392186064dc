"""HopeConfig and the model classes as Transformers classes."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_hope import HopeCache, HopeConfig, HopeForCausalLM, HopeForTokenClassification, HopeModel

from .conftest import BLOCKS, assert_same_memory, random_ids, stirred, tiny_config, tiny_model


def test_a_config_of_four_numbers_is_a_sensible_model():
    config = HopeConfig(vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = HopeForCausalLM(config)
    blocks = sum(p.numel() for name, p in model.model.layers[0].named_parameters() if "levels" in name)
    assert blocks == pytest.approx(3 * 48 * 128, rel=0.1)  # one Llama MLP of width 48
    assert model(torch.arange(20)[None]).logits.shape == (1, 20, 100)


LONG = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"cms_periods": [4, 6, None]}, "cms_periods"),
        ({"cms_periods": [4, None, 8]}, "cms_periods"),
        ({"cms_periods": []}, "cms_periods"),
        ({"cms_periods": [1, 2, 4]}, "cms_periods"),
        ({"cms_periods": [-4, 8, None]}, "cms_periods"),
        ({"cms_periods": "512"}, "cms_periods"),
        ({"cms_learning_rates": [0.1] * 4}, "cms_learning_rates"),
        ({"cms_learning_rates": -0.1}, "cms_learning_rates"),
        ({"cms_learning_rates": 0.0, "cms_learn_rates": True}, "cms_learn_rates"),
        ({"cms_decay": 1.5}, "cms_decay"),
        ({"cms_nested_rate": 2}, "cms_nested_rate"),
        ({"cms_max_update_norm": 0.0}, "cms_max_update_norm"),
        ({"cms_levels_per_layer": [[0, 3], [0]]}, "cms_levels_per_layer"),
        ({"cms_levels_per_layer": [[0]]}, "cms_levels_per_layer"),
        ({"cms_levels_per_layer": [[], [0]]}, "cms_levels_per_layer"),
        ({"cms_variant": "parallel"}, "cms_variant"),
        ({"cms_aggregation": "mean"}, "cms_aggregation"),
        ({"cms_fast_weights": "up_proj"}, "cms_fast_weights"),
        ({"cms_optimizer": "adam"}, "cms_optimizer"),
        ({"cms_training": "dynamic"}, "cms_training"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["mamba"] * 2}, "layer_types"),
        ({"sliding_window": None}, "sliding_window"),
        ({"attention_sinks": -1}, "attention_sinks"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"intermediate_size": [8, 8]}, "intermediate_size"),
        ({"cms_learning_rates": float("nan")}, "cms_learning_rates"),
        ({"cms_period": [4]}, "cms_period`"),
        ({"cms_learning_rates": float("inf")}, "cms_learning_rates"),
        ({"cms_max_update_norm": float("nan")}, "cms_max_update_norm"),
        ({"head_dim": 3}, "head_dim"),
        ({"num_attention_heads": 32, "num_key_value_heads": 2}, "head_dim"),
        ({"hidden_act": "foo"}, "hidden_act"),
        ({"pad_token_id": 40}, "pad_token_id"),
        ({"layer_types": ["full_attention"] * 2}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 10000.0}}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.*local_rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.3}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": "half"}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters"),
        ({"rope_parameters": {**LONG, "long_factor": [1.0, 3.0]}}, "rope_parameters"),
        ({"rope_parameters": {**LONG, "short_factor": [1.0], "long_factor": [1.0]}}, "rope_parameters"),
        ({"local_rope_parameters": {"type": "dynamic", "factor": 2.0}}, "local_rope_parameters"),
        ({"local_rope_parameters": {"rope_theta": -1.0}}, "local_rope_parameters"),
        ({"layer_ropes": ["local", None]}, "layer_ropes.*local_rope_parameters"),
        ({"layer_ropes": ["global"]}, "layer_ropes"),
        ({"layer_ropes": ["here", None]}, "layer_ropes"),
        ({"learned_positions": True, "max_position_embeddings": 0}, "max_position_embeddings"),
        ({"qk_norm": "heads"}, "qk_norm"),
        ({"attention_multiplier": [0.5]}, "attention_multiplier"),
        ({"attention_multiplier": [0.5, float("nan")]}, "attention_multiplier"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
        ({"logits_scaling": 0}, "logits_scaling"),
        ({"embedding_multiplier": float("inf")}, "embedding_multiplier"),
        ({"residual_multiplier": float("nan")}, "residual_multiplier"),
        ({"norm_type": "batch_norm"}, "norm_type"),
        ({"norm_weight_offset": float("nan")}, "norm_weight_offset"),
        ({"norm_weight_offset": 1.0, "norm_type": "layer_norm"}, "norm_weight_offset"),
        ({"norm_placement": "sandwich"}, "norm_placement"),
        ({"cms_norm_placement": ["pre", "post"]}, "cms_norm_placement"),
        ({"cms_norm_placement": ["pre", "post", "none"]}, "cms_norm_placement"),
        ({"cms_norm_placement": ["pre", "post", "pre"], "cms_variant": "independent"}, "cms_norm_placement"),
        ({"sliding_window": [6]}, "sliding_window"),
        ({"sliding_window": [6, None]}, "sliding_window"),
        ({"sliding_window": [None, 0]}, "sliding_window"),
        ({"attention_sinks": [1]}, "attention_sinks"),
        ({"attention_sinks": [0, -1]}, "attention_sinks"),
        ({"converted_from": "llama"}, "converted_from"),
    ],
)
def test_configs_that_cannot_be(fields, named):
    with pytest.raises(Exception, match=f"`?{named}"):
        tiny_config(**fields)


@pytest.mark.parametrize("fields", [{"cms_learning_rates": (0.3, 0.2, 0.1), "cms_decay": 0.1}, *BLOCKS.values()])
def test_config_round_trip(tmp_path, fields):
    """Of tuples too, which are lists from then on; completing a config once more changes nothing."""
    original = tiny_config(**fields).to_dict()
    config = HopeConfig(**json.loads(json.dumps(original), object_hook=_with_tuples))
    assert config.to_dict() == original
    config.complete()
    config.save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert found.to_dict() == {**original, "_name_or_path": str(tmp_path)}
    assert found.memory_fields == config.memory_fields


def _with_tuples(found):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def test_a_config_does_not_change_what_it_is_given():
    given = {"rope_type": "longrope", "short_factor": (1.0, 2.0), "long_factor": (1.0, 2.0)}
    before = dict(given)
    tiny_config(rope_parameters=given, local_rope_parameters=given)
    assert given == before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_save_and_load(tmp_path, tied, shard):
    model = tiny_model(
        dtype=torch.float32,
        tie_word_embeddings=tied,
        cms_learn_rates=True,
        cms_learning_rates=0.3,
        cms_variant="independent",
    )
    with torch.no_grad():  # nothing is left at its initial value
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "5GB"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(loaded, HopeForCausalLM) and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(loaded(random_ids(1, 14)).logits, model(random_ids(1, 14)).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, HopeModel) and torch.equal(base.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS.keys())
def test_blocks_of_other_families_save_load_and_initialise(tmp_path, fields):
    model, ids = stirred(tiny_model(dtype=torch.float32, **fields)), random_ids(1, 14)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        memory = loaded(ids).past_key_values
        assert torch.equal(loaded(ids, learn="off").logits, model(ids, learn="off").logits)
    memory.save_pretrained(tmp_path / "memory", model=loaded)
    assert_same_memory(HopeCache.from_pretrained(tmp_path / "memory", model=model), memory, rtol=0, atol=0)
    with torch.device("meta"):
        made = HopeForCausalLM(model.config)
    made.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(torch.nan)
        for module in made.modules():
            made._init_weights(module)
        for module in made.modules():
            if "Norm" in type(module).__name__:  # of features with mean square 1, the features themselves
                unit = torch.ones(module.weight.shape).index_fill_(0, torch.arange(0, len(module.weight), 2), -1.0)
                torch.testing.assert_close(module(unit), unit, rtol=1e-4, atol=1e-4)
        assert made(ids).logits.isfinite().all()
    bigger = model.resize_token_embeddings(48)
    assert type(bigger) is type(loaded.get_input_embeddings()) and bigger.weight.shape[0] == 48


def test_fields_given_to_from_pretrained_are_validated(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    for fields, named in (
        ({"cms_variant": "foo"}, "cms_variant"),
        ({"cms_periods": [5, 6, None]}, "cms_periods"),
        ({"layer_ropes": (None, "local")}, "local_rope_parameters"),
        ({"sliding_window": (4, 4, 4)}, "sliding_window"),
        ({"norm_placement": "none"}, "norm_placement"),
    ):
        with pytest.raises(Exception, match=named):
            HopeForCausalLM.from_pretrained(tmp_path, **fields)
    other = HopeForCausalLM.from_pretrained(
        tmp_path, sliding_window=(None, 4), attention_sinks=(0, 1), layer_ropes=(None, "global"), logits_scaling=2
    )
    assert (other.config.layer_windows, other.config.layer_sinks) == ([None, 4], [0, 1])
    assert [layout.rope for layout in other.model.layouts()] == [None, "global"]
    model = HopeForCausalLM.from_pretrained(tmp_path, cms_periods=(4, 8, None), cms_learning_rates=0.5)
    assert model.config.cms_periods == [4, 8, None] and model.config.level_learning_rates == [0.5] * 3
    with torch.no_grad():
        memory = model(random_ids(1, 9)).past_key_values
    memory.save_pretrained(tmp_path / "memory")
    assert HopeCache.from_pretrained(tmp_path / "memory", model=model).seen == [9]


def test_dtype_and_device_map(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16 and {p.dtype for p in half.parameters()} == {torch.bfloat16}
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert auto(random_ids(1, 9)).logits.isfinite().all()
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        torch.testing.assert_close(
            offloaded(random_ids(1, 9), learn="off").logits, auto(random_ids(1, 9), learn="off").logits
        )
    with pytest.raises(ValueError, match="device_map"):
        offloaded(random_ids(1, 9))


def test_only_init_weights_initialises():
    """A model built on the meta device and initialised by `_init_weights` is complete."""
    config = tiny_config(cms_variant="independent", cms_learn_rates=True, cms_learning_rates=0.3)
    with torch.device("meta"):
        model = HopeForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        for module in model.modules():
            model._init_weights(module)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    rates = model.model.layers[0].cms.log_learning_rates
    torch.testing.assert_close(rates.exp(), torch.full_like(rates, 0.3))


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_learning_off_and_rate_zero_are_the_same_to_the_bit(variant):
    model = tiny_model(dtype=torch.float32, cms_variant=variant)
    ids = random_ids(2, 37)
    with torch.no_grad():
        off = model(ids, learn="off").logits
        model.config.cms_learning_rates = 0.0
        zero = model(ids, learn="all")
        model.config.cms_learning_rates, model.config.cms_learning = 0.5, False
        assert torch.equal(model(ids).logits, off)
    assert torch.equal(zero.logits, off)
    assert not any("levels" in name for name in zero.past_key_values.tensors())


@pytest.mark.parametrize("index", [0, 1])
def test_rate_zero_and_decay_leave_a_memory_as_it_is(index):
    model = tiny_model(cms_decay=0.3)
    memory = HopeCache(model.config)
    with torch.no_grad():
        model(random_ids(1, 8), past_key_values=memory)
        changes = {name: t for name, t in memory.tensors().items() if ".change." in name}
        if index:
            model.config.cms_learning_rates = 0.0
            model(random_ids(1, 9), past_key_values=memory)
        else:
            model(random_ids(1, 9), past_key_values=memory, learn="off")
    assert changes and all(memory.tensors()[name] is tensor for name, tensor in changes.items())


def test_bad_input_is_refused_before_anything_changes():
    model = tiny_model()
    memory = HopeCache(model.config, 2)
    ids = random_ids(2, 9)
    with torch.no_grad():
        model(ids, past_key_values=memory)
    before = memory.clone()
    for options, named in ({"learning": "off"}, "learning"), ({"cu_seq_lens_q": ids[0]}, "cu_seq_lens_q"):
        with pytest.raises(TypeError, match=named):
            model(ids, **options)
    with pytest.raises(IndexError):
        model(ids, past_key_values=memory, logits_to_keep=torch.tensor([50]))
    other = tiny_model(cms_periods=[4, 12, None])
    mask = torch.ones(2, 9)
    cases = [
        ({"input_ids": ids + 40}, "vocab_size"),
        ({"input_ids": ids - 40}, "input_ids"),
        ({"input_ids": ids[:, :0]}, "input_ids"),
        ({"input_ids": ids[:0]}, "input_ids"),
        ({"input_ids": ids[0]}, "input_ids"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(2, 9, 16)}, "inputs_embeds"),
        ({}, "input_ids"),
        ({"input_ids": ids, "attention_mask": mask[:, :8]}, "attention_mask"),
        ({"input_ids": ids, "attention_mask": mask[:1]}, "attention_mask"),
        ({"input_ids": ids, "attention_mask": mask[:, None, :, None]}, "attention_mask"),
        ({"input_ids": ids, "learn_mask": mask[:, :8]}, "learn_mask"),
        ({"input_ids": ids, "learn": "some"}, "learn"),
        ({"input_ids": ids, "labels": ids[:, :8]}, "labels"),
        ({"input_ids": ids, "labels": ids + 40}, "labels"),
        ({"input_ids": ids, "labels": ids, "logits_to_keep": 1}, "labels"),
        ({"inputs_embeds": torch.zeros(2, 9, 16).double(), "labels": ids[:, :8]}, "labels"),
        ({"input_ids": ids, "learn": "off", "learn_mask": mask[:, :8]}, "learn_mask"),
        ({"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(3)[None]}, "position_ids"),
        ({"input_ids": ids, "output_attentions": True}, "output_attentions"),
        ({"input_ids": ids[:1]}, "2 rows"),
        ({"inputs_embeds": torch.zeros(2, 9, 8).double()}, "inputs_embeds"),
        ({"input_ids": ids, "position_ids": torch.arange(9)[None]}, "position_ids"),
    ]
    for inputs, named in cases:
        with pytest.raises(ValueError, match=named):
            model(**inputs, past_key_values=memory)
    with pytest.raises(ValueError, match="cms_periods"):
        other(ids, past_key_values=memory)
    with pytest.raises(ValueError, match="all padding"):
        model(ids, attention_mask=torch.tensor([[0] * 9, [1] * 9]))
    with pytest.raises(ValueError, match="HopeCache"):
        model(ids, past_key_values=object())
    assert_same_memory(memory, before, rtol=0, atol=0)
    model(ids, past_key_values=memory, position_ids=torch.arange(9, 18)[None])
    assert memory.seen == [18, 18]


def test_the_base_model_reads_with_a_memory_but_does_not_learn():
    model = tiny_model()
    memory = HopeCache(model.config)
    with torch.no_grad():
        model(random_ids(1, 8), past_key_values=memory)
        fork = memory.clone()
        hidden = model.model(random_ids(1, 6), past_key_values=fork).last_hidden_state
        logits = model(random_ids(1, 6), past_key_values=memory, learn="off").logits
    torch.testing.assert_close(model.lm_head(hidden), logits)
    with pytest.raises(ValueError, match="no next-token loss"):
        model.model(random_ids(1, 6), learn="all")
    waiting = HopeCache(model.config)
    with torch.no_grad():
        model(random_ids(1, 10), past_key_values=waiting)
    with pytest.raises(ValueError, match="no next-token loss"):
        model.model(random_ids(1, 6), past_key_values=waiting)
    output = model.model(random_ids(1, 1), past_key_values=waiting)
    assert output.past_key_values is waiting and waiting.columns == 11


@pytest.mark.usefixtures("family")
def test_the_decoder_without_a_memory_gives_what_its_language_model_learns(tmp_path):
    model, ids = tiny_model(), random_ids(2, 18)
    torch.save(model, tmp_path / "model.pt")
    for each in (model, copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        for learn in (None, "off"):
            hidden = each.model(ids, use_cache=False, learn=learn).last_hidden_state
            torch.testing.assert_close(each.head(hidden), model(ids, learn=learn).logits, rtol=1e-9, atol=1e-9)
    alone = copy.deepcopy(model.model)  # of no language model
    assert torch.equal(alone(ids, use_cache=False)[0], model.model(ids, use_cache=False, learn="off")[0])


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_the_loss_does_not_depend_on_padding(side):
    model, ids = tiny_model(dtype=torch.float32), random_ids(1, 8)
    padded, mask = torch.zeros(1, 11, dtype=torch.int64), torch.zeros(1, 11, dtype=torch.int64)
    where = {"left": range(3, 11), "right": range(8), "middle": [0, 1, 2, 6, 7, 8, 9, 10]}[side]
    padded[:, where], mask[:, where] = ids, 1
    labels = padded.masked_fill(mask == 0, -100)
    alone = model(ids, labels=ids).loss
    torch.testing.assert_close(model(padded, attention_mask=mask, labels=labels).loss, alone)
    two = model(
        torch.cat([padded, padded]), attention_mask=torch.cat([mask, mask]), labels=torch.cat([labels, labels])
    ).loss
    torch.testing.assert_close(two, alone)


def test_labels_in_a_call_that_ends_with_a_segment():
    model, memory = tiny_model(dtype=torch.float32), None
    with torch.no_grad():
        memory = model(random_ids(2, 9)).past_key_values
        assert model(random_ids(2, 3), past_key_values=memory, labels=random_ids(2, 3)).loss.isfinite()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_are_counted_and_never_applied(poison):
    model = tiny_model()
    memory = HopeCache(model.config, 2)
    bad = random_ids(2, 12) % 30
    bad[0, 5] = 39  # a token of row 0, in its second segment
    model.get_input_embeddings().weight.data[39] = poison
    with torch.no_grad():
        model(bad, past_key_values=memory)
        summary = memory.summary()["rows"]
        # Full attention keeps the poisoned key in view: all later segments of that row are lost, and none of the other's.
        assert [row["segments_nonfinite"] for row in summary] == [2, 0]
        assert [row["segments_learned"] for row in summary] == [1, 3]
        assert all(t.isfinite().all() for name, t in memory.tensors().items() if "levels" in name)
        healthy = HopeCache(model.config)
        expected = model(bad[1:], past_key_values=healthy).logits
        assert expected.isfinite().all()
    one = memory.clone()
    one.select([1])
    assert_same_memory(one, healthy, rtol=1e-8, atol=1e-9)


def test_hidden_states_logits_to_keep_and_tuples():
    model, ids = tiny_model(), random_ids(2, 21)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, :3] = False
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_hidden_states=True)
        last = model(ids, attention_mask=mask, logits_to_keep=2).logits
        chosen = model(ids, attention_mask=mask, logits_to_keep=torch.tensor([4, 20])).logits
        as_tuple = model(ids, attention_mask=mask, return_dict=False)
    torch.testing.assert_close(last, output.logits[:, -2:])
    torch.testing.assert_close(chosen, output.logits[:, [4, 20]])
    torch.testing.assert_close(as_tuple[0], output.logits)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1])[mask], output.logits[mask])


@pytest.mark.parametrize("training", ["static", "first_order"])
def test_trainer(tmp_path, training):
    model = tiny_model(dtype=torch.float32, cms_training=training)
    data = [{"input_ids": row, "labels": row} for row in random_ids(8, 12)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        eval_strategy="steps", eval_steps=2, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("training", ["static", "first_order"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_or_says_why_not(family, training, reentrant):
    """With no memory, one to return, and one that has learned; of the language model and of a head."""
    ids = random_ids(2, 11)
    with torch.no_grad():
        learned = tiny_model()(random_ids(2, 8, seed=1)).past_key_values
    for kind, labels in (HopeForCausalLM, ids), (HopeForTokenClassification, ids % 2):
        for memory, use_cache in ((None, False), (None, True), (learned, True)):
            models = []
            for checkpointed in (False, True):
                torch.manual_seed(0)
                model = kind(tiny_config(cms_training=training, classifier_dropout=0.0)).double().train()
                if checkpointed:
                    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                models.append(model)
            plain, checkpointed = models
            options = {"labels": labels, "use_cache": use_cache}
            learns = training == "first_order" and kind is HopeForCausalLM
            if reentrant and (learns or (use_cache and family != "attention")):
                before = None if memory is None else memory.clone()
                with pytest.raises(ValueError, match="use_reentrant"):
                    checkpointed(ids, past_key_values=memory, **options)
                if memory is not None:
                    assert_same_memory(memory, before, rtol=0, atol=0)
                continue
            for model in models:
                own = None if memory is None else memory.clone()
                model(ids, past_key_values=own, **options).loss.backward()
            for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_reentrant_checkpointing_cannot_learn_even_where_no_outer_gradient_is_taken():
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with torch.no_grad(), pytest.raises(ValueError, match="use_reentrant"):
        model(random_ids(1, 11), learn="all")
