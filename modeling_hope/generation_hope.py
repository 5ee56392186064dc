"""generate() with a memory that lasts: what it learns from, and what the memory holds afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from inspect import signature
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerationMixin

from .cache_hope import HopeCache, check_memory
from .turn import Turn, TurnCriterion, WatchedCriteria, check_learn, new_turn, right_aligned


if TYPE_CHECKING:
    from .modeling_hope import HopeForCausalLM


class HopeGenerationMixin(GenerationMixin):
    """Transformers' own `generate()`, told what is new to the memory it is given."""

    @torch.no_grad()
    def generate(
        self: HopeForCausalLM,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As `GenerationMixin.generate`, with a memory that lasts.

        With a used `past_key_values`, `input_ids` that begin with all that a row has read are *history*, of which the
        rest is new; otherwise they are *new tokens*. The last sampled token of the call before, which nothing has read
        yet, is read first, once; without any ids, it is the prompt. An `attention_mask` is as wide as the ids, or
        covers the history too: then the ids are new tokens.

        Args:
            learn (`str`, *optional*): what is learned from: `"prompt"` (what the model is told), `"all"` (its own words
                too) or `"off"`. Unset: the generation config's `learn`, and without one `"prompt"` where the model
                learns at all.
            cache_implementation (`str`, *optional*): of the memory that is made when none is given: `"dynamic"`;
                `"offloaded"`, which keeps keys, values and the mixers' states in CPU memory while their layer does not
                run; `"static"`, for models without full attention, whose memory has a bound anyway.

        Returns:
            As `GenerationMixin.generate`. The memory holds the returned sequences up to their last tokens, one row for
            each, after beam search too. When anything is raised it is as it was.
        """
        settings, learn = self._settle(generation_config, kwargs)
        kwargs.pop("learn", None)
        _refuse_assistance(settings, kwargs.get("assistant_model"))
        if settings.token_healing:
            raise ValueError("`token_healing` changes a prompt that the memory may have read already. Leave it out.")
        if settings.prefill_chunk_size is not None and settings.prefill_chunk_size < 1:
            raise ValueError(f"`prefill_chunk_size` must be at least 1, got {settings.prefill_chunk_size}.")
        input_ids, memory, turn = self._told(inputs, kwargs, settings, learn)

        beams = settings.num_beams or 1
        copies = max(beams, settings.num_return_sequences or 1)
        chunk = settings.prefill_chunk_size
        work = None if memory is None else memory.clone()
        # Hidden states of the prompt are wanted for every copy.
        shared = copies > 1 and not (settings.output_hidden_states or settings.output_attentions)
        if work is not None and (shared or chunk):
            self._read_ahead(work, turn, chunk)
        before = work.clone() if work is not None and beams > 1 else None
        last_of_prompt = replace(turn)
        if work is not None:
            work.batch_repeat_interleave(copies)
            kwargs["past_key_values"] = work
        turn.expand(copies)
        for name in ("prefill_chunk_size", "cache_implementation"):  # seen to
            if getattr(settings, name) is not None:
                kwargs[name] = None
        if beams > 1:
            kwargs["return_dict_in_generate"] = True  # its beam indices tell how long each sequence is
        output = super().generate(
            input_ids,
            generation_config,
            logits_processor=logits_processor,
            stopping_criteria=StoppingCriteriaList([*(stopping_criteria or []), TurnCriterion(turn)]),
            attention_mask=torch.ones(len(last_of_prompt.mask), turn.width, dtype=torch.int64, device=turn.mask.device),
            turn=turn,
            **kwargs,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if memory is not None and work is not None:
            if before is not None:
                start = 0 if input_ids is None else turn.width
                lengths = (output.beam_indices >= 0).sum(1).tolist()
                words = [row[start : start + length] for row, length in zip(sequences, lengths, strict=True)]
                work = self._read_words(before, last_of_prompt, words)
            else:
                _leave_pending(work, turn, sequences, _pad(settings))
            memory.assign(work)
        if isinstance(output, torch.Tensor):
            return output
        output.past_key_values = memory
        return output if settings.return_dict_in_generate else sequences

    def _settle(
        self: HopeForCausalLM, generation_config: GenerationConfig | None, options: Mapping[str, Any]
    ) -> tuple[GenerationConfig, str]:
        """The settings of a call of `generate()` with these options, and what it learns from."""
        given = {name: value for name, value in options.items() if name != "learn"}
        settings, _ = self._prepare_generation_config(generation_config, **given)
        learn = options.get("learn")
        if learn is None:
            learn = getattr(settings, "learn", None)
        if learn is None:
            learn = "prompt" if self._learns(None) else "off"
        check_learn(learn)
        return settings, learn

    def _told(
        self: HopeForCausalLM,
        inputs: torch.Tensor | None,
        kwargs: dict[str, Any],
        settings: GenerationConfig,
        learn: str,
    ) -> tuple[torch.Tensor | None, HopeCache | None, Turn]:
        """The ids to start from, the memory that the call changes, and what is new to it; takes them out of `kwargs`."""
        if kwargs.get("position_ids") is not None:
            raise ValueError("`position_ids`: a Hope model counts the tokens of each row by itself. Leave them out.")
        given, embeds = kwargs.pop("past_key_values", None), kwargs.get("inputs_embeds")
        offloading = self._check_cache_implementation(settings.cache_implementation, given)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is not None and embeds is not None:
            raise ValueError("Give one of `input_ids` and `inputs_embeds`: a Hope model reads everything it is given.")
        own_words = input_ids is None and embeds is None  # the prompt is the token that waits, or a start token
        if embeds is None:
            input_ids = _prompt(input_ids, given, settings.bos_token_id, self.device)
        use_cache = settings.use_cache is not False
        if given is not None and not use_cache:
            raise ValueError("`use_cache=False` leaves `past_key_values` unread: leave out one of them.")
        if embeds is not None and not use_cache:
            raise ValueError(
                "`use_cache=False` reads ids again at every step, and `inputs_embeds` are none: leave it out."
            )
        prompt = input_ids if input_ids is not None else embeds
        assert prompt is not None
        memory = HopeCache(self.config, len(prompt), offloading) if given is None else given
        check_memory(memory, self.config, len(prompt))
        mask = kwargs.pop("attention_mask", None)
        if mask is None and input_ids is not None and not own_words:
            mask = _mask_of_pads(input_ids, settings.pad_token_id, settings.eos_token_id)
        turn = new_turn(memory, input_ids, embeds, mask, kwargs.pop("learn_mask", None), learn, own_words)
        return input_ids, memory if use_cache else None, turn

    def _check_cache_implementation(self, name: str | None, given: Any) -> bool:
        """Whether a memory made for a call is to be offloaded; `ValueError` for one that cannot be made."""
        if given is not None:
            check_memory(given, self.config)
            if name not in (None, "dynamic"):
                raise ValueError(
                    f"`cache_implementation={name!r}` is for a memory that `generate()` makes, and `past_key_values` is given: "
                    "leave out one of them."
                )
        if name == "static" and "full_attention" in self.config.layer_types:
            raise ValueError(
                "`cache_implementation='static'`: keys of full attention grow with what is read, and are never written in "
                "place, for forks share them. Leave it out, or use layers of 'hope_memory' or 'sliding_attention'."
            )
        if name == "quantized":
            raise ValueError(
                "`cache_implementation='quantized'`: a Hope model reads its segments again to learn from them, and rounded "
                "keys and values would give other gradients than were read with. Leave it out."
            )
        if name not in (None, "dynamic", "static", "offloaded"):
            raise ValueError(
                f"`cache_implementation={name!r}`: a Hope model remembers more than keys and values, in a HopeCache, which is "
                "'dynamic', 'offloaded' or, without full attention, 'static'."
            )
        return name == "offloaded"

    def _read_ahead(self: HopeForCausalLM, memory: HopeCache, turn: Turn, chunk: int | None) -> None:
        """Read the prompt up to its last column, once for all copies of a row, which then share what it learned."""
        last = turn.mask.shape[1] - 1
        for start in range(0, last, chunk or max(last, 1)):
            part = turn.inputs(start, min(start + (chunk or last), last))
            self(**part, past_key_values=memory, logits_to_keep=1, idle_rows=True)
        turn.skip(last)

    def _read_words(self: HopeForCausalLM, memory: HopeCache, prompt: Turn, words: list[torch.Tensor]) -> HopeCache:
        """
        The memory of what beam search returned: the cache of the search is that of the beams still running.

        Read from where the memory stood before the prompt, or before its last token.
        """
        self(**prompt.inputs(0, None), past_key_values=memory, logits_to_keep=1)
        memory.batch_repeat_interleave(len(words) // memory.batch_size)
        read, real = right_aligned([row[:-1] for row in words])
        if read.shape[1]:
            self(read, attention_mask=real, past_key_values=memory, learn=prompt.own_words, logits_to_keep=1)
        for row, tokens in enumerate(words):
            memory.rows[row] = replace(memory.rows[row], pending=int(tokens[-1]))
        return memory

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList | None, **kwargs: Any
    ) -> StoppingCriteriaList:
        turns = [c.turn for c in stopping_criteria or [] if isinstance(c, TurnCriterion)]
        given = StoppingCriteriaList(c for c in stopping_criteria or [] if not isinstance(c, TurnCriterion))
        made = super()._get_stopping_criteria(generation_config=generation_config, stopping_criteria=given, **kwargs)
        # Beam search asks about candidates, and never runs a finished beam: nothing to watch there.
        return WatchedCriteria(made, turns[0]) if turns and generation_config.num_beams == 1 else made

    def _get_logits_processor(self: HopeForCausalLM, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        made = super()._get_logits_processor(*args, **kwargs)
        for processor in made:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                # What guidance compares with is read in a stream of its own, and is nothing that the model is told.
                processor.model = partial(self.__call__, learn="off")
        return made

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: HopeCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        turn: Turn | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new tokens of a step and what is to be learned from them; `turn` says what is new to the memory."""
        if turn is None:
            return super().prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_sequence_length,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **kwargs,
            )
        if is_first_iteration:
            inputs = turn.inputs(0, None)
        elif past_key_values is not None:
            inputs = turn.next_inputs(input_ids)
        else:
            inputs = turn.whole(input_ids)
        # The loop hands on what concerns itself only, such as `tokenizer`; misspelt arguments it has refused.
        names = _arguments_of(type(self).forward)
        passed = {name: value for name, value in kwargs.items() if name in names and value is not None}
        return {**passed, **inputs, "past_key_values": past_key_values}

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused; `generate_batch` comes here too."""
        raise NotImplementedError(
            "Continuous batching pages keys and values, and a Hope model remembers more: give `generate()` a batch, with a "
            "mask for its padding, or each stream a HopeCache of its own."
        )


@cache
def _arguments_of(forward: Callable[..., Any]) -> frozenset[str]:
    """Of a step; looked up once, and not at every token."""
    return frozenset(signature(forward).parameters) - {"position_ids", "labels"}


def _leave_pending(memory: HopeCache, turn: Turn, sequences: torch.Tensor, pad: int) -> None:
    """Note each row's last token, which is sampled and not read; what the loop wrote after it gives way to pads."""
    assert turn.last is not None, "This version of Transformers makes its stopping criteria elsewhere."
    for row, column in enumerate(turn.last.tolist()):
        memory.rows[row] = replace(memory.rows[row], pending=int(sequences[row, column]))
        # Without an end-of-sequence token the loop goes on sampling for rows that other criteria have ended.
        sequences[row, column + 1 :] = pad


