"""Transformers' own Trainer, unchanged: every way to lay out a batch is one gradient, and a run goes on where it ended."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from modeling_hope import HopeForCausalLM
from modeling_hope.fast_weights import LevelMemory

from .conftest import FAMILIES, assert_same_memory, random_ids, tiny_model


MODES = ["static", "first_order", "second_order"]
# Mixers and modes; what a memory learns and how a level learns are apart, so that not all pairs have to be.
KINDS = {
    **{training: {"cms_training": training} for training in MODES},
    "memory": {**FAMILIES["memory"], "cms_training": "first_order", "cms_optimizer": "momentum"},
    "hybrid": {
        **FAMILIES["hybrid"],
        "cms_training": "second_order",
        "cms_optimizer": "dgd",
        "cms_learning_rates": [0.1, 0.1, 0.0],
    },
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


def summed_loss(output, labels, num_items_in_batch=None):
    """As Transformers' loss, from the logits that `compute_loss_func` is given."""
    targets = labels[:, 1:].flatten()
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), targets, reduction="sum") / num_items_in_batch


def test_a_loss_function_of_ones_own_and_a_memory_returned_change_nothing(tmp_path):
    model = tiny_model(cms_training="first_order")
    layout = {"collator": padded(), **LAYOUTS["accumulated"]}
    for options in ({"compute_loss_func": summed_loss}, {"use_cache": True}):
        assert_same_step(a_step(model, tmp_path, **layout, **options), expected_step(model))


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_goes_on_from_its_checkpoint_with_the_same_losses(tmp_path, model):
    """Optimizer, schedule, order of the data and random numbers (dropout) go on too."""
    config, weights = copy.deepcopy(model.config), copy.deepcopy(model.state_dict())
    config.attention_dropout = 0.2

    def trainer(**fields):
        model = HopeForCausalLM(config)
        model.load_state_dict(weights)
        fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2, **fields}
        settings = arguments(tmp_path, per_device_train_batch_size=2, **fields)
        return Trainer(model, settings, data_collator=padded(), train_dataset=DOCUMENTS)

    whole = trainer()
    whole.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    torch.rand(7)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(whole) and len(losses_of(whole)) == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_mixed_precision_is_near_float32(tmp_path, model, monkeypatch):
    """In bfloat16 losses differ by its rounding; what levels learn stays in float32."""
    model = model.float()
    dtypes = set()
    keep = LevelMemory.with_change

    def watched(memory, change, **fields):
        dtypes.update(tensor.dtype for kind in (change, *fields.values()) for tensor in kind.values())
        return keep(memory, change, **fields)

    monkeypatch.setattr(LevelMemory, "with_change", watched)
    options = {"collator": padded(), "gradient_checkpointing": model.config.cms_training == "second_order"}
    (_, expected), (moved, loss) = (a_step(model, tmp_path, bf16=bf16, **options) for bf16 in (False, True))
    assert loss != expected and loss == pytest.approx(expected, rel=0.02)
    assert all(bool(tensor.isfinite().all()) for tensor in moved.values())
    assert dtypes == (set() if model.config.cms_training == "static" else {torch.float32})


