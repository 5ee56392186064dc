"""An order in the engine's hands: what it has still to read, and what it has said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from modeling_hope import HopeCache
from modeling_hope.cache_hope import check_memory
from modeling_hope.inputs import check_ids
from modeling_hope.turn import check_learn

from .choice import Choice
from .job import Job
from .orders import Answer, Order
from .words import Words


Part = list[tuple[int, bool]]  # tokens, each with whether it is learned from


class Row:
    """
    Attributes:
        job: of the order.
        choice: how its tokens are chosen.
        left: tokens to read before the answer.
        said: tokens of the answer so far. The last one is read by the next step.
        memory: its own, while it is in no batch.
        longest: tokens that it may have read in the end.
        bytes: that its memory may take then.

    Raises:
        ValueError: the order is impossible.
    """

    def __init__(self, model: Any, tokenizer: Any, order: Order):
        check_learn(order.learn)
        if check_memory(order.memory, model.config).batch_size != 1:
            raise ValueError(f"`memory` holds {order.memory.batch_size} rows, and an order is about one.")
        record = order.memory.rows[0]
        waiting = [] if record.pending is None else [record.pending]
        ids = order.ids
        if not waiting and not order.closing and not ids:
            bos = order.settings.bos_token_id
            bos = model.generation_config.bos_token_id if bos is None else bos
            if record.seen or bos is None:
                raise ValueError("`ids` are empty, and no sampled token of `memory` waits to be read: give some.")
            ids = [bos]
        self.order, self.own = order, order.learn == "all"
        own = waiting + order.closing
        self.left: Part = [*((token, self.own) for token in own), *((token, order.learn != "off") for token in ids)]
        check_ids(torch.tensor([[token for token, _ in self.left]]), model.config.vocab_size)
        self.choice = Choice(model, order.settings, ids or own[-1:], order.seed)
        self.prompt_tokens = len(order.ids)
        read = record.seen + len(self.left)
        if (end := model.config.longest_stream) is not None:
            if read > end:
                raise ValueError(
                    f"The memory would have read {read} tokens: this model has learned positions, and none beyond "
                    f"max_position_embeddings={end}. Give less text, or a new memory."
                )
            self.choice.limit = min(self.choice.limit, end - read + 1)
        self.bytes = 0
        self.longest = read + self.choice.limit
        self.said: list[int] = []
        self.job = Job(tokenizer, self.choice.stops)
        self.tokenizer = tokenizer
        # Who listens makes the text for itself; the row's own tells when a stop string was said.
        self.words = Words(tokenizer, self.choice.stops) if self.choice.stops else None
        self.memory: HopeCache | None = None

    def begin(self, model: Any) -> None:
        """Take up the memory, as memories that are joined have to be: on the model's device, in its dtype."""
        memory = self.order.memory.clone()
        memory.offloading = False
        if getattr(model, "hf_device_map", None) is None:
            memory.to(model.device)
        for layer in memory.layers:
            layer.map_states(lambda state: state.to(state.device, model.dtype))
        self.memory = memory

    def say(self, token: int) -> str | None:
        """Say a token; why the answer ends with it, if it does."""
        self.said.append(token)
        self.choice.seen.append(token)
        if self.words is not None:
            self.words.add(token)
        stopped = token in self.choice.ends or (self.words is not None and self.words.stopped is not None)
        self.job.say(token)
        if stopped:
            return "stop"
        return "length" if len(self.said) >= self.choice.limit or self.choice.past() else None

    def finish(self, reason: str, memory: HopeCache) -> None:
        """Answer, with the row's memory."""
        memory.rows[0] = replace(memory.rows[0], pending=self.said[-1])
        given = self.order.memory.clone()
        memory.notes, memory.lost = given.notes, given.lost
        if memory.rows[0].ids.device.type != "cpu":
            memory.to("cpu")
        self.job.finish(self._answer(reason, memory))

    def cancel(self) -> None:
        self.job.finish(self._answer("cancelled", None))

    def fail(self, error: BaseException) -> None:
        self.job.finish(error)

    def _answer(self, reason: str, memory: HopeCache | None) -> Answer:
        text = self.tokenizer.decode(self.said, skip_special_tokens=True)
        text = Words(self.tokenizer, self.choice.stops).cut(text)
        return Answer(memory, list(self.said), text, reason, self.prompt_tokens)
