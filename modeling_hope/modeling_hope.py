"""Hope (*Nested Learning*, arXiv 2512.24695) as Transformers classes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import TransformersKwargs

from .attention import AttentionState, HopeAttention
from .cache_hope import HopeCache
from .configuration_hope import HopeConfig
from .continuum_memory import HopeAggregation, HopeContinuumMemory, HopeRMSNorm
from .fast_weights import LevelWeights
from .generation_hope import HopeGenerationMixin
from .key_layout import Reading
from .learning import Stretch, act, gather, gradients, next_stretch, run_weights, segment_loss
from .packing import Packing
from .stream_record import NO_TOKEN


LEARN = ("all", "prompt", "off")
# Passed by parts of Transformers to every model.
IGNORED_OPTIONS = {"cache_position", "token_type_ids"}

F = TypeVar("F", bound=Callable[..., Any])


def outside_inference_mode(forward: F) -> F:
    """
    Run `forward` as under `no_grad` when called under `inference_mode`.

    Tensors made in inference mode can never take part in a gradient, and a memory's tensors have to: a segment may end
    in a later call.
    """

    @wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return forward(self, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            args = tuple(_usable(value) for value in args)
            return forward(self, *args, **{name: _usable(value) for name, value in kwargs.items()})

    return wrapped  # type: ignore[return-value]


def _usable(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


class HopeDecoderLayer(GradientCheckpointingLayer):
    """x = x + mixer(norm(x)), then the levels of the continuum memory, each with its own norm and residual."""

    def __init__(self, config: HopeConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = HopeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = HopeAttention(config, layer_idx)
        self.cms = HopeContinuumMemory(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: AttentionState | None,
        reading: Reading,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        rotary: LlamaRotaryEmbedding,
        weights: dict[int, LevelWeights] | None,
        keep_state: bool,
    ) -> tuple[torch.Tensor, AttentionState | None, torch.Tensor | None]:
        """`[batch, width, hidden_size]` to the same, the mixer's new state, and attention weights where there are any."""
        mixed, state, attention = self.mixer(
            self.input_layernorm(hidden_states), state, reading, position_embeddings, rotary, keep_state
        )
        return self.cms(hidden_states + mixed, weights), state, attention


class HopePreTrainedModel(PreTrainedModel):
    config: HopeConfig
    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "state", "reading", "weights"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True

    def __init__(self, config: HopeConfig, *args: Any, **kwargs: Any):
        # `from_pretrained` sets fields on a config that was complete without them.
        config.complete()
        config.validate()
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HopeAggregation | HopeContinuumMemory):
            module.initialise()


class Run:
    """
    What one run of the model gave: `rows` of the batch read `lengths` tokens from `offsets` on in the packed batch.

    `hidden`, `logits` (where they were needed) and the layers' `hidden_states` are `[rows, width, ...]`.
    """

    def __init__(self, rows: list[int], offsets: list[int], lengths: list[int], hidden: torch.Tensor):
        self.rows, self.offsets, self.lengths, self.hidden = rows, offsets, lengths, hidden
        self.logits: torch.Tensor | None = None
        self.hidden_states: list[torch.Tensor] = []
        self.attentions: list[torch.Tensor | None] = []


def assemble(runs: list[Run], parts: list[torch.Tensor], batch: int, width: int) -> torch.Tensor:
    """Runs' outputs `[rows, width of the run, ...]` as one packed batch `[batch, width, ...]`, zero where nothing was read."""
    aligned = all(run.rows == list(range(batch)) and len(set(run.offsets)) == 1 for run in runs)
    if aligned and all(set(run.lengths) == {part.shape[1]} for run, part in zip(runs, parts, strict=True)):
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    whole = parts[0].new_zeros(batch, width, *parts[0].shape[2:])
    for run, part in zip(runs, parts, strict=True):
        for index, (row, offset, length) in enumerate(zip(run.rows, run.offsets, run.lengths, strict=True)):
            whole[row, offset : offset + length] = part[index, :length]
    return whole


