"""lm-eval's model type `hope`: as `hf` where each document is alone, and as a loop by hand where they are a stream."""

import inspect
import json
from functools import partialmethod
from importlib.metadata import version
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_hope import HopeCache
from modeling_hope.cli import eval as command
from modeling_hope.cli.main import main
from modeling_hope.eval.lm import HopeLM
from modeling_hope.eval.lm_documents import ranges
from modeling_hope.eval.lm_settings import MemorySettings

from .conftest import chat_tokenizer, random_ids, tiny_model


NEAR = {"rel": 1e-9, "abs": 1e-9}
WORD = 9  # the first id of a word
SEPARATOR = "w11 w12"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """lm-eval's own index of 14,000 tasks takes ten seconds to build, its account of the environment one or two."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))


def tokenizer():
    made = chat_tokenizer()
    made.eos_token = "<unk>"
    return made


def words(count, seed):
    """`count` words, and their ids."""
    ids = (WORD + random_ids(count, seed=seed, vocab_size=30)).tolist()
    return " ".join(f"w{i}" for i in ids), ids


def ids_of(text):
    return [int(word[1:]) for word in text.split()]


DOCUMENTS = [
    {
        "context": words(length, seed)[0],
        "choices": [words(1 + (seed + i) % 3, 50 * seed + i)[0] for i in range(3)],
        "gold": seed % 3,
        "text": words(length + 4, 100 + seed)[0],
    }
    for seed, length in enumerate([5, 11, 3, 6])
]


def documents(**metadata):
    return {"test": Dataset.from_list(DOCUMENTS)}


def task(name, output_type, **fields):
    return {
        "task": name,
        "custom_dataset": documents,
        "output_type": output_type,
        "test_split": "test",
        "doc_to_text": "{{context}}",
        **fields,
    }


CHOICES = task("choices", "multiple_choice", doc_to_choice="choices", doc_to_target="gold")
TARGETS = task("targets", "loglikelihood", doc_to_target="{{' ' + choices[0]}}", metric_list=[{"metric": "acc"}])
TEXTS = task("texts", "loglikelihood_rolling", doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}])
ANSWERS = task(
    "answers",
    "generate_until",
    doc_to_target="{{choices[gold]}}",
    generation_kwargs={"until": ["w13"], "max_gen_toks": 5, "do_sample": False},
    metric_list=[{"metric": "exact_match"}],
)
ALL = [CHOICES, TARGETS, TEXTS, ANSWERS]


def evaluate(lm, tasks, **options):
    """Results, and the responses to each document's requests, by task."""
    tasks = [dict(each) for each in tasks]
    results = simple_evaluate(lm, tasks=tasks, task_manager=TaskManager(), bootstrap_iters=0, **options)
    return results, {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in results["samples"].items()
    }


def hope(model, **options):
    return HopeLM(model, tokenizer=tokenizer(), **options)


def flat(responses):
    """Numbers and texts, apart."""
    if isinstance(responses, list | tuple):
        parts = [flat(each) for each in responses]
        return [n for numbers, _ in parts for n in numbers], [t for _, texts in parts for t in texts]
    return ([responses], []) if isinstance(responses, float) else ([], [responses])


def assert_near(found, expected):
    (numbers, others), (their_numbers, their_others) = flat(found), flat(expected)
    assert others == their_others
    assert numbers == pytest.approx(their_numbers, **NEAR)


@pytest.mark.parametrize("learns", [False, True])
def test_documents_that_are_alone_give_what_hf_gives_exactly(model, learns):
    model.config.cms_learning = learns
    found = {}
    for side, size, options in [("left", 1, {}), ("right", 3, {}), ("left", 3, {"logits_cache": False})]:
        shared = {"batch_size": size, "max_length": 20, **options}
        stock, own = HFLM(model, tokenizer=tokenizer(), **shared), hope(model, **shared)
        stock.tokenizer.padding_side = own.tokenizer.padding_side = side
        tasks = ALL if not options else [CHOICES]
        (_, expected), (_, found[side, size, len(options)]) = evaluate(stock, tasks), evaluate(own, tasks)
        assert found[side, size, len(options)] == expected
    # A document's results do not depend on which others are in its batch, learning or not.
    first, *others = found.values()
    for other in others:
        for name, responses in other.items():
            assert_near(responses, first[name])


