"""Transformers' own Trainer, unchanged: every way to lay out a batch is one gradient, and a run goes on where it ended."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from .conftest import FAMILIES, random_ids, tiny_model


MODES = ["static", "first_order", "second_order"]
# Mixers and modes; what a memory learns and how a level learns are apart, so that not all pairs have to be.
KINDS = {
    **{training: {"cms_training": training} for training in MODES},
    "memory": {**FAMILIES["memory"], "cms_training": "first_order"},
    "hybrid": {**FAMILIES["hybrid"], "cms_training": "second_order"},
}
LENGTHS = (9, 4, 1, 6)
DOCUMENTS = [{"input_ids": random_ids(1, length, seed=length)[0].tolist()} for length in LENGTHS]


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request):
    return tiny_model(**request.param)


def arguments(path, **fields):
    fields = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, **fields}
    return TrainingArguments(path, logging_steps=1, logging_nan_inf_filter=False, max_grad_norm=0.0, **fields)


def padded(side="right"):
    """A collator as `DataCollatorForLanguageModeling`, without a tokenizer."""

    def collate(documents):
        width = max(len(document["input_ids"]) for document in documents)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for document in documents:
            ids, pads = document["input_ids"], width - len(document["input_ids"])
            for name, row, pad in (
                ("input_ids", ids, 0),
                ("attention_mask", [1] * len(ids), 0),
                ("labels", [-100, *ids[1:]], -100),
            ):
                batch[name].append(row + [pad] * pads if side == "right" else [pad] * pads + row)
        return {name: torch.tensor(rows) for name, rows in batch.items()}

    return collate


def a_step(model, path, collator, label_smoothing_factor=0.0, **fields):
    """The gradient that one step of SGD on all documents takes, by name, and the loss that is logged."""
    model = copy.deepcopy(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {
        name: fields.pop(name) for name in ("compute_loss_func", "compute_metrics", "eval_dataset") if name in fields
    }
    fields = {"per_device_train_batch_size": len(DOCUMENTS), **fields}
    settings = arguments(path, label_smoothing_factor=label_smoothing_factor, lr_scheduler_type="constant", **fields)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    trainer = Trainer(
        model, settings, collator, train_dataset=DOCUMENTS, optimizers=(optimizer, None), **options
    )  # fmt: skip
    trainer.train()
    after = dict(model.named_parameters())
    moved = {name: tensor - after[name].detach() for name, tensor in before.items() if after[name].requires_grad}
    return moved, trainer.state.log_history[0]["loss"]


def expected_step(model, smoothing=0.0):
    """The mean over all documents' predictions, each document read by itself."""
    model = copy.deepcopy(model).train()
    losses = []
    for document in DOCUMENTS:
        ids = torch.tensor([document["input_ids"]])
        logits = model(ids, use_cache=False).logits[0, :-1]
        losses.append(cross_entropy(logits.float(), ids[0, 1:], reduction="sum", label_smoothing=smoothing))
    loss = sum(losses) / sum(length - 1 for length in LENGTHS)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, float(loss.detach())


def assert_same_step(found, expected):
    (moved, loss), (gradients, mean) = found, expected
    assert loss == pytest.approx(mean, rel=1e-5)
    for name, tensor in moved.items():
        gradient = gradients.get(name, torch.zeros_like(tensor))
        torch.testing.assert_close(tensor, gradient, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


LAYOUTS = {
    "one batch": {},
    "padded on the left": {"collator": padded("left")},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "accumulated unevenly": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    "laid end to end": {"collator": DataCollatorWithFlattening(return_tensors="pt")},
    "laid end to end, accumulated": {
        "collator": DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "by length": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2,
                  "gradient_accumulation_steps": 2},
}  # fmt: skip


def test_every_layout_of_the_documents_is_one_gradient(tmp_path, model):
    expected = expected_step(model)
    for layout in LAYOUTS.values():
        assert_same_step(a_step(model, tmp_path, **{"collator": padded(), **layout}), expected)


def test_label_smoothing_is_of_the_next_token(tmp_path, model):
    expected = expected_step(model, smoothing=0.2)
    for name in ("one batch", "accumulated", "laid end to end, accumulated"):
        layout = {"collator": padded(), "label_smoothing_factor": 0.2, **LAYOUTS[name]}
        assert_same_step(a_step(model, tmp_path, **layout), expected)
