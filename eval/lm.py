"""lm-eval's model type `hope`: as `hf`, and with a memory that is carried from document to document."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from .lm_cuts import count_cuts
from .lm_documents import Document, delimited, documents_by_task, gold_index, gold_text, ranges, tell_tasks
from .lm_settings import MemorySettings
from .lm_stream import Plan, TaskStream, common_start


# A bound for what has none: lm-eval counts with it.
UNBOUNDED = 2**40

log = logging.getLogger("lm_eval.hope")


@register_model("hope")
class HopeLM(HFLM):
    """
    A Hope model for lm-eval. With `memory="reset"`, the default, it gives what the model type `hf` gives, with the same
    arguments and for any model that that one takes.

    With `memory="stream"` a task's documents are read in their order with one memory; a new task begins anew. All
    choices of a question are scored as forks of one memory, of which `batch_size` run at once, and then the document is
    read into it, once. Log-likelihoods of whole texts and generation go on from what was read before as well.

    Contexts are never cut in a stream. With `"reset"` they are cut as `hf` cuts them, to the last `max_length` tokens,
    which are `config.max_position_embeddings` unless it is given; but a document that states a greater length as its
    `max_length` (a needle's haystack) is refused, and how many others were cut is said in the results.

    Args:
        pretrained, **options: as of `lm_eval.models.huggingface.HFLM`.
        memory, read, separator, learn, levels: see `MemorySettings`.

    Raises:
        ValueError: a setting is impossible, or impossible in a stream; where that does not take the model to tell, before
            it is loaded.
    """

    def __init__(
        self,
        pretrained: Any,
        memory: str = "reset",
        read: str | None = None,
        separator: str | None = None,
        learn: str | None = None,
        levels: Any = None,
        logits_cache: bool | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ):
        self.settings = MemorySettings.of(memory, read, separator, learn, levels)
        self.settings.check_run({**options, "logits_cache": logits_cache, "batch_size": batch_size})
        if not isinstance(pretrained, str):
            self.settings.check_model(pretrained.config)
        logits_cache = not self.settings.streams if logits_cache is None else logits_cache
        try:
            super().__init__(pretrained, logits_cache=logits_cache, batch_size=batch_size, **options)
        except TypeError as error:
            # What `hf` does not know, it hands on to `from_pretrained`.
            if "unexpected keyword argument" in str(error):
                raise ValueError(f"`model_args` has a name that nothing takes: {error}.") from error
            raise
        self.settings.check_model(self.model.config)
        self.settings.check_processes(self.world_size)
        if self.settings.streams:
            tell_tasks()
        self.streams: dict[str, dict[str, Any]] = {}
        self.cuts: dict[str, int] = {}
        # Whether lm-eval is only to encode what it was asked to score.
        self._encoding = False
        # What `_model_generate` goes on from, and how many tokens of the prompt it has read.
        self._asked: tuple[Any, int] | None = None
        if not self.settings.streams and not self._max_length and self._reads_on:
            log.warning(
                "The model reads without bound, and lm-eval cuts contexts to the last max_position_embeddings=%s tokens: give "
                "max_length=... in --model_args for longer ones.",
                self.model.config.max_position_embeddings,
            )

    def _get_config(self, *args: Any, **options: Any) -> None:
        super()._get_config(*args, **options)
        self.settings.check_model(self._config)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        if cache_hook.dbdict is not None:
            self.settings.check_run({"use_cache": True})
        super().set_cache_hook(cache_hook)

    @property
    def _reads_on(self) -> bool:
        """Whether attention is bounded by windows, or there is none."""
        config = self.model.config
        if getattr(config, "model_type", None) != "hope" or config.learned_positions:
            return False
        return "full_attention" not in config.layer_types

    @property
    def max_length(self) -> int:
        """Tokens of a context, or in a stream of all that is read in it."""
        if self.settings.streams and not self._max_length and self._reads_on:
            return UNBOUNDED
        return super().max_length

    def get_model_info(self) -> dict[str, Any]:
        """
        For the results' `config`, as `hf` has it; and under `hope` how the memory was used, and
        - in a stream what was read: of each task's documents, counted as lm-eval counts them, the `order`, and by `read`
          those that the memory went on with;
        - else, as `cut`, how many requests of each task lm-eval cut to what the model reads.
        """
        settings = self.settings
        learn = settings.learn or self._learn_by_default()
        levels: Sequence[int] = settings.levels or getattr(self.model.config, "learning_levels", None) or ()
        hope: dict[str, Any] = {
            "version": version("hope-transformers"),
            "memory": settings.memory,
            "learn": learn,
            "levels": [] if learn == "off" else list(levels),
        }
        if settings.streams:
            hope |= {"read": settings.read, "separator": settings.separator, "streams": self.streams}
        else:
            hope["cut"] = {task: count for task, count in self.cuts.items() if count}
        return {**super().get_model_info(), "hope": hope}

    def _learn_by_default(self) -> str:
        if getattr(self.model.config, "model_type", None) != "hope" or not self.model.config.cms_learning:
            return "off"
        return getattr(self.model.generation_config, "learn", None) or "prompt"

    # One call of the model

    @property
    def _learn(self) -> dict[str, str]:
        return {} if self.settings.learn is None else {"learn": self.settings.learn}

    def _call(self, ids: torch.Tensor, **options: Any) -> Any:
        kind, dtype = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(kind, dtype, enabled=dtype is not None):
            return self.model(ids, **{**options, **self._learn})

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._call(inps).logits if self._learn else super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        options |= self._learn
        if self._asked is None:
            return super()._model_generate(context, max_length=max_length, stop=stop, **options)
        memory, read = self._asked
        # A mask over the history says that the ids are new to it.
        mask = context.new_ones(1, memory.columns + context.shape[1] - read)
        options |= {"attention_mask": mask, "past_key_values": memory}
        new = super()._model_generate(context[:, read:], max_length=max_length - read, stop=stop, **options)
        return torch.cat([context[:, :read].expand(len(new), -1), new], 1)

    @contextmanager
    def _levels(self) -> Iterator[None]:
        """Only the chosen levels learn: the others' rates are 0."""
        if self.settings.levels is None:
            yield
            return
        config = self.model.config
        before = config.cms_learning_rates
        rates = enumerate(config.level_learning_rates)
        config.cms_learning_rates = [rate if level in self.settings.levels else 0.0 for level, rate in rates]
        try:
            yield
        finally:
            config.cms_learning_rates = before

    # What lm-eval asks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._levels():
            self._encoding = True
            try:
                found: list[Any] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            finally:
                self._encoding = False
            encoded = {id(request): pair for request, (_, *pair) in zip(requests, found, strict=True)}
            if self.settings.streams:
                return self._streamed(
                    requests, lambda each: self._choices(each, encoded), self._score_choices, disable_tqdm
                )
            # The last token of an answer is scored, and not read.
            self._count_cuts(requests, lambda each: sum(map(len, encoded[id(each)])) - 1)
            return self._loglikelihood_tokens(found, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[Any]:
        return requests if self._encoding else super()._loglikelihood_tokens(requests, **options)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        with self._levels():
            if not self.settings.streams:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            return self._streamed(requests, self._text, self._score_text, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        # In a stream it is `hf`'s own again that answers a single request.
        if self._asked is not None:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        with self._levels():
            if self.settings.streams:
                return self._streamed(requests, self._prompts, self._answer_prompts, disable_tqdm)
            self._count_cuts(requests, self._prompt_and_answer)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _prompt_and_answer(self, request: Instance) -> int:
        """Tokens of a prompt to generate after, and those that may be generated."""
        prompt, kwargs = request.args
        ids, _ = self.tok_batch_encode([prompt])
        return ids.shape[1] + int(normalize_gen_kwargs(kwargs, self.max_gen_toks)["max_gen_toks"])

    def _count_cuts(self, requests: Sequence[Instance], size: Callable[[Instance], int]) -> None:
        """Note which requests are cut, and refuse those that must not be; their `size` is in tokens."""
        if self.backend != "causal":
            return
        once = {id(request): request for request in requests}.values()
        remedy = (
            "The model reads without bound: give max_length=... in --model_args."
            if self._reads_on
            else "Ask for shorter ones (--metadata '{\"lengths\": [...]}'), or give a model with windows (hope convert --window)."
        )
        self.cuts |= count_cuts(((request, size(request)) for request in once), self.max_length, remedy)

    # Streams

    def _streamed(
        self,
        requests: Sequence[Instance],
        plan: Callable[[Document], Plan],
        answer: Callable[[TaskStream, Document, Plan], list[list[Any]]],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Results of the requests: every task's documents one after the other, all planned before the first is read."""
        results: list[Any] = [None] * len(requests)
        tasks = documents_by_task(requests)
        plans = {name: [plan(document) for document in documents] for name, documents in tasks.items()}
        for name, documents in tasks.items():
            self._check_length(documents, plans[name])
        for name, documents in tasks.items():
            stream = TaskStream(self._call, self.model.new_memory(), self.device, self.softmax_dtype)
            pairs = list(zip(documents, plans[name], strict=True))
            for document, planned in tqdm(pairs, desc=f"Streaming {name}", disable=disable_tqdm):
                for places, values in zip(document.places, answer(stream, document, planned), strict=True):
                    for place, value in zip(places, values, strict=True):
                        results[place] = value
            row = stream.memory.summary()["rows"][0]
            kept: dict[str, list[int]] = {}
            for document, planned in pairs:
                kept.setdefault(planned.read, []).append(document.doc_id)
            self.streams[name] = {
                "documents": len(documents),
                "order": ranges([document.doc_id for document in documents]),
                "read": {read: ranges(numbers) for read, numbers in kept.items()},
                "tokens": row["tokens"],
                "segments_learned": row["segments_learned"],
                "updates": [level["updates"] for level in row["levels"]],
            }
        return results

    def _check_length(self, documents: Sequence[Document], plans: Sequence[Plan]) -> None:
        """Raise `ValueError` where a stream would grow beyond what the model can attend to."""
        seen, limit = 0, self.max_length
        for index, (document, plan) in enumerate(zip(documents, plans, strict=True)):
            if seen + plan.longest > limit:
                bound = "max_length" if self._max_length else "max_position_embeddings"
                fewer = f"fewer documents (--limit {index}), " if index else ""
                raise ValueError(
                    f"With {document.name}, the stream is {seen + plan.longest:,} tokens long, and the model attends to "
                    f"{bound}={limit:,}. Give {fewer}a model with windows (hope convert --window) or memory=reset; "
                    "max_length=... in --model_args lets it read further than it was trained to."
                )
            seen += plan.grows_by

    def _read_of(self, document: Document) -> str:
        """What a stream goes on with of a question."""
        read = document.read or self.settings.read
        if read is None:
            raise ValueError(
                f"`read`: {document.name} asks a question, and nothing says what of it the memory is to go on with. Give, in "
                "--model_args, read=question_and_answer (the right answer too, as examples in a prompt have it), "
                "question_and_prediction (the model's own), nothing (every question is asked of a new memory), or question "
                "(the question alone: a model that learns from it learns that no answer follows)."
            )
        return read

    @cached_property
    def _separator(self) -> list[int]:
        text = self.settings.separator
        return self.tok_encode(text, add_special_tokens=False) if text else []

    @property
    def _own_words(self) -> bool:
        """Whether it learns from what it says itself."""
        return (self.settings.learn or self._learn_by_default()) == "all"

    def _choices(self, document: Document, encoded: Mapping[int, Sequence[list[int]]]) -> Plan:
        """Requests that score answers: the question is what all their contexts begin with."""
        pairs = [encoded[id(request)] for request in document.requests]
        asking = document.asking
        question = common_start([pairs[index][0] for index in asking])
        rows, told = [], []
        for index, (context, continuation) in enumerate(pairs):
            if not continuation:
                raise ValueError(f"An answer has no tokens of its own: {document.name}.")
            shared = len(question) if index in asking else 0
            rows.append((context + continuation)[shared:])
            told.append(len(context) - shared)
        plan = Plan(question, rows, told, asking, self._read_of(document))
        if plan.read == "question_and_answer":
            plan.answers = [gold_index(document)]
        elif plan.read == "question_and_prediction":
            if len(asking) == 1:
                raise ValueError(
                    f"`read=question_and_prediction`: a single answer is scored, which is no prediction: {document.name}. Give "
                    "another `read`."
                )
            plan.answers = asking
        if plan.read != "nothing":
            answer = max((len(rows[index]) for index in plan.answers), default=0)
            plan.grows_by = len(question) + answer + len(self._separator)
        return plan

    def _score_choices(self, stream: TaskStream, document: Document, plan: Plan) -> list[list[tuple[float, bool]]]:
        asked = stream.memory.clone()
        last = stream.read(asked, plan.question)
        alone = [index for index in range(len(plan.rows)) if index not in plan.asking]
        scores: dict[int, tuple[float, bool]] = {}
        for memory, indices, before in ((asked, plan.asking, last), (stream.memory, alone, None)):
            rows, told = [plan.rows[index] for index in indices], [plan.told[index] for index in indices]
            found = stream.score_forks(memory, rows, told, before, int(self.batch_size))
            for index, start, (logprobs, greedy) in zip(indices, told, found, strict=True):
                scores[index] = (float(logprobs[start:].sum()), bool(greedy[start:].all()))
        if plan.read != "nothing":
            if plan.answers:
                chosen = max(plan.answers, key=lambda index: scores[index][0])
                row, start = plan.rows[chosen], plan.told[chosen]
                stream.read(asked, row[:start])
                stream.read(asked, row[start:], learn=plan.read == "question_and_answer" or self._own_words)
            self._go_on(stream, asked)
        return [[scores[index]] * len(places) for index, places in enumerate(document.places)]

    def _go_on(self, stream: TaskStream, memory: Any) -> None:
        stream.read(memory, self._separator)
        stream.memory = memory

    def _text(self, document: Document) -> Plan:
        """A text, after the prefix token that lm-eval begins each with."""
        ids = self.tok_encode(document.requests[0].args[0])
        read = document.read or self.settings.read or "question"
        size = len(ids) + 1
        return Plan([], [[self.prefix_token_id, *ids]], [size], [0], read, grows_by=0 if read == "nothing" else size)

    def _score_text(self, stream: TaskStream, document: Document, plan: Plan) -> list[list[float]]:
        memory = stream.memory.clone()
        [(logprobs, _)] = stream.score(memory, plan.rows, plan.told, read_last=True)
        if plan.read != "nothing":
            stream.memory = memory
        return [[float(logprobs[1:].sum())] * len(places) for places in document.places]

    def _prompts(self, document: Document) -> Plan:
        """Requests to generate: the question is what all prompts begin with, up to the token that generation starts from."""
        prompts = []
        for request in document.requests:
            ids, _ = self.tok_batch_encode([request.args[0]], truncation=self.truncation)
            prompts.append(ids[0].tolist())
        if not all(prompts):
            raise ValueError(f"There is no token to generate after, for the prompt is empty: {document.name}.")
        shared = common_start(prompts)
        question = shared[: min(map(len, prompts)) - 1]
        rows = [prompt[len(question) :] for prompt in prompts]
        kwargs = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in document.requests]
        new = max(each["max_gen_toks"] for each in kwargs)
        plan = Plan(question, rows, list(map(len, rows)), [], self._read_of(document), new=new)
        plan.rest = shared[len(question) :]
        if plan.read == "question_and_answer":
            first = document.requests[0]
            plan.rest = [*rows[0], *self._after(first.args[0], prompts[0], gold_text(first))]
        said = len(rows[0]) + plan.new if plan.read == "question_and_prediction" else 0
        if plan.read != "nothing":
            plan.grows_by = len(question) + max(len(plan.rest), said) + len(self._separator)
        return plan

    def _after(self, context: str, prompt: list[int], answer: str) -> list[int]:
        """Tokens of an answer after a prompt that was read: as in the whole text, where that begins with the prompt's."""
        ids, _ = self.tok_batch_encode([context + answer], truncation=False)
        whole: list[int] = ids[0].tolist()
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self.tok_encode(answer, add_special_tokens=False)

    def _answer_prompts(self, stream: TaskStream, document: Document, plan: Plan) -> list[list[str]]:
        asked = stream.memory.clone()
        stream.read(asked, plan.question)
        answers: list[list[str]] = []
        for request, places in zip(document.requests, document.places, strict=True):
            answers.append([])
            for _ in places:
                self._asked = asked.clone(), len(plan.question)
                try:
                    answers[-1] += self.generate_until([request], disable_tqdm=True)
                finally:
                    self._asked = None
        if plan.read != "nothing":
            stream.read(asked, plan.rest)
            if plan.read == "question_and_prediction":
                first = document.requests[0]
                stream.read(asked, plan.rows[0][len(plan.rest) :])
                said = delimited(first, answers[0][0]) if answers[0][0] else ""
                words = self._after(first.args[0], plan.question + plan.rows[0], said)
                stream.read(asked, words, learn=self._own_words)
            self._go_on(stream, asked)
        return answers