def test_what_is_cut_is_cut_as_hf_does_it_and_counted():
    model, shared = tiny_model(), {"tokenizer": tokenizer(), "max_length": 8, "batch_size": 2}
    results, found = evaluate(HopeLM(model, **shared), ALL)
    assert found == evaluate(HFLM(model, **shared), ALL)[1]
    # Contexts of 5, 11, 3 and 6 words; answers of 1 to 3, or 5. A text is scored in windows, and loses nothing.
    assert results["config"]["hope"]["cut"] == {"choices": 3, "targets": 1, "answers": 3}
    assert evaluate(HopeLM(model, **shared | {"max_length": 20}), ALL)[0]["config"]["hope"]["cut"] == {}


def test_what_learns_is_chosen(model):
    rates = list(model.config.cms_learning_rates)

    def found(**options):
        return evaluate(hope(model, batch_size=2, **options), [CHOICES, ANSWERS], limit=2)[1]

    model.config.cms_learning = False
    frozen = found()
    assert found(learn="prompt") != frozen
    model.config.cms_learning = True
    assert found(learn="off") == frozen and found() == found(learn="prompt") == found(levels="0+1")
    slow = found(levels=1)
    assert model.config.cms_learning_rates == rates
    model.config.cms_learning_rates = [0.0, *rates[1:]]
    assert found() == slow != frozen


def forward(model, memory, ids, told=None, **options):
    mask = torch.tensor([[position < (len(ids) if told is None else told) for position in range(len(ids))]])
    with torch.no_grad():
        logits = model(torch.tensor([ids]), past_key_values=memory, learn_mask=mask, **options).logits[0]
    return F.log_softmax(logits, -1)


def score(model, memory, context, answer, **options):
    """One answer at a time, read from the start."""
    logprobs = forward(model, memory.clone(), (context + answer)[:-1], told=len(context), **options)[-len(answer) :]
    greedy = bool((logprobs.argmax(-1) == torch.tensor(answer)).all())
    return float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum()), greedy


@pytest.mark.parametrize(
    ("read", "options", "sizes"),
    [
        ("question", {}, [2]),
        ("question_and_answer", {}, [1, 2, 8]),
        ("question_and_answer", {"learn": "off"}, [2]),
        ("question_and_prediction", {}, [2]),
        ("question_and_prediction", {"learn": "all"}, [2]),
        ("nothing", {}, [2]),
    ],
)
def test_a_stream_of_questions_is_a_loop_over_documents(model, read, options, sizes):
    memory, expected = HopeCache(model.config), []
    for document in DOCUMENTS:
        context, choices = ids_of(document["context"]), [ids_of(choice) for choice in document["choices"]]
        expected.append([[score(model, memory, context, choice, **options)] for choice in choices])
        if read == "nothing":
            continue
        best = max(range(3), key=lambda index: expected[-1][index][0][0])
        answer = {"question_and_answer": choices[document["gold"]], "question_and_prediction": choices[best]}.get(
            read, []
        )
        own = read == "question_and_prediction" and options.get("learn") != "all"
        forward(model, memory, context, **options)
        if answer:
            forward(model, memory, answer, told=0 if own else None, **options)
        forward(model, memory, ids_of(SEPARATOR), **options)
    for size in sizes:
        lm = hope(model, memory="stream", read=read, separator=SEPARATOR, batch_size=size, **options)
        results, found = evaluate(lm, [CHOICES])
        assert_near(found["choices"], expected)
        about = results["config"]["hope"]
        assert about["streams"]["choices"]["order"] == "0-3"
        assert about["streams"]["choices"]["tokens"] == memory.seen[0]
        assert about["streams"]["choices"]["updates"] == list(memory.rows[0].updates)
        assert (about["memory"], about["read"], about["learn"]) == ("stream", read, options.get("learn", "prompt"))
        assert about["version"] == version("hope-transformers")


