"""Ways to learn a stream of classes with one language model: Hope's memory, the prompt, training, and a bound."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from modeling_hope import HopeCache, HopeConfig, HopeForCausalLM, consolidate
from modeling_hope.eval.generators.class_streams import ClassTask, Example
from modeling_hope.eval.reading import at_native_context, feed
from modeling_hope.training.rows import IGNORED

from .class_prediction import Writer, predict


Choice = dict[str, Any]


@dataclasses.dataclass
class Backbone:
    """
    What every method begins with.

    Attributes:
        model: never changed.
        rows: questions asked at once, at most, with a context of 1,024 tokens or fewer.
        room: tokens of the longest question and answer.
    """

    model: HopeForCausalLM
    tokenizer: Any
    rows: int
    room: int

    @cached_property
    def writer(self) -> Writer:
        return Writer(self.tokenizer)

    def copy(self, **fields: Any) -> HopeForCausalLM:
        """The model with weights of its own, and other fields of its config."""
        with init.no_init_weights():
            model = HopeForCausalLM(HopeConfig.from_dict({**self.model.config.to_dict(), **fields}))
        model.tie_weights()
        model.load_state_dict(self.model.state_dict())
        return model.to(self.model.device).eval()


class Learner(ABC):
    """
    One way to learn a stream of classes.

    Args:
        choice: what was tuned.
        seed: of what is drawn at random.
    """

    # It is asked after the last task only.
    only_at_end: bool = False

    def __init__(self, backbone: Backbone, choice: Choice, seed: int):
        self.backbone, self.choice, self.seed = backbone, choice, seed
        self.writer = backbone.writer
        self.model = self.make_model()

    def make_model(self) -> HopeForCausalLM:
        return self.backbone.copy()

    @abstractmethod
    def learn(self, task: ClassTask) -> None:
        """Learn from a task's training examples, in their order."""

    def finish(self) -> None:
        """What is done once all tasks so far are there, before questions are asked: nothing, unless a learner says so."""
        return None

    def predict(self, texts: Sequence[str], classes: Sequence[str]) -> list[str]:
        """Classes of texts, among those seen so far. Nothing is learned from it."""
        answers = {name: self.writer.answer(name) for name in classes}
        questions = [self.writer.question(text) for text in texts]
        return predict(self.model, self.context(), questions, answers, self.rows)

    def context(self) -> HopeCache:
        """The memory that questions are asked of."""
        return self.model.new_memory()

    @property
    def rows(self) -> int:
        return self.backbone.rows

    def save(self, place: Path) -> None:
        """What `load` cannot find in the tasks that were learned: nothing, unless a learner says so."""
        return None

    def load(self, place: Path, past: Sequence[ClassTask]) -> None:
        """Go on where `save` was called, these tasks having been learned."""
        for task in past:
            self.learn(task)


