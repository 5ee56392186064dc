"""generate() with a memory that lasts."""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria

from modeling_hope import HopeCache

from .conftest import assert_same_memory, random_ids, tiny_model


pytestmark = pytest.mark.usefixtures("family")


TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture
def model(family):
    return tiny_model(eos_token_id=None, bos_token_id=None)


def memory_of(model, *stretches):
    """The memory of a stream read outside generate(): pairs of ids and whether they are learned from."""
    memory = HopeCache(model.config)
    with torch.no_grad():
        for ids, learn in stretches:
            model(ids[None], past_key_values=memory, learn="all" if learn else "off")
    return memory


def greedy_by_hand(model, prompt, tokens, learn="prompt"):
    """What generate() should do, one forward at a time."""
    memory, ids = HopeCache(model.config), prompt[None]
    with torch.no_grad():
        logits = model(ids, past_key_values=memory, learn="off" if learn == "off" else "all").logits
        for _ in range(tokens - 1):
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            logits = model(ids[:, -1:], past_key_values=memory, learn="all" if learn == "all" else "off").logits
    return torch.cat([ids, logits[:, -1:].argmax(-1)], 1)[0], memory


@pytest.mark.parametrize("learn", ["prompt", "all", "off"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_and_what_is_learned(model, learn, use_cache):
    prompt = random_ids(14)
    expected, memory = greedy_by_hand(model, prompt, 13, learn)
    output = model.generate(
        prompt[None], max_new_tokens=13, do_sample=False, learn=learn, use_cache=use_cache, return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == expected.tolist()
    if use_cache:
        given = output.past_key_values
        assert given.rows[0].pending == int(expected[-1])
        given.rows[0] = memory.rows[0].__class__(**{**given.rows[0].__dict__, "pending": None})
        assert_same_memory(given, memory, **TOLERANCE)


def test_policy_comes_from_the_generation_config_and_the_model(model):
    prompt = random_ids(1, 14)

    def learned(**kwargs):
        memory = HopeCache(model.config)
        model.generate(prompt, max_new_tokens=12, do_sample=False, past_key_values=memory, **kwargs)
        return memory.rows[0].segments

    assert learned() == 4 and learned(learn="off") == 0  # the fourth segment holds the last two tokens of the prompt
    assert learned(generation_config=GenerationConfig(learn="all")) == 6
    assert learned(generation_config=GenerationConfig(learn="all"), learn="off") == 0
    model.config.cms_learning = False
    try:
        assert learned() == 0 and learned(learn="prompt") == 4
    finally:
        model.config.cms_learning = True


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("history", [False, True])
def test_turns_equal_one_stream(model, history, with_mask):
    """Three turns, as new tokens or as the whole history, equal reading the conversation token by token."""
    memory, conversation = HopeCache(model.config), torch.empty(0, dtype=torch.int64)
    stretches = []
    for turn in range(3):
        new = random_ids(5 + turn, seed=turn)
        ids = torch.cat([conversation, new]) if history else new
        mask = {"attention_mask": torch.ones(1, len(ids), dtype=torch.int64)} if with_mask else {}
        output = model.generate(ids[None], max_new_tokens=6, do_sample=False, past_key_values=memory, **mask)[0]
        assert output[: len(ids)].tolist() == ids.tolist()
        sampled = output[len(ids) :]
        # The last token of a turn is read in the next.
        stretches += [(new, True), (sampled[:-1], False), (sampled[-1:], False)]
        conversation = torch.cat([conversation, new, sampled])
        expected = memory_of(model, *stretches[:-1])
        assert memory.rows[0].ids.tolist() == conversation[:-1].tolist()
        assert memory.rows[0].pending == int(conversation[-1])
        cleared = memory.clone()
        cleared.rows[0] = cleared.rows[0].__class__(**{**cleared.rows[0].__dict__, "pending": None})
        assert_same_memory(cleared, expected, **TOLERANCE)


def test_a_mask_over_history_and_new_tokens(model):
    short, wide = HopeCache(model.config), HopeCache(model.config)
    first, second = random_ids(1, 7), random_ids(1, 3, seed=1)
    options = {"max_new_tokens": 4, "do_sample": False}
    for memory in (short, wide):
        output = model.generate(first, past_key_values=memory, **options)
    expected = model.generate(second, past_key_values=short, **options)
    mask = torch.ones(1, output.shape[1] + 3, dtype=torch.int64)
    assert model.generate(second, attention_mask=mask, past_key_values=wide, **options).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(second, attention_mask=mask[:, :-2], past_key_values=wide.clone(), **options)


def test_ids_that_fit_neither_are_refused_and_nothing_changes(model):
    memory = HopeCache(model.config, 2)
    first = random_ids(2, 6)
    with torch.no_grad():
        model(first, past_key_values=memory)
    before = memory.clone()
    mixed = torch.cat([torch.cat([first[:1], random_ids(1, 2)], 1), random_ids(1, 8, seed=5)])
    with pytest.raises(ValueError, match="all rows"):
        model.generate(mixed, past_key_values=memory, max_new_tokens=3)
    with pytest.raises(ValueError, match="adds none"):
        model.generate(first, past_key_values=memory, max_new_tokens=3)
    with pytest.raises(ValueError, match="2 rows"):
        model.generate(first[:1], past_key_values=memory, max_new_tokens=3)
    assert_same_memory(memory, before, rtol=0, atol=0)


def test_an_interrupted_call_leaves_the_memory_as_it_was(model):
    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > 16:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    memory = HopeCache(model.config)
    with torch.no_grad():
        model(random_ids(1, 9), past_key_values=memory)
    before = memory.clone()
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            random_ids(1, 12),
            past_key_values=memory,
            max_new_tokens=9,
            stopping_criteria=StoppingCriteriaList([Interrupt()]),
        )
    assert_same_memory(memory, before, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_and_finished_rows(model, side):
    """Rows of different lengths that finish at different times: each as if alone, and absorbing nothing afterwards."""
    prompts = [random_ids(length, seed=length) for length in (3, 9, 6)]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        part = slice(width - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, part], mask[row, part] = prompt, 1
    free = [greedy_by_hand(model, prompt, 12)[0][len(prompt) :] for prompt in prompts]
    eos = int(free[0][3])  # ends the first row early
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    memory = HopeCache(model.config, 3)
    output = model.generate(ids, attention_mask=mask, past_key_values=memory, **options)
    lengths = set()
    for row, prompt in enumerate(prompts):
        alone = HopeCache(model.config)
        expected = model.generate(prompt[None], past_key_values=alone, **options)[0][len(prompt) :]
        assert output[row, width:].tolist() == expected.tolist() + [0] * (output.shape[1] - width - len(expected))
        lengths.add(len(expected))
        one = memory.clone()
        one.select([row])
        assert one.rows[0].ids.tolist() == alone.rows[0].ids.tolist()
        assert one.rows[0].pending == alone.rows[0].pending == int(expected[-1])
        with torch.no_grad():  # and both go on alike
            after = [model(random_ids(1, 9), past_key_values=m).logits for m in (one, alone)]
        torch.testing.assert_close(*after, **TOLERANCE)
    assert len(lengths) > 1


def test_sampling_and_return_sequences(model):
    prompt, memory = random_ids(1, 10), HopeCache(model.config)
    torch.manual_seed(1)
    options = {"do_sample": True, "max_new_tokens": 7, "num_return_sequences": 3}
    sequences = model.generate(prompt, past_key_values=memory, **options)
    torch.manual_seed(1)
    assert model.generate(prompt, use_cache=False, **options).tolist() == sequences.tolist()
    assert memory.batch_size == 3
    for row in range(3):
        expected = memory_of(model, (prompt[0], True), (sequences[row, 10:-1], False))
        one = memory.clone()
        one.select([row])
        assert one.rows[0].pending == int(sequences[row, -1])
        torch.testing.assert_close(one.layers[1].mixer.tensors, expected.layers[1].mixer.tensors, **TOLERANCE)


@pytest.mark.parametrize("learn", ["prompt", "all", "off"])
@pytest.mark.parametrize("returned", [1, 2])
def test_beams(model, learn, returned):
    """Beams equal those of a search without a memory, and the memory is that of what was returned."""
    prompt, memory = random_ids(2, 10).clamp(min=4), HopeCache(model.config, 2)  # no pads: a mask would be inferred
    options = {
        "num_beams": 3,
        "num_return_sequences": returned,
        "max_new_tokens": 8,
        "do_sample": False,
        "learn": learn,
    }
    sequences = model.generate(prompt, past_key_values=memory, eos_token_id=3, pad_token_id=0, **options)
    expected = model.generate(prompt, use_cache=False, eos_token_id=3, pad_token_id=0, **options)
    assert sequences.tolist() == expected.tolist()
    assert memory.batch_size == 2 * returned
    for row, sequence in enumerate(sequences):
        words = sequence[10:].tolist()
        words = words[: words.index(3) + 1] if 3 in words else words
        told = prompt[row // returned]
        alone = memory_of(model, (told, learn != "off"), (torch.tensor(words[:-1]), learn == "all"))
        assert memory.rows[row].ids.tolist() == alone.rows[0].ids.tolist()
        assert memory.rows[row].pending == words[-1]
        one = memory.clone()
        one.select([row])
        with torch.no_grad():
            after = [model(random_ids(1, 9), past_key_values=m).logits for m in (one, alone)]
        torch.testing.assert_close(*after, **TOLERANCE)


def test_beams_of_a_used_memory(model):
    first, second = random_ids(1, 9), random_ids(1, 4, seed=1)
    used = memory_of(model, (first[0], True))
    options = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    sequences = model.generate(second, past_key_values=used, **options)
    whole = model.generate(torch.cat([first, second], 1), **options)
    assert sequences[0].tolist() == whole[0, 9:].tolist()


def test_beams_end_where_the_search_ended(model):
    """Not at a token that looks like an end: the search was told there is none, or padded with a real token."""
    prompt = random_ids(1, 10).clamp(min=4)
    options = {"num_beams": 2, "max_new_tokens": 7, "do_sample": False}
    free = model.generate(prompt, **options)[0, 10:].tolist()
    model.generation_config.eos_token_id = free[2]
    try:
        memory = HopeCache(model.config)
        # The prompt may hold that token too: the mask says that it is no padding.
        told = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, "pad_token_id": free[-1]}
        model.generate(prompt, past_key_values=memory, **told, **options)
    finally:
        model.generation_config.eos_token_id = None
    assert memory.rows[0].ids[10:].tolist() == free[:-1] and memory.rows[0].pending == free[-1]


def test_history_that_was_tokenised_differently_is_refused(model):
    memory = memory_of(model, (random_ids(20), True))
    other = torch.cat([random_ids(20)[:18], random_ids(6, seed=3)])
    with pytest.raises(ValueError, match="repeat the first 18 of the 20"):
        model.generate(other[None], past_key_values=memory, max_new_tokens=2)
    assert memory.seen == [20]


def test_without_ids(model):
    """From the start of a sequence, or on from the token that waits to be read."""
    model.generation_config.bos_token_id = 1
    try:
        memory = HopeCache(model.config)
        options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": memory}
        first = model.generate(**options)
        second = model.generate(**options)
    finally:
        model.generation_config.bos_token_id = None
    assert first[0, 0] == 1 and second[0, 0] == first[0, -1]
    whole = model.generate(torch.tensor([[1]]), max_new_tokens=12, do_sample=False)[0]
    assert torch.cat([first[0], second[0, 1:]]).tolist() == whole.tolist()
    assert memory.rows[0].segments == 0  # it was told one token, the input of a segment
    with pytest.raises(ValueError, match="no sampled token"):
        model.generate(past_key_values=memory_of(model, (random_ids(5), True)), max_new_tokens=2)


def test_a_history_that_contradicts_the_last_token_is_refused(model):
    memory = HopeCache(model.config)
    output = model.generate(random_ids(1, 6), past_key_values=memory, max_new_tokens=4, do_sample=False)
    output[0, -1] = (output[0, -1] + 1) % 40
    with pytest.raises(ValueError, match="was sampled"):
        model.generate(output, past_key_values=memory, max_new_tokens=2)
    # A turn that says the same word again adds it.
    model.generate(torch.tensor([[memory.rows[0].pending]]), past_key_values=memory, max_new_tokens=1, do_sample=False)
    assert memory.seen == [11]


def test_rows_of_very_different_lengths_share_a_prefill(model):
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :8] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    assert model.generate(ids, prefill_chunk_size=3, **options).tolist() == expected.tolist()
    alone = model.generate(ids[:1, 8:], max_new_tokens=4, do_sample=False, num_beams=2)
    assert model.generate(ids, num_beams=2, **options)[0, 9:].tolist() == alone[0, 1:].tolist()


def test_two_padded_rows_over_two_turns(model):
    """One row finishes early; the second turn as new tokens, as history and with a mask over everything."""
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    free = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    first = HopeCache(model.config, 2)
    output = model.generate(ids, attention_mask=mask, past_key_values=first, eos_token_id=int(free[0, 8]), **options)
    new = random_ids(2, 4, seed=9) % 39 + 1
    by_new = model.generate(new, past_key_values=first.clone(), attention_mask=torch.ones(2, 4), **options)[:, 4:]
    for row in range(2):
        said = [*first.rows[row].ids.tolist(), first.rows[row].pending]
        history = torch.cat([torch.tensor(said), new[row]])[None]
        one = first.clone()
        one.select([row])
        ones = torch.ones_like(history)  # a token of the history is the pad
        by_history = model.generate(history, attention_mask=ones, past_key_values=one, **options)[:, history.shape[1] :]
        assert by_history[0].tolist() == by_new[row].tolist()
    wide = torch.ones(2, output.shape[1] + 4)
    by_mask = model.generate(new, past_key_values=first.clone(), attention_mask=wide, **options)[:, 4:]
    assert by_mask.tolist() == by_new.tolist()


def test_a_memory_without_a_cache_is_refused(model):
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(random_ids(1, 4), past_key_values=HopeCache(model.config), use_cache=False, max_new_tokens=2)


def test_prefill_in_chunks(model):
    prompt, memories = random_ids(1, 17), [HopeCache(model.config) for _ in range(2)]
    whole = model.generate(prompt, max_new_tokens=6, do_sample=False, past_key_values=memories[0])
    parts = model.generate(prompt, max_new_tokens=6, do_sample=False, past_key_values=memories[1], prefill_chunk_size=3)
    assert whole.tolist() == parts.tolist()
    assert_same_memory(*memories, **TOLERANCE)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, prefill_chunk_size=3)
    by_config = HopeCache(model.config)
    assert model.generate(prompt, config, past_key_values=by_config).tolist() == whole.tolist()
    assert_same_memory(by_config, memories[0], **TOLERANCE)
    assert config.prefill_chunk_size == 3


def test_embeddings_as_the_prompt(model):
    prompt = random_ids(1, 11)
    embeds = model.get_input_embeddings()(prompt)
    given = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False, learn="off")
    assert given[0].tolist() == expected[0, 11:].tolist()
