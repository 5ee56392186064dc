"""What `--model_args` say about a Hope model's memory, and what a stream of documents cannot be evaluated with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


MEMORIES = ("reset", "stream")
# What of a document a stream goes on with, once it was scored.
READS = ("question", "question_and_answer", "question_and_prediction", "nothing")
LEARN = ("prompt", "all", "off")

ONE_PROCESS = "its documents are read one after the other, by one process"
# Settings of lm-eval with which the documents of a task are not read once each, in their order.
NOT_OF_A_STREAM = {
    "use_cache": (
        "a response that comes from a cache is not read into the memory",
        "leave out --use_cache",
    ),
    "cache_requests": (
        "cached requests keep an order that nothing checks",
        "leave out --cache_requests",
    ),
    "logits_cache": (
        "it joins requests of several documents",
        "leave it out: one-token answers are scored from one call anyway",
    ),
    "parallelize": (ONE_PROCESS, "leave it out; device_map=auto in --model_args spreads one model over devices"),
    "tp_plan": (ONE_PROCESS, "leave it out"),
}


@dataclass(frozen=True)
class MemorySettings:
    """
    How a Hope model is evaluated, in the words of `--model_args`.

    Attributes:
        memory: `"reset"`, each document alone, as the model type `hf` has it; `"stream"`, a task's documents are read
            one after the other with one memory.
        read: with `"stream"`, what of a document the memory goes on with, where the document does not say so itself
            (`lm_documents.Document.read`): the `"question"` (the prompt), `"question_and_answer"` (the gold one),
            `"question_and_prediction"` (the model's), or `"nothing"`: every document is then met with a new memory.
            Unset: a text of rolling log-likelihoods is read, and for a question that does not say it must be given.
        separator: with `"stream"`, text that is read after each document but those of rolling log-likelihoods, which
            begin with a prefix token.
        learn: what is learned from, as in `model.generate`: `"prompt"`, `"all"` or `"off"`. Unset: the model decides.
        levels: that may learn, indices into `config.cms_periods`. Unset: all.
    """

    memory: str = "reset"
    read: str | None = None
    separator: str = "\n\n"
    learn: str | None = None
    levels: tuple[int, ...] | None = None

    @property
    def streams(self) -> bool:
        return self.memory == "stream"

    @classmethod
    def of(cls, memory: Any, read: Any, separator: Any, learn: Any, levels: Any) -> MemorySettings:
        """
        Settings from values as lm-eval parses them from a command line.

        Raises:
            ValueError: there is no such value; the message names the setting.
        """
        if memory not in MEMORIES:
            raise ValueError(f"`memory` must be one of {_names(MEMORIES)}, got {memory!r}.")
        if read not in (None, *READS):
            raise ValueError(f"`read` must be one of {_names(READS)}, got {read!r}.")
        if memory == "reset":
            for name, value in (("read", read), ("separator", separator)):
                if value is not None:
                    raise ValueError(
                        f"`{name}` says how a stream is read: give memory=stream as well, or leave it out."
                    )
        if learn not in (None, *LEARN):
            raise ValueError(f"`learn` must be one of {_names(LEARN)}, got {learn!r}.")
        chosen = None if levels is None else _levels(levels)
        if chosen is not None and learn == "off":
            raise ValueError("`levels` says what learns, and `learn` is 'off': leave out one of them.")
        if chosen is not None and learn is None:
            learn = "prompt"
        defaults = cls()
        return cls(
            memory,
            read,
            defaults.separator if separator is None else str(separator),
            learn,
            chosen,
        )

    @classmethod
    def of_command(cls, model_args: Mapping[str, Any], run: Mapping[str, Any]) -> MemorySettings:
        """
        Of a whole run: its `--model_args`, and its other settings by the names that lm-eval has for them.

        Raises:
            ValueError: a setting is impossible, or impossible in a stream.
        """
        named = ("memory", "read", "separator", "learn", "levels")
        settings = cls.of(*(model_args.get(name, "reset" if name == "memory" else None) for name in named))
        settings.check_run({**run, **model_args})
        return settings

    def check_run(self, run: Mapping[str, Any]) -> None:
        """Raise `ValueError` for what cannot be in a stream, naming the setting and the fix."""
        if not self.streams:
            return
        for name, (reason, fix) in NOT_OF_A_STREAM.items():
            if run.get(name):
                raise ValueError(f"`{name}` cannot be with memory=stream, for {reason}: {fix}, or give memory=reset.")
        if str(run.get("batch_size", 1)).startswith("auto"):
            raise ValueError(
                "`batch_size=auto` measures batches of many documents, and with memory=stream the answers to one question "
                "are a batch: give --batch_size a number."
            )
        if run.get("backend") == "seq2seq":
            raise ValueError("`backend=seq2seq` cannot be with memory=stream: a Hope model is a decoder. Leave it out.")
        self.check_processes(int(os.environ.get("WORLD_SIZE", "1")))

    def check_processes(self, count: int) -> None:
        """Raise `ValueError` where several processes would share a stream."""
        if self.streams and count > 1:
            raise ValueError(
                f"{count} processes cannot share the stream of memory=stream, for {ONE_PROCESS}: launch one process, or "
                "give memory=reset."
            )

    def check_model(self, config: Any) -> None:
        """Raise `ValueError` for what a model of this config cannot do."""
        kind = getattr(config, "model_type", None)
        if kind != "hope":
            for name, value in (("memory", "stream" if self.streams else None), ("learn", self.learn)):
                if value is not None:
                    raise ValueError(
                        f"`{name}={value}` needs a Hope model, and this one is of type {kind!r}, which has no memory beyond "
                        "its context: convert it with `hope convert`, or leave the setting out."
                    )
            return
        for level in self.levels or ():
            if level not in config.learning_levels:
                raise ValueError(
                    f"`levels` names {level}, and the levels that can learn are "
                    f"{', '.join(map(str, config.learning_levels)) or 'none'}, of periods {list(config.cms_periods)}."
                )
        if self.levels is not None and config.cms_learn_rates:
            raise ValueError(
                "`levels` cannot be chosen for a model with learned rates (cms_learn_rates): leave it out; learn=off "
                "holds all of them."
            )


def _names(values: tuple[str, ...]) -> str:
    return ", ".join(values)


def _levels(given: Any) -> tuple[int, ...]:
    """Levels as `0`, `0+2` or a list."""
    parts = given.split("+") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]
    try:
        levels = tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError):
        levels = ()
    if not levels or isinstance(given, bool):
        raise ValueError(f"`levels` must be numbers of levels, as 0 or 0+2, got {given!r}.")
    return levels
