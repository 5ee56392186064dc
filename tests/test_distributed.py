"""Two processes (gloo) train as one does that reads both their rows."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import merge_fsdp_weights

from modeling_hope import HopeConfig, HopeForCausalLM

from .conftest import FAMILIES, TINY, random_ids
from .distributed_jobs import LAUNCH, build, launched, sharded_calls, sharded_otherwise, train
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


@pytest.mark.parametrize(
    ("launch", "saved"), [("ddp", None), ("fsdp2", "FULL_STATE_DICT"), ("fsdp2", "SHARDED_STATE_DICT")]
)
def test_checkpoints_go_on_and_load_anywhere(pair, tmp_path, launch, saved):
    fields = fields_of("attention", "first_order")
    environment = launched(launch, **({"FSDP_STATE_DICT_TYPE": saved} if saved else {}))
    options = {"fields": fields, "environment": environment, "optim": "adamw_torch", "save_steps": 2, "steps": 4}
    options |= {"save_strategy": "steps", "directory": str(tmp_path)}
    straight = run(pair, **options)[0]
    resumed = run(pair, **options, resume=str(tmp_path / "checkpoint-2"))[0]
    assert resumed.losses == pytest.approx(straight.losses[2:], abs=2e-4)
    folder = tmp_path / "checkpoint-4"
    if saved == "SHARDED_STATE_DICT":
        merge_fsdp_weights(str(folder / "pytorch_model_fsdp_0"), str(tmp_path / "merged"))
        folder = tmp_path / "merged"
        HopeConfig(**fields).save_pretrained(folder)
    model = HopeForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, straight.parameters[name], rtol=0, atol=0)
        torch.testing.assert_close(resumed.parameters[name], straight.parameters[name], rtol=1e-9, atol=1e-12)


def test_calls_around_training_of_sharded_models(pair):
    """A memory read on, an evaluation that learns, a call that fails; other ways to shard are refused."""
    answers = pair.run(sharded_calls, fields=fields_of("hybrid", "first_order"))
    expected = sharded_calls(None, fields_of("hybrid", "first_order"))
    assert not isinstance(answers[0], str), answers[0]
    assert answers[0].keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(answers[0][name], logits)
    for refusals in pair.run(sharded_otherwise, fields=fields_of("hybrid", "first_order")):
        assert "fully_shard(model)" in refusals[0] and len(refusals) == 4
        assert all("FSDP1 gathers" in refusal for refusal in refusals[1:])


def test_zero_3_is_refused_before_anything_is_read():
    """DeepSpeed's mark stands in for it: the package is not needed."""
    model = build(fields_of("hybrid", "first_order"))
    for parameter in model.parameters():
        parameter.ds_id = 0
    memory = model.new_memory()
    for options in ({"past_key_values": memory}, {"use_cache": False}):
        with pytest.raises(ValueError, match=r"ZeRO-3 .* Use FSDP2"):
            model.train()(random_ids(1, 9), **options)
    assert memory.seen == [0]
    model.config.cms_training = "static"
    model(random_ids(1, 9), use_cache=False)


def test_launch_files_are_those_of_accelerate():
    files = {path.stem: load_config_from_file(str(path)) for path in LAUNCH.glob("*.yaml")}
    assert {name: str(file.distributed_type.value) for name, file in files.items()} == {
        "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"
    }  # fmt: skip
    assert [files[name].deepspeed_config["zero_stage"] for name in ("zero2", "zero3")] == [2, 3]
    assert files["fsdp2"].fsdp_config["fsdp_version"] == 2
