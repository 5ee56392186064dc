"""The model against the slow version that shares no code with it: logits, changes, updates and gradients."""

import pytest
import torch

from modeling_hope import HopeCache

from .conftest import BLOCKS, MEMORY, random_ids, stirred, tiny_model
from .slow_hope import SlowHope


CASES = {
    "sequential": {},
    "nested": {"cms_variant": "nested", "cms_nested_rate": 0.3},
    "nested, three levels": {
        "cms_variant": "nested",
        "cms_periods": [3, 6, 12],
        "cms_learning_rates": [0.7, 0.5, 0.3],
        "cms_decay": [0.1, 0.0, 0.2],
    },
    **{
        f"independent, {aggregation}": {"cms_variant": "independent", "cms_aggregation": aggregation}
        for aggregation in ("sum", "weighted_sum", "gated", "concat", "attention")
    },
    "down_proj": {"cms_fast_weights": "down_proj"},
    "momentum": {"cms_optimizer": "momentum", "cms_momentum": 0.6},
    "dgd": {"cms_optimizer": "dgd", "cms_learning_rates": [0.05, 0.03, 0.0]},
    "decay": {"cms_decay": 0.3},
    "no clip": {"cms_max_update_norm": None, "cms_learning_rates": [0.1, 0.05, 0.0]},
    "surprise": {"cms_surprise_threshold": 3.8},
    "levels by layer": {"cms_levels_per_layer": [[1], [0, 2]]},
    "first level nowhere": {"cms_levels_per_layer": [[1], [2]]},
    "sliding only": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "attention_sinks": 1},
    "no sinks": {"attention_sinks": 0, "sliding_window": 3},
    "memory": MEMORY,
    "memory, chunks and reads": {**MEMORY, "memory_chunk_size": 8, "projection_chunk_size": 4, "memory_read": "chunk"},
    "hybrid": {
        "layer_types": ["hope_memory", "sliding_attention"],
        "num_memory_heads": 2,
        "memory_chunk_size": 5,
        "projection_chunk_size": 5,
    },
    **BLOCKS,
    "gemma, independent": {**BLOCKS["gemma"], "cms_variant": "independent"},
    "olmo, independent": {**BLOCKS["olmo"], "cms_variant": "independent", "cms_aggregation": "gated"},
    "neox, dgd": {**BLOCKS["neox"], "cms_optimizer": "dgd", "cms_learning_rates": [0.05, 0.03, 0.0]},
    "gpt2, nested": {**BLOCKS["gpt2"], "cms_variant": "nested", "cms_levels_per_layer": [[1], [0, 2]]},
    "memory in blocks": {
        **{**BLOCKS["neox"], **MEMORY, "layer_types": ["hope_memory", "full_attention"]},
        "norm_placement": "both",
        "learned_positions": True,
        "residual_multiplier": 0.7,
    },
    **{
        f"{field}={value}": {field: value}
        for field, value in [
            ("attention_bias", True),
            ("attention_output_bias", True),
            ("attention_multiplier", [0.3, 0.9]),
            ("attn_logit_softcapping", 0.5),
            ("cms_norm_placement", ["post", "pre", "both"]),
            ("embedding_multiplier", 2.5),
            ("final_logit_softcapping", 1.5),
            ("gated_mlp", False),
            ("layer_ropes", [None, None]),
            ("learned_positions", True),
            ("logits_scaling", 2),
            ("mlp_bias", True),
            ("norm_placement", "both"),
            ("norm_placement", "post"),
            ("norm_type", "layer_norm"),
            ("norm_weight_offset", 1.0),
            ("parallel_residual", True),
            ("qk_norm", "all"),
            ("qk_norm", "head"),
            ("residual_multiplier", 0.4),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 0.5}),
            ("sliding_window", [None, 3]),
        ]
    },
    "bias without output bias": {"attention_bias": True, "attention_output_bias": False},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_logits_changes_and_updates(fields):
    model = stirred(tiny_model(**fields))
    ids = random_ids(2, 29)
    learn = torch.rand(2, 29, generator=torch.Generator().manual_seed(1)) < 0.8
    learn[1, 4:17] = False
    memory = HopeCache(model.config, 2)
    with torch.no_grad():
        logits = model(ids, past_key_values=memory, learn="all", learn_mask=learn).logits
    for row in range(2):
        slow = SlowHope(model)
        expected = slow.read(ids[row].tolist(), learn[row].tolist())
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)
        record = memory.rows[row]
        assert (record.segments, record.skipped) == (slow.segments, slow.skipped)
        for level, names in slow.levels.items():
            assert record.updates[level] == slow.updates[level]
            assert record.pairs[level] == slow.pairs[level]
            for name in names:
                layer, _, map_name = (name.split(".")[i] for i in (2, 5, 6))
                level_memory = memory.layers[int(layer)].levels[level][row]
                change = level_memory.change.get(map_name, torch.zeros(()))
                torch.testing.assert_close(change.expand_as(slow.own[name]), slow.changes[name], rtol=1e-9, atol=1e-11)
        if "surprise" in str(fields):
            assert slow.skipped and slow.segments
    assert any(any(record.updates) for record in memory.rows)


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_learned_rates_are_used(variant):
    fields = {"cms_variant": variant, "cms_periods": [4, 8], "cms_learning_rates": [0.7, 0.4]}
    fixed, learned = tiny_model(**fields), tiny_model(**fields, cms_learn_rates=True)
    learned.load_state_dict(fixed.state_dict(), strict=False)
    ids = random_ids(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(fixed(ids).logits, learned(ids).logits, rtol=1e-6, atol=1e-6)
        learned.model.layers[0].cms.log_learning_rates.add_(1.0)
        assert not torch.allclose(fixed(ids).logits, learned(ids).logits, atol=1e-4)


TRAINED = {"attention": {}, "memory": MEMORY, **BLOCKS}


@pytest.mark.parametrize("fields", TRAINED.values(), ids=TRAINED.keys())
def test_outer_gradients_of_first_order_training(fields):
    """In train() mode the updates run in the forward pass and are constants for the outer gradient."""
    model = stirred(tiny_model(cms_training="first_order", **fields)).train()
    ids = random_ids(1, 22)
    loss = model(ids, labels=ids).loss
    loss.backward()
    slow = SlowHope(model, outer=True)
    logits = slow.read(ids[0].tolist(), [True] * 22)
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6, check_dtype=False)  # Transformers' loss is float32
    parameters = dict(model.named_parameters())
    for name, gradient in zip(
        parameters, torch.autograd.grad(expected, [slow.slow[n] for n in parameters]), strict=True
    ):
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-5, atol=1e-6)
