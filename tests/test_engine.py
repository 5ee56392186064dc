"""The engine: turns of different sessions in one batch, each as if it were alone."""

import asyncio
import threading

import pytest
import torch
from transformers import GenerationConfig

from modeling_hope import HopeCache, HopeSession
from modeling_hope.serving.choice import Choice
from modeling_hope.serving.engine import Busy, Closed, Engine
from modeling_hope.serving.orders import Order
from modeling_hope.serving.words import Words
from modeling_hope.session_turn import chat_turn, text_turn

from .conftest import assert_same_memory, chat_tokenizer, random_ids, tiny_model


TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}
PLAIN = {"suppress_tokens": [0, 1, 2, 3, 6, 7, 8]}  # answers of words only
SAMPLED = {**PLAIN, "do_sample": True, "sequence_bias": {(4,): 1.0}, "temperature": 0.8}


@pytest.fixture
def model():
    return tiny_model(eos_token_id=None, bos_token_id=None)


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


def words(count, seed):
    return " ".join(f"w{index}" for index in random_ids(count, seed=seed).clamp(min=9, max=38).tolist())


def ordered(turn, model, learn="prompt", seed=None, **settings):
    return Order.of_turn(turn, model, learn, GenerationConfig(**settings), seed)


def test_every_answer_is_that_of_its_session_alone(family, model, tokenizer):
    """Two turns of sessions that start, read and end at different times; policies, settings and lengths differ."""
    sessions = [HopeSession(model, tokenizer) for _ in range(5)]
    memories = [session.memory for session in sessions]
    with Engine(model, tokenizer, rows=4, piece=7) as engine:
        for turn in range(2):
            jobs, expected, ends = [], [], set()
            for index, session in enumerate(sessions):
                learn = ("all", "prompt", "off")[index % 3 if turn else 0]
                options = {**(SAMPLED if index % 2 else PLAIN), "max_new_tokens": 5 + 2 * index}
                if index == 3:
                    options |= {"repetition_penalty": 1.3, "min_new_tokens": 2, "top_p": 0.9}
                seed, text = 10 * turn + index, words(2 + 4 * ((index + turn) % 3), seed=index)
                made = chat_turn(memories[index], tokenizer, text, "w12" if turn == 0 else None)
                jobs.append(engine.submit(ordered(made, model, learn, seed, **options)))
                ends = {*made.ends, model.generation_config.eos_token_id}
                torch.manual_seed(seed)
                expected.append(session.chat(text, system="w12" if turn == 0 else None, learn=learn, **options))
            for index, (job, said) in enumerate(zip(jobs, expected, strict=True)):
                answer = job.result(60)
                assert answer.text == said == "".join(job)
                assert answer.reason == ("stop" if answer.ids[-1] in ends else "length")
                assert answer.reason == "stop" or len(answer.ids) == 5 + 2 * index
                assert_same_memory(answer.memory, sessions[index].memory, **TOLERANCE)
                assert answer.memory.notes == sessions[index].memory.notes
                assert answer.memory.columns == sessions[index].memory.columns
                memories[index] = answer.memory
    assert all(session.memory.rows[0].updates[0] >= 2 for session in sessions)


def test_prompts_that_go_on_and_texts_that_do(model, tokenizer):
    """Without a chat template: a start token, a prompt, and going on after the model's own last word."""
    model.generation_config.bos_token_id = 1
    session = HopeSession(model, tokenizer)
    memory = session.memory
    with Engine(model, tokenizer) as engine:
        for prompt in ("", "w9 w10 w11", ""):
            turn = text_turn(memory, tokenizer, prompt)
            answer = engine.submit(ordered(turn, model, max_new_tokens=5)).result(60)
            assert answer.text == session.generate(prompt, max_new_tokens=5)
            memory = answer.memory
    assert_same_memory(memory, session.memory, **TOLERANCE)


def test_stop_strings_are_never_shown(model, tokenizer):
    session, options = HopeSession(model, tokenizer), {**PLAIN, "repetition_penalty": 9.0, "max_new_tokens": 20}
    whole = session.fork().generate("w9", **options).split(" ")
    stop = f"{whole[5]} {whole[6]}"[:-1]
    with Engine(model, tokenizer) as engine:
        turn = text_turn(session.memory, tokenizer, "w9")
        job = engine.submit(ordered(turn, model, stop_strings=["none", stop], **options))
        pieces, answer = list(job), job.result(60)
    expected = " ".join(whole)
    expected = expected[: expected.index(stop)]
    assert "".join(pieces) == answer.text == expected and answer.reason == "stop" and len(pieces) > 1
    session.generate("w9", stop_strings=["none", stop], **options)
    assert_same_memory(answer.memory, session.memory, **TOLERANCE)