class HopeModel(HopePreTrainedModel):
    """
    The decoder without a head. It reads with what a memory has learned, but learns nothing itself, having no next-token
    loss to learn from.
    """

    layers: Sequence[HopeDecoderLayer]

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            HopeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = HopeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @outside_inference_mode
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        learn: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """
        Args:
            input_ids: `[batch, width]` int64, the tokens to read. Or `inputs_embeds`, `[batch, width, hidden_size]`.
            attention_mask: `[batch, width]`, or over everything read and the new tokens; 0 where padded. Padding may
                be anywhere, and a row that has read something may sit a call out.
            position_ids: accepted when they count each row's tokens, as the model does by itself.
            past_key_values: the memory to read with, changed by the call.
            use_cache: whether to return a memory when none was given.
            learn: only `"off"`.

        Returns:
            `last_hidden_state`, `[batch, width, hidden_size]`, zero where padded, and the memory.

        Raises:
            ValueError: an input is impossible; nothing was read.
        """
        if learn not in (None, "off"):
            raise ValueError(
                f"`learn={learn!r}`: {type(self).__name__} has no next-token loss to learn from. Use HopeForCausalLM."
            )
        check_options(kwargs)
        check_attentions(self.config, output_attentions)
        stream = Stream(self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        stretches = stream.stretches()
        if not stream.in_one_run(stretches):
            raise ValueError(
                "`past_key_values` holds tokens to be learned from, and their segment or period ends in this call: a "
                f"{type(self).__name__} has no next-token loss to learn from. Read on with HopeForCausalLM."
            )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        stream.keep = past_key_values is not None or use_cache
        run = stream.read(list(range(stream.batch)), stretches, bool(output_hidden_states), bool(output_attentions))
        output = BaseModelOutputWithPast(
            last_hidden_state=stream.packing.unpack(run.hidden),
            past_key_values=stream.close() if stream.keep else None,
            hidden_states=tuple(map(stream.packing.unpack, run.hidden_states)) if output_hidden_states else None,
            attentions=tuple(run.attentions) if output_attentions else None,
        )
        return output.to_tuple() if self._as_tuple(return_dict) else output

    def _as_tuple(self, return_dict: bool | None) -> bool:
        return not (self.config.return_dict if return_dict is None else return_dict)

    def run(
        self,
        embeds: torch.Tensor,
        reading: Reading,
        states: list[AttentionState | None],
        weights: list[dict[int, LevelWeights]] | None,
        keep_states: bool,
        hidden_states: list[torch.Tensor] | None = None,
        attentions: list[torch.Tensor | None] | None = None,
        grad_from: int = 0,
    ) -> tuple[torch.Tensor, list[AttentionState | None]]:
        """
        All layers over one stretch of every row. No state is kept: what the rows had comes in, what they have goes out.

        Args:
            embeds: `[rows, width, hidden_size]`.
            reading: what each row reads.
            states: the mixers' states of these rows, by layer.
            weights: by layer and level, the weights of the levels whose rows differ.
            keep_states: whether to return the new states.
            hidden_states, attentions: lists to append each layer's to.
            grad_from: layers before this one need no gradient.

        Returns:
            The last hidden states `[rows, width, hidden_size]`, normed, and the new states.
        """
        hidden = embeds
        position_embeddings = self.rotary_emb(hidden, reading.positions().clamp(min=0))
        new_states: list[AttentionState | None] = []
        for index, layer in enumerate(self.layers):
            if hidden_states is not None:
                hidden_states.append(hidden)
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= grad_from):
                hidden, state, attention = layer(
                    hidden,
                    states[index],
                    reading,
                    position_embeddings,
                    self.rotary_emb,
                    weights[index] if weights else None,
                    keep_states,
                )
            new_states.append(state)
            if attentions is not None:
                attentions.append(attention)
        hidden = self.norm(hidden)
        if hidden_states is not None:
            hidden_states.append(hidden)
        return hidden, new_states


