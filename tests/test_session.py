"""HopeSession: one stream to talk to, read to, keep and fork."""

import io
import threading

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, TextStreamer
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

from modeling_hope import HopeCache, HopeSession, text_pieces
from modeling_hope.chat_turns import ChatTurns
from modeling_hope.session_turn import tokens_of

from .conftest import CHATML, assert_same_memory, chat_tokenizer, random_ids, tiny_model


every_mixer = pytest.mark.usefixtures("family")
# Answers of words only, which end soon.
ANSWER = {"do_sample": True, "suppress_tokens": [0, 1, 2, 3, 6, 7, 8], "sequence_bias": {(4,): 2.0}}
EXACT = {"rtol": 0, "atol": 0}
TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}
END = 4


@pytest.fixture
def model():
    return tiny_model(eos_token_id=None, bos_token_id=None)


@pytest.fixture
def session(model):
    return HopeSession(model, chat_tokenizer())


def text(*shape, seed=0):
    return " ".join(f"w{index}" for index in random_ids(*shape, seed=seed).clamp(min=9, max=38).tolist())


def stream_of(session):
    """All that is in a session's stream, the token that waits to be read included."""
    record = session.memory.rows[0]
    return record.ids.tolist() + ([] if record.pending is None else [record.pending])


def turns(session, count, first=0, between=lambda session: session):
    """Some turns of a conversation, sampled, every other answer cut short; the session after it and the answers."""
    answers = []
    for turn in range(first, first + count):
        torch.manual_seed(turn)
        system = {"system": "w10 w11"} if turn == 0 else {}
        length = {"max_new_tokens": 4, "min_new_tokens": 4} if turn % 2 else {"max_new_tokens": 60}
        answers.append(session.chat(text(5, seed=turn), **system, **ANSWER, **length))
        session = between(session)
    return session, answers


@every_mixer
def test_turns_are_the_tokens_of_the_whole_conversation(session):
    """Answers that end by themselves, and those that were cut short, which the next turn closes."""
    messages = [{"role": "system", "content": "w10 w11"}]
    session, answers = turns(session, 6)
    for turn, answer in enumerate(answers):
        messages += [{"role": "user", "content": text(5, seed=turn)}, {"role": "assistant", "content": answer}]
    tokenizer, stream = session.tokenizer, stream_of(session)
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
    assert whole[: len(stream)] == stream and whole[len(stream) :] == [END, 5]  # the last answer was cut
    assert session.conversation == "open" and session.summary()["conversation"] == "open"
    with pytest.raises(ValueError, match="reset"):
        session.chat("w9", system="w10")


@every_mixer
def test_saved_and_loaded_between_turns(session, tmp_path):
    """As if it had never stopped: the same words, the same memory."""

    def again(used):
        used.save(tmp_path)
        return HopeSession.load(tmp_path, used.model, used.tokenizer)

    fork = session.fork()
    whole, expected = turns(session, 5)
    loaded, answers = turns(fork, 5, between=again)
    assert answers == expected and stream_of(loaded) == stream_of(whole)
    assert_same_memory(loaded.memory, whole.memory, **EXACT)
    with pytest.raises(ValueError, match="another model"):
        HopeSession.load(tmp_path, tiny_model(seed=1), session.tokenizer)


@every_mixer
def test_generate_goes_on(session):
    """A prompt in parts, cut answers and all, is one stream; what the model would take for history is new."""
    options = {"do_sample": False, "learn": "off"}
    first = session.generate("w9 w10 w11", max_new_tokens=6, **options)
    second = session.generate("", max_new_tokens=5, **options)
    whole = session.model.generate(torch.tensor([[9, 10, 11]]), max_new_tokens=11, **options)[0]
    assert stream_of(session) == whole.tolist()
    assert f"{first} {second}".split() == session.tokenizer.decode(whole[3:], skip_special_tokens=True).split()
    before = session.tokens
    # It begins with all that was read, and holds the pad.
    session.generate(session.tokenizer.decode(session.memory.rows[0].ids) + " <pad> w9", max_new_tokens=1, **options)
    assert session.tokens == 2 * before + 3
    words = session.fork().generate("w9", **options, max_new_tokens=9).split(" ")
    stopped = session.fork().generate("w9", **options, max_new_tokens=9, stop_strings=[words[3]])
    assert stopped.split(" ") == words[: words.index(words[3]) + 1]
    with pytest.raises(ValueError, match="some text"):
        fork = session.fork()
        fork.read("w9")
        fork.generate("")