class HopeMemory(Learner):
    """
    Hope's own way: a memory reads the examples one after the other, and its levels learn from them.

    Choice: `rate`, the levels'; `period`, the fastest one's in tokens, the others keep their ratio to it; `window`, tokens
    in view of attention that slides (where examples are in view, they are copied from rather than learned); `passes` over
    a task's examples; `targets`, what is learned from ("answers" or "all" tokens); `optimizer`, `cms_optimizer`.
    """

    def __init__(self, backbone: Backbone, choice: Choice, seed: int):
        super().__init__(backbone, choice, seed)
        self.memory = self.model.new_memory()

    def make_model(self) -> HopeForCausalLM:
        config = self.backbone.model.config
        fastest = min((period for period in config.cms_periods if period is not None), default=1)
        periods = [None if p is None else self.choice["period"] * p // fastest for p in config.cms_periods]
        fields = {
            "cms_learning_rates": self.choice["rate"],
            "cms_periods": periods,
            "cms_optimizer": self.choice["optimizer"],
        }
        if isinstance(config.sliding_window, int):
            fields["sliding_window"] = min(config.sliding_window, self.choice["window"])
        return self.backbone.copy(**fields)

    def learn(self, task: ClassTask) -> None:
        ids: list[int] = []
        targets: list[int] = []
        for example in list(task.train) * self.choice["passes"]:
            of_example, answer = self.writer.example(example)
            ids += of_example
            targets += answer if self.choice["targets"] == "answers" else [1] * len(answer)
        device = self.model.device
        feed(self.model, self.memory, torch.tensor(ids, device=device), "all", torch.tensor(targets, device=device))

    def context(self) -> HopeCache:
        return self.memory

    def save(self, place: Path) -> None:
        self.memory.save_pretrained(place / "memory")

    def load(self, place: Path, past: Sequence[ClassTask]) -> None:
        self.memory = self.model.load_memory(place / "memory")


class HopeConsolidated(HopeMemory):
    """
    The same, and after each task what the levels have learned is written into the weights, and the memory begins anew.

    Choice: `strength` of the writing, besides.
    """

    def learn(self, task: ClassTask) -> None:
        super().learn(task)
        self.model = consolidate(self.model, self.memory, strength=self.choice["strength"])
        self.memory = self.model.new_memory()

    def save(self, place: Path) -> None:
        save_weights(self.model, place)

    def load(self, place: Path, past: Sequence[ClassTask]) -> None:
        load_weights(self.model, place)


class ZeroShot(Learner):
    """No example is seen: the backbone names classes by what it knows of their names."""

    def learn(self, task: ClassTask) -> None:
        """Nothing."""


class InContext(Learner):
    """
    In-context learning: labelled examples stand before each question, as many as the context holds.

    Choice: `chosen`, which: the most "recent", in their order, or a "balanced" number of each class, mixed; `shots`, of
    each class at most (`None`: no bound).
    """

    def __init__(self, backbone: Backbone, choice: Choice, seed: int):
        super().__init__(backbone, choice, seed)
        self.examples: list[Example] = []
        self.prompt = self.model.new_memory()

    @property
    def budget(self) -> int:
        """Tokens of examples that the context has room for."""
        config = self.model.config
        layers = zip(config.layer_windows, config.layer_sinks, strict=True)
        windows = [window for window, sinks in layers if sinks and window is not None]  # others slid in the source too
        return min([config.max_position_embeddings, *windows]) - self.backbone.room

    @property
    def rows(self) -> int:
        # Each row has the context's keys and values.
        return max(1, self.backbone.rows * 1024 // max(self.budget, 1024))

    def learn(self, task: ClassTask) -> None:
        self.examples += task.train

    def finish(self) -> None:
        ids = [token for example in self.chosen() for token in self.writer.example(example)[0]]
        self.prompt = self.model.new_memory()
        feed(self.model, self.prompt, torch.tensor(ids, dtype=torch.int64, device=self.model.device), "off")

    def chosen(self) -> list[Example]:
        """The examples of the prompt, in its order."""
        draw = random.Random(f"{self.seed} {len(self.examples)}")
        by_class: dict[str, list[Example]] = {}
        ordered = []
        for example in reversed(self.examples):
            of_class = by_class.setdefault(example.label, [])
            if len(of_class) != self.choice["shots"]:
                of_class.append(example)
                ordered.append(example)
        if self.choice["chosen"] == "balanced":
            classes = list(by_class.values())
            draw.shuffle(classes)
            ordered = [example for turn in zip_longest(*classes) for example in turn if example is not None]
        room, taken = self.budget, []
        for example in ordered:
            room -= len(self.writer.example(example)[0])
            if room < 0:
                break
            taken.append(example)
        if self.choice["chosen"] == "balanced":
            draw.shuffle(taken)
        return taken[::-1]

    def context(self) -> HopeCache:
        return self.prompt


class NativeInContext(InContext):
    """
    The same with the whole context that the model was trained for in view, instead of the window.

    It is asked after the last task only: a row of questions has that context's keys and values, which are many.
    """

    only_at_end = True

    def make_model(self) -> HopeForCausalLM:
        return at_native_context(self.backbone.model)


class FineTuning(Learner):
    """
    Plain fine-tuning: AdamW on the answers' loss, all weights, task after task.

    Choice: `rate` of learning; `passes` over a task's examples.
    """

    rows_per_step = 15

    def learn(self, task: ClassTask) -> None:
        self.train(self.examples_of(task))

    def examples_of(self, task: ClassTask) -> Iterator[list[Example]]:
        """A pass's examples, pass by pass."""
        for _ in range(self.choice["passes"]):
            yield list(task.train)

    def train(self, passes: Iterator[list[Example]]) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.choice["rate"], weight_decay=0.0, fused=True)
        self.model.train()
        with torch.enable_grad():
            for examples in passes:
                for start in range(0, len(examples), self.rows_per_step):
                    optimizer.zero_grad()
                    self.loss(examples[start : start + self.rows_per_step]).backward()
                    self.add_penalty()
                    nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    optimizer.step()
        self.model.zero_grad()
        self.model.eval()

    def loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """Mean over the tokens of the answers."""
        written = [self.writer.example(example) for example in examples]
        width, asked = max(len(ids) for ids, _ in written), max(sum(answer) for _, answer in written)
        ids, mask, targets = (torch.full((len(written), width), empty) for empty in (0, 0, IGNORED))
        # All end together, so that logits are needed of the last columns only.
        for row, (tokens, answer) in enumerate(written):
            ids[row, -len(tokens) :] = torch.tensor(tokens)
            mask[row, -len(tokens) :] = 1
            targets[row, -sum(answer) :] = torch.tensor(tokens[-sum(answer) :])
        device = self.model.device
        logits = self.model(
            ids.to(device), attention_mask=mask.to(device), use_cache=False, learn="off", logits_to_keep=asked + 1
        ).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), targets[:, -asked:].flatten().to(device), ignore_index=IGNORED)

    def add_penalty(self) -> None:
        """Add the gradient of what is minimised besides the loss: nothing, unless a learner says so."""
        return None

    def save(self, place: Path) -> None:
        save_weights(self.model, place)

    def load(self, place: Path, past: Sequence[ClassTask]) -> None:
        load_weights(self.model, place)


