"""Attention layers by every implementation that Transformers' interface offers, and the weights they can return."""

from itertools import pairwise

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations import flex_attention as transformers_flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.attention import eager_attention

from .conftest import BLOCKS, FAMILIES, MEMORY, assert_same_memory, random_ids, tiny_config, tiny_model


MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 12])


def assert_agree(model, other, learn=None, tolerance=1e-8):
    """Two models read padded batches without a memory, and on and on with one."""
    memories = [HopeCache(model.config, 2) for _ in range(2)]
    with torch.no_grad():
        alone = [m(random_ids(2, 12), attention_mask=MASK, use_cache=False, learn="off").logits for m in (model, other)]
        torch.testing.assert_close(*alone, rtol=tolerance, atol=tolerance)
        for step in range(3):
            ids = random_ids(2, 12, seed=step)
            mask = MASK if step < 2 else None
            outputs = [
                m(ids, attention_mask=mask, past_key_values=k, learn=learn).logits
                for m, k in zip((model, other), memories, strict=True)
            ]
            torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
        token = [m(random_ids(2, 1), past_key_values=k).logits for m, k in zip((model, other), memories, strict=True)]
        torch.testing.assert_close(*token, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fields", [{}, FAMILIES["hybrid"]], ids=["attention", "hybrid"])
def test_sdpa_and_eager_agree(fields):
    model, eager = tiny_model(**fields), tiny_model(**fields)
    eager.set_attn_implementation("eager")
    assert_agree(model, eager)


CAPPED = {**BLOCKS["gemma"], "attn_logit_softcapping": 0.5}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("fields", [{}, CAPPED], ids=["plain", "capped"])
def test_flex_agrees_and_on_a_cpu_does_not_learn(monkeypatch, fields):
    """Transformers compiles flex attention, which needs a C++ compiler; uncompiled it computes the same."""
    monkeypatch.setattr(
        transformers_flex.WrappedFlexAttention, "__call__", lambda self: transformers_flex.flex_attention
    )
    model, flex = tiny_model(dtype=torch.float32, **fields), tiny_model(dtype=torch.float32, **fields)
    flex.set_attn_implementation("flex_attention")
    assert_agree(model, flex, learn="off", tolerance=1e-4)
    memory = HopeCache(flex.config)
    with pytest.raises(NotImplementedError, match="backward on CPU"), torch.no_grad():
        flex(random_ids(1, 9), past_key_values=memory)
    assert_same_memory(memory, HopeCache(flex.config))


@pytest.mark.parametrize("fields", [{"attention_sinks": 0}, CAPPED], ids=["plain", "capped"])
def test_flash_attention_gets_rows_end_to_end(monkeypatch, fields):
    """Flash attention itself needs a GPU; what we hand to it is checked by one that reads the same arguments."""
    calls = []

    def flash(module, query, key, value, mask, dropout, scaling, sliding_window, softcap=None, **lengths):
        assert mask is None and softcap == fields.get("attn_logit_softcapping")
        calls.append(sorted(lengths))
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        if not lengths:  # rows that are alike
            rows = [(query[row], key[row], value[row]) for row in range(len(query))]
        else:
            assert query.shape[0] == 1
            queries, keys = (lengths[f"cu_seq_lens_{name}"].tolist() for name in "qk")
            assert queries[-1] == query.shape[2] and keys[-1] == key.shape[2]
            for name, ends in ("q", queries), ("k", keys):
                assert lengths[f"max_length_{name}"] == max(b - a for a, b in pairwise(ends))
            rows = [
                (query[0, :, q:r], key[0, :, k:m], value[0, :, k:m])
                for (q, r), (k, m) in zip(pairwise(queries), pairwise(keys), strict=True)
            ]
        outputs = []
        for q, k, v in rows:
            ends = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]  # aligned at the bottom right
            distance = ends - torch.arange(k.shape[1])
            hidden = (distance < 0) | (distance >= (sliding_window or k.shape[1] + 1))
            scores = q @ k.mT * scaling if softcap is None else (q @ k.mT * scaling / softcap).tanh() * softcap
            outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return (torch.cat(outputs)[None] if lengths else torch.stack(outputs)), None

    model, other = tiny_model(**fields), tiny_model(**fields)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    other.config._attn_implementation_internal = "flash_attention_2"
    assert other.model.layers[0].mixer.config._attn_implementation == "flash_attention_2"
    assert_agree(model, other)
    assert [] in calls and ["cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q"] in calls
    other.model.layers[1].mixer.layout = type(other.model.layers[1].mixer.layout)(6, 2, 4)
    with pytest.raises(ValueError, match="attention_sinks"):
        other(random_ids(1, 5))


