"""TRL's SFTTrainer: it computes its loss from the decoder's hidden states, which are those of a model that learns."""

import copy

import pytest
import torch

from modeling_hope import HopeForCausalLM

from .conftest import chat_tokenizer, random_ids, tiny_model


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# As ChatML, with what the assistant says marked for `assistant_only_loss`.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }} <|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(count, seed):
    return " ".join(f"w{9 + int(index)}" for index in random_ids(count, seed=seed, vocab_size=30))


TEXTS = [{"text": words(count, seed=count)} for count in (9, 4, 14)]
ASKED = {"role": "user", "content": words(3, seed=1)}
ANSWERED = {"role": "assistant", "content": words(6, seed=2)}
TALKS = [{"messages": [ASKED, ANSWERED]}, {"messages": [ASKED, ANSWERED, ASKED, ANSWERED]}]
ANSWERS = [{"prompt": [ASKED], "completion": [ANSWERED]}, {"prompt": [ANSWERED, ASKED], "completion": [ANSWERED]}]
CASES = {
    "texts": (TEXTS, {}),
    "packed": (TEXTS, {"packing": True, "max_length": 24}),
    "wrapped": (TEXTS, {"packing": True, "max_length": 12, "packing_strategy": "wrapped"}),
    "padding-free": (TEXTS, {"padding_free": True, "max_length": None}),
    "smoothed": (TEXTS, {"label_smoothing_factor": 0.1}),
    "chats": (TALKS, {}),
    "assistant only": (TALKS, {"assistant_only_loss": True}),
    "completion only": (ANSWERS, {}),
}


def sft_trainer(model, path, data, **fields):
    tokenizer = chat_tokenizer(TEMPLATE)
    tokenizer.eos_token = "<|im_end|>"
    settings = trl.SFTConfig(
        path, max_steps=1, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_steps=1, per_device_train_batch_size=4, gradient_checkpointing=False, **fields,
    )  # fmt: skip
    data = datasets.Dataset.from_list(data)
    return trl.SFTTrainer(model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize(("data", "fields"), CASES.values(), ids=CASES)
def test_losses_and_gradients_are_those_of_the_model_itself(tmp_path, data, fields):
    model = tiny_model(cms_training="second_order", dtype=torch.float32, eos_token_id=4)
    plain = copy.deepcopy(model).train()
    trainer = sft_trainer(model, tmp_path, data, **fields)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(model.train(), dict(batch))
    loss.backward()
    if trainer.label_smoother is None:
        expected = plain(**batch, use_cache=False).loss
    else:
        labels = batch.pop("labels")
        expected = trainer.label_smoother(plain(**batch, use_cache=False), labels, shift_labels=True)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, parameter), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.usefixtures("family")
def test_modes_differ_and_evaluation_follows_the_config(tmp_path):
    losses = []
    for fields in ({}, {"cms_training": "first_order"}, {"cms_training": "second_order"}, {"cms_learning": False}):
        trainer = sft_trainer(tiny_model(dtype=torch.float32, **fields), tmp_path, TEXTS)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        evaluated = trainer.evaluate()["eval_loss"]
        (batch,) = trainer.get_eval_dataloader()
        with torch.no_grad():
            learn = "off" if fields.get("cms_learning") is False else "all"
            expected = trainer.model(**batch, learn=learn).loss
        assert evaluated == pytest.approx(float(expected), rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4
    assert losses[1] == pytest.approx(losses[2]) and losses[3] == pytest.approx(losses[0])


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model(cms_training="first_order", dtype=torch.float32, eos_token_id=4)
    before = copy.deepcopy(model.state_dict())
    lora = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj", "o_proj"], task_type="CAUSAL_LM")
    trainer = sft_trainer(peft.get_peft_model(model, lora), tmp_path, TALKS, assistant_only_loss=True)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    base = HopeForCausalLM(copy.deepcopy(model.config))
    base.load_state_dict(before)
    again = sft_trainer(
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), tmp_path, TALKS, assistant_only_loss=True
    )
    assert again.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
