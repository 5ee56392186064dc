"""Classification of sequences and tokens, and question answering."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_hope import (
    HopeCache,
    HopeForQuestionAnswering,
    HopeForSequenceClassification,
    HopeForTokenClassification,
)

from .conftest import assert_same_memory, random_ids, tiny_config, tiny_model


AUTO = {
    HopeForSequenceClassification: (AutoModelForSequenceClassification, {"score.weight"}),
    HopeForTokenClassification: (AutoModelForTokenClassification, {"score.weight", "score.bias"}),
    HopeForQuestionAnswering: (AutoModelForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
}
PAD = 0
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def head(kind=HopeForSequenceClassification, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    return kind(tiny_config(**{"pad_token_id": PAD, "num_labels": 3, **fields})).to(dtype).eval()


def padded(side):
    """Two rows, the second of 5 tokens, ending with the pad token's id, padded on one side; their mask; and each alone."""
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    ids[1, 4] = PAD
    alone = [ids[:1].clone(), ids[1:, :5].clone()]
    real = slice(4, 9) if side == "left" else slice(0, 5)
    ids[1], mask[1] = PAD, 0
    ids[1, real], mask[1, real] = alone[1][0], 1
    return ids, mask, alone, real


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_is_judged_as_if_alone_whatever_its_padding(side):
    ids, mask, alone, real = padded(side)
    model = head()
    expected = torch.cat([model(row, attention_mask=torch.ones_like(row)).logits for row in alone])
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, **CLOSE)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, expected, **CLOSE)
    model.config.pad_token_id = None
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="no padding token"):
        model(ids)
    tokens, spans = head(HopeForTokenClassification), head(HopeForQuestionAnswering)
    torch.testing.assert_close(tokens(ids, attention_mask=mask).logits[1, real], tokens(alone[1]).logits[0], **CLOSE)
    answer, expected = spans(ids, attention_mask=mask), spans(alone[1])
    torch.testing.assert_close(answer.start_logits[1, real], expected.start_logits[0], **CLOSE)
    torch.testing.assert_close(answer.end_logits[1, real], expected.end_logits[0], **CLOSE)


@pytest.mark.usefixtures("family")
def test_heads_read_with_a_memory_and_learn_nothing(tmp_path):
    lm, model, ids = tiny_model(pad_token_id=PAD), head(), random_ids(2, 6)
    model.model.load_state_dict(lm.model.state_dict())
    with torch.no_grad():
        memory = lm(random_ids(2, 8, seed=1)).past_key_values
        fork, mask = memory.clone(), torch.ones(2, 14, dtype=torch.int64)
        hidden = lm.model(ids, past_key_values=memory.clone()).last_hidden_state
        output = model(ids, attention_mask=mask, past_key_values=fork)
        again = model(ids[:, -2:], attention_mask=mask[:, -2:], past_key_values=model(ids[:, :4]).past_key_values)
        torch.testing.assert_close(again.logits, model(ids).logits, **CLOSE)
    assert output.past_key_values is fork and fork.seen == [14, 14]
    torch.testing.assert_close(output.logits, model.score(hidden[:, -1]), **CLOSE)
    changes = [name for name in memory.tensors() if ".change." in name]
    assert changes and all(fork.tensors()[name] is memory.tensors()[name] for name in changes)
    memory.save_pretrained(tmp_path)
    assert_same_memory(HopeCache.from_pretrained(tmp_path, model=model), memory, rtol=0, atol=0)
    with torch.no_grad():
        open_segment = lm(random_ids(2, 3, seed=1)).past_key_values
    before = open_segment.clone()
    for kind in AUTO:
        with pytest.raises(ValueError, match="no next-token loss"):
            head(kind)(ids, past_key_values=open_segment)
        with pytest.raises(ValueError, match="no next-token loss"):
            head(kind)(ids, learn="all")
        with pytest.raises(TypeError, match="logits_to_keep"):
            head(kind)(ids, logits_to_keep=1)
    with pytest.raises(ValueError, match="row 1 is all padding"):
        model(ids[:, :2], attention_mask=torch.tensor([[1, 1], [0, 0]]), past_key_values=open_segment)
    assert_same_memory(open_segment, before, rtol=0, atol=0)