def _pad(settings: GenerationConfig) -> int:
    """As Transformers pads: with the pad token, else the first that ends a sequence; without both, with any."""
    pads = [settings.pad_token_id, *_ends(settings.eos_token_id)]
    return next((pad for pad in pads if pad is not None), 0)


def _ends(eos: Any) -> list[Any]:
    return eos if isinstance(eos, list) else [eos]


def _refuse_assistance(settings: GenerationConfig, assistant_model: Any) -> None:
    """Raise `ValueError` where tokens would be read that may be rejected."""
    reason = "what was learned from a rejected token cannot be taken back"
    if settings.is_assistant:
        raise ValueError(f"A Hope model cannot be an `assistant_model`: {reason}. Use one that is stateless.")
    if settings.get_generation_mode(assistant_model) == GenerationMode.ASSISTED_GENERATION:
        asked = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        named = next((name for name in asked if getattr(settings, name, None)), "assistant_model")
        raise ValueError(
            f"`{named}`: assisted generation is not supported by a Hope model, for {reason}. Leave it out."
        )


def _mask_of_pads(input_ids: torch.Tensor, pad: Any, eos: Any) -> torch.Tensor | None:
    """As Transformers infers a mask: from the pads, unless a pad may be an end of sequence."""
    if pad is None or pad in _ends(eos) or not bool((input_ids == pad).any()):
        return None
    return input_ids != pad


def _prompt(
    input_ids: torch.Tensor | None, memory: HopeCache | None, bos: int | None, device: torch.device
) -> torch.Tensor:
    """The ids to start from: those given, the tokens that wait to be read, or the start of a sequence."""
    if input_ids is not None:
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}: give at least one row of at least one token."
            )
        return input_ids
    pendings = [row.pending for row in memory.rows] if memory is not None else []
    if memory is not None and any(memory.seen):
        if any(pending is None for pending in pendings):
            raise ValueError("Give `input_ids`: no sampled token of `past_key_values` waits to be read.")
        return torch.tensor(pendings, device=device)[:, None]
    if bos is None:
        raise ValueError("Give `input_ids`: there is no `bos_token_id` to start from.")
    return torch.full((max(len(pendings), 1), 1), bos, device=device)
