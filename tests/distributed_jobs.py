"""What the processes of a `ProcessPair` do, and one process alone."""

import os
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from modeling_hope import HopeConfig, HopeForCausalLM
from modeling_hope.modeling_hope import HopeDecoderLayer
from modeling_hope.training.recipe import TrainingRecipe
from modeling_hope.training.train import train as train_recipe

from .conftest import random_ids


LAUNCH = Path(__file__).parent.parent / "training" / "launch"
# Documents to be read by one process while the other reads its neighbour.
LENGTHS = [27, 3, 2, 21, 9, 10, 18, 1]


def build(fields, seed=0):
    torch.manual_seed(seed)
    return HopeForCausalLM(HopeConfig(**fields)).double()


def launched(name, **changes):
    """The environment that `accelerate launch --config_file` gives its processes, but for mixed precision."""
    command = ["--config_file", str(LAUNCH / f"{name}.yaml"), "--mixed_precision", "no", "train.py"]
    arguments, file, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(file.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    taken = {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
    return taken | changes


class Documents(torch.utils.data.Dataset):
    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        return random_ids(1, LENGTHS[index], seed=index)[0]


def padded(documents):
    width = max(map(len, documents))
    ids, labels = torch.zeros(len(documents), width, dtype=torch.int64), torch.full((len(documents), width), -100)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = labels[row, : len(document)] = document
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()}


class Trained(NamedTuple):
    """Losses and gradient norms by step, losses of evaluations, parameters at the end and how many are sharded by FSDP2."""

    losses: list[float]
    norms: list[float]
    evaluated: list[float]
    parameters: dict[str, torch.Tensor]
    sharded: int


class Losses(TrainerCallback):
    def __init__(self):
        self.losses, self.norms, self.evaluated = [], [], []

    def on_log(self, args, state, control, logs, **kwargs):
        if "grad_norm" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs["grad_norm"]))
        if "eval_loss" in logs:
            self.evaluated.append(logs["eval_loss"])


def train(rank, directory, fields, environment=None, resume=None, steps=3, checkpointing=False, **options):
    """
    Let a `Trainer` train a small model on documents of very different lengths.

    Args:
        rank: `None` for one process, which reads each two processes' documents in a batch.
        environment: as `accelerate launch` sets it.
    """
    with begun(environment):
        return _train(rank, directory, fields, resume, steps, checkpointing, options)


@contextmanager
def begun(environment):
    """As in a process that has just begun."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    before = dict(os.environ)
    os.environ.update(environment or {})
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # Processes of one machine would talk through it, once it was compiled, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def by_recipe(rank, recipe, environment=None):
    """What a run of a recipe's fields comes to, and what it said."""
    said = []
    with begun(environment):
        result = train_recipe(TrainingRecipe.from_fields(recipe), say=said.append)
    return result, said


def _train(rank, directory, fields, resume, steps, checkpointing, options):
    set_seed(0)
    watch = Losses()
    arguments = TrainingArguments(
        directory, use_cpu=True, max_steps=steps, per_device_train_batch_size=2 if rank is None else 1,
        per_device_eval_batch_size=2 if rank is None else 1, learning_rate=0.1,
        lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True, report_to=[], log_level="error",
        train_sampling_strategy="sequential", ddp_backend=None if rank is None else "gloo", **{"optim": "sgd", "save_strategy": "no", **options},
    )  # fmt: skip
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate shards where there are several accelerators, and takes several CPUs for another matter.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if plugin := arguments.deepspeed_plugin:
        # Or weights as small as these would be whole in every process.
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = build(fields)
    trainer = Trainer(
        model, arguments, train_dataset=Documents(), eval_dataset=Documents(), data_collator=padded, callbacks=[watch]
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.train(resume_from_checkpoint=resume)
    whole = nullcontext()
    if arguments.deepspeed_plugin:
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(trainer.model.parameters()))
    with whole:
        parameters = {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in trainer.model.named_parameters()
        }
    sharded = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
    return Trained(watch.losses, watch.norms, watch.evaluated, parameters, sharded)


def sharded_calls(rank, fields):
    """Logits of calls in turn with one training step between, the model sharded unless `rank` is `None`."""
    model = build(fields)
    if rank is not None:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, found, memory = random_ids(1, 21), {}, model.new_memory()
    with torch.no_grad():
        found["evaluated"] = model.eval()(ids, use_cache=False).logits
        # Whatever the other process does: it reads less.
        model(ids[:, : 10 if rank != 1 else 1], past_key_values=memory)
    with pytest.raises(ValueError, match="attention_mask"):
        model.train()(ids, attention_mask=torch.ones(1, 99), use_cache=False)
    model.train()(ids, use_cache=False).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        found["read on"] = model.eval()(ids[:, 10:], past_key_values=memory).logits
        found["static"] = model(ids, use_cache=False, learn="off").logits
        found["bare"] = model.train()(ids, use_cache=False).logits
    return found


def sharded_otherwise(rank, fields):
    """How a step that learns is refused: the layers alone sharded by FSDP2, and the model by FSDP1."""
    layers = build(fields)
    for layer in layers.model.layers:
        fully_shard(layer)
    models, by_layer = [layers], {"auto_wrap_policy": ModuleWrapPolicy([HopeDecoderLayer])}
    for options in ({}, by_layer, {"use_orig_params": True, **by_layer}):
        models.append(FullyShardedDataParallel(build(fields), device_id=torch.device("cpu"), **options))
    return [_refusal(model) for model in models]


def _refusal(model):
    with pytest.raises(ValueError) as refusal:
        model.train()(random_ids(1, 9), use_cache=False)
    return str(refusal.value)