class ByteTokenizer:
    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("stops", [[], ["本 b"], ["a日", "ï", "zz"], ["b!?", "b!!"]])
def test_pieces_are_whole_characters_and_the_text_in_the_end(stops):
    whole = "日本 naïve a日本 b!? c\u00e9"
    for cut in range(len(whole.encode()) + 1):
        words, pieces, said = Words(ByteTokenizer(), stops), [], list(whole.encode()[:cut])
        for token in said:
            words.add(token)
            pieces.append(words.take())
            if words.stopped is not None:
                break
        text = words.cut(bytes(said).decode("utf-8", "replace"))
        assert "".join(pieces) + words.rest(text) == text
        assert "\ufffd" not in "".join(pieces) and not any(stop in text for stop in stops)
        assert (words.stopped is not None) == any(stop.encode() in bytes(said) for stop in stops)


def test_listened_to_while_it_is_said(model, tokenizer):
    """By threads and by coroutines, from the first piece on, whenever they begin to listen."""
    turn = text_turn(HopeCache(model.config), tokenizer, "w9")

    async def listen(job):
        return [piece async for piece in job]

    async def listen_to_all(jobs):
        return await asyncio.gather(*(listen(job) for job in jobs), *(asyncio.wrap_future(job.answer) for job in jobs))

    with Engine(model, tokenizer) as engine:
        jobs = [engine.submit(ordered(turn, model, max_new_tokens=12 + each, **PLAIN)) for each in range(3)]
        *heard, a, b, c = asyncio.run(listen_to_all(jobs))
        assert ["".join(pieces) for pieces in heard] == [a.text, b.text, c.text] == ["".join(job) for job in jobs]
        assert c.text.startswith(b.text) and b.text.startswith(a.text) and len(heard[0]) > 3


def test_a_long_prompt_does_not_hold_up_the_others(model, tokenizer):
    """While it is read piece by piece, the batch goes on, and a short prompt that came later is answered."""
    with Engine(model, tokenizer, piece=4) as engine:
        memory = HopeCache(model.config)
        long = engine.submit(ordered(text_turn(memory, tokenizer, words(400, 0)), model, max_new_tokens=1))
        short = [
            engine.submit(ordered(text_turn(memory, tokenizer, words(3, seed)), model, max_new_tokens=9))
            for seed in range(3)
        ]
        for job in short:
            job.result(60)
        assert not long.answer.done()
        assert long.result(60).memory.seen == [400]


class Gate:
    """Holds a model's calls until it is opened, so that a test knows what runs."""

    def __init__(self, model):
        self.open, self.reached = threading.Event(), threading.Event()
        self.handle = model.model.embed_tokens.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.reached.set()
        assert self.open.wait(60)


def test_cancelled_turns_leave_no_memory(model, tokenizer):
    """While they wait, read and decode; those beside them go on as if nothing had been."""
    memory = HopeCache(model.config)
    turn = text_turn(memory, tokenizer, "w9 w10 w11")
    with Engine(model, tokenizer, rows=3, piece=2) as engine:
        expected = engine.submit(ordered(turn, model, max_new_tokens=30, **PLAIN)).result(60)
        gate = Gate(model)
        jobs = [engine.submit(ordered(turn, model, max_new_tokens=n, **PLAIN)) for n in (30, 500, 400, 300, 200)]
        assert gate.reached.wait(60)
        jobs[3].cancel()
        jobs[2].cancel()
        gate.open.set()
        assert next(iter(jobs[1]))
        jobs[1].cancel()
        for job in jobs[1:4]:
            answer = job.result(60)
            assert answer.memory is None and answer.reason == "cancelled" and list(job) is not None
        assert 0 < len(jobs[1].result().ids) < 500
        answer = jobs[0].result(60)
        assert answer.ids == expected.ids
        assert_same_memory(answer.memory, expected.memory, **TOLERANCE)
        jobs[0].cancel()
        assert jobs[0].result().memory is answer.memory
        assert jobs[4].result(60).reason == "length"
        assert not any(memory.seen) and engine.status()["bytes"] == 0