def test_evaluation_learns_where_the_config_says_so(tmp_path, model):
    whole = copy.deepcopy(model)
    found = {}
    for learning in (True, False):
        model.config.cms_learning = learning
        settings = arguments(tmp_path, per_device_eval_batch_size=2)
        trainer = Trainer(model, settings, padded(), eval_dataset=DOCUMENTS, compute_metrics=accuracy)
        metrics = trainer.evaluate()
        predicted = trainer.predict(DOCUMENTS)
        assert metrics["eval_loss"] == pytest.approx(predicted.metrics["test_loss"])
        assert metrics["eval_accuracy"] == predicted.metrics["test_accuracy"]
        assert predicted.predictions.shape == (len(DOCUMENTS), max(LENGTHS), model.config.vocab_size)
        trainer = Trainer(model, arguments(tmp_path, prediction_loss_only=True), padded(), eval_dataset=DOCUMENTS)
        assert trainer.predict(DOCUMENTS).predictions is None
        found[learning] = trainer.evaluate()["eval_loss"]
        losses = []
        for document in DOCUMENTS:
            ids = torch.tensor([document["input_ids"]])
            with torch.no_grad():
                logits = whole(ids, learn="all" if learning else "off").logits[0, :-1]
            losses.append(cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
        assert found[learning] == pytest.approx(float(sum(losses)) / sum(n - 1 for n in LENGTHS), rel=1e-5)
    assert abs(found[True] - found[False]) > 1e-4


def accuracy(prediction):
    said, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    return {"accuracy": float((said == labels)[labels != -100].mean())}


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = tiny_model(cms_training="first_order", dtype=torch.float32)
    settings = arguments(
        tmp_path, max_steps=4, learning_rate=0.5, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    trainer = Trainer(model, settings, padded(), train_dataset=DOCUMENTS, eval_dataset=DOCUMENTS)
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


class GeneratingTrainer(Trainer):
    """What `predict_with_generate` is for models that go on with their prompt."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, _, labels = super().prediction_step(model, inputs, True, ignore_keys)
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        said = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3)
        return loss, said[:, prompt["input_ids"].shape[1] :], labels


def test_evaluation_by_generation(tmp_path):
    """By few lines on top of Trainer, and by Seq2SeqTrainer, which gives the prompt back too, padded to `max_length`."""
    model = tiny_model(dtype=torch.float32, pad_token_id=0)
    trainer = GeneratingTrainer(model, arguments(tmp_path), padded("left"), train_dataset=DOCUMENTS)
    trainer.train()
    predicted = trainer.predict(DOCUMENTS)
    for row, document in zip(predicted.predictions, DOCUMENTS, strict=True):
        alone = model.generate(torch.tensor([document["input_ids"]]), max_new_tokens=3, min_new_tokens=3)
        assert row.tolist() == alone[0, -3:].tolist()
    settings = Seq2SeqTrainingArguments(tmp_path, predict_with_generate=True, use_cpu=True, report_to=[])
    whole = Seq2SeqTrainer(model, settings, padded("left")).predict(DOCUMENTS, max_new_tokens=3, min_new_tokens=3)
    width = max(LENGTHS)
    assert (whole.predictions[:, width : width + 3] == predicted.predictions).all()
    assert whole.metrics["test_loss"] == pytest.approx(predicted.metrics["test_loss"], rel=1e-5)


def test_a_batch_size_that_fits_is_found(tmp_path):
    model, rows = tiny_model(cms_training="second_order"), []

    def two_rows_fit(module, given, named):
        rows.append(len(named["input_ids"]))
        if rows[-1] > 2:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(two_rows_fit, with_kwargs=True)
    settings = arguments(tmp_path, max_steps=2, auto_find_batch_size=True, per_device_train_batch_size=4)
    Trainer(model, settings, padded(), train_dataset=DOCUMENTS).train()
    assert rows[0] == 4 and rows[-2:] == [2, 2]


def test_adapters_are_trained_saved_and_loaded(tmp_path, model):
    peft = pytest.importorskip("peft")
    model = model.float()
    before = copy.deepcopy(model.state_dict())
    lora = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = a_step(adapted, tmp_path, padded(), label_smoothing_factor=0.2)
    assert all("lora" in name for name in found[0])
    assert_same_step(found, expected_step(adapted, smoothing=0.2))
    settings = arguments(tmp_path, max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    trainer = Trainer(adapted, settings, padded(), train_dataset=DOCUMENTS, eval_dataset=DOCUMENTS)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    base = HopeForCausalLM(copy.deepcopy(model.config)).float()
    base.load_state_dict(before)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-2")
    again = Trainer(loaded, arguments(tmp_path), padded(), eval_dataset=DOCUMENTS)
    assert again.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_a_trained_model_goes_on_with_a_memory(tmp_path):
    """Trainer turns config.use_cache off, and saves it so."""
    model = tiny_model(cms_training="first_order", dtype=torch.float32)
    trainer = Trainer(model, arguments(tmp_path), padded(), train_dataset=DOCUMENTS)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    loaded = HopeForCausalLM.from_pretrained(tmp_path / "model")
    memories = [trained.new_memory() for trained in (model.eval(), loaded)]
    ids = random_ids(1, 9)
    said = [
        m.generate(ids, past_key_values=memory, max_new_tokens=4)
        for m, memory in zip((model, loaded), memories, strict=True)
    ]
    assert torch.equal(*said)
    assert_same_memory(*memories)


def test_what_would_train_something_else_is_refused(tmp_path):
    model = tiny_model(dtype=torch.float32, cms_training="first_order")

    def refused(error, match, tensors=None, **fields):
        trainer = Trainer(
            model,
            arguments(tmp_path, **fields),
            lambda documents: {**padded()(documents), **(tensors or {})},
            train_dataset=DOCUMENTS,
        )
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=match):
            trainer.train()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    refused(ValueError, "`labels` has shape", {"labels": torch.zeros(4, 3, dtype=torch.int64)})
    refused(ValueError, "`labels` must lie between", {"labels": torch.full((4, 9), 40)}, per_device_train_batch_size=4)
    refused(ValueError, "`input_ids` must lie between", {"input_ids": torch.full((4, 9), 40)})
    refused(TypeError, "unexpected argument `weights`", {"weights": torch.ones(8)})
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    refused(ValueError, "use_reentrant", **checkpointing)