def saying(*reads):
    """The documents, of which each says itself what of it a stream goes on with."""
    told = [{**document, "hope_read": reads[index % len(reads)]} for index, document in enumerate(DOCUMENTS)]
    return lambda **metadata: {"test": Dataset.from_list(told)}


@pytest.mark.parametrize("each", ALL, ids=lambda each: each["output_type"])
def test_a_document_says_itself_what_a_stream_goes_on_with(model, each):
    # Its own word goes before the setting's.
    mixed = {"custom_dataset": saying("nothing", "question", "nothing", "question_and_answer")}
    results, found = evaluate(hope(model, memory="stream", read="question_and_prediction"), [each | mixed])
    kept = {"nothing": "0, 2", "question": "1", "question_and_answer": "3"}
    [about] = results["config"]["hope"]["streams"].values()
    assert about["read"] == kept and results["config"]["hope"]["read"] == "question_and_prediction"

    def alone(reads, places):
        docs = [{**DOCUMENTS[place], "hope_read": read} for read, place in zip(reads, places, strict=True)]
        only = {"custom_dataset": lambda **metadata: {"test": Dataset.from_list(docs)}}
        results, found = evaluate(hope(model, memory="stream"), [each | only])
        [about] = results["config"]["hope"]["streams"].values()
        return found[each["task"]], about["tokens"]

    # What is not kept is as if it had never been asked.
    without, tokens = alone(["question", "question_and_answer"], [1, 3])
    assert_near([found[each["task"]][place] for place in (1, 3)], without)
    assert about["tokens"] == tokens
    assert_near(found[each["task"]][0], alone(["nothing"], [0])[0][0])
    assert_near(found[each["task"]][2], alone(["question", "nothing"], [1, 2])[0][1])


def test_only_a_stream_has_lm_eval_tell_whose_its_requests_are(model, monkeypatch):
    build = inspect.unwrap(Task.build_all_requests)
    _, *options = inspect.signature(build).parameters.values()
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in options)
    assert "cache_requests" in {each.name for each in options}
    monkeypatch.setattr(Task, "build_all_requests", build)
    hope(model)
    assert Task.build_all_requests is build
    hope(model, memory="stream")
    telling = Task.build_all_requests
    hope(model, memory="stream")
    assert Task.build_all_requests is telling is not build and inspect.unwrap(telling) is build


@pytest.mark.parametrize("read", [None, "nothing"])
def test_a_stream_of_texts_goes_on_from_text_to_text(model, read):
    memory, expected = HopeCache(model.config), []
    lm = hope(model, memory="stream", read=read)
    for document in DOCUMENTS:
        ids = [lm.prefix_token_id, *ids_of(document["text"])]
        logprobs = forward(model, HopeCache(model.config) if read else memory, ids)[:-1]
        expected.append([[float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum())]])
    results, found = evaluate(lm, [TEXTS])
    assert_near(found["texts"], expected)
    assert results["config"]["hope"]["streams"]["texts"]["tokens"] == memory.seen[0]