def test_chosen_at_loading_later_and_by_a_function_of_ones_own(tmp_path):
    seen = []

    def own(module, query, key, value, attention_mask, **kwargs):
        seen.append(None if attention_mask is None else (attention_mask.dtype, tuple(attention_mask.shape)))
        return eager_attention(module, query, key, value, attention_mask, kwargs["scaling"], kwargs["dropout"])

    AttentionInterface.register("own_attention", own)
    try:
        model = tiny_model(dtype=torch.float32)
        model.save_pretrained(tmp_path)
        expected = model(random_ids(2, 12), attention_mask=MASK).logits
        for choice in "eager", "sdpa", "own_attention", {"": "eager"}:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=choice)
            name = choice if isinstance(choice, str) else choice[""]
            assert loaded.config._attn_implementation == name
            assert (
                AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=choice).config._attn_implementation
                == name
            )
            torch.testing.assert_close(loaded(random_ids(2, 12), attention_mask=MASK).logits, expected)
            model.set_attn_implementation(choice)
            assert model.model.layers[0].mixer.config._attn_implementation == name
            torch.testing.assert_close(model(random_ids(2, 12), attention_mask=MASK).logits, expected)
        # It is given what sdpa is: no mask where causal order alone decides, or which query sees which key.
        assert seen and all(mask is None or (mask[0] == torch.bool and len(mask[1]) == 4) for mask in seen)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("own_attention")


def test_capped_scores_are_made_eagerly_unless_asked_otherwise_and_never_by_sdpa(tmp_path):
    model = tiny_model(dtype=torch.float32, **CAPPED)
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "eager"
    for ask in (
        lambda: model.set_attn_implementation("sdpa"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa"),
        lambda: HopeForCausalLM._from_config(tiny_config(**CAPPED), attn_implementation="sdpa"),
    ):
        with pytest.raises(ValueError, match="`attn_logit_softcapping`"):
            ask()
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("flex_attention")
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("layers", ["attention", "memory"])
def test_what_is_not_there_is_refused_at_loading(layers):
    """By Transformers, before there is a model; also where no layer attends."""
    config = tiny_config(**FAMILIES[layers])
    for name, error, message in (
        ("flash_attention_2", ImportError, "FlashAttention2"),
        ("flash_attention_3", ImportError, "FlashAttention3"),
        ("unknown", ValueError, "not supported"),
    ):
        with pytest.raises(error, match=message):
            HopeForCausalLM._from_config(config, attn_implementation=name)


def test_attention_weights_of_padded_batches_windows_and_hybrids():
    model = tiny_model(layer_types=["full_attention", "sliding_attention"], attn_implementation="eager")
    model.set_attn_implementation("eager")
    ids = random_ids(2, 12)
    real = MASK.bool()
    with torch.no_grad():
        for use_cache in (False, True):
            whole = model(ids, attention_mask=MASK, output_attentions=True, learn="off", use_cache=use_cache)
            alone = model(ids[:1, real[0]], output_attentions=True, learn="off", use_cache=use_cache).attentions
            assert len(whole.attentions) == 2
            for layer, row in zip(whole.attentions, alone, strict=True):
                assert layer.shape == (2, 4, 12, 12)
                torch.testing.assert_close(layer.sum(-1), real[:, None].expand(2, 4, 12).double())
                torch.testing.assert_close(layer[0][:, real[0]][:, :, real[0]], row[0])
                assert not layer[0][:, :, ~real[0]].any()
        sliding = whole.attentions[1][1]
        distance = torch.arange(12)[:, None] - torch.arange(12)
        in_view = (distance >= 0) & ((distance < 6) | (torch.arange(12) < 2))
        assert ((sliding > 0) == in_view).all()
        # With a memory: over the keys that it kept, and then the new ones.
        memory = HopeCache(model.config)
        model(ids[1:, :8], past_key_values=memory, learn="off")
        later = model(ids[1:, 8:], past_key_values=memory, learn="off", output_attentions=True).attentions
        torch.testing.assert_close(later[0][0], whole.attentions[0][1, :, 8:])
        hybrid = tiny_model(**{**MEMORY, "layer_types": ["hope_memory", "full_attention"]})
        hybrid.set_attn_implementation("eager")
        # As in Transformers' other hybrids, of the layers that attend.
        assert len(hybrid(ids, output_attentions=True, learn="off", use_cache=False).attentions) == 1


def test_attention_weights_that_cannot_be_are_refused_and_nothing_changes():
    ids = random_ids(1, 9)
    for fields, implementation, options, message in (
        ({}, "sdpa", {"learn": "off"}, "attn_implementation='eager'"),
        ({}, "eager", {}, "learn='off'"),
        (FAMILIES["hybrid"], "eager", {"learn": "off"}, "two runs"),
    ):
        model = tiny_model(**fields)
        model.set_attn_implementation(implementation)
        memory = HopeCache(model.config)
        with torch.no_grad():
            model(ids[:, :5], past_key_values=memory, learn="off")
            before = memory.clone()
            with pytest.raises(ValueError, match=message):
                model(ids, past_key_values=memory, output_attentions=True, **options)
            model.config.output_attentions = implementation == "eager"
            if model.config.output_attentions:
                with pytest.raises(ValueError, match=message):
                    model(ids, past_key_values=memory, **options)
                assert model(ids, use_cache=False, learn="off").attentions
        assert_same_memory(memory, before, rtol=0, atol=0)
