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


def assert_same_training(pair, tmp_path, fields, environment, **options):
    answers = pair.run(train, directory=str(tmp_path), fields=fields, environment=environment, **options)
    assert not any(isinstance(answer, str) for answer in answers), answers
    losses, norms, evaluated, parameters = train(None, str(tmp_path / "one"), fields, **options)
    for found in answers:
        assert found[0] == pytest.approx(losses, abs=2e-4)
        assert found[1] == pytest.approx(norms, rel=1e-4)
        assert found[2] == pytest.approx(evaluated, rel=1e-4)
        assert found[3].keys() == parameters.keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[3][name], parameter, rtol=1e-5, atol=1e-6)
    return answers[0]


@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
@pytest.mark.parametrize("training", ["static", "first_order", "second_order"])
def test_same_losses_and_parameters(pair, tmp_path, family, training, launch):
    fields = fields_of(family, training)
    assert_same_training(pair, tmp_path, fields, launched(launch))