def test_busy_closed_and_budget(model, tokenizer):
    turn = text_turn(HopeCache(model.config), tokenizer, "w9")
    engine = Engine(model, tokenizer, rows=1, waiting=2)
    order = ordered(turn, model, max_new_tokens=3)
    gate = Gate(model)
    jobs = [engine.submit(order)]
    assert gate.reached.wait(60)
    jobs += [engine.submit(order), engine.submit(order)]
    with pytest.raises(Busy, match="2 orders"):
        engine.submit(order)
    gate.open.set()
    engine.close()
    assert len({job.result(0).text for job in jobs}) == 1
    with pytest.raises(Closed):
        engine.submit(order)

    engine = Engine(model, tokenizer)
    gate = Gate(model)
    jobs = [engine.submit(order), engine.submit(order)]
    closing = threading.Thread(target=engine.close, kwargs={"drain": False})
    closing.start()
    gate.open.set()
    closing.join()
    assert {job.result(0).reason for job in jobs} <= {"cancelled", "length"}

    size = engine._size.at(1 + 3)
    with Engine(model, tokenizer, memory_bytes=2 * size) as engine:
        gate = Gate(model)
        jobs = [engine.submit(order) for _ in range(5)]
        assert gate.reached.wait(60)
        assert engine.status()["bytes"] <= 2 * size and engine.status()["waiting"] >= 3
        gate.open.set()
        assert [job.result(60).reason for job in jobs] == ["length"] * 5
        with pytest.raises(ValueError, match="memory_bytes"):
            engine.submit(ordered(turn, model, max_new_tokens=10**6))


def test_what_goes_wrong_in_a_row_ends_that_row(model, tokenizer, monkeypatch):
    """A token that the model chokes on, a processor that raises, probabilities that are none."""
    turn = text_turn(HopeCache(model.config), tokenizer, "w9 w10")
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: _refuse(given[0]))
    made = Choice.__init__

    def sabotaged(choice, *given):
        made(choice, *given)
        choice.processors.extend({7: [_raise], 8: [lambda ids, scores: scores * float("nan")]}.get(choice.limit, []))
        choice.alike = None if choice.limit in (7, 8) else choice.alike

    monkeypatch.setattr(Choice, "__init__", sabotaged)
    with Engine(model, tokenizer) as engine:
        expected = engine.submit(ordered(turn, model, max_new_tokens=20, **PLAIN)).result(60)
        good = [engine.submit(ordered(turn, model, max_new_tokens=20, **PLAIN)) for _ in range(3)]
        bad = [
            engine.submit(ordered(text_turn(turn.memory, tokenizer, "w9 abcdef"), model)),
            engine.submit(ordered(turn, model, max_new_tokens=7)),
            engine.submit(ordered(turn, model, max_new_tokens=8, do_sample=True)),
            engine.submit(ordered(turn, model, max_new_tokens=50, sequence_bias={(39,): 100.0})),
        ]
        for job, error in zip(bad, ("choked", "raised", "finite", "choked"), strict=True):
            with pytest.raises((RuntimeError, ValueError), match=error):
                job.result(60)
            with pytest.raises((RuntimeError, ValueError), match=error):
                list(job)
        for job in good:
            answer = job.result(60)
            assert answer.ids == expected.ids
            assert_same_memory(answer.memory, expected.memory, **TOLERANCE)
        assert engine.status()["failures"] == 4 and engine.status()["bytes"] == 0


def _refuse(ids):
    if bool((ids == 39).any()):
        raise RuntimeError("choked")


def _raise(ids, scores):
    raise RuntimeError("raised")


def test_impossible_orders_are_refused_at_once(model, tokenizer):
    memory = HopeCache(model.config)
    turn = text_turn(memory, tokenizer, "w9")
    with Engine(model, tokenizer) as engine:
        for options in (
            {"num_beams": 2},
            {"guidance_scale": 2.0},
            {"prompt_lookup_num_tokens": 3},
            {"use_cache": False},
        ):
            with pytest.raises(ValueError, match=next(iter(options))):
                engine.submit(ordered(turn, model, **options))
        for bad, words_of_it in (
            (Order(memory, [], [], "off", GenerationConfig()), "empty"),
            (Order(memory, [40], [], "off", GenerationConfig()), "vocab_size"),
            (Order(memory, [9], [], "often", GenerationConfig()), "learn"),
            (Order(HopeCache(model.config, 2), [9], [], "off", GenerationConfig()), "2 rows"),
            (Order(HopeCache(tiny_model(hidden_size=32).config), [9], [], "off", GenerationConfig()), "another model"),
        ):
            with pytest.raises(ValueError, match=words_of_it):
                engine.submit(bad)
    with pytest.raises(ValueError, match="rows"):
        Engine(model, tokenizer, rows=0)
