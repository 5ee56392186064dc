"""A task's documents as one stream: a memory that reads them, and forks of it that are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .reading import TOKENS_PER_CALL, feed


# A row's log-probabilities, `[tokens]`, and whether each was the most likely token, `[tokens]` bool.
Scores = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Plan:
    """
    What is read of a document, in tokens.

    Attributes:
        question: read once, for all requests.
        rows: of each request, what comes after it.
        told: how many tokens of each row belong to the question too; the others are an answer under test.
        asking: the requests whose rows come after the question. The others' are whole.
        read: what the memory goes on with, one of `lm_settings.READS`.
        answers: rows one of which it goes on with, the most likely one.
        rest: tokens that it goes on with in any case.
        new: tokens that may be generated after a row.
        grows_by: tokens that the memory has read more afterwards, at most.
    """

    question: list[int]
    rows: list[list[int]]
    told: list[int]
    asking: list[int]
    read: str
    answers: list[int] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)
    new: int = 0
    grows_by: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest fork that is asked."""
        return len(self.question) + max(map(len, self.rows)) + self.new


class TaskStream:
    """
    The memory of one task, which is read into, and read with.

    Args:
        call: what the model is called by, as it is: `call(ids, past_key_values=..., ...)`, to its output.
        memory: an empty `HopeCache` of one row.
        device: of the ids.
        softmax_dtype: in which log-probabilities are computed; `None`: that of the logits.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        memory: Any,
        device: torch.device,
        softmax_dtype: torch.dtype | None = None,
    ):
        self.call, self.memory, self.device, self.softmax_dtype = call, memory, device, softmax_dtype

    def read(self, memory: Any, ids: Sequence[int], learn: bool = True) -> torch.Tensor | None:
        """
        Read tokens, and learn from them where the model learns.

        Returns:
            Logits after the last one, `[1, vocab_size]`; `None` where there was nothing to read.
        """
        given = torch.tensor(list(ids), dtype=torch.int64, device=self.device)
        last = feed(self.call, memory, given, learn=None, learn_mask=torch.full_like(given, learn))
        return None if last is None else last[None]

    def score(
        self,
        memory: Any,
        rows: Sequence[Sequence[int]],
        told: Sequence[int],
        last: torch.Tensor | None = None,
        read_last: bool = False,
    ) -> list[Scores]:
        """
        How likely tokens are, one row of them for each row of the memory, which reads them.

        Args:
            rows: tokens, at least one in each row.
            told: how many tokens of each row, from its start, may be learned from. The others are answers under test.
            last: logits after what the memory has read, `[1, vocab_size]`. Without them a row's first token is not
                scored: its log-probability is NaN.
            read_last: read the rows' last tokens too, which no score needs.
        """
        logprobs: list[list[torch.Tensor]] = [[] for _ in rows]
        greedy: list[list[torch.Tensor]] = [[] for _ in rows]

        def note(logits: torch.Tensor, start: int) -> None:
            """Logits `[rows, width, vocab_size]` from which the tokens from `start` on follow."""
            found = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            for index, row in enumerate(rows):
                targets = torch.tensor(
                    list(row[start : start + found.shape[1]]), dtype=torch.int64, device=found.device
                )
                mine = found[index, : len(targets)]
                logprobs[index].append(mine.gather(1, targets[:, None])[:, 0])
                greedy[index].append(mine.argmax(-1) == targets)

        width = max(map(len, rows)) - (not read_last)
        if last is not None:
            note(last[:, None].expand(len(rows), -1, -1), 0)
        for start in range(0, width, TOKENS_PER_CALL):
            stop = min(start + TOKENS_PER_CALL, width)
            parts = [torch.tensor(list(row[start : min(stop, len(row) - (not read_last))])) for row in rows]
            ids = pad_sequence([part.long() for part in parts], batch_first=True)
            columns = torch.arange(ids.shape[1])
            real = columns < torch.tensor([len(part) for part in parts])[:, None]
            marked = columns + start < torch.tensor(list(told))[:, None]
            logits = self.call(
                ids.to(self.device),
                attention_mask=real.to(self.device),
                past_key_values=memory,
                learn_mask=marked.to(self.device),
            ).logits
            if last is None and start == 0:
                note(torch.full_like(logits[:, :1], torch.nan), 0)
            note(logits, start + 1)
        return [(torch.cat(found), torch.cat(most)) for found, most in zip(logprobs, greedy, strict=True)]

    def score_forks(
        self,
        memory: Any,
        rows: Sequence[Sequence[int]],
        told: Sequence[int],
        last: torch.Tensor | None,
        batch_size: int,
    ) -> list[Scores]:
        """As `score`, of rows that each go on by themselves from one memory of one row, which stays as it is."""
        scores: list[Scores] = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            forks = memory.clone()
            forks.batch_repeat_interleave(len(part))
            scores += self.score(forks, part, told[start : start + batch_size], last)
        return scores


def common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all rows begin."""
    start = []
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        start.append(tokens[0])
    return start