@pytest.mark.parametrize(
    ("read", "learn"),
    [
        ("question", "prompt"),
        ("question_and_answer", "all"),
        ("question_and_prediction", "prompt"),
        ("question_and_prediction", "all"),
        ("nothing", "prompt"),
    ],
)
def test_a_stream_of_prompts_is_answered_from_forks(model, read, learn):
    memory, expected, lm = HopeCache(model.config), [], hope(model, memory="stream", read=read, learn=learn)
    for document in DOCUMENTS:
        context = ids_of(document["context"])
        own, said, fork = "all" if learn == "all" else "off", [], memory.clone()
        logprobs = forward(model, fork, context, learn=learn)
        while len(said) < 5:
            said.append(int(logprobs[-1].argmax()))
            if said[-1] in (13, lm.eot_token_id):
                break
            logprobs = forward(model, fork, said[-1:], learn=own)
        text = lm.tok_decode(said).split("w13")[0].split("<unk>")[0]
        expected.append([[text]])
        if read == "nothing":
            continue
        answer = {"question_and_answer": document["choices"][document["gold"]], "question_and_prediction": text}.get(
            read, ""
        )
        forward(model, memory, context, learn=learn)
        if answer := lm.tok_encode(answer, add_special_tokens=False):
            forward(model, memory, answer, learn=own if read == "question_and_prediction" else learn)
        forward(model, memory, lm.tok_encode("\n\n"), learn=learn)
    results, found = evaluate(lm, [ANSWERS])
    assert found["answers"] == expected
    assert results["config"]["hope"]["streams"]["answers"]["tokens"] == memory.seen[0]


def test_each_task_has_a_memory_of_its_own_and_each_document_is_read_once(model):
    lm = hope(model, memory="stream", read="question_and_answer", batch_size=2)
    alone = {name: responses for each in ALL for name, responses in evaluate(lm, [each], limit=2)[1].items()}
    results, found = evaluate(lm, ALL, limit=2)
    assert found == alone
    streams = results["config"]["hope"]["streams"]
    # Several repeats and several filters of a document ask it again, and read it once.
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("one", "two")]
    results, repeated = evaluate(
        lm, [ANSWERS | {"repeats": 3, "filter_list": filters}, CHOICES | {"repeats": 2}], limit=2
    )
    assert results["config"]["hope"]["streams"] == {name: streams[name] for name in ("choices", "answers")} | {
        name: streams[name] for name in ("targets", "texts")
    }
    assert [[each[0]] for each in repeated["choices"][0]] == found["choices"][0]
    assert repeated["answers"][0] == [found["answers"][0][0] * 3]


def test_the_first_document_of_a_stream_is_as_if_alone(model):
    together, alone = hope(model, memory="stream", read="question", batch_size=2), hope(model)
    (_, first), (_, expected) = evaluate(together, ALL, limit=1), evaluate(alone, ALL, limit=1)
    for name, responses in expected.items():
        assert_near(first[name], responses)


def test_questions_that_are_asked_by_several_contexts(model):
    """As winogrande: the answer stands in the context, and the rest of the sentence is scored."""
    lm = hope(model, memory="stream", read="question_and_answer", separator="", batch_size=2)
    several = task(
        "several",
        "multiple_choice",
        doc_to_text=lambda document: document["gold"],
        doc_to_choice=lambda document: [f"{document['context']} {choice}" for choice in document["choices"]],
        doc_to_target="{{text}}",
    )
    memory, expected = HopeCache(model.config), []
    for document in DOCUMENTS:
        contexts = [ids_of(document["context"]) + ids_of(choice) for choice in document["choices"]]
        rest = ids_of(document["text"])
        shared = next(n for n in range(99) if len({tuple(context[: n + 1]) for context in contexts}) > 1)
        expected.append([[score(model, memory, context, rest)] for context in contexts])
        forward(model, memory, contexts[document["gold"]] + rest)
        assert shared >= len(ids_of(document["context"]))
    results, found = evaluate(lm, [several])
    assert_near(found["several"], expected)
    assert results["config"]["hope"]["streams"]["several"]["tokens"] == memory.seen[0]


def test_answers_by_themselves_are_scored_without_their_question(model):
    lm = hope(model, memory="stream", read="question", batch_size=4)
    metrics = [{"metric": "acc"}, {"metric": "acc_mutual_info"}]
    _, found = evaluate(lm, [CHOICES | {"metric_list": metrics}], limit=2)
    memory = HopeCache(model.config)
    for document, responses in zip(DOCUMENTS, found["choices"], strict=False):
        context, choices = ids_of(document["context"]), [ids_of(choice) for choice in document["choices"]]
        expected = [
            [score(model, memory, start, choice)] for start in (context, [lm.prefix_token_id]) for choice in choices
        ]
        assert_near(responses, expected)
        forward(model, memory, context + lm.tok_encode("\n\n"))