def test_what_generate_refuses(session):
    for options in (
        {"num_return_sequences": 2},
        {"past_key_values": HopeCache(session.model.config)},
        {"return_dict_in_generate": True},
        {"attention_mask": torch.ones(1, 1)},
        {"use_cache": False},
        {"learn": "sometimes"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            session.generate("w9", **options)
    with pytest.raises(ValueError, match="streamer"):
        session.generate("w9", stream=True, streamer=TextStreamer(session.tokenizer))
    assert stream_of(session) == []
    two = HopeCache(session.model.config, 2)
    with pytest.raises(ValueError, match="2 rows"):
        HopeSession(session.model, session.tokenizer, two)
    with pytest.raises(ValueError, match="hope convert"):
        HopeSession(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=40)), session.tokenizer)


def test_beams_and_learning_policies(session):
    fork = session.fork()
    fork.generate(text(6), num_beams=3, max_new_tokens=5)
    whole = session.model.generate(torch.tensor([tokens_of(fork.tokenizer, text(6))]), num_beams=3, max_new_tokens=5)
    assert stream_of(fork) == whole[0].tolist()
    learned = {}
    for learn in ("prompt", "all", "off"):
        fork = session.fork()
        fork.generate(text(8), learn=learn, max_new_tokens=9, suppress_tokens=[END])
        learned[learn] = fork.summary()["segments_learned"]
    assert learned == {"prompt": 2, "all": 4, "off": 0}


def test_the_start_of_a_stream_has_one_bos(model):
    tokenizer = chat_tokenizer("{{ bos_token }}" + CHATML)
    tokenizer.add_bos_token = True
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for start in ("generate", "read", "chat"):
        session = HopeSession(model, tokenizer)
        options = {} if start == "read" else {"max_new_tokens": 2, "suppress_tokens": [1]}
        getattr(session, start)("w9 w10", **options)
        session.chat("w11", max_new_tokens=2, suppress_tokens=[1])
        session.generate("w12", max_new_tokens=2, suppress_tokens=[1])
        session.read("w13")
        assert stream_of(session)[0] == 1 and stream_of(session).count(1) == 1


def test_templates_that_cannot_be_written_turn_by_turn(model):
    forgets = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '' }}")
    thinks = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    moves = CHATML.replace("{{ m['content'] }}", "{{ 'w9' if loop.last }}{{ m['content'] }}")
    refuses = "{{ raise_exception('one turn only') if messages|length > 1 }}" + CHATML
    told = {
        None: "no chat template",
        forgets: "otherwise",
        thinks: "otherwise",
        moves: "otherwise",
        refuses: "one turn",
    }
    for template, message in told.items():
        with pytest.raises(ValueError, match=message):
            HopeSession(model, chat_tokenizer(template)).chat("w9")
    with pytest.raises(ValueError, match="0 times"):
        ChatTurns(chat_tokenizer(forgets)).next([{"role": "user", "content": "w9"}])
    with pytest.raises(ValueError, match="`message`"):
        HopeSession(model, chat_tokenizer()).chat([])


def test_a_template_ends_the_answer(session):
    """Also where the generation config knows of no end; and a cut answer is brought to its end."""

    class Says(LogitsProcessor):
        def __init__(self, *words):
            self.words = list(words)

        def __call__(self, input_ids, scores):
            return torch.zeros_like(scores).index_fill(1, torch.tensor([self.words.pop(0)]), 99.0)

    fork = session.fork()
    assert session.chat("w9", logits_processor=[Says(20, 21, END, 22)], max_new_tokens=4) == "w20 w21"
    assert fork.chat("w9", logits_processor=[Says(20)], max_new_tokens=1) == "w20"
    assert fork.generate("", logits_processor=[Says(21, END, 22)], max_new_tokens=3) == "w21"
    assert stream_of(fork) == stream_of(session)
    for used in (session, fork):
        used.chat([{"role": "tool", "content": "w30"}], max_new_tokens=1, logits_processor=[Says(23)])
    assert stream_of(session)[-13:] == [21, END, 5, 3, 2, 5, 30, END, 5, 3, 8, 5, 23]
    assert stream_of(fork) == stream_of(session)