def test_the_loss_of_each_problem():
    ids, mask, _, real = padded("left")
    functional = torch.nn.functional
    for labels, fields, loss in (
        (torch.tensor([2, 0]), {}, functional.cross_entropy),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1]]), {}, functional.binary_cross_entropy_with_logits),
        (torch.tensor([[1.0, 0, 3], [0, 2, 1]]), {"problem_type": "regression"}, functional.mse_loss),
        (torch.tensor([0.5, 2]), {"num_labels": 1}, lambda a, b: functional.mse_loss(a[:, 0], b)),
    ):
        labels = labels.double() if labels.is_floating_point() else labels
        for mask_given in (mask, None):
            output = head(**fields)(
                ids.clamp(min=1 if mask_given is None else 0), attention_mask=mask_given, labels=labels
            )
            torch.testing.assert_close(output.loss, loss(output.logits, labels))
    labels = torch.full((2, 9), -100)
    labels[0, 1:], labels[1, real] = 1, 2
    output = head(HopeForTokenClassification)(ids, attention_mask=mask, labels=labels)
    expected = functional.cross_entropy(output.logits[labels != -100].float(), labels[labels != -100])
    torch.testing.assert_close(output.loss, expected)
    starts, ends = torch.tensor([1, 4]), torch.tensor([3, 6])
    output = head(HopeForQuestionAnswering)(ids, attention_mask=mask, start_positions=starts, end_positions=ends)
    expected = functional.cross_entropy(output.start_logits, starts) + functional.cross_entropy(output.end_logits, ends)
    torch.testing.assert_close(output.loss, expected / 2)
    as_tuple = head()(ids, attention_mask=mask, labels=torch.tensor([2, 0]), return_dict=False, use_cache=False)
    assert [tensor.shape for tensor in as_tuple] == [(), (2, 3)]
    states = head()(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(2, 9, 16)] * 3


@pytest.mark.parametrize("kind", AUTO)
def test_from_the_checkpoint_of_a_language_model_and_back(tmp_path, kind):
    lm = tiny_model(dtype=torch.float32)
    lm.save_pretrained(tmp_path / "lm")
    auto, new = AUTO[kind]
    model, info = auto.from_pretrained(tmp_path / "lm", num_labels=3, pad_token_id=PAD, output_loading_info=True)
    assert type(model) is kind and not model.training
    assert info["missing_keys"] == new and info["unexpected_keys"] == {"lm_head.weight"}
    assert all(torch.equal(lm.model.state_dict()[name], tensor) for name, tensor in model.model.state_dict().items())
    model.save_pretrained(tmp_path / "head")
    again, info = auto.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(info.values()) and again.config.architectures == [kind.__name__]
    assert torch.equal(model(random_ids(2, 9))[0], again(random_ids(2, 9))[0])
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and info["unexpected_keys"] == new


def test_an_error_after_reading_leaves_the_memory_as_it_was():
    model = HopeForSequenceClassification(tiny_config(num_labels=3))
    memory, ids = HopeCache(model.config), random_ids(1, 5)
    with pytest.raises(IndexError):
        model(ids, labels=torch.tensor([7]), past_key_values=memory)
    assert memory.seen == [0]
    assert model(ids, past_key_values=memory).past_key_values is memory and memory.seen == [5]


def test_trainer_trains_a_head(tmp_path):
    model = head(dtype=torch.float32, cms_training="first_order")
    before = copy.deepcopy(model.state_dict())
    data = [
        {"input_ids": row[:length], "labels": 1} for row, length in zip(random_ids(4, 9), (9, 5, 7, 2), strict=True)
    ]

    def collate(rows):
        ids = [row["input_ids"] for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=PAD),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert trainer.predict(data).predictions.shape == (4, 3)


def test_pipelines():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<unk>": 1, "good": 2, "bad": 3, "it": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    texts = ["it is good", "bad"]
    classify = pipeline("text-classification", model=head(dtype=torch.float32), tokenizer=tokenizer, device="cpu")
    together, alone = classify(texts, batch_size=2), [classify(text)[0] for text in texts]
    assert [answer["label"] for answer in together] == [answer["label"] for answer in alone]
    assert [answer["score"] for answer in together] == pytest.approx([answer["score"] for answer in alone])
    model = head(HopeForTokenClassification, dtype=torch.float32)
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu", ignore_labels=[])
    assert [len(tags) for tags in tag(texts)] == [3, 1]
