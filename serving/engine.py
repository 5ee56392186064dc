"""The engine: one thread owns the model, and turns of different sessions decode together in one batch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import torch

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.memory_rows import RowSize

from .choice import choose
from .job import Job
from .orders import Order
from .row import Part, Row


logger = logging.getLogger(__name__)


class Busy(RuntimeError):
    """As many orders wait as may."""


class Closed(RuntimeError):
    """The engine takes no more orders."""


class Engine:
    """
    Decodes the turns of many sessions at once, each with a memory of its own.

    Orders are taken up in the order in which they came, as far as there are rows and memory for them, and none overtakes
    one that has to wait for these. Prompts are read in pieces, in turns, one piece between two steps of the batch that
    decodes: a long prompt delays nobody by more than a piece. Each answer is that of its order alone, whatever else is
    in the batch. What goes wrong in one row ends that row.

    Args:
        model (`HopeForCausalLM`): nobody else may change it. Others may read with it.
        tokenizer: of the model.
        rows: orders worked on at a time.
        memory_bytes: what their memories may take together. Each counts with what it may grow to until its answer is
            as long as it may become. Unset: no bound.
        waiting: orders that may wait, before `submit` raises `Busy`.
        piece: tokens of prompts, padding included, that are read between two steps.
    """

    def __init__(
        self,
        model: HopeForCausalLM,
        tokenizer: Any,
        *,
        rows: int = 64,
        memory_bytes: int | None = None,
        waiting: int = 256,
        piece: int = 512,
    ):
        for name, value in {"rows": rows, "waiting": waiting, "piece": piece}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.model, self.tokenizer = model, tokenizer
        self.rows, self.memory_bytes, self.waiting, self.piece = rows, memory_bytes, waiting, piece
        self._size = RowSize(model)
        self._changed = threading.Condition()
        self._queue: deque[Row] = deque()
        self._active: set[Row] = set()  # taken up, and not answered
        self._reading: deque[Row] = deque()
        self._decoding: list[Row] = []
        self._memory: HopeCache | None = None  # of the rows that decode
        self._closed = False
        self._counts = {"tokens_read": 0, "tokens_said": 0, "steps": 0, "answers": 0, "failures": 0}
        self._thread = threading.Thread(target=self._run, name="hope-engine", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> Job:
        """
        Take an order.

        Raises:
            ValueError: it is impossible, or its memory alone may outgrow `memory_bytes`.
            Busy: too many wait.
            Closed: the engine is closed.
        """
        row = Row(self.model, self.tokenizer, order)
        row.bytes = self._size.at(row.longest)
        if self.memory_bytes is not None and row.bytes > self.memory_bytes:
            raise ValueError(
                f"This turn's memory may grow to {row.bytes:,} bytes, and there are memory_bytes={self.memory_bytes:,} for all: "
                "ask for fewer tokens, or give the engine more."
            )
        with self._changed:
            if self._closed:
                raise Closed("The engine is closed.")
            if len(self._queue) >= self.waiting:
                raise Busy(f"{len(self._queue)} orders wait already: try again later.")
            self._queue.append(row)
            self._changed.notify()
        return row.job

    def close(self, drain: bool = True) -> None:
        """Take no more orders, and return when all are answered; without `drain`, cancel them."""
        with self._changed:
            self._closed = True
            if not drain:
                for row in (*self._queue, *self._active):
                    row.job.cancel()
            self._changed.notify()
        self._thread.join()

    def status(self) -> dict[str, int]:
        """Orders that wait, read and decode now, bytes set aside for them, and what was counted since the start."""
        with self._changed:
            numbers = {"waiting": len(self._queue), "reading": len(self._reading), "decoding": len(self._decoding)}
            return {**numbers, "bytes": self._bytes(), **self._counts}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self.close(drain=kind is None)

    def _bytes(self) -> int:
        return sum(row.bytes for row in list(self._active))

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue or self._active)
                if not self._queue and not self._active:
                    return
                started = self._admit()
            try:
                for row in started:
                    self._begin(row)
                self._drop_cancelled()
                self._read_piece()
                self._decode()
            except Exception as error:
                # Not one row's fault: nobody knows what the batch holds now.
                logger.exception("The engine lost its batch.")
                for row in list(self._active):
                    self._fail(row, error)
                self._reading.clear()
                self._decoding, self._memory = [], None

    def _admit(self) -> list[Row]:
        """Take up orders for which there is room, in the order in which they came."""
        started: list[Row] = []
        cancelled = [row for row in self._queue if row.job.cancelled]
        for row in cancelled:
            self._queue.remove(row)
            row.cancel()
        taken = self._bytes()
        while self._queue and len(self._active) + len(started) < self.rows:
            taken += self._queue[0].bytes
            if self.memory_bytes is not None and taken > self.memory_bytes:
                break
            started.append(self._queue.popleft())
        self._active |= set(started)
        return started

    def _begin(self, row: Row) -> None:
        try:
            row.begin(self.model)
        except Exception as error:  # no room on its device, say
            self._fail(row, error)
        else:
            self._reading.append(row)

    def _drop_cancelled(self) -> None:
        cancelled = {row for row in self._active if row.job.cancelled}
        if not cancelled:
            return
        self._reading = deque(row for row in self._reading if row not in cancelled)
        kept = [index for index, row in enumerate(self._decoding) if row not in cancelled]
        self._decoding = [self._decoding[index] for index in kept]
        if self._memory is not None and kept:
            self._memory.select(kept)
        else:
            self._memory = None
        for row in cancelled:
            self._active.discard(row)
            row.cancel()

    def _read_piece(self) -> None:
        """Read a piece of the prompt whose turn it is, and with it as many others as fit, all padded to the longest."""
        if not self._reading:
            return
        taken: list[Row] = []
        width = 0
        for row in self._reading:
            wider = max(width, min(len(row.left), self.piece))
            if not taken or wider * (len(taken) + 1) <= self.piece:
                taken, width = [*taken, row], wider
        self._reading = deque(row for row in self._reading if row not in taken)
        whole = self.model.join_memories([row.memory for row in taken if row.memory is not None])
        for row in taken:
            row.memory = None
        for rows, memory, parts, logits in self._forward(taken, whole, [row.left[:width] for row in taken]):
            for index, (row, part) in enumerate(zip(rows, parts, strict=True)):
                row.left = row.left[len(part) :]
                self._counts["tokens_read"] += len(part)
                if row.left:
                    row.memory = self.model.take_memory(memory, index)
                    self._reading.append(row)
            ready = [index for index, row in enumerate(rows) if not row.left]
            if not ready:
                continue
            memory.select(ready)
            going_on, memory = self._say([rows[index] for index in ready], memory, logits[ready])
            if going_on:
                self._memory = memory if self._memory is None else self.model.join_memories([self._memory, memory])
                self._decoding += going_on

    def _decode(self) -> None:
        """One step of the rows that decode: read what each said last, and say the next token."""
        if self._memory is None:
            return
        rows, memory = self._decoding, self._memory
        done = self._forward(rows, memory, [[(row.said[-1], row.own)] for row in rows])
        if len(done) > 1:
            memory = self.model.join_memories([memory for _, memory, _, _ in done])
        rows = [row for rows, _, _, _ in done for row in rows]
        self._decoding, self._memory = [], None
        if rows:
            rows, memory = self._say(rows, memory, torch.cat([logits for _, _, _, logits in done]))
            self._counts["steps"] += 1
        if rows:
            self._decoding, self._memory = rows, memory

    def _forward(
        self, rows: list[Row], memory: HopeCache, parts: list[Part]
    ) -> list[tuple[list[Row], HopeCache, list[Part], torch.Tensor]]:
        """
        Read tokens, each with whether it is learned from, into the rows' memory, which changes.

        Returns:
            Rows, their memory, what they read, and logits `[rows, vocab_size]` after it. All in one, unless something goes
            wrong: then rows are read in halves, until the one that it is about is alone, and fails.
        """
        try:
            logits = self.model(**self._inputs(parts), past_key_values=memory, logits_to_keep=1).logits[:, -1]
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return []
            found = []
            for half in (range(len(rows) // 2), range(len(rows) // 2, len(rows))):
                part = memory.clone()
                part.select(list(half))
                found += self._forward([rows[i] for i in half], part, [parts[i] for i in half])
            return found
        return [(rows, memory, parts, logits)]

    def _inputs(self, parts: list[Part]) -> dict[str, Any]:
        """Arguments of `forward()` that say what each row reads, padded on the left."""
        width, device = max(len(part) for part in parts), self.model.device
        padded = [[(0, False)] * (width - len(part)) + part for part in parts]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[token for token, _ in row] for row in padded], device=device)
        }
        if any(len(part) < width for part in parts):
            missing = torch.tensor([[width - len(part)] for part in parts], device=device)
            inputs["attention_mask"] = torch.arange(width, device=device) >= missing
        told = torch.tensor([[learn for _, learn in row] for row in padded])
        learns = bool(told.any())
        return {**inputs, "learn": "all" if learns else "off", "learn_mask": told.to(device) if learns else None}

    def _say(self, rows: list[Row], memory: HopeCache, logits: torch.Tensor) -> tuple[list[Row], HopeCache]:
        """Let each row say its next token; those that have not ended, and their memory."""
        kept = []
        for index, (row, token) in enumerate(zip(rows, choose([row.choice for row in rows], logits), strict=True)):
            try:
                if isinstance(token, Exception):
                    raise token
                reason = row.say(token)
                self._counts["tokens_said"] += 1
                if reason is None:
                    kept.append(index)
                else:
                    taken = self.model.take_memory(memory, index)
                    self._counts["answers"] += 1
                    self._active.discard(row)  # who has the answer finds its room free
                    row.finish(reason, taken)
            except Exception as error:
                self._fail(row, error)
        if kept and len(kept) < len(rows):
            memory.select(kept)
        return [rows[index] for index in kept], memory

    def _fail(self, row: Row, error: BaseException) -> None:
        self._counts["failures"] += 1
        self._active.discard(row)
        row.fail(error)