def test_reading_closes_an_open_answer(session):
    session.chat("w9", max_new_tokens=1, suppress_tokens=[END, 5])
    session.read("w20 w21")
    assert session.conversation == "closed" and stream_of(session)[-4:] == [END, 5, 20, 21]
    session.chat("w10", max_new_tokens=1)
    assert stream_of(session)[-12:-1] == [20, 21, 3, 7, 5, 10, END, 5, 3, 8, 5]


def test_sources_of_text(session, tmp_path, monkeypatch):
    """Whatever it comes from and however it is cut, it is one stream, read as in one call."""
    monkeypatch.setattr(text_pieces, "BLOCK", 32)
    words = text(50)
    (tmp_path / "text").write_text(words)
    expected = HopeCache(session.model.config)
    with torch.no_grad():
        session.model(torch.tensor([tokens_of(session.tokenizer, words)]), past_key_values=expected, learn="all")
    sources = [words, tmp_path / "text", (tmp_path / "text").open(), (tmp_path / "text").open("rb")]
    sources += [io.StringIO(words), io.BytesIO(words.encode()), iter([*words]), [words[:100], "", words[100:]]]
    for source in sources:
        fork = session.fork()
        reading = fork.read(source, chunk=37)
        assert reading.tokens == 50 and reading.seconds > 0
        assert_same_memory(fork.memory, expected, **TOLERANCE)
        assert reading.loss > 0
    assert session.fork().read(words, learn="off").loss is None and session.fork().read("").tokens == 0
    for source, error in ((3, TypeError), (b"w9", TypeError), ([3], TypeError), (tmp_path / "none", OSError)):
        with pytest.raises(error):
            session.read(source)
    with pytest.raises(ValueError, match="chunk"):
        session.read("w9", chunk=0)
    assert stream_of(session) == []


@every_mixer
def test_reading_after_generating_reads_the_last_word_once(session):
    """And learns from what it is told only, unless told otherwise."""
    for learn in ("prompt", "all"):
        fork = session.fork()
        fork.generate(text(5), max_new_tokens=3, learn=learn)
        said = stream_of(fork)
        fork.read(text(8, seed=1), learn=learn)
        assert stream_of(fork) == said + tokens_of(fork.tokenizer, text(8, seed=1))
        expected, ids = HopeCache(session.model.config), torch.tensor([stream_of(fork)])
        told = (torch.arange(16) < 5) | (torch.arange(16) >= 8) | (learn == "all")
        with torch.no_grad():
            session.model(ids, past_key_values=expected, learn="all", learn_mask=told[None])
        assert_same_memory(fork.memory, expected, **TOLERANCE)


