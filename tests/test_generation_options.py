"""The options of generate(), as people call it; those that cannot be right are refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from modeling_hope import HopeCache, HopeForCausalLM, HopeSession

from .conftest import FAMILIES, TINY, assert_same_memory, random_ids, tiny_model


TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture
def model(family):
    return tiny_model(eos_token_id=None, bos_token_id=None)


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .?!"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A token for each of 40 characters, and a chat template in them."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    raw = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "!"},
    }
    path.write_text(json.dumps(raw))
    made = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="!", clean_up_tokenization_spaces=False)
    made.chat_template = (
        "{% for m in messages %}{{ '?' if m.role == 'user' else '.' }} {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}. {% endif %}"
    )
    return made


_models = {}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.sampled_from(["greedy", "sampled", "beams"]), st.integers(0, 99), st.data())
def test_any_split_into_turns_gives_the_same_tokens(family_name, way, seed, data):
    """A prompt told in parts, some by generate() and some by forward(), and an answer in parts."""
    if family_name not in _models:
        _models[family_name] = tiny_model(**FAMILIES[family_name], eos_token_id=None, bos_token_id=None)
    model = _models[family_name]
    options = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True},
        "beams": {"do_sample": False, "num_beams": 3},
    }[way]
    prompt, tokens = random_ids(1, 15, seed=seed), 9
    learn = data.draw(st.sampled_from(["prompt", "all", "off"]))
    torch.manual_seed(seed)
    whole = HopeCache(model.config)
    expected = model.generate(prompt, max_new_tokens=tokens, past_key_values=whole, learn=learn, **options)

    cuts = sorted(data.draw(st.sets(st.integers(1, 14), max_size=3)))
    parts = [part for part in torch.tensor_split(prompt, cuts, 1) if part.shape[1]]
    memory = HopeCache(model.config)
    with torch.no_grad():
        for part in parts[:-1]:
            model(part, past_key_values=memory, learn=learn)
    # What a beam goes on to depends on what comes later: an answer of beams comes in one turn.
    first = tokens if way == "beams" else data.draw(st.integers(1, tokens))
    torch.manual_seed(seed)
    said = model.generate(parts[-1], max_new_tokens=first, past_key_values=memory, learn=learn, **options)
    answer = said[0, parts[-1].shape[1] :].tolist()
    while len(answer) < tokens:
        more = data.draw(st.integers(1, tokens - len(answer)))
        answer += model.generate(max_new_tokens=more, past_key_values=memory, learn=learn, **options)[0, 1:].tolist()
    assert answer == expected[0, 15:].tolist()
    assert_same_memory(memory, whole, **TOLERANCE)


def test_streaming_and_stop_strings(model, tokenizer):
    prompt = random_ids(1, 9).clamp(min=4)
    words = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 9:].tolist()
    memory, streamer = HopeCache(model.config), TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(prompt, max_new_tokens=12, do_sample=False, past_key_values=memory, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(words)
    # A used memory is told two words, of which the streamer hears as of any prompt.
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    told = model.generate(
        prompt[:, :2], max_new_tokens=3, do_sample=False, past_key_values=memory.clone(), streamer=streamer
    )
    assert "".join(streamer) == tokenizer.decode(told[0, 2:])
    text, memory = tokenizer.decode(words), HopeCache(model.config)
    stops = {"stop_strings": [text[4:6]], "tokenizer": tokenizer}
    stopped = model.generate(prompt, max_new_tokens=12, do_sample=False, past_key_values=memory, **stops)[
        0, 9:
    ].tolist()
    said = text[: text.index(text[4:6]) + 2]
    assert tokenizer.decode(stopped) == said and tokenizer.decode([memory.rows[0].pending]) == said[-1]


@pytest.mark.parametrize("beams", [1, 3])
def test_outputs_are_those_of_every_step(model, beams):
    prompt, width = random_ids(2, 9), TINY["hidden_size"]
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    memory = HopeCache(model.config, 2)
    output = model.generate(prompt, output_hidden_states=True, past_key_values=memory, **wanted, **options)
    plain = model.generate(prompt, use_cache=False, output_hidden_states=True, **wanted, **options)
    assert output.past_key_values is memory and plain.past_key_values is None
    assert output.sequences.tolist() == plain.sequences.tolist()
    rows = 2 * beams
    assert [tuple(states[-1].shape) for states in output.hidden_states] == [(rows, 9, width)] + [(rows, 1, width)] * 4
    for ours, theirs in zip(output.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(ours[-1][:, -1], theirs[-1][:, -1], **TOLERANCE)
    for name in ("scores", "logits"):
        for ours, theirs in zip(output[name], plain[name], strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)
    tokens = model.generate(prompt, past_key_values=HopeCache(model.config, 2), logits_to_keep=1, **options)
    assert tokens.tolist() == plain.sequences.tolist()


def test_attentions_of_every_step(family):
    model = tiny_model(eos_token_id=None)
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    if family == "attention":
        found = model.generate(random_ids(1, 3), learn="off", **options).attentions
        assert [attentions[0].shape[-2:] for attentions in found] == [(3, 3), (1, 4), (1, 5)]
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(random_ids(1, 30), **options)


def test_the_policy_is_saved_and_the_call_decides(model, tmp_path):
    model.generation_config.learn = "all"
    model.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.generation_config.learn == "all"
    GenerationConfig(learn="off", max_new_tokens=8).save_pretrained(tmp_path / "off")
    off = GenerationConfig.from_pretrained(tmp_path / "off")

    def learned(**kwargs):
        memory = HopeCache(loaded.config)
        loaded.generate(random_ids(1, 8), do_sample=False, past_key_values=memory, **kwargs)
        return memory.rows[0].segments

    # From the weakest to the strongest; 8 tokens are told and 7 said and read, in segments of 4.
    loaded.config.cms_learning = False
    assert learned(max_new_tokens=8) == 3  # the generation config saved with the model
    assert learned(generation_config=off) == 0  # the one given to the call
    assert learned(generation_config=off, learn="prompt") == 2  # the call
    loaded.generation_config.learn = None
    assert learned(max_new_tokens=8) == 0  # the model's own
    loaded.config.cms_learning = True
    assert learned(max_new_tokens=8) == 2
    loaded.train()  # cms_training is "static"
    assert learned(max_new_tokens=8) == 0
    with pytest.raises(ValueError, match="learn"):
        learned(generation_config=GenerationConfig(learn="sometimes"))


def test_an_offloaded_memory(model, monkeypatch):
    prompt, options = random_ids(2, 14), {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(prompt, **options)
    output = model.generate(prompt, cache_implementation="offloaded", **options)
    assert output.sequences.tolist() == expected.sequences.tolist() and output.past_key_values.offloading
    assert_same_memory(output.past_key_values, expected.past_key_values, **TOLERANCE)
    # Another device than the model's: every state is put away there, and fetched for the next call.
    monkeypatch.setattr("modeling_hope.stream.OFFLOADED", torch.device("meta"))
    memory = HopeCache(model.config, offloading=True)
    with torch.no_grad():
        model(random_ids(1, 3), past_key_values=memory)
        assert {layer.mixer.device.type for layer in memory.layers} == {"meta"}
        with pytest.raises(NotImplementedError, match="meta"):
            model(random_ids(1, 1), past_key_values=memory)


def test_implementations_of_the_cache(model, family):
    prompt, options = random_ids(1, 9), {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert model.generate(prompt, cache_implementation="dynamic", **options).tolist() == expected.tolist()
    if family == "memory":
        assert model.generate(prompt, cache_implementation="static", **options).tolist() == expected.tolist()
    else:
        with pytest.raises(ValueError, match=r"'static'.*full attention"):
            model.generate(prompt, cache_implementation="static", **options)
    for name in ("quantized", "paged", "offloaded_static", "sliding_window"):
        with pytest.raises(ValueError, match=f"cache_implementation='{name}'"):
            model.generate(prompt, cache_implementation=name, **options)
    memory = HopeCache(model.config)
    with pytest.raises(ValueError, match="leave out one"):
        model.generate(prompt, cache_implementation="offloaded", past_key_values=memory, **options)
    for other in (DynamicCache(), "memory"):
        with pytest.raises(ValueError, match="HopeCache"):
            model.generate(prompt, past_key_values=other, **options)
    with pytest.raises(ValueError, match="HopeCache"):
        model.generate(past_key_values=DynamicCache(), **options)
    assert memory.seen == [0]


def test_what_would_need_forgetting_is_refused(model):
    prompt = random_ids(1, 9)
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).double()
    memory = HopeCache(model.config)
    for name, value in (("assistant_model", other), ("prompt_lookup_num_tokens", 3), ("assistant_early_exit", 1)):
        with pytest.raises(ValueError, match=f"`{name}`: assisted generation"):
            model.generate(prompt, max_new_tokens=3, past_key_values=memory, **{name: value})
    with pytest.raises(ValueError, match="cannot be an `assistant_model`"):
        other.generate(prompt, max_new_tokens=3, assistant_model=model)
    with pytest.raises(ValueError, match="cannot be cropped"):
        memory.crop(2)
    for call in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(NotImplementedError, match="Continuous batching"):
            call([[1, 2]])
    for option in ({"token_healing": True}, {"prefill_chunk_size": 0}, {"learn": False}):
        with pytest.raises(ValueError, match=next(iter(option))):
            model.generate(prompt, max_new_tokens=3, past_key_values=memory, **option)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 16), use_cache=False, max_new_tokens=2)
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(prompt, position_ids=torch.arange(9)[None], max_new_tokens=3)
    assert memory.seen == [0]


def test_marked_tokens_of_the_prompt(model):
    """`learn_mask` says which tokens of the prompt are learned from, whether they are new or follow the history."""
    prompt, mark, options = random_ids(1, 12), torch.rand(1, 12) < 0.5, {"max_new_tokens": 3, "do_sample": False}
    for learn in ("prompt", "all"):
        memory, expected = HopeCache(model.config), HopeCache(model.config)
        said = model.generate(prompt, learn_mask=mark, learn=learn, past_key_values=memory, **options)
        with torch.no_grad():
            model(prompt, learn_mask=mark, learn="all", past_key_values=expected)
            model(said[:, 12:-1], learn="all" if learn == "all" else "off", past_key_values=expected)
        expected.rows[0] = replace(expected.rows[0], pending=int(said[0, -1]))
        assert_same_memory(memory, expected, **TOLERANCE)
        again = torch.cat([said, random_ids(1, 6, seed=3)], 1)
        none = torch.zeros_like(again)
        model.generate(again, learn_mask=none, learn=learn, past_key_values=memory, **options)
        assert not memory.rows[0].learn.any() or learn == "all"
    with pytest.raises(ValueError, match="learn_mask"):
        model.generate(prompt, learn_mask=mark[:, 1:], **options)


def test_padded_embeddings(model):
    embeds = model.get_input_embeddings()(random_ids(2, 5)).detach()
    mask, options = torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), {"max_new_tokens": 4, "do_sample": False}
    for more in ({}, {"num_beams": 2}, {"prefill_chunk_size": 2}):
        found = model.generate(inputs_embeds=embeds, attention_mask=mask, **options, **more).tolist()
        for row in range(2):
            alone = model.generate(inputs_embeds=embeds[[row]][:, mask[row] > 0], **options, **more)
            assert found[row] == alone[0].tolist()


def test_rows_that_other_criteria_end_get_pads(model, tokenizer):
    ids, options = random_ids(2, 5).clamp(min=1), {"max_new_tokens": 9, "do_sample": False}
    free = [tokenizer.decode(row) for row in model.generate(ids, **options)[:, 5:]]
    stops = {"stop_strings": [free[0][3]], "tokenizer": tokenizer, "pad_token_id": 39}
    memory = HopeCache(model.config, 2)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=memory, **options, **stops)[:, 5:]
    for row in range(2):
        said = free[row][: free[row].index(free[0][3]) + 1] if free[0][3] in free[row] else free[row]
        width = found.shape[1]
        assert found[row].tolist() == tokenizer(said).input_ids[:width] + [39] * (width - len(said))
        assert memory.rows[row].pending == tokenizer(said).input_ids[-1]


def test_finished_rows_are_padded_as_transformers_pads(model):
    """Without a pad token, with the first that ends a sequence."""
    ids, options = random_ids(2, 5), {"max_new_tokens": 9, "do_sample": False}
    free = model.generate(ids, **options)[0, 5:].tolist()
    end = free[2]
    found = model.generate(ids, eos_token_id=[end, 39], **options)[0, 5:].tolist()
    first = free.index(end)
    assert found == free[: first + 1] + [end] * (len(found) - first - 1)
    assert found == model.generate(ids, eos_token_id=[end, 39], use_cache=False, **options)[0, 5:].tolist()


def test_a_row_that_has_read_nothing_takes_new_tokens_too(model):
    memory, ids = HopeCache(model.config, 2), random_ids(2, 6)
    with torch.no_grad():
        model(ids, attention_mask=torch.tensor([[1] * 6, [0] * 6]), past_key_values=memory, idle_rows=True)
    options = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(random_ids(2, 3, seed=2), past_key_values=memory, **options)
    alone = model.generate(random_ids(2, 3, seed=2)[1:], **options)
    assert found[1].tolist() == alone[0].tolist() and memory.seen == [12, 6]
    # One token read, and the same one waiting.
    memory = HopeCache(model.config)
    token = model.generate(torch.tensor([[6]]), max_new_tokens=1, do_sample=False, past_key_values=memory)[0, -1]
    memory.rows[0] = replace(memory.rows[0], pending=6)
    assert model.generate(past_key_values=memory, max_new_tokens=1, do_sample=False).shape == (1, 2) and token >= 0


def test_guidance_learns_nothing_from_what_it_compares_with(model):
    """Transformers reads the words again without the prompt, in a cache of its own."""
    prompt, scale, memory = random_ids(1, 9), 1.5, HopeCache(model.config)
    options = {"max_new_tokens": 9, "do_sample": False, "guidance_scale": scale, "learn": "all"}
    sequence = model.generate(prompt, past_key_values=memory, **options)
    assert model.generate(prompt, use_cache=False, **options).tolist() == sequence.tolist()
    ids = prompt
    for _ in range(9):
        with torch.no_grad():
            told = model(ids, learn="all").logits[:, -1].log_softmax(-1)
            alone = model(ids[:, 8:], learn="off").logits[:, -1].log_softmax(-1)
        ids = torch.cat([ids, (scale * (told - alone) + alone).argmax(-1, keepdim=True)], 1)
    assert sequence.tolist() == ids.tolist() and memory.seen == [17]


def test_pipeline(model, tokenizer):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}

    def said(text, **kwargs):
        return generate(text, **options, **kwargs)[0]["generated_text"]

    prompt, memory = "tell me", HopeCache(model.config)
    answer = said(prompt, past_key_values=memory, learn="all")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = model.generate(ids, learn="all", max_new_tokens=5, do_sample=False)[0, 7:]
    assert answer == tokenizer.decode(expected) and memory.seen == [11]
    # The memory goes on, with new words only or with the whole conversation.
    onward = [said(text, past_key_values=memory.clone()) for text in ("more", f"{prompt}{answer}more")]
    assert onward[0] == onward[1]
    session = HopeSession(model, tokenizer)
    assert session.generate(prompt, max_new_tokens=5, do_sample=False, learn="all") == answer
    assert said("more", past_key_values=session.memory) == onward[0] and session.tokens == 20
    batch = generate([prompt, "why"], batch_size=2, **options)
    assert [out[0]["generated_text"] for out in batch] == [said(prompt), said("why")]
    # A chat, with all its messages in each call, as pipelines take it.
    memory, chat = HopeCache(model.config), [{"role": "user", "content": "hello"}]
    chat = generate(chat, past_key_values=memory, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    said([*chat, {"role": "user", "content": "bye"}], past_key_values=memory)
    ids = tokenizer(f"? hello. {chat[-1]['content']}? bye. ").input_ids
    assert memory.rows[0].ids.tolist()[: len(ids)] == ids
