"""Two processes (gloo) train as one does that reads both their rows."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import merge_fsdp_weights

from modeling_hope import HopeConfig, HopeForCausalLM
from modeling_hope.sharding import in_one_order

from .conftest import FAMILIES, TINY, random_ids
from .distributed_jobs import LAUNCH, build, by_recipe, launched, padded, sharded_calls, sharded_otherwise, train
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


def assert_same_training(pair, tmp_path, fields, launch, changes=(), **options):
    environment = launched(launch, **dict(changes))
    answers = run(pair, directory=str(tmp_path / "two"), fields=fields, environment=environment, **options)
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
    environment = launched(launch, **({"FSDP_STATE_DICT_TYPE": saved} if saved else {}))
    assert_checkpoints_go_on(pair, tmp_path, fields_of("hybrid", "first_order"), environment)


def assert_checkpoints_go_on(pair, tmp_path, fields, environment):
    options = {"fields": fields, "environment": environment, "optim": "adamw_torch", "save_steps": 2, "steps": 4}
    options |= {"save_strategy": "steps", "directory": str(tmp_path)}
    straight = run(pair, **options)[0]
    resumed = run(pair, **options, resume=str(tmp_path / "checkpoint-2"))[0]
    assert resumed.losses == pytest.approx(straight.losses[2:], abs=2e-4)
    folder = tmp_path / "checkpoint-4"
    if environment.get("FSDP_STATE_DICT_TYPE") == "SHARDED_STATE_DICT":
        merge_fsdp_weights(str(folder / "pytorch_model_fsdp_0"), str(tmp_path / "merged"))
        folder = tmp_path / "merged"
        HopeConfig(**fields).save_pretrained(folder)
    model = HopeForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, straight.parameters[name], rtol=0, atol=0)
        torch.testing.assert_close(resumed.parameters[name], straight.parameters[name], rtol=1e-9, atol=1e-12)


def run_recipe(pair, tmp_path, launch, **config):
    """A recipe's result by two processes and by one, of the same batches; what the second process says."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"The keeper of lamp {n} saw {n * n} ships." * 4 for n in range(20)))
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "cms_periods": [16, 32]}
    recipe = {
        "train": [str(tmp_path / "text.txt")], "separator": "\n\n", "validation_fraction": 0.2, "train_tokenizer": 270,
        "config": {**layers, "layer_types": ["hope_memory", "full_attention"], **config}, "sequence_length": 32,
        "steps": 4, "log_every": 1, "evaluate_every": 2, "save_every": 2, "memory_tokens": 32, "plots": False,
    }  # fmt: skip
    two, one = ({**recipe, "out": str(tmp_path / out), "batch_size": size} for out, size in (("two", 2), ("one", 4)))
    answers = pair.run(by_recipe, recipe=two, environment=launched(launch))
    assert not any(isinstance(answer, str) for answer in answers), answers
    expected, _ = by_recipe(None, one)
    for result, _ in answers:
        for name in (
            "tokens",
            "steps",
            "parameters",
            *(name for name in expected if "loss" in name or "perpl" in name),
        ):
            assert result[name] == pytest.approx(expected[name], rel=1e-4), name
    assert answers[1][1] == []  # the first process speaks for both
    model = HopeForCausalLM.from_pretrained(tmp_path / "two" / "model")
    for name, parameter in HopeForCausalLM.from_pretrained(tmp_path / "one" / "model").named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


def test_recipes_run_by_several_processes(pair, tmp_path):
    run_recipe(pair, tmp_path, "ddp", cms_training="first_order")


ZERO1 = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
ZERO = [("hybrid", training, "zero2", ZERO1) for training in ("static", "first_order", "second_order")]
ZERO += [
    (family, training, "zero2", {}) for family in FAMILIES for training in ("static", "first_order", "second_order")
]
ZERO += [(family, "static", "zero3", {}) for family in FAMILIES]


@pytest.fixture(scope="module")
def deepspeed_pair():
    pytest.importorskip("deepspeed")
    pair = ProcessPair()
    yield pair
    pair.close()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "training", "launch", "changes"), ZERO)