def test_an_interrupted_reading_keeps_whole_calls(session, monkeypatch):
    monkeypatch.setattr(text_pieces, "BLOCK", 64)

    def interrupted():
        yield text(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read(interrupted(), chunk=5)
    words = tokens_of(session.tokenizer, text(60))
    assert 0 < session.tokens < 60 and stream_of(session) == words[: session.tokens]
    session.read("w9")
    assert stream_of(session)[-1] == 9


@pytest.mark.parametrize("mixer", ["sliding_attention", "hope_memory"])
def test_memory_does_not_grow_with_what_is_read(mixer):
    window = 6 if mixer == "sliding_attention" else None
    session = HopeSession(tiny_model(layer_types=[mixer] * 2, sliding_window=window), chat_tokenizer())
    sizes = []
    for _ in range(3):
        session.read(text(64), learn="all")
        sizes.append(session.memory.nbytes() - 8 * session.tokens)
    assert sizes[0] == sizes[1] == sizes[2]


def test_streamed_text(session):
    """The same words and the same memory as in one go, in pieces."""
    fork = session.fork()
    options = {"do_sample": True, "suppress_tokens": [END, 5], "max_new_tokens": 12}
    torch.manual_seed(0)
    expected = session.chat("w9 w10", **options)
    torch.manual_seed(0)
    pieces = list(stream := fork.chat("w9 w10", **options, stream=True))
    assert "".join(pieces) == expected and len(pieces) > 1 and "" not in pieces
    assert list(stream) == []
    assert_same_memory(fork.memory, session.memory, **EXACT)


class Raises(StoppingCriteria):
    """At the third token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("a bad day")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_an_error_in_a_stream_reaches_its_reader(session):
    session.read(text(7))
    before = session.memory.clone()
    with pytest.raises(ArithmeticError, match="a bad day"):
        list(session.chat("w9", max_new_tokens=9, stopping_criteria=[Raises()], stream=True, suppress_tokens=[END]))
    with pytest.raises(ValueError):
        list(session.generate("w9", max_new_tokens=9, stream=True, num_beams=2))
    with pytest.raises(ArithmeticError):
        session.generate("w9", max_new_tokens=9, stopping_criteria=[Raises()])
    assert_same_memory(session.memory, before, **EXACT)
    assert session.memory.notes == {}
    session.generate("w9", max_new_tokens=2)


@pytest.mark.parametrize("how", ["stop", "close", "with", "drop"])
def test_a_stream_ended_early_keeps_what_was_said(session, how):
    options = {"do_sample": False, "suppress_tokens": [END, 5]}
    fork = session.fork()
    stream = session.generate("w9 w10", max_new_tokens=100_000, stream=True, **options)
    said = next(stream)
    with pytest.raises(RuntimeError, match="busy"):
        session.read("w9")
    assert session.tokens == 0  # until the end, the memory is that of before
    if how == "stop":
        stream.stop()
        said = "".join([said, *stream])
    elif how == "close":
        stream.close()
    elif how == "with":
        with stream:
            pass
    del stream
    ids = stream_of(session)
    fork.generate("w9 w10", max_new_tokens=len(ids) - 2, **options)
    assert 2 < len(ids) < 1000 and stream_of(fork) == ids
    assert_same_memory(session.memory, fork.memory, **EXACT)
    assert session.tokenizer.decode(ids[2:], skip_special_tokens=True).startswith(said)
    if how == "stop":
        assert session.tokenizer.decode(ids[2:], skip_special_tokens=True) == said
    session.chat("w9", max_new_tokens=1)


def test_notes_that_no_session_has_written_are_refused(model):
    for note, read in (("sometimes", True), ("open", False)):
        memory = HopeCache(model.config)
        if read:
            with torch.no_grad():
                model(random_ids(1, 5), past_key_values=memory)
        memory.notes["conversation"] = note
        with pytest.raises(ValueError, match="notes"):
            HopeSession(model, chat_tokenizer(), memory)
    with pytest.raises(ValueError, match="HopeForCausalLM"):
        HopeSession(model.model, chat_tokenizer())


def test_streamed_text_is_said_under_the_autocast_of_the_caller():
    model = tiny_model(dtype=torch.float32, eos_token_id=None)
    sessions = [HopeSession(model, chat_tokenizer()) for _ in range(2)]
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        said = [
            sessions[0].generate(text(5), **options),
            "".join(sessions[1].generate(text(5), stream=True, **options)),
        ]
    assert said[0] == said[1]
    assert_same_memory(sessions[0].memory, sessions[1].memory, rtol=0, atol=0)


def test_one_call_at_a_time(session):
    """Reading a memory is possible at any time; changing it is not."""
    held, go = threading.Event(), threading.Event()

    def source():
        yield "w9 " * 10
        held.set()
        go.wait(10)

    reader = threading.Thread(target=session.read, args=(source(),))
    reader.start()
    assert held.wait(10)
    for call in (lambda: session.generate("w9"), lambda: session.chat("w9"), lambda: session.read("w9"), session.reset):
        with pytest.raises(RuntimeError, match="busy"):
            call()
    assert session.summary()["tokens"] == session.fork().tokens == 0
    go.set()
    reader.join()
    assert session.tokens == 10


def test_fork_reset_and_repr(session):
    session.chat(text(9), max_new_tokens=2)
    fork = session.fork()
    fork.read(text(9))
    assert fork.tokens > session.tokens and fork.conversation == "closed" and session.conversation == "open"
    fork.reset(levels=[0])
    assert fork.tokens > session.tokens and fork.summary()["levels"][0]["change_norm"] == 0
    assert "in conversation" in repr(fork) and f"{fork.tokens:,} tokens" in repr(fork)
    fork.reset()
    assert fork.tokens == 0 and fork.conversation is None
    fork.chat("w9", system="w10", max_new_tokens=1)
    with pytest.raises(ValueError, match="levels"):
        session.reset(levels=[7])