class EWC(FineTuning):
    """
    Elastic weight consolidation (online form: one sum of Fisher information, one anchor): weights that mattered to earlier
    tasks are held near where they were.

    Choice: `strength` of the penalty, besides.
    """

    fisher_examples = 30

    def __init__(self, backbone: Backbone, choice: Choice, seed: int):
        super().__init__(backbone, choice, seed)
        self.fisher: dict[str, torch.Tensor] = {}
        self.anchor: dict[str, torch.Tensor] = {}

    def learn(self, task: ClassTask) -> None:
        super().learn(task)
        found = fisher_information(self.model, self._losses(task))
        self.fisher = {name: self.fisher.get(name, 0) + values for name, values in found.items()}
        self.anchor = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def _losses(self, task: ClassTask) -> Iterator[torch.Tensor]:
        for example in task.train[: self.fisher_examples]:
            yield self.loss([example])

    def add_penalty(self) -> None:
        if self.anchor:
            add_ewc_gradient(self.model, self.fisher, self.anchor, self.choice["strength"])

    def save(self, place: Path) -> None:
        super().save(place)
        save_file(self.fisher, place / "fisher.safetensors")

    def load(self, place: Path, past: Sequence[ClassTask]) -> None:
        super().load(place, past)
        self.fisher = load_file(place / "fisher.safetensors", device=str(self.model.device))
        self.anchor = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}


class Replay(FineTuning):
    """
    Fine-tuning with a small buffer: some examples of each earlier class are trained on again with each task.

    Choice: as fine-tuning.
    """

    buffered = 1  # examples of each class

    def __init__(self, backbone: Backbone, choice: Choice, seed: int):
        super().__init__(backbone, choice, seed)
        self.buffer: list[Example] = []

    def learn(self, task: ClassTask) -> None:
        super().learn(task)
        self.keep(task)

    def keep(self, task: ClassTask) -> None:
        for name in task.classes:
            self.buffer += [example for example in task.train if example.label == name][: self.buffered]

    def examples_of(self, task: ClassTask) -> Iterator[list[Example]]:
        draw = random.Random(f"{self.seed} {len(self.buffer)}")
        for examples in super().examples_of(task):
            mixed = examples + self.buffer
            draw.shuffle(mixed)
            yield mixed

    def load(self, place: Path, past: Sequence[ClassTask]) -> None:
        super().load(place, past)
        for task in past:
            self.keep(task)