def test_adapters_and_narrow_numbers():
    peft = pytest.importorskip("peft")
    model = tiny_model(dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(model, config).eval()
    options = {"memory": "stream", "read": "question", "learn": "prompt", "batch_size": 2}
    results, found = evaluate(hope(lora, **options), ALL)
    merged, expected = evaluate(hope(lora.merge_and_unload(), **options), ALL)
    assert flat(found["choices"])[0] == pytest.approx(flat(expected["choices"])[0], abs=1e-3)
    assert results["config"]["hope"] == merged["config"]["hope"] != {}
    options |= {"softmax_dtype": "float32", "batch_size": 3}
    half = hope(tiny_model(dtype=torch.bfloat16), **options)
    assert all(torch.isfinite(torch.tensor(flat(evaluate(half, [CHOICES, TEXTS])[1]["choices"])[0])))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "forever"}, "`memory` must be one of reset, stream"),
        ({"memory": "stream", "read": "all"}, "`read` must be one of question"),
        ({"read": "question"}, "`read` says how a stream is read: give memory=stream"),
        ({"separator": ""}, "`separator` says"),
        ({"learn": "yes"}, "`learn` must be one of prompt, all, off"),
        ({"levels": "fast"}, "`levels` must be numbers of levels"),
        ({"levels": True}, "`levels` must be numbers of levels"),
        ({"levels": "0+2"}, "`levels` names 2, and the levels that can learn are 0, 1"),
        ({"levels": 0, "learn": "off"}, "`levels` says what learns"),
        ({"memory": "stream", "batch_size": "auto:4"}, "`batch_size=auto`"),
        ({"memory": "stream", "logits_cache": True}, "`logits_cache` cannot be with memory=stream"),
        ({"memory": "stream", "parallelize": True}, "`parallelize` cannot be"),
        ({"memory": "stream", "tp_plan": "auto"}, "`tp_plan` cannot be"),
        ({"memory": "stream", "backend": "seq2seq"}, "`backend=seq2seq` cannot be"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        hope(tiny_model(dtype=torch.float32), **options)


def test_what_a_stream_cannot_be_is_refused(model, monkeypatch, tmp_path):
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    for options in ({"memory": "stream"}, {"learn": "off"}):
        with pytest.raises(ValueError, match=r"needs a Hope model, and this one is of type 'llama'.*hope convert"):
            hope(llama, **options)
    assert evaluate(hope(llama), [CHOICES])[0]["config"]["hope"]["learn"] == "off"
    lm = hope(model, memory="stream")
    pytest.importorskip("sqlitedict")
    with pytest.raises(ValueError, match="`use_cache` cannot be"):
        evaluate(lm, [CHOICES], use_cache=str(tmp_path / "responses"))
    monkeypatch.setattr("lm_eval.api.task.load_from_cache", lambda **_: None)
    monkeypatch.setattr("lm_eval.api.task.save_to_cache", lambda **_: None)
    with pytest.raises(ValueError, match="`cache_requests` cannot be"):
        evaluate(lm, [CHOICES], cache_requests=True)
    for each in (CHOICES, TARGETS, ANSWERS):
        with pytest.raises(ValueError, match=r"`read`: task .*, document 0 asks a question, and nothing says"):
            evaluate(lm, [each])
    with pytest.raises(ValueError, match=r"`hope_read` of task texts, document 0 must be one of question, .*got 'all'"):
        evaluate(lm, [TEXTS | {"custom_dataset": saying("all")}])
    with pytest.raises(ValueError, match="name their task and document"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("w10", " w11"), 0)])
    with pytest.raises(ValueError, match="single answer is scored"):
        evaluate(hope(model, memory="stream", read="question_and_prediction"), [TARGETS])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes cannot share"):
        hope(model, memory="stream")


