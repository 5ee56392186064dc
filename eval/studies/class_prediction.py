"""How labelled examples are written as text, and how a language model names the class of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.eval.generators.class_streams import BETWEEN, QUESTION, Example


class Writer:
    """
    Examples as tokens: `Query: TEXT`, a line break, `Intent:`, and then ` CLASS` and a line break.

    Question and answer are tokenized apart, so that a question is the same with and without its answer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.end = self._ids(BETWEEN)

    def question(self, text: str) -> list[int]:
        return self._ids(QUESTION.format(text))

    def answer(self, label: str) -> list[int]:
        return self._ids(f" {label}") + self.end

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def example(self, example: Example) -> tuple[list[int], list[int]]:
        """Ids of an example, and for each whether it is of the answer."""
        question, answer = self.question(example.text), self.answer(example.label)
        return question + answer, [0] * len(question) + [1] * len(answer)


@torch.no_grad()
def predict(
    model: HopeForCausalLM,
    memory: HopeCache,
    questions: Sequence[Sequence[int]],
    answers: Mapping[str, Sequence[int]],
    batch_size: int,
) -> list[str]:
    """
    The classes that a model names for questions, each asked of the same memory, which stays as it is.

    The name is written greedily, a token at a time, among the tokens with which a name of a class can go on; where only
    one name can, it is that.

    Args:
        questions: ids.
        answers: ids of each class's name, none of which begins with another.
    """
    said: list[list[int]] = [[] for _ in questions]
    possible = [list(answers) for _ in questions]
    while undecided := [index for index, names in enumerate(possible) if len(names) > 1]:
        # A question is read anew with each token of its name, and what pads it stands behind it, where it changes nothing
        # before: without a mask, and without memories of rows that go on, there is less to copy than to read.
        undecided.sort(key=lambda index: len(questions[index]) + len(said[index]))
        for start in range(0, len(undecided), batch_size):
            chosen = undecided[start : start + batch_size]
            logits = _next(model, memory, [[*questions[index], *said[index]] for index in chosen])
            for row, index in enumerate(chosen):
                place = len(said[index])
                tokens = sorted({answers[name][place] for name in possible[index]})
                said[index].append(tokens[int(logits[row, tokens].argmax())])
                possible[index] = [name for name in possible[index] if answers[name][place] == said[index][-1]]
    return [names[0] for names in possible]


def _next(model: HopeForCausalLM, memory: HopeCache, texts: list[list[int]]) -> torch.Tensor:
    """Logits of what follows each of some texts, `[texts, vocab_size]`."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    fork = memory.clone()
    fork.batch_repeat_interleave(len(texts))
    ends, end_of = (lengths - 1).unique(return_inverse=True)
    kept = model(ids.to(model.device), past_key_values=fork, learn="off", logits_to_keep=ends.to(model.device)).logits
    return kept[torch.arange(len(texts)), end_of].cpu()