class Joint(FineTuning):
    """Training on all tasks at once, mixed: what a stream could reach at best. Choice: as fine-tuning."""

    only_at_end = True

    def __init__(self, backbone: Backbone, choice: Choice, seed: int):
        super().__init__(backbone, choice, seed)
        self.examples: list[Example] = []

    def learn(self, task: ClassTask) -> None:
        self.examples += task.train

    def finish(self) -> None:
        draw = random.Random(self.seed)
        self.train(iter([draw.sample(self.examples, len(self.examples)) for _ in range(self.choice["passes"])]))

    def save(self, place: Path) -> None:
        """Nothing was learned before the last task."""

    def load(self, place: Path, past: Sequence[ClassTask]) -> None:
        for task in past:
            self.learn(task)


class ClassMeans(Learner):
    """
    No language model's answer, a reference line: the mean of each class's frozen hidden states, and for all classes one
    covariance; a text has the class whose mean is nearest (linear discriminant analysis, which a stream can be learned
    with exactly).

    Choice: `layer` whose states are taken, as a part of the depth; `shrinkage` of the covariance toward a multiple of 1.
    """

    def __init__(self, backbone: Backbone, choice: Choice, seed: int):
        super().__init__(backbone, choice, seed)
        self.states: dict[str, list[torch.Tensor]] = {}

    def learn(self, task: ClassTask) -> None:
        for example, state in zip(task.train, self.features([e.text for e in task.train]), strict=True):
            self.states.setdefault(example.label, []).append(state)

    def predict(self, texts: Sequence[str], classes: Sequence[str]) -> list[str]:
        means = torch.stack([torch.stack(self.states[name]).mean(0) for name in classes])
        around = torch.cat([torch.stack(self.states[name]) - mean for name, mean in zip(classes, means, strict=True)])
        covariance = around.T @ around / len(around)
        share, size = self.choice["shrinkage"], len(covariance)
        covariance = (1 - share) * covariance + share * covariance.trace() / size * torch.eye(size, dtype=means.dtype)
        weights = torch.linalg.solve(covariance, means.T)
        scores = self.features(texts) @ weights - (means.T * weights).sum(0) / 2
        return [classes[index] for index in scores.argmax(1).tolist()]

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> torch.Tensor:
        """Mean hidden state of each text, `[texts, hidden_size]` float64."""
        layer = round(self.choice["layer"] * self.model.config.num_hidden_layers)
        found = []
        for text in texts:
            ids = torch.tensor([self.writer.question(text)], device=self.model.device)
            states = self.model(ids, learn="off", use_cache=False, output_hidden_states=True, logits_to_keep=1)
            found.append(states.hidden_states[layer][0].mean(0).double().cpu())
        return torch.stack(found)


def fisher_information(model: nn.Module, losses: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean squared gradient of each weight over examples' losses (the empirical Fisher information's diagonal)."""
    fisher = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    count = 0
    for loss in losses:
        model.zero_grad()
        loss.backward()
        count += 1
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                fisher[name].add_(weight.grad.square())
    model.zero_grad()
    return {name: values / max(count, 1) for name, values in fisher.items()}


@torch.no_grad()
def add_ewc_gradient(
    model: nn.Module, fisher: dict[str, torch.Tensor], anchor: dict[str, torch.Tensor], strength: float
) -> None:
    """Add the gradient of strength / 2 sum_i F_i (w_i - anchor_i)^2 to those of the weights."""
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            weight.grad.addcmul_(fisher[name], weight - anchor[name], value=strength)


def save_weights(model: nn.Module, place: Path) -> None:
    save_file(
        {name: weight.detach().contiguous() for name, weight in model.named_parameters()}, place / "weights.safetensors"
    )


def load_weights(model: nn.Module, place: Path) -> None:
    saved = load_file(place / "weights.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(saved[name])
