"""Training through the updates: the outer gradient against finite differences, and how far back it goes."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from modeling_hope import HopeCache
from modeling_hope.benchmarks.training_cost import KeptActivations

from .conftest import random_ids, tiny_model


TWO_LEVELS = {"cms_periods": [4, 8], "cms_learning_rates": [0.7, 0.4]}
CASES = {
    "sequential": {},
    "nested": {"cms_variant": "nested", "cms_nested_rate": 0.3},
    "independent": {"cms_variant": "independent", "cms_aggregation": "gated"},
    "learned rates": {"cms_learn_rates": True},
    "momentum and decay": {"cms_optimizer": "momentum", "cms_momentum": 0.6, "cms_decay": 0.1},
    "dgd": {"cms_optimizer": "dgd", "cms_learning_rates": [0.05, 0.03]},
    "no clip": {"cms_max_update_norm": None, "cms_learning_rates": [0.1, 0.05]},
    "down_proj": {"cms_fast_weights": "down_proj"},
    "plain MLPs, norms after": {"gated_mlp": False, "norm_placement": "post", "qk_norm": "head"},
    "three levels": {"cms_periods": [3, 6, 12], "cms_learning_rates": [0.5, 0.5, 0.5]},
}


def second_order(**fields):
    fields = {**TWO_LEVELS, "cms_max_backprop_updates": None, **fields}
    return tiny_model(cms_training="second_order", **fields).train()


def loss_of(model, ids, start=0, mask=None):
    """Mean next-token loss of the targets after `start`, in float64."""
    logits = model(ids, attention_mask=mask, use_cache=False).logits[:, start:-1].flatten(0, 1)
    targets = ids[:, start + 1 :] if mask is None else ids[:, start + 1 :].masked_fill(mask[:, start + 1 :] == 0, -100)
    return cross_entropy(logits, targets.flatten())


def gradients_of(model, *arguments, **options):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss_of(model, *arguments, **options), parameters, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def assert_is_the_slope(model, ids, found, mask=None, step=1e-7):
    """In random directions, some in all parameters at once and one in the rates alone, where they are learned."""
    generator = torch.Generator().manual_seed(3)
    rates = [name for name in found if name.endswith("log_learning_rates")]
    parameters = dict(model.named_parameters())
    for names in [list(found)] * 3 + [rates] * bool(rates):
        direction = {n: torch.randn(found[n].shape, generator=generator, dtype=torch.float64) for n in names}
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, way in direction.items():
                    parameters[name].add_(sign * step * way)
            ends.append(float(loss_of(model, ids, mask=mask).detach()))
            with torch.no_grad():
                for name, way in direction.items():
                    parameters[name].sub_(sign * step * way)
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = sum(float((found[n] * way).sum()) for n, way in direction.items())
        assert abs(slope - expected) <= 1e-6 * max(abs(slope), 1.0), (slope, expected)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_the_gradient_is_the_slope_of_the_loss(fields):
    model, ids = second_order(**fields), random_ids(2, 27)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = gradients_of(model, ids, mask=mask)
    assert_is_the_slope(model, ids, found, mask)
    model.config.cms_training = "first_order"
    first = gradients_of(model, ids, mask=mask)
    assert any((found[name] - first[name]).abs().max() > 1e-4 for name in first)
    assert ("log_learning_rates" in str(list(found))) == model.config.cms_learn_rates
    assert "log_learning_rates" not in str(list(first))


def test_of_every_mixer(family):
    model, ids = second_order(), random_ids(1, 18)
    assert_is_the_slope(model, ids, gradients_of(model, ids))


def test_without_the_graph_of_its_updates_it_is_first_order():
    model, ids = second_order(cms_max_backprop_updates=0), random_ids(2, 27)
    found = gradients_of(model, ids)
    model.config.cms_training = "first_order"
    model.set_attn_implementation("eager")
    expected = gradients_of(model, ids)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_how_many_updates_back_it_flows():
    """Where segments see nothing of each other, the last two updates are those of a stream whose others came before."""
    fields = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 1, "attention_sinks": 0}
    fields |= {"cms_periods": [4], "cms_learning_rates": [0.7], "intermediate_size": 12}
    ids = random_ids(1, 18)  # updates after 4, 8, 12 and 16 tokens, the loss of those from 16 on
    model = second_order(**fields, cms_max_backprop_updates=2)
    found = gradients_of(model, ids, start=16)
    memory = HopeCache(model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=memory)
    parameters = dict(model.named_parameters())
    logits = model(ids[:, 8:], past_key_values=memory).logits[:, 8:-1].flatten(0, 1)
    loss = cross_entropy(logits, ids[:, 17:].flatten())
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for (name, _), gradient in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    model.config.cms_max_backprop_updates = None
    assert any((gradients_of(model, ids, start=16)[name] - found[name]).abs().max() > 1e-6 for name in found)


@pytest.mark.parametrize("fields", [{}, {"cms_learn_rates": True}], ids=["", "learned rates"])
def test_checkpointing_gives_the_same_gradients(fields, family):
    model, ids = second_order(**fields), random_ids(2, 18)
    expected = gradients_of(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = None
    loss_of(model, ids).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_attention_without_a_second_derivative_is_refused():
    for implementation in ("flex_attention", "flash_attention_2"):
        model = second_order()
        model.config._attn_implementation = implementation
        with pytest.raises(ValueError, match="second derivative"):
            model(random_ids(1, 9))


def test_calls_are_cut_apart_and_nothing_is_held():
    """What a call learned goes on as a constant: a second call's gradient does not reach the first's graph."""
    model, memory = second_order(), None
    for _ in range(3):
        output = model(random_ids(1, 10), labels=random_ids(1, 10), past_key_values=memory, use_cache=True)
        output.loss.backward()
        memory = output.past_key_values
        assert not any(tensor.requires_grad for tensor in memory.tensors().values())


def test_what_it_keeps_beyond_first_order_is_bounded():
    def kept(updates, segments):
        model = second_order(cms_periods=[4, None], cms_learning_rates=[0.7, 0.0], cms_max_backprop_updates=updates)
        kept = KeptActivations(model)
        with kept:
            loss_of(model, random_ids(1, 4 * segments)).backward()
        return kept.peak

    beyond = {updates: [kept(updates, n) - kept(0, n) for n in (4, 8, 16)] for updates in (2, None)}
    assert beyond[2][0] > 0 and beyond[2][2] - beyond[2][1] < 0.1 * (beyond[None][2] - beyond[None][1])
    assert beyond[None][2] > 1.8 * beyond[None][1] > 3 * beyond[None][0]