def test_same_with_deepspeed(deepspeed_pair, tmp_path, family, training, launch, changes):
    """
    DeepSpeed needs no GPU, and must not take another PyTorch:
    `DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation deepspeed`, and what it imports,
    `pip install einops hjson msgpack ninja psutil py-cpuinfo pydantic tqdm`.
    """
    assert_same_training(deepspeed_pair, tmp_path, fields_of(family, training), launch, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "training", "launch", "fields", "options"),
    [
        ("hybrid", "first_order", "zero2", {}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}),
        ("hybrid", "first_order", "zero2", {"cms_variant": "nested"}, {"checkpointing": True, "max_grad_norm": 0.1}),
        ("hybrid", "first_order", "zero2", {}, {"eval_strategy": "steps", "eval_steps": 2}),
        ("memory", "second_order", "zero2", LEARNED_RATES, {"gradient_accumulation_steps": 2, "steps": 2}),
        ("hybrid", "static", "zero3", {}, {"gradient_accumulation_steps": 2, "checkpointing": True}),
        ("hybrid", "static", "zero3", {"cms_learning": False}, {"eval_strategy": "steps", "eval_steps": 2}),
    ],
)
def test_same_with_deepspeed_and_options(deepspeed_pair, tmp_path, family, training, launch, fields, options):
    assert_same_training(deepspeed_pair, tmp_path, fields_of(family, training, **fields), launch, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "training"), [("zero2", "first_order"), ("zero3", "static")])
def test_deepspeed_checkpoints_go_on_and_load_anywhere(deepspeed_pair, tmp_path, launch, training):
    assert_checkpoints_go_on(deepspeed_pair, tmp_path, fields_of("hybrid", training), launched(launch))


@pytest.mark.slow
def test_recipes_run_with_deepspeed(deepspeed_pair, tmp_path):
    run_recipe(deepspeed_pair, tmp_path, "zero2", cms_training="second_order")


@pytest.mark.slow
def test_zero_3_is_refused_where_it_learns(deepspeed_pair, tmp_path):
    fields = fields_of("hybrid", "first_order")
    for answer in deepspeed_pair.run(train, directory=str(tmp_path), fields=fields, environment=launched("zero3")):
        assert "DeepSpeed ZeRO-3 gathers each layer's weights anew" in answer


def arrivals(parameters):
    """A list to which parameters' indices are added when their gradients are complete."""
    arrived = []
    for index, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: arrived.append(index))
    return arrived


WRITTEN = {"memory_read": "chunk", "memory_chunk_size": 6, "projection_chunk_size": 3}


@pytest.mark.parametrize("fields", [{}, WRITTEN, LEARNED_RATES])
@pytest.mark.parametrize("training", ["static", "first_order", "second_order"])
def test_gradients_arrive_alike_whatever_rows_hold(family, training, fields):
    """All of them, and in one order: that is what ZeRO-2 reduces them by."""
    found = set()
    for lengths in ([27], [9], [8], [5], [4], [3], [2], [1], [9, 2]):
        model = build(fields_of(family, training, **fields)).train()
        parameters = [p for n, p in model.named_parameters() if training == "second_order" or "log_" not in n]
        arrived = arrivals(parameters)
        model(**padded([random_ids(1, length)[0] for length in lengths]), use_cache=False).logits.sum().backward()
        assert sorted(arrived) == list(range(len(parameters)))
        found.add(tuple(arrived))
    assert len(found) == 1


def test_gradients_wait_for_all_that_comes_of_a_place():
    found = set()
    for order in ([0, 1, 2], [2, 0, 1]):
        module = torch.nn.ParameterList(torch.ones(1) for _ in order)
        arrived = arrivals(module)
        x = in_one_order(torch.ones(1), module)
        for index in order:
            x = x * module[index]
        x.backward()
        found.add(tuple(arrived))
    assert len(found) == 1 and len(found.pop()) == 3


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