def test_a_stream_that_grows_beyond_what_the_model_attends_to(model):
    full = "full_attention" in model.config.layer_types
    model.config.max_position_embeddings = 24
    before = HopeLM(model, tokenizer=tokenizer(), memory="stream").max_length
    assert before == (24 if full else 2**40)
    for each in ALL:
        if full:
            with pytest.raises(ValueError, match=r"document \d.* attends to max_position_embeddings=24.*--limit \d"):
                evaluate(hope(model, memory="stream", read="question"), [each])
        with pytest.raises(ValueError, match="max_length=20"):
            evaluate(hope(model, memory="stream", read="question", max_length=20), [each])
    longer = {"max_length": 1000} if full else {}
    evaluate(hope(model, memory="stream", read="question", **longer), [CHOICES])
    # What is not read on does not count.
    evaluate(hope(model, memory="stream", read="nothing", max_length=20), ALL)


def test_orders_are_written_as_ranges():
    assert ranges([0, 1, 2, 7, 9, 10, 4]) == "0-2, 7, 9-10, 4" and ranges([]) == "" and ranges([3]) == "3"


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "data.py").write_text(
        f"from datasets import Dataset\n\n\ndef documents(**metadata):\n    return {{'test': Dataset.from_list({DOCUMENTS!r})}}\n"
    )
    for each in (CHOICES, ANSWERS):
        written = yaml.dump({name: value for name, value in each.items() if name != "custom_dataset"})
        (tmp_path / "tasks" / f"{each['task']}.yaml").write_text(f"custom_dataset: !function data.documents\n{written}")
    return tmp_path


def test_the_command_is_lm_evals_own(checkpoint, capsys):
    model = f"pretrained={checkpoint / 'model'}"
    theirs = ["--include_path", str(checkpoint / "tasks"), "--device", "cpu"]
    out = ["--output_path", str(checkpoint / "out.json"), "--log_samples"]
    stream = ["--model_args", model, "memory=stream", "read=question_and_answer", "separator='\\n'", "levels=0+1"]
    assert main(["eval", *stream, "--tasks", "choices", "answers", "--batch_size", "2", *theirs, *out]) == 0
    printed = capsys.readouterr().out
    assert "|choices|" in printed and "|answers|" in printed and "hope ({" in printed
    results = json.loads(next(checkpoint.glob("out*.json")).read_text())
    about = results["config"]["hope"]
    assert about["separator"] == "\n" and about["levels"] == [0, 1] and about["streams"]["choices"]["order"] == "0-3"
    assert len(list(checkpoint.glob("samples_*"))) == 2

    (checkpoint / "run.yaml").write_text(
        yaml.dump({"model_args": {"pretrained": str(checkpoint / "model")}, "tasks": ["choices"], "limit": 2})
    )
    assert main(["eval", "run", "--config", str(checkpoint / "run.yaml"), *theirs]) == 0
    assert "limit: 2" in capsys.readouterr().out
    assert main(["eval", "--model", "hf", "--model_args", model, "--tasks", "choices", *theirs]) == 0
    assert "hf ({" in capsys.readouterr().out
    assert main(["eval", "ls", "tasks", "--include_path", str(checkpoint / "tasks")]) == 0
    listed = capsys.readouterr().out
    assert "choices" in listed and "hope_table1" in listed


