"""Two processes (gloo) train as one does that reads both their rows."""

import pytest
import torch

from .conftest import FAMILIES, TINY
from .distributed_jobs import launched, train
from .process_pair import ProcessPair


@pytest.fixture(scope="module")
def pair():
    pair = ProcessPair()
    yield pair
    pair.close()


def fields_of(family, training, **fields):
    return {**TINY, **FAMILIES[family], "cms_training": training, **fields}


def run(pair, **arguments):
    answers = pair.run(train, **arguments)
    assert not any(isinstance(answer, str) for answer in answers), answers
    return answers


def assert_same(found, expected):
    assert found.losses == pytest.approx(expected.losses, abs=2e-4)  # Trainer logs four digits
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert found.evaluated == pytest.approx(expected.evaluated, rel=1e-4)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], parameter, rtol=1e-5, atol=1e-6)


def assert_same_training(pair, tmp_path, fields, launch, **options):
    answers = run(pair, directory=str(tmp_path / "two"), fields=fields, environment=launched(launch), **options)
    expected = train(None, str(tmp_path / "one"), fields, **options)
    for found in answers:
        assert found.sharded == (len(found.parameters) if launch == "fsdp2" else 0)
        assert_same(found, expected)


LAUNCHES = pytest.mark.parametrize("launch", ["ddp", "fsdp2"])


@LAUNCHES
@pytest.mark.parametrize("training", ["static", "first_order", "second_order"])
def test_same_losses_and_parameters(pair, tmp_path, family, training, launch):
    """Of documents that end within a chunk or a segment, beside others with many."""
    assert_same_training(pair, tmp_path, fields_of(family, training), launch)


LEARNED_RATES = {"cms_learn_rates": True, "cms_periods": [4, 8], "cms_learning_rates": [0.5, 0.3]}


@LAUNCHES
@pytest.mark.parametrize(
    ("family", "training", "fields", "options"),
    [
        ("hybrid", "first_order", {}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "steps": 3}),
        ("hybrid", "static", {}, {"gradient_accumulation_steps": 2, "checkpointing": True}),
        ("hybrid", "first_order", {"cms_variant": "nested"}, {"checkpointing": True, "max_grad_norm": 0.1}),
        ("hybrid", "first_order", {"tie_word_embeddings": False}, {"eval_strategy": "steps", "eval_steps": 2}),
        ("memory", "second_order", LEARNED_RATES, {"gradient_accumulation_steps": 2, "steps": 2}),
        ("attention", "second_order", {"cms_optimizer": "momentum"}, {"checkpointing": True}),
        ("attention", "first_order", {"cms_optimizer": "dgd", "cms_learning_rates": 0.05}, {"optim": "adamw_torch"}),
    ],
)
def test_same_with_options(pair, tmp_path, family, training, fields, options, launch):
    assert_same_training(pair, tmp_path, fields_of(family, training, **fields), launch, **options)
