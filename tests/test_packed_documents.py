"""Several documents in one row: each is read as if it were alone."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

from modeling_hope import HopeModel

from .conftest import random_ids, tiny_config, tiny_model


LENGTHS = ([5, 13, 1, 8], [17, 10], [27])


def packed(lengths=LENGTHS):
    """Ids, positions and mask of rows of documents; what is left of a row is padding, on either side."""
    width = max(map(sum, lengths)) + 2
    ids, positions = random_ids(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    documents = []
    for row, parts in enumerate(lengths):
        start = row % 2
        for length in parts:
            positions[row, start : start + length] = torch.arange(length)
            mask[row, start : start + length] = 1
            documents.append((row, slice(start, start + length)))
            start += length
    return ids, positions, mask, documents


@pytest.mark.parametrize("training", ["static", "first_order", "second_order"])
def test_outputs_loss_and_gradients_are_those_of_each_alone(family, training):
    model = tiny_model(cms_training=training).train()
    ids, positions, mask, documents = packed()
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, position_ids=positions, attention_mask=mask, labels=labels, use_cache=False)
    output.loss.backward()
    given = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    losses = []
    for row, columns in documents:
        alone = model(ids[row, columns][None], use_cache=False).logits
        torch.testing.assert_close(output.logits[row, columns], alone[0], rtol=1e-9, atol=1e-9)
        losses.append(cross_entropy(alone[0, :-1].float(), ids[row, columns][1:], reduction="sum"))
    loss = sum(losses) / sum(columns.stop - columns.start - 1 for _, columns in documents)
    loss.backward()
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-7)
    assert not output.logits[mask == 0].any()


def test_learning_at_test_time_and_other_models(family):
    model = tiny_model()
    ids, positions, mask, documents = packed()
    with torch.no_grad():
        output = model(ids, position_ids=positions, attention_mask=mask, learn="all")
        assert output.past_key_values is None  # each document has one of its own
        for row, columns in documents:
            alone = model(ids[row, columns][None], learn="all").logits[0]
            torch.testing.assert_close(output.logits[row, columns], alone, rtol=1e-9, atol=1e-9)
        bare = HopeModel(tiny_config()).double().eval()
        hidden = bare(ids, position_ids=positions, attention_mask=mask).last_hidden_state
        row, columns = documents[1]
        torch.testing.assert_close(hidden[row, columns], bare(ids[row, columns][None]).last_hidden_state[0])


@pytest.mark.parametrize("kwargs", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_transformers_collator(kwargs):
    """The batch laid end to end, as padding-free training has it."""
    model = tiny_model(cms_training="first_order", dtype=torch.float32).train()
    documents = [{"input_ids": random_ids(1, length)[0].tolist()} for length in (9, 4, 14)]
    batch = DataCollatorWithFlattening(return_tensors="pt", **kwargs)(documents)
    loss = model(**batch, use_cache=False).loss
    total = sum(
        model(torch.tensor([d["input_ids"]]), labels=torch.tensor([d["input_ids"]])).loss.item()
        * (len(d["input_ids"]) - 1)
        for d in documents
    )
    assert abs(float(loss) - total / (8 + 3 + 13)) < 1e-5


def test_what_cannot_be_is_refused():
    model = tiny_model()
    ids, positions, mask, _ = packed()
    memory = model.new_memory(3)
    cases = [
        ({"past_key_values": memory}, "past_key_values"),
        ({"position_ids": positions + 1}, "position_ids"),
        ({"position_ids": positions.flip(1)}, "position_ids"),
        ({"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q"),
    ]
    for options, named in cases:
        with pytest.raises((ValueError, TypeError), match=named):
            model(ids, **{"position_ids": positions, "attention_mask": mask, **options})
    assert memory.seen == [0, 0, 0]
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions"):
        eager(ids, position_ids=positions, attention_mask=mask, output_attentions=True, learn="off")
