"""The study of continual learning: its figures, what its methods see, and the streams of classes for lm-eval."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

import modeling_hope.eval
from modeling_hope.cli.main import main
from modeling_hope.eval.generators.class_streams import class_stream, load_classes
from modeling_hope.eval.studies import continual
from modeling_hope.eval.studies.accuracy_matrix import average_accuracy, forgetting, mean_matrix
from modeling_hope.eval.studies.class_prediction import Writer, predict
from modeling_hope.eval.studies.continual_methods import (
    ClassMeans,
    InContext,
    Joint,
    add_ewc_gradient,
    fisher_information,
)

from .test_class_streams import data  # noqa: F401


QUICK = ["study", "continual", "--quick"]
TASKS = Path(next(iter(modeling_hope.eval.__path__))) / "tasks" / "class_incremental"


@pytest.fixture(scope="module")
def stream():
    return class_stream("invented", tasks=3, classes_per_task=2, train=3, validation=1, test=2)


@pytest.fixture(scope="module")
def backbone(stream):
    return continual.backbone_for(continual.STUDY.settle({"quick": True}), stream)


def learner(backbone, name, **choice):
    method = continual.METHODS[name]
    return method.learner(backbone, {**method.choices[-1], **choice}, 0)


def test_average_accuracy_and_forgetting_are_those_of_the_definition():
    matrix = [[0.9], [0.5, 0.8], [0.7, 0.6, 1.0], [0.4, 0.7, 0.5, 0.9]]
    assert average_accuracy(matrix) == pytest.approx((0.4 + 0.7 + 0.5 + 0.9) / 4)
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.4) + (0.8 - 0.7) + (1.0 - 0.5)) / 3)
    assert forgetting([[0.2], [0.5, 0.8]]) == pytest.approx(-0.3)  # better than it ever was
    assert forgetting([[1.0]]) is None and forgetting([[], [0.5, 0.5]]) is None
    assert mean_matrix([[[1.0], [0.0, 1.0]], [[0.0], [1.0, 1.0]]]) == [[0.5], [0.5, 1.0]]


def test_the_penalty_of_ewc_and_its_fisher_information_are_those_of_the_definition():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    inputs, targets = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    losses = [torch.nn.functional.cross_entropy(model(x[None]), y[None]) for x, y in zip(inputs, targets, strict=True)]
    fisher = fisher_information(model, iter(losses))
    # The gradient of a cross entropy over a linear map is (p - onehot) x^T.
    errors = model(inputs).softmax(1) - torch.nn.functional.one_hot(targets, 2)
    direct = (errors[:, :, None] * inputs[:, None, :]).square().mean(0)
    torch.testing.assert_close(fisher["weight"], direct.detach())
    torch.testing.assert_close(fisher["bias"], errors.square().mean(0).detach())
    anchor = {name: torch.randn_like(weight) for name, weight in model.named_parameters()}
    for losses_gradient in model.parameters():
        losses_gradient.grad = torch.ones_like(losses_gradient)
    add_ewc_gradient(model, fisher, anchor, 10.0)
    for name, weight in model.named_parameters():
        again = weight.detach().clone().requires_grad_()
        (10 / 2 * (fisher[name] * (again - anchor[name]).square()).sum()).backward()
        torch.testing.assert_close(weight.grad, 1 + again.grad)


def test_a_copy_of_the_backbone_has_weights_of_its_own_tied_as_they_were(backbone):
    copied = backbone.copy(cms_learning_rates=0.3)
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    with torch.no_grad():
        for weight in copied.parameters():
            weight.add_(1.0)
    assert copied.config.cms_learning_rates == 0.3 != backbone.model.config.cms_learning_rates
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())
    assert len(list(copied.parameters())) == len(list(backbone.model.parameters()))


def test_the_loss_is_of_the_answers_tokens_each_example_read_alone(backbone, stream):
    method = learner(backbone, "fine_tuning")
    examples = stream[0].train[:3]
    losses = []
    for ids, answer in map(method.writer.example, examples):
        logits = method.model(torch.tensor([ids]), learn="off", use_cache=False).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        losses.append(each[torch.tensor(answer[1:]) == 1])
    torch.testing.assert_close(method.loss(examples), torch.cat(losses).mean())


@torch.no_grad()
def test_classes_are_named_as_one_by_one_and_the_memory_stays_as_it_is(backbone):
    model, writer = backbone.model, Writer(backbone.tokenizer)
    memory = model.new_memory()
    model(torch.tensor([writer.example(class_stream("invented", tasks=1)[0].train[0])[0]]), past_key_values=memory)
    before = memory.clone()
    answers = {name: writer.answer(name) for name in ("bono", "bono nada", "tuga", "tuga poke", "lo")}
    questions = [writer.question(text) for text in ("a", "bono nada the", "tegu tuga poke now", "my lo")]
    found = predict(model, memory, questions, answers, batch_size=3)
    assert memory.seen == before.seen and memory.tensors().keys() == before.tensors().keys()
    for question, named in zip(questions, found, strict=True):
        names, ids, place = dict(answers), list(question), 0
        while len(names) > 1:
            logits = model(torch.tensor([ids]), past_key_values=memory.clone(), learn="off").logits[0, -1]
            token = max({answer[place] for answer in names.values()}, key=lambda token: float(logits[token]))
            names = {name: answer for name, answer in names.items() if answer[place] == token}
            ids, place = [*ids, token], place + 1
        assert [named] == list(names)


@pytest.mark.parametrize("name", continual.METHODS)
def test_a_stream_that_was_stopped_goes_on_to_the_same_end(backbone, stream, name, tmp_path):
    whole, _ = continual.run_stream(learner(backbone, name), stream, tmp_path / "whole")
    stopped = learner(backbone, name)
    learn = stopped.learn

    def until_the_last(task):
        if task is stream[2]:
            raise KeyboardInterrupt
        learn(task)

    stopped.learn = until_the_last
    (tmp_path / "stopped").mkdir()
    with pytest.raises(KeyboardInterrupt):
        continual.run_stream(stopped, stream, tmp_path / "stopped")
    again = learner(backbone, name)
    again_learn, seen = again.learn, []
    again.learn = lambda task: (seen.append(task), again_learn(task))
    matrix, _ = continual.run_stream(again, stream, tmp_path / "stopped")
    assert matrix == whole and seen[-1] is stream[2]
    assert [len(row) for row in whole] == ([0, 0, 3] if learner(backbone, name).only_at_end else [1, 2, 3])
    assert not list((tmp_path / "stopped").iterdir())


@pytest.fixture
def recorded(monkeypatch):
    """What every method was given to learn and asked for, by method, stream by stream."""
    seen = {}
    for name, method in continual.METHODS.items():

        class Recorder(method.learner):
            name_of = name

            def __init__(self, backbone, choice, seed):
                self.seed, self.streams = seed, seen.setdefault(self.name_of, [])
                self.streams.append({"seed": seed, "learned": [], "asked": []})

            def learn(self, task):
                self.streams[-1]["learned"] += task.train

            def finish(self):
                pass

            def predict(self, texts, classes):
                self.streams[-1]["asked"] += texts
                return [classes[0]] * len(texts)

            def save(self, place):
                pass

        monkeypatch.setitem(continual.METHODS, name, dataclasses.replace(method, learner=Recorder))
    return seen


def test_methods_see_the_same_examples_and_none_that_is_asked_for(recorded, tmp_path):
    settings = continual.STUDY.settle({"quick": True, "out": str(tmp_path), "choices": 2, "seeds": [0, 1]})
    assert continual.STUDY.run(settings, say=lambda text: None)
    one = recorded["hope"]
    at_end = {"in_context_native", "joint"}  # these are not asked before
    for name, other in recorded.items():
        tried = 1 if name == "zero_shot" else 2
        assert [run["learned"] for run in other[tried:]] == [run["learned"] for run in one[2:]]
        assert [run["learned"] for run in other[:tried]] == [run["learned"] for run in one[:tried]]
        assert name in at_end or other[tried:] == one[2:]
    assert [run["seed"] for run in one] == [1000, 1000, 0, 1] and all(run["learned"] for run in one)
    classes = load_classes("invented")
    test = {text for of_class in classes["test"].values() for text in of_class}
    validation = {text for of_class in classes["validation"].values() for text in of_class}
    for run in one:
        assert not {example.text for example in run["learned"]} & (test | validation)
        assert set(run["asked"]) <= (validation if run["seed"] == 1000 else test)


def test_every_rival_has_as_many_settings_to_try():
    rivals = {name: method for name, method in continual.METHODS.items() if name not in ("joint", "zero_shot")}
    assert {len(method.choices) for method in rivals.values()} == {4}
    for name, method in rivals.items():
        assert len({json.dumps(choice) for choice in method.choices}) == 4, name
    trained = {(choice["rate"], choice["passes"]) for choice in continual.TRAINED}
    of_ewc = {(choice["rate"], choice["passes"]) for choice in continual.METHODS["ewc"].choices}
    assert (1e-4, 3) in of_ewc <= trained


def test_a_setting_at_the_edge_of_what_was_tried_is_named():
    choices = [{"rate": rate, "passes": passes, "kind": "a"} for rate, passes in ((0.1, 1), (0.2, 1), (0.3, 3))]
    assert continual.edges(choices[0], choices) == ["rate"]  # there are no fewer passes than one
    assert continual.edges(choices[1], choices) == []
    assert continual.edges(choices[2], choices) == ["rate", "passes"]
    assert continual.edges({"shots": None}, [{"shots": None}, {"shots": 1}]) == []


def test_learning_is_timed_to_its_end(backbone, stream, tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(continual.time, "perf_counter", lambda: float(next(clock)))
    method, finished = learner(backbone, "joint"), []
    monkeypatch.setattr(method, "finish", lambda: finished.append(next(clock)))
    assert isinstance(method, Joint)
    _, seconds = continual.run_stream(method, stream, tmp_path)
    assert len(finished) == 1 and seconds == 3 + 1  # a tick for each task, and one more within the last


def test_the_best_choice_is_taken_and_none_before_all_are_there(tmp_path):
    settings = continual.STUDY.settle({"quick": True, "out": str(tmp_path), "choices": 2})
    for place, accuracy in enumerate((0.2, 0.7)):
        with pytest.raises(ValueError, match=r"`only`: 'replay' is not tuned yet. Run --only 'tune/replay/\*' first"):
            continual.tuned(settings, "replay")
        directory = tmp_path / "parts" / "tune" / "replay" / str(place)
        directory.mkdir(parents=True)
        (directory / "result.json").write_text(json.dumps({"accuracy": accuracy, "choice": {"passes": place}}))
    assert continual.tuned(settings, "replay") == {"passes": 1}


def test_the_prompt_holds_the_newest_or_as_many_of_each_class_as_there_is_room_for(backbone, stream):
    longest = max(len(backbone.writer.question(example.text)) for task in stream for example in task.test)
    assert longest < backbone.room < longest + 12
    for name, window in (("in_context", 128), ("in_context_native", 4096)):
        for choice in continual.IN_CONTEXT:
            made = learner(backbone, name, **choice)
            assert made.budget == window - backbone.room and isinstance(made, InContext)
            for task in stream:
                made.learn(task)
            made.finish()
            taken = made.chosen()
            size = sum(len(made.writer.example(example)[0]) for example in taken)
            assert 0 < size <= made.budget and made.context().seen == [size]
            told = [example for task in stream for example in task.train]
            counts = [sum(example.label == name for example in taken) for task in stream for name in task.classes]
            assert max(counts) <= (choice["shots"] or 3)
            if choice["chosen"] == "recent" and choice["shots"] is None:
                assert taken == told[-len(taken) :]
            if choice["chosen"] == "recent":
                assert [told.index(example) for example in taken] == sorted(told.index(example) for example in taken)
            if name == "in_context_native":
                assert counts == [choice["shots"] or 3] * 6


def test_means_of_classes_find_what_the_states_tell_apart(backbone, stream):
    means = learner(backbone, "class_means")
    assert isinstance(means, ClassMeans)
    for task in stream:
        means.learn(task)
    classes = [name for task in stream for name in task.classes]
    asked = [example for task in stream for example in task.train]
    assert means.predict([example.text for example in asked], classes) == [example.label for example in asked]


def test_the_quick_form_writes_tables_figures_and_a_plot(tmp_path, capsys):
    flags = ["--methods", "hope", "fine_tuning", "joint", "--out", str(tmp_path)]
    assert main([*QUICK, *flags, "--only", "tune/*"]) == 0
    assert main([*QUICK, *flags]) == 0
    figures = json.loads((tmp_path / "continual.json").read_text())
    assert figures["methods"].keys() == {"hope", "fine_tuning", "joint"}
    of_hope = figures["methods"]["hope"]
    assert [len(row) for row in of_hope["matrix"]] == [1, 2, 3]
    assert of_hope["accuracy"] == [average_accuracy(of_hope["matrix"])]
    assert of_hope["forgetting"] == [forgetting(of_hope["matrix"])]
    assert figures["methods"]["joint"]["forgetting"] == [None]
    assert "| joint training" in (tmp_path / "continual.md").read_text()
    assert (tmp_path / "continual.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "hop"], "hop"),
        (["--tuning-tasks", "4"], "`tuning_tasks` must be between 1 and the 3 tasks"),
        (["--seeds", "1000"], "`seeds`: 1000 is the order of classes that settings are chosen on"),
        (["--tasks", "20"], "`tasks`: 20 tasks"),
        (["--model", "nowhere"], "`model`: nowhere is no checkpoint. Convert one"),
        (["--model", "small:x"], "`model`: 'small:x' has no seed"),
        (["--choices", "0"], "`choices` must be 1 or more, got 0"),
        (["--rows", "0"], "`rows` must be 1 or more, got 0"),
        (["--device", "abacus"], "`device`: 'abacus' is not here"),
        (["--model", "{llama}"], "`model`: .* is a 'llama' and no Hope model"),
        (["--dataset", "clinc150", "--data", "{llama}"], "`data`: .* has no clinc150_full.json"),
    ],
)
def test_what_cannot_be_is_refused_before_a_part_is_run(tmp_path, capsys, flags, said):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    try:
        code = main([*QUICK, "--out", str(tmp_path / "out"), *(flag.format(llama=tmp_path) for flag in flags)])
    except SystemExit as error:
        code = error.code
    assert code == 2 and re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def evaluate(name, answer, **metadata):
    """A task's documents in their order, and its results where `answer` names the classes."""

    class Namer(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [answer(request.doc) for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    sizes = {"tasks": 3, "train": 3, "test": 2}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={**sizes, **metadata})
    done = simple_evaluate(model=Namer(), tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True)
    return [sample["doc"] for sample in done["samples"][name]], done["results"][name]


@pytest.mark.parametrize("dataset", ["clinc150", "banking77", "dbpedia"])
def test_tasks_of_lm_eval_teach_before_they_ask(data, dataset):  # noqa: F811
    def knows_the_first_task_until_the_last(doc):
        return f" {doc['label']}" if doc["after"] < 2 or doc["task"] == 2 else "something else"

    name, here = f"hope_class_incremental_{dataset}", {"data": str(data)}
    docs, found = evaluate(name, lambda doc: f" {doc['label']}", **here)
    assert [doc["task"] for doc in docs] == [-1, -1, -1, *[0] * 4, *[1] * 4, *[2] * 4]
    assert found["accuracy,none"] == 1
    docs, found = evaluate(name, knows_the_first_task_until_the_last, asked="each", **here)
    assert [doc["task"] for doc in docs] == [-1, *[0] * 4, -1, *[0] * 4, *[1] * 4, -1, *[0] * 4, *[1] * 4, *[2] * 4]
    assert found["accuracy,none"] == pytest.approx(1 / 3) and found["forgetting,none"] == 1
    stream = class_stream(dataset, data, tasks=3, train=3, validation=0, test=2)
    for doc, task in zip([doc for doc in docs if doc["task"] < 0], stream, strict=True):
        told = [f"Query: {example.text}\nIntent: {example.label}" for example in task.train]
        assert doc["text"] == "\n".join(told)
    docs, found = evaluate(f"{name}_prompt", lambda doc: doc["label"].upper(), shots=2, **here)
    assert len(docs) == 12 and all(doc["text"].count("Intent:") == 13 for doc in docs)
    assert found["accuracy,none"] == 1 and "forgetting,none" not in found
    with pytest.raises(ValueError, match="`shots` must lie between 1 and the 3 examples"):
        evaluate(f"{name}_prompt", lambda doc: "", shots=4, **here)
    with pytest.raises(ValueError, match="`asked` must be 'end' or 'each'"):
        evaluate(name, lambda doc: "", asked="often", **here)
    with pytest.raises(ValueError, match="`data`"):
        evaluate(name, lambda doc: "", data=str(data / "nowhere"))