class Stream:
    """
    One call: its inputs checked and packed, the memory it reads with, and how far each row has read.

    Attributes:
        cache: the memory that the call works on. The caller's own takes its place in `close()`, when all has gone well.
        keep: whether the mixers' states have to be kept: for the caller, or for a later stretch of this call.
        head_of: the model that was called, which a memory notes as its own.
    """

    def __init__(
        self,
        model: HopeModel,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: HopeCache | None,
        inputs_embeds: torch.Tensor | None,
    ):
        config = model.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        assert inputs is not None
        name, rank = ("input_ids", 2) if input_ids is not None else ("inputs_embeds", 3)
        if inputs.dim() != rank or inputs.shape[0] == 0 or inputs.shape[1] == 0:
            raise ValueError(f"`{name}` has shape {tuple(inputs.shape)}: give at least one row of at least one token.")
        if input_ids is not None:
            check_ids(input_ids, config.vocab_size)
        self.model, self.batch, self.width = model, inputs.shape[0], inputs.shape[1]
        if past_key_values is not None:
            if not isinstance(past_key_values, HopeCache):
                raise ValueError(
                    f"`past_key_values` is a {type(past_key_values).__name__}; a Hope model needs a HopeCache: "
                    "HopeCache(model.config, batch_size)."
                )
            past_key_values.check(config, self.batch)
        self.given = past_key_values
        mask = check_mask(attention_mask, self.batch, self.width, past_key_values)
        self.packing = Packing.from_mask(mask, self.batch, self.width)
        for row, length in enumerate(self.packing.lengths):
            if length == 0 and (past_key_values is None or past_key_values.rows[row].seen == 0):
                raise ValueError(f"`attention_mask` row {row} is all padding: a row needs at least one token.")
        self.cache = HopeCache(config, self.batch) if past_key_values is None else past_key_values.clone()
        if position_ids is not None:
            self._check_positions(position_ids)
        self.ids = None if input_ids is None else self.packing.pack(input_ids)
        self.embeds = None if inputs_embeds is None else self.packing.pack(inputs_embeds)
        self.offsets = [0] * self.batch
        self.coming = [torch.zeros(length, dtype=torch.bool) for length in self.packing.lengths]
        self.keep = True
        self.head_of: nn.Module = model

    def in_one_run(self, stretches: list[Stretch]) -> bool:
        """Nothing is learned before the end of the call."""
        lengths = [stretch.length for stretch in stretches]
        return lengths == self.packing.lengths and not any(stretch.learn for stretch in stretches)

    def _check_positions(self, position_ids: torch.Tensor) -> None:
        counted = torch.zeros(self.batch, self.packing.longest, dtype=torch.bool)
        if position_ids.shape in ((1, self.width), (self.batch, self.width)):
            given = self.packing.pack(position_ids.expand(self.batch, -1)).cpu()
            steps = torch.arange(self.packing.longest)
            expected = torch.tensor(self.cache.seen)[:, None] + steps
            counted = (given == expected) | (steps >= torch.tensor(self.packing.lengths)[:, None])
        if not counted.all():
            raise ValueError(
                "`position_ids` do not count each row's tokens from where its memory stands. Leave them out: a Hope model "
                "counts by itself. For several documents in one row, give each its own row."
            )

    def mark(self, learn: bool, learn_mask: torch.Tensor | None) -> None:
        """Mark the call's tokens to be learned from, if any: all, or where `learn_mask`, `[batch, width]`, is nonzero."""
        if learn_mask is not None and learn_mask.shape != (self.batch, self.width):
            raise ValueError(
                f"`learn_mask` has shape {tuple(learn_mask.shape)}, the tokens {(self.batch, self.width)}: give one entry for each."
            )
        if not learn or self.ids is None:
            return
        if learn_mask is None:
            self.coming = [torch.ones_like(coming) for coming in self.coming]
            return
        packed = self.packing.pack(learn_mask).bool().cpu()
        self.coming = [packed[row, :length] for row, length in enumerate(self.packing.lengths)]

    @property
    def finished(self) -> bool:
        return self.offsets == self.packing.lengths

    def stretches(self) -> list[Stretch]:
        """What each row reads next."""
        config = self.model.config
        return [
            next_stretch(record, coming[offset:], config)
            for record, coming, offset in zip(self.cache.rows, self.coming, self.offsets, strict=True)
        ]

    def read(
        self, rows: list[int], stretches: list[Stretch], hidden_states: bool = False, attentions: bool = False
    ) -> Run:
        """Let rows read on, nothing learned from the run."""
        offsets = [self.offsets[row] for row in rows]
        lengths = [stretches[row].length for row in rows]
        width = max(*lengths, 1)
        embeds = self._embeds(rows, offsets, width)
        run = Run(rows, offsets, lengths, embeds)
        reading = Reading([self.cache.rows[row].seen for row in rows], lengths, width, embeds.device)
        constant = not torch.is_grad_enabled()
        run.hidden, states = self.model.run(
            embeds,
            reading,
            self._states(rows),
            run_weights(self.model, self.cache, rows, learn=False, constant=constant),
            self.keep,
            run.hidden_states if hidden_states else None,
            run.attentions if attentions else None,
        )
        self._keep(rows, states)
        self._advance(run)
        return run

    def learn(
        self, rows: list[int], stretches: list[Stretch], head: nn.Module, keep_logits: bool, hidden_states: bool
    ) -> Run:
        """
        Let rows read to the end of their open segments, and learn from those.

        The segment is read from its start, with gradients, in the place of reading its last part alone: its first part
        may have been read in earlier calls, and the work at a segment's end is that of one segment.
        """
        config, cache = self.model.config, self.cache
        if torch.is_grad_enabled() and _reentrant(self.model):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` cannot take the gradients that learning needs: "
                "give {'use_reentrant': False}."
            )
        segment = config.segment_length
        assert segment is not None
        offsets, lengths = [self.offsets[row] for row in rows], [stretches[row].length for row in rows]
        records = [cache.rows[row] for row in rows]
        opened = [segment - length for length in lengths]
        constant = not torch.is_grad_enabled()
        learn = torch.stack(
            [
                torch.cat([record.learn, self.coming[row][offset : offset + length]])
                for record, row, offset, length in zip(records, rows, offsets, lengths, strict=True)
            ]
        )
        embeds, ids = self._segments(rows, opened, lengths)
        learn_here = learn.to(embeds.device)
        weights = run_weights(self.model, cache, rows, learn=True, constant=constant)
        reading = Reading(
            [r.seen - o for r, o in zip(records, opened, strict=True)], [segment] * len(rows), segment, embeds.device
        )
        layers: list[torch.Tensor] | None = [] if hidden_states else None
        first = next(index for index, layer in enumerate(weights) if any(level.traced for level in layer.values()))
        with torch.enable_grad():
            hidden, states = self.model.run(
                embeds, reading, self._states(rows), weights, self.keep, layers, grad_from=first if constant else 0
            )
            logits = head(hidden)
            losses = segment_loss(logits, ids, learn_here)
            found = gradients(losses, weights, learn_here, config, keep_graph=not constant)
        if constant:
            hidden, logits = hidden.detach(), logits.detach()
            states = [state.detach() if state is not None else None for state in states]
        run = Run(rows, offsets, lengths, _tails(hidden, lengths))
        run.logits = _tails(logits, lengths) if keep_logits else None
        run.hidden_states = [_tails(layer.detach() if constant else layer, lengths) for layer in layers or []]
        self._keep(rows, states)
        self._advance(run)
        pairs = learn[:, 1:].sum(1).tolist()
        for index, (row, loss) in enumerate(zip(rows, losses.detach().tolist(), strict=True)):
            of_row = [{level: of_rows[index] for level, of_rows in layer.items()} for layer in found]
            gather(cache, row, loss, pairs[index], of_row, config)
        return run

    def act(self) -> None:
        """Let the levels whose periods have ended, row by row, apply what they have gathered."""
        for row in range(self.batch):
            act(self.model, self.cache, row)

    def close(self) -> HopeCache:
        """Make the call's work the caller's, once nothing can fail any more."""
        self.cache.detach()
        self.cache.columns += self.width
        self.cache.model = weakref.ref(self.head_of)
        if self.given is None:
            return self.cache
        self.given.assign(self.cache)
        return self.given

    def _embeds(self, rows: list[int], offsets: list[int], width: int) -> torch.Tensor:
        """The next `width` embeddings of the rows, `[rows, width, hidden_size]`."""
        source = self.ids if self.ids is not None else self.embeds
        assert source is not None
        if len(set(offsets)) == 1 and rows == list(range(self.batch)):
            part = source[:, offsets[0] : offsets[0] + width]
        else:
            index = torch.tensor(offsets, device=source.device)[:, None] + torch.arange(width, device=source.device)
            part = source[torch.tensor(rows, device=source.device)[:, None], index.clamp(max=source.shape[1] - 1)]
        return self.model.embed_tokens(part) if self.ids is not None else part

    def _segments(self, rows: list[int], opened: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[rows, segment, hidden_size]` and ids `[rows, segment]` of segments that these rows complete."""
        ids = torch.stack(
            [
                torch.cat([self.cache.rows[row].ids[seen - count :], self._new_ids(row, length)])
                for row, count, length in zip(rows, opened, lengths, strict=True)
                for seen in [self.cache.rows[row].seen]
            ]
        )
        known = ids.clamp(min=0)
        embeds = self.model.embed_tokens(known)
        if bool((ids == NO_TOKEN).any()):
            embeds = embeds.clone()
            for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                given = self._open_embeds(row, length)
                if given is not None:
                    taken = ids[index] == NO_TOKEN
                    embeds[index, taken] = given[taken]
        return embeds, known

    def _new_ids(self, row: int, length: int) -> torch.Tensor:
        offset = self.offsets[row]
        if self.ids is not None:
            return self.ids[row, offset : offset + length]
        assert self.embeds is not None
        return torch.full((length,), NO_TOKEN, device=self.embeds.device)

    def _open_embeds(self, row: int, length: int) -> torch.Tensor | None:
        """Embeddings of the open segment and the next `length` tokens, zero for tokens; `None` where all are tokens."""
        record, offset = self.cache.rows[row], self.offsets[row]
        if record.embeds is None and self.embeds is None:
            return None
        like = self.embeds if self.embeds is not None else record.embeds
        assert like is not None
        before = record.embeds if record.embeds is not None else like.new_zeros(len(record.learn), like.shape[-1])
        if self.embeds is None:
            return torch.cat([before, like.new_zeros(length, like.shape[-1])])
        return torch.cat([before, self.embeds[row, offset : offset + length].detach().to(before.dtype)])

    def _states(self, rows: list[int]) -> list[AttentionState | None]:
        states = [layer.mixer for layer in self.cache.layers]
        if rows == list(range(self.batch)):
            return states
        return [
            None if state is None else state.select(torch.tensor(rows, device=state.keys.device)) for state in states
        ]

    def _keep(self, rows: list[int], states: list[AttentionState | None]) -> None:
        if not self.keep:
            return
        for layer, state in zip(self.cache.layers, states, strict=True):
            assert state is not None
            if rows == list(range(self.batch)):
                layer.mixer = state
                continue
            index = torch.tensor(rows, device=state.keys.device)
            if layer.mixer is None:
                nothing = AttentionState(
                    *(part.new_zeros(self.batch, part.shape[1], 0, part.shape[3]) for part in state)
                )
                layer.mixer = nothing.place(index, state)
            else:
                layer.mixer = layer.mixer.place(index, state)

    def _advance(self, run: Run) -> None:
        """Note what the rows of a run have read."""
        segment = self.model.config.segment_length
        for row, offset, length in zip(run.rows, run.offsets, run.lengths, strict=True):
            record = self.cache.rows[row]
            embeds = self._open_embeds(row, length)
            ids = torch.cat([record.ids.to(run.hidden.device), self._new_ids(row, length)])
            opened = len(ids) % segment if segment is not None else 0
            learn = torch.cat([record.learn, self.coming[row][offset : offset + length]])
            self.cache.rows[row] = replace(
                record,
                ids=ids,
                learn=learn[len(learn) - opened :],
                embeds=None if embeds is None or not opened else embeds[len(embeds) - opened :],
                pending=None if length else record.pending,
            )
            self.offsets[row] = offset + length


class HopeForCausalLM(HopePreTrainedModel, HopeGenerationMixin):
    """Hope with a language-modelling head: it learns from the next-token loss of what it reads."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        self.model = HopeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @outside_inference_mode
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        learn: str | None = None,
        learn_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """
        Read, and learn from what is read.

        Args:
            input_ids: `[batch, width]` int64, the tokens to read. Or `inputs_embeds`, `[batch, width, hidden_size]`,
                which are read but, being no tokens, are no targets to learn from.
            attention_mask: `[batch, width]`, or over everything read and the new tokens; 0 where padded. Padding may
                be anywhere, and a row that has read something may sit a call out.
            position_ids: accepted when they count each row's tokens, as the model does by itself.
            past_key_values: the memory to read with, changed by the call.
            labels: `[batch, width]` int64 for a loss as Llama's; -100 where there is none.
            use_cache: whether to return a memory when none was given. What is learned does not depend on it.
            logits_to_keep: compute the logits of the last so many columns only, or of these columns; 0 for all.
            learn: `"all"` or `"prompt"`: this call's tokens are learned from. `"off"`: they are read only. Unset:
                `config.cms_training` decides in `train()` mode, `config.cms_learning` in `eval()` mode. What waits in
                an open segment from earlier calls is learned when the segment ends, whatever this call says.
            learn_mask: `[batch, width]`, 0 for tokens not to be learned from.

        Returns:
            `loss`, `logits` `[batch, kept, vocab_size]` (zero where padded), and the memory.

        Raises:
            ValueError: an input is impossible; nothing was read or learned.
        """
        if learn not in (None, *LEARN):
            raise ValueError(f"`learn` must be one of {', '.join(map(repr, LEARN))}, got {learn!r}.")
        check_options(kwargs)
        check_attentions(self.config, output_attentions)
        stream = Stream(self.model, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        stream.head_of = self
        if labels is not None:
            check_labels(labels, stream.batch, stream.width, self.config.vocab_size, logits_to_keep)
        stream.mark(self._learns(learn), learn_mask)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        stretches = stream.stretches()
        one_run = stream.in_one_run(stretches)
        if output_attentions and not one_run:
            raise ValueError("`output_attentions` needs a call in which nothing is learned: give learn='off'.")
        stream.keep = past_key_values is not None or use_cache or not one_run
        all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0

        runs: list[Run] = []
        while True:
            learning = [row for row, stretch in enumerate(stretches) if stretch.learn]
            reading = [row for row, stretch in enumerate(stretches) if not stretch.learn]
            if learning:
                runs.append(stream.learn(learning, stretches, self.lm_head, all_logits, bool(output_hidden_states)))
            if reading and (not learning or any(stretches[row].length for row in reading)):
                runs.append(stream.read(reading, stretches, bool(output_hidden_states), bool(output_attentions)))
            stream.act()
            if stream.finished:
                break
            stretches = stream.stretches()
        loss = None
        if all_logits:
            # Those that learning has made already are used again.
            parts = [self.lm_head(run.hidden) if run.logits is None else run.logits for run in runs]
            packed = self._assemble(runs, parts, stream)
            logits = stream.packing.unpack(packed)
            if labels is not None:
                loss = self._loss(packed, labels, stream.packing, **kwargs)
        else:
            hidden = stream.packing.unpack(self._assemble(runs, [run.hidden for run in runs], stream))
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        all_hidden = None
        if output_hidden_states:
            layers = zip(*(run.hidden_states for run in runs), strict=True)
            all_hidden = tuple(stream.packing.unpack(self._assemble(runs, list(parts), stream)) for parts in layers)
        memory = stream.close() if past_key_values is not None or use_cache else None
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=memory,
            hidden_states=all_hidden,
            attentions=tuple(runs[0].attentions) if output_attentions else None,
        )
        return output.to_tuple() if self.model._as_tuple(return_dict) else output

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, packing: Packing, **kwargs: Any) -> torch.Tensor:
        """Transformers' loss on packed rows: a token is predicted from the one before it, whatever pads lie between."""
        real = torch.arange(packing.longest, device=labels.device)
        real = real < torch.tensor(packing.lengths, device=labels.device)[:, None]
        labels = packing.pack(labels).masked_fill(~real, -100)
        return self.loss_function(
            logits=logits.contiguous(), labels=labels, vocab_size=self.config.vocab_size, **kwargs
        )

    def _learns(self, learn: str | None) -> bool:
        if learn is not None:
            return learn != "off"
        return self.config.cms_training != "static" if self.training else self.config.cms_learning

    def _assemble(self, runs: list[Run], parts: list[torch.Tensor], stream: Stream) -> torch.Tensor:
        return assemble(runs, parts, stream.batch, stream.packing.longest)


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise `ValueError` for ids outside the vocabulary, which would crash or read memory that is not theirs."""
    if torch.compiler.is_compiling():
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`input_ids` must lie between 0 and vocab_size - 1 = {vocab_size - 1}, got {low} to {high}. "
            "Was the text encoded with this model's tokenizer?"
        )


def check_labels(
    labels: torch.Tensor, batch: int, width: int, vocab_size: int, logits_to_keep: int | torch.Tensor
) -> None:
    """Raise `ValueError` for labels that no loss can be taken of."""
    if labels.shape != (batch, width):
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}, the tokens {(batch, width)}: give one for each.")
    if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
        raise ValueError("`labels` need the logits of all tokens: leave out `logits_to_keep`.")
    if not torch.compiler.is_compiling() and bool(((labels != -100) & ((labels < 0) | (labels >= vocab_size))).any()):
        raise ValueError(f"`labels` must lie between 0 and vocab_size - 1 = {vocab_size - 1}, or be -100 for none.")


def check_options(options: dict[str, Any]) -> None:
    """Raise `TypeError` for an argument that nothing reads: a misspelt one would be lost without a word."""
    unknown = set(options) - set(TransformersKwargs.__optional_keys__) - IGNORED_OPTIONS
    if unknown:
        raise TypeError(f"forward() got an unexpected argument `{sorted(unknown)[0]}`.")


def check_attentions(config: HopeConfig, output_attentions: bool | None) -> None:
    if output_attentions and config._attn_implementation != "eager":
        raise ValueError(
            f"`output_attentions` needs attn_implementation='eager'; {config._attn_implementation!r} makes no weights to return."
        )


def check_mask(mask: torch.Tensor | None, batch: int, width: int, cache: HopeCache | None) -> torch.Tensor | None:
    """The part of the mask that is about the new tokens, `[batch, width]`."""
    if mask is None:
        return None
    columns = cache.columns if cache is not None else 0
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (width, columns + width):
        full = f", or {(batch, columns + width)} with the {columns} columns read before" if columns else ""
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}: it must be {(batch, width)} as the tokens{full}."
        )
    return mask[:, -width:]


def _reentrant(model: HopeModel) -> bool:
    checkpoint = getattr(model.layers[0], "_gradient_checkpointing_func", None)
    if not (model.training and model.layers[0].gradient_checkpointing and checkpoint is not None):
        return False
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", False))


def _tails(tensor: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The last `lengths` columns of each row, moved to the left, `[rows, max(lengths), ...]`."""
    width = tensor.shape[1]
    if len(set(lengths)) == 1:
        return tensor[:, width - lengths[0] :].contiguous()
    tails = tensor.new_zeros(tensor.shape[0], max(lengths), *tensor.shape[2:])
    for row, length in enumerate(lengths):
        tails[row, :length] = tensor[row, width - length :]
    return tails


__all__ = ["HopeForCausalLM", "HopeModel", "HopePreTrainedModel"]