def test_what_the_command_refuses_before_anything_is_loaded(checkpoint, capsys, monkeypatch):
    model = f"pretrained={checkpoint / 'model'}"
    monkeypatch.setattr(TaskManager, "__init__", lambda *_, **__: pytest.fail("tasks are looked for"))
    for flags, said in [
        ([model], "`use_cache` cannot be with memory=stream"),
        ([model, "memory=stream"], "`batch_size=auto`"),
        ([model, "memory=stream"], "`cache_requests` cannot be"),
        ([model, "learn=never"], "`learn` must be one of"),
        (["memory=stream"], "`pretrained` is missing"),
    ]:
        more = {"`use_cache`": ["memory=stream", "--use_cache", "kept"], "`batch_size": ["--batch_size", "auto"]}
        more |= {"`cache_requests`": ["--cache_requests", "true"]}
        added = next((words for name, words in more.items() if said.startswith(name)), [])
        assert main(["eval", "--model_args", *flags, *added, "--tasks", "choices"]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(command, "hub_unreachable", lambda: "ConnectError")
    monkeypatch.setattr(command, "downloaded", lambda groups: False)
    assert main(["eval", "--model_args", model, "--tasks", "choices,hope_table[12]"]) == 2
    said = capsys.readouterr().err.strip()
    assert (
        "\n" not in said and "hope_table1, hope_table2 are on the Hugging Face hub" in said and "(ConnectError)" in said
    )


def test_what_lm_eval_refuses_is_said_in_a_line(checkpoint, capsys, monkeypatch):
    model, theirs = (
        f"pretrained={checkpoint / 'model'}",
        ["--include_path", str(checkpoint / "tasks"), "--device", "cpu"],
    )
    assert main(["eval", "--model_args", model, "--tasks", "no_such_task", *theirs]) == 2
    assert "hope: Tasks not found: no_such_task" in capsys.readouterr().err
    assert main(["eval", "--model_args", f"{model},memroy=stream", "--tasks", "choices", *theirs]) == 2
    assert "`model_args` has a name that nothing takes" in capsys.readouterr().err
    assert main(["eval", "--model_args", f"pretrained={checkpoint / 'nowhere'}", "--tasks", "choices", *theirs]) == 2
    assert "nowhere" in capsys.readouterr().err

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    (checkpoint / "tasks" / "far.yaml").write_text(
        yaml.dump(CHOICES | {"task": "far", "custom_dataset": None, "dataset_path": "some/data"})
    )
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert main(["eval", "--model_args", model, "--tasks", "far", *theirs]) == 2
    assert "the data of far are on the Hugging Face hub, which cannot be reached" in capsys.readouterr().err


def test_groups_of_the_paper_name_tasks_that_lm_eval_has():
    built_in = Path(lm_eval.tasks.__path__[0])
    folders = (
        "ruler wikitext lambada piqa hellaswag winogrande arc siqa super_glue swde nq_open drop fda squad_completion"
    )
    places = [built_in / name for name in (*folders.split(), "triviaqa")]
    index = TaskManager(include_path=[*places, command.TASKS]).task_index
    sizes = {}
    for group in command.ON_THE_HUB:
        config = index[group].cfg
        for each in config["task"]:
            member = {"task": each} if isinstance(each, str) else each
            entry = index[member["task"]]
            held = {metric["metric"] for metric in (entry.cfg or {}).get("metric_list", [])}
            assert {metric["metric"] for metric in member.get("metric_list", [])} <= held
            data = (entry.cfg or {}).get("dataset_path")
            assert not data or data in config["metadata"]["datasets"]
        sizes[group] = len(config["task"])
    assert sizes == {"hope_table1": 6, "hope_table2": 9, "hope_table3": 6}
    lengths = index["hope_table1"].cfg["task"][0]["metadata"]["max_seq_lengths"]
    assert [str(length) for length in lengths] == [
        each["metric"] for each in index["hope_table1"].cfg["aggregate_metric_list"]
    ]


def test_settings_as_a_command_line_has_them():
    given = {"memory": "stream", "levels": "0+2", "separator": 7}
    settings = MemorySettings.of_command(given, {})
    assert (settings.levels, settings.learn, settings.read, settings.separator) == ((0, 2), "prompt", None, "7")
    assert MemorySettings.of_command({"levels": [1, 0]}, {"use_cache": "kept"}).levels == (0, 1)
