"""Hope (*Nested Learning*, arXiv 2512.24695) as Transformers classes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .attention import HopeAttention
from .cache_hope import HopeCache
from .configuration_hope import HopeConfig
from .continuum_memory import HopeContinuumMemory
from .fast_weights import LevelWeights
from .generation_hope import HopeGenerationMixin
from .inputs import Inputs
from .key_layout import KeyLayout, Span
from .learning import Stretch
from .memory_rows import join_rows, take_row
from .mixer_state import MixerState
from .norm import add, make_norm, norms_around
from .packing import Packing
from .rotary import HopeRotaryEmbeddings, Rotation
from .self_modifying_memory import SelfModifyingMemory
from .stream import CallOutput, Run, Stream, with_memory
from .turn import check_learn


# What parts of Transformers pass to every model: `num_items_in_batch` is used, the others change nothing.
KNOWN_OPTIONS = {"num_items_in_batch", "cache_position", "token_type_ids"}
# What says again of documents in one row where they begin: `position_ids` say it.
PACKING_OPTIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}

TWO_RUNS = (
    "`output_attentions`: this call is read in two runs, for the memory keeps what its last segment began with. Give "
    "use_cache=False and no memory."
)


class HopeDecoderLayer(GradientCheckpointingLayer):
    """
    `x + mixer(norm(x))`, then the levels of the continuum memory, each with its own norm and residual.

    With `parallel_residual` the levels read `x` as the mixer does.
    """

    _z3_leaf = True  # DeepSpeed ZeRO-3 gathers a layer as one: how often its parts run turns on the rows' lengths

    def __init__(self, config: HopeConfig, layer_idx: int):
        super().__init__()
        self.residual_multiplier, self.parallel = config.residual_multiplier, config.parallel_residual
        self.input_layernorm, self.output_layernorm = norms_around(config, config.norm_placement)
        kind = SelfModifyingMemory if config.layer_types[layer_idx] == "hope_memory" else HopeAttention  # type: ignore[index]
        self.mixer = kind(config, layer_idx)
        self.cms = HopeContinuumMemory(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: MixerState | None,
        span: Span,
        position_embeddings: dict[str, Rotation],
        weights: dict[int, LevelWeights] | None,
        keep_state: bool,
    ) -> tuple[torch.Tensor, MixerState | None, torch.Tensor | None]:
        """`[batch, width, hidden_size]` to the same, the mixer's new state, and attention weights where there are any."""
        if state is not None and state.device != hidden_states.device:
            state = state.to(hidden_states.device)  # from where an offloading memory keeps it
        mixed, state, attention = self.mixer(
            self.input_layernorm(hidden_states), state, span, position_embeddings, keep_state
        )
        mixed = self.output_layernorm(mixed)
        if self.parallel:
            hidden_states = add(self.cms(hidden_states, weights), mixed, self.residual_multiplier)
        else:
            hidden_states = self.cms(add(hidden_states, mixed, self.residual_multiplier), weights)
        return hidden_states, state, attention


class HopeScaledEmbedding(nn.Embedding):
    """Embeddings times a constant, which is rounded to their dtype."""

    def __init__(self, vocab_size: int, hidden_size: int, padding_idx: int | None, multiplier: float):
        super().__init__(vocab_size, hidden_size, padding_idx)
        self.multiplier = multiplier

    @property
    def embed_scale(self) -> torch.Tensor:
        """By this name PEFT finds what its adapters of embeddings have to be multiplied by as well."""
        return torch.tensor(self.multiplier, dtype=self.weight.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


class HopePreTrainedModel(PreTrainedModel):
    config: HopeConfig
    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "state", "span", "weights"]
    # In bfloat16 what a memory forgets, 1 - alpha, is 2% off, and an optimizer's steps are rounded away. Named twice: the
    # first list is for float16 and for quantization, the second for both low precisions.
    _keep_in_fp32_modules = ["alpha_proj", "eta_proj", "memories.momentum", "log_learning_rates"]
    _keep_in_fp32_modules_strict = _keep_in_fp32_modules
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def __init__(self, config: HopeConfig, *args: Any, **kwargs: Any):
        # `from_pretrained` sets fields on a config that was complete without them.
        config.complete()
        config.validate()
        super().__init__(config, *args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """
        As Transformers' own. A memory made before has read another vocabulary: it is refused from then on.

        Raises:
            ValueError: `pad_token_id` would lie outside; what is saved then could not be loaded.
        """
        pad = self.config.pad_token_id
        if new_num_tokens is not None and pad is not None and 0 < new_num_tokens <= pad:
            raise ValueError(
                f"`new_num_tokens` is {new_num_tokens} and config.pad_token_id {pad}: set it to a token that stays, or "
                "to None, first."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        """Transformers asks when it chooses: by default it goes on to eager attention."""
        if self.config.attn_logit_softcapping is not None:
            raise ValueError(
                f"`attn_implementation='sdpa'` cannot cap scores, and `attn_logit_softcapping` is "
                f"{self.config.attn_logit_softcapping}: use 'eager', 'flex_attention' or 'flash_attention_2'."
            )
        return super()._sdpa_can_dispatch(is_init_check)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if callable(initialise := getattr(module, "initialise", None)):
            initialise()

    def new_memory(self, batch_size: int = 1, offloading: bool = False) -> HopeCache:
        """An empty memory for this model, to be given as `past_key_values`: `HopeCache(model.config, ...)`."""
        return HopeCache(self.config, batch_size, offloading)

    def load_memory(self, directory: str | os.PathLike[str]) -> HopeCache:
        """The memory that was saved in a directory: `HopeCache.from_pretrained(directory, model=model)`."""
        return HopeCache.from_pretrained(directory, model=self)

    def join_memories(self, memories: Sequence[HopeCache]) -> HopeCache:
        """
        One memory with the rows of several, in their order: a batch that reads on together, each row where it stands.

        Learned changes are shared, not copied; keys, values and the mixers' states are copied. Notes stay behind.
        """
        return join_rows(memories, self)

    def take_memory(self, memory: HopeCache, row: int) -> HopeCache:
        """A row of a batch's memory as one of its own, as if it had always been alone."""
        return take_row(memory, row, self)

    def _learns(self, learn: str | None) -> bool:
        if learn is not None:
            return learn != "off"
        return self.config.cms_training != "static" if self.training else self.config.cms_learning


class HopeModel(HopePreTrainedModel):
    """
    The decoder without a head. It reads with what a memory has learned, but learns nothing itself, having no next-token
    loss to learn from.

    That of a `HopeForCausalLM` gives, where no memory is given or wanted, the hidden states of the language model's own
    call, which learns: trainers that compute losses from hidden states, as TRL's do, train what they are asked to.
    """

    layers: Sequence[HopeDecoderLayer]

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        sizes = config.vocab_size, config.hidden_size, config.pad_token_id
        if config.embedding_multiplier == 1:
            self.embed_tokens = nn.Embedding(*sizes)
        else:
            self.embed_tokens = HopeScaledEmbedding(*sizes, config.embedding_multiplier)
        self.embed_positions = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            HopeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config)
        self.rotary_emb = HopeRotaryEmbeddings(config)
        self.decoder_of: weakref.ref[HopeForCausalLM] | None = None
        self.gradient_checkpointing = False
        self.post_init()

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
            position_ids: `[batch, width]`. They count each row's tokens, as the model does by itself; or, without a memory,
                several documents in a row, each from 0. These are read as rows of their own, each with a new memory, and no
                memory is returned.
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
        check_options(kwargs, documents=position_ids is not None)
        wanted = wanted_outputs(self.config, output_hidden_states, output_attentions)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
        }
        if past_key_values is not None or use_cache:
            output = self._read_on(given, *wanted)
        elif (whole := self._learner(learn)) is not None:
            output = whole.read_hidden(given, *wanted)
        else:
            inputs = Inputs(self.config, **given)
            output = self._output(inputs, self.read_alone(inputs, *wanted))
        return output.to_tuple() if self._as_tuple(return_dict) else output

    def read_alone(self, inputs: Inputs, hidden_states: bool, attentions: bool) -> CallOutput:
        """
        Read what has no memory, keeps none and is not learned from: one run, of the same operations for all that it may
        hold, which is what can be compiled and exported.

        Rows run as if all were full: nothing before a row's end sees what lies behind it.
        """
        embeds = inputs.embeds if inputs.ids is None else self.embed_tokens(inputs.ids)
        assert embeds is not None
        width = embeds.shape[1]
        layers: list[torch.Tensor] | None = [] if hidden_states else None
        weights: list[torch.Tensor] | None = [] if attentions else None
        span = Span([0], [width], width, embeds.device)
        hidden, _ = self.run(
            embeds,
            span,
            [None] * len(self.layers),
            weights=None,
            keep_states=False,
            hidden_states=layers,
            attentions=weights,
        )
        return CallOutput(hidden, None, layers, weights)

    @with_memory
    def _read_on(self, given: dict[str, Any], hidden_states: bool, attentions: bool) -> BaseModelOutputWithPast:
        inputs = Inputs(self.config, **given)
        stream = Stream(self, inputs)
        if stream.learns():
            raise ValueError(
                "`past_key_values` holds tokens to be learned from, and their segment or period ends in this call: a "
                f"{type(self).__name__} has no next-token loss to learn from. Read on with HopeForCausalLM."
            )
        runs: list[Run] = []
        while not runs or not stream.finished:
            stretches = stream.stretches()
            reading = [row for row, stretch in enumerate(stretches) if stretch.length or not runs]
            runs.append(stream.read(reading, stretches, hidden_states, attentions))
        if attentions and len(runs) > 1:
            raise ValueError(TWO_RUNS)
        output = self._output(inputs, stream.reading(runs, hidden_states, attentions))
        output.past_key_values = None if inputs.several else stream.close()
        return output

    def _output(self, inputs: Inputs, reading: CallOutput) -> BaseModelOutputWithPast:
        assert reading.hidden is not None
        return BaseModelOutputWithPast(
            last_hidden_state=inputs.packing.unpack(reading.hidden),
            hidden_states=inputs.unpack_states(reading.hidden_states),
            attentions=inputs.unpack_attentions(reading.attentions),
        )

    def _learner(self, learn: str | None) -> HopeForCausalLM | None:
        """The language model that this is the decoder of, where its call would learn."""
        if learn is not None or self.decoder_of is None or not self.config.learning_levels:
            return None
        return self.decoder_of() if self._learns(learn) else None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is the decoder of a copied language model, which says so itself.
        return {**self.__dict__, "decoder_of": None}

    def _as_tuple(self, return_dict: bool | None) -> bool:
        return not (self.config.return_dict if return_dict is None else return_dict)

    def run(
        self,
        embeds: torch.Tensor,
        span: Span,
        states: list[MixerState | None],
        weights: list[dict[int, LevelWeights]] | None,
        keep_states: bool,
        home: torch.device | None = None,
        hidden_states: list[torch.Tensor] | None = None,
        attentions: list[torch.Tensor] | None = None,
        grad_from: int = 0,
    ) -> tuple[torch.Tensor, list[MixerState | None]]:
        """
        All layers over one stretch of every row. No state is kept: what the rows had comes in, what they have goes out.

        Args:
            embeds: `[rows, width, hidden_size]`.
            span: what each row reads.
            states: the mixers' states of these rows, by layer.
            weights: by layer and level, the weights of the levels whose rows differ.
            keep_states: whether to return the new states.
            home: where to put each new state away; `None` to leave it with its layer.
            hidden_states, attentions: lists to append each layer's to, of attention layers in the latter.
            grad_from: layers before this one need no gradient.

        Returns:
            The last hidden states `[rows, width, hidden_size]`, normed, and the new states.
        """
        positions = span.positions().clamp(min=0)
        hidden = embeds
        if self.embed_positions is not None:
            # Columns past a row's end may lie beyond the last position.
            hidden = embeds + self.embed_positions(positions.clamp(max=self.config.max_position_embeddings - 1))
        position_embeddings = self.rotary_emb(hidden, positions)
        for layout in self.layouts():
            rotary = None if layout.rope is None else self.rotary_emb.of(layout.rope)
            span.make_plan(layout, rotary, hidden, flex=self.config._attn_implementation == "flex_attention")
        new_states: list[MixerState | None] = []
        for index, layer in enumerate(self.layers):
            if hidden_states is not None:
                hidden_states.append(hidden)
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= grad_from):
                hidden, state, attention = layer(
                    hidden,
                    states[index],
                    span,
                    position_embeddings,
                    weights[index] if weights else None,
                    keep_states,
                )
            new_states.append(state if state is None or home is None else state.to(home))
            if attentions is not None and attention is not None:
                attentions.append(attention)
        hidden = self.norm(hidden)
        if hidden_states is not None:
            hidden_states.append(hidden)
        return hidden, new_states

    def layouts(self) -> Iterable[KeyLayout]:
        """The kinds of attention that layers have."""
        return (layer.mixer.layout for layer in self.layers if isinstance(layer.mixer, HopeAttention))


class HopeForCausalLM(HopePreTrainedModel, HopeGenerationMixin):
    """Hope with a language-modelling head: it learns from the next-token loss of what it reads."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        self.model = HopeModel(config)
        self.model.decoder_of = weakref.ref(self)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Marked as derived, it would lose `learn` when it is loaded.
        self.generation_config._from_model_config = False
        self.post_init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.model.decoder_of = weakref.ref(self)

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
        idle_rows: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """
        Read, and learn from what is read.

        Args:
            input_ids: `[batch, width]` int64, the tokens to read. Or `inputs_embeds`, `[batch, width, hidden_size]`,
                which are read but, being no tokens, are no targets to learn from.
            attention_mask: `[batch, width]`, or over everything read and the new tokens; 0 where padded. Padding may
                be anywhere, and a row that has read something may sit a call out.
            position_ids: `[batch, width]`. They count each row's tokens, as the model does by itself; or, without a memory,
                several documents in a row, each from 0. These are read as rows of their own, each with a new memory, and no
                memory is returned.
            past_key_values: the memory to read with, changed by the call.
            labels: `[batch, width]` int64 for a loss as Llama's; -100 where there is none.
            use_cache: whether to return a memory when none was given. What is learned does not depend on it.
            logits_to_keep: compute the logits of the last so many columns only, or of these columns; 0 for all.
            learn: `"all"` or `"prompt"`: this call's tokens are learned from. `"off"`: they are read only. Unset:
                `config.cms_training` decides in `train()` mode, `config.cms_learning` in `eval()` mode. What waits in
                an open segment from earlier calls is learned when the segment ends, whatever this call says.
            learn_mask: `[batch, width]`, 0 for tokens not to be learned from.
            idle_rows: accept rows that are all padding even if they have read nothing yet.
            output_attentions: return the weights of the layers that attend, with attn_implementation="eager" where
                nothing is learned: `[batch, heads, width, width]`, 0 out of a window's view and where padded. With a
                memory that holds something: over the keys it kept, left-packed, and then the new ones.

        Returns:
            `loss`, `logits` `[batch, kept, vocab_size]` (zero where padded), and the memory.

        With use_cache=False, no memory and nothing to learn, the call compiles into one graph and exports. What tensors
        hold is not checked there, and `position_ids` are refused.

        Raises:
            ValueError: an input is impossible; nothing was read or learned.
        """
        if learn is not None:
            check_learn(learn)
        check_options(kwargs, documents=position_ids is not None)
        wanted = wanted_outputs(self.config, output_hidden_states, output_attentions)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        learns = self._learns(learn)
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "idle_rows": idle_rows,
            "labels": labels,
            "learn_mask": learn_mask,
            "logits_to_keep": logits_to_keep,
        }
        if past_key_values is None and not use_cache and not (learns and self.config.learning_levels):
            inputs = Inputs(self.config, **given)
            output = self._output(inputs, self.model.read_alone(inputs, *wanted), **kwargs)
        else:
            output = self._read_on(given, learns, use_cache, *wanted, **kwargs)
        return output.to_tuple() if self.model._as_tuple(return_dict) else output

    @with_memory
    def _read_on(
        self,
        given: dict[str, Any],
        learns: bool,
        use_cache: bool,
        hidden_states: bool,
        attentions: bool,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        inputs = Inputs(self.config, **given)
        returned = inputs.memory is not None or (use_cache and not inputs.several)
        stream, runs = self._runs(inputs, learns, returned, inputs.wants_all_logits, hidden_states, attentions)
        head = self.head if inputs.wants_all_logits else None
        output = self._output(inputs, stream.reading(runs, hidden_states, attentions, head), **kwargs)
        output.past_key_values = stream.close() if returned else None
        return output

    @with_memory
    def read_hidden(self, given: dict[str, Any], hidden_states: bool, attentions: bool) -> BaseModelOutputWithPast:
        """What the decoder gives in a call that has no memory, keeps none and learns."""
        inputs = Inputs(self.config, **given)
        stream, runs = self._runs(inputs, True, False, False, hidden_states, attentions)
        return self.model._output(inputs, stream.reading(runs, hidden_states, attentions))

    def _runs(
        self, inputs: Inputs, learns: bool, keep: bool, keep_logits: bool, hidden_states: bool, attentions: bool
    ) -> tuple[Stream, list[Run]]:
        stream = Stream(self.model, inputs)
        stream.head_of = self
        stream.mark(learns, inputs.learn_mask)
        learns = stream.learns()
        if attentions and learns:
            raise ValueError("`output_attentions` needs a call in which nothing is learned: give learn='off'.")
        stream.keep = keep or learns
        runs: list[Run] = []
        while not runs or not stream.finished:
            stretches = stream.stretches()
            learning = [row for row, stretch in enumerate(stretches) if stretch.learn]
            reading = [row for row, stretch in enumerate(stretches) if not stretch.learn]
            if learning:
                runs.append(stream.learn(learning, stretches, self.head, keep_logits, hidden_states))
                if len(learning) <= len(reading):
                    # To let a row read nothing costs less than to take the states of all others out and put them back.
                    reading = list(range(stream.batch))
                    stretches = [Stretch(0) if stretch.learn else stretch for stretch in stretches]
            if any(stretches[row].length for row in reading) or not learning:
                runs.append(stream.read(reading, stretches, hidden_states, attentions))
            stream.act()
        if attentions and len(runs) > 1:
            raise ValueError(TWO_RUNS)
        return stream, runs

    def _output(self, inputs: Inputs, reading: CallOutput, **kwargs: Any) -> CausalLMOutputWithPast:
        packing, kept, loss = inputs.packing, inputs.logits_to_keep, None
        if inputs.wants_all_logits:
            packed = reading.logits
            if packed is None:
                assert reading.hidden is not None
                packed = self.head(reading.hidden)
            logits = packing.unpack(packed)
            if inputs.labels is not None:
                loss = self._loss(packed, inputs.labels, packing, **kwargs)
        else:
            assert reading.hidden is not None
            hidden = packing.unpack(reading.hidden)
            logits = self.head(hidden[:, slice(-kept, None) if isinstance(kept, int) else kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=inputs.unpack_states(reading.hidden_states),
            attentions=inputs.unpack_attentions(reading.attentions),
        )

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[..., hidden_size]` to logits `[..., vocab_size]`."""
        logits, cap = self.lm_head(hidden), self.config.final_logit_softcapping
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        return logits if cap is None else (logits / cap).tanh() * cap

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, packing: Packing, **kwargs: Any) -> torch.Tensor:
        """Transformers' loss on packed rows: a token is predicted from the one before it, whatever pads lie between."""
        labels = packing.pack(labels)
        if packing.real is not None:
            labels = labels.masked_fill(~packing.real, -100)
        return self.loss_function(
            logits=logits.contiguous(), labels=labels, vocab_size=self.config.vocab_size, **kwargs
        )


def check_options(options: dict[str, Any], documents: bool) -> None:
    """Raise `TypeError` for an argument that nothing reads: a misspelt one would be lost without a word."""
    unknown = sorted(set(options) - KNOWN_OPTIONS - (PACKING_OPTIONS if documents else set()))
    if unknown and unknown[0] in PACKING_OPTIONS:
        raise TypeError(
            f"`{unknown[0]}` without `position_ids`: for several documents in one row, give position_ids that count each from 0."
        )
    if unknown:
        raise TypeError(f"forward() got an unexpected argument `{unknown[0]}`.")


def wanted_outputs(config: HopeConfig, hidden_states: bool | None, attentions: bool | None) -> tuple[bool, bool]:
    """What a call has to return besides: as it says, and where it does not, as the config says."""
    hidden_states = bool(config.output_hidden_states if hidden_states is None else hidden_states)
    attentions = bool(config.output_attentions if attentions is None else attentions)
    if attentions and config._attn_implementation != "eager":
        raise ValueError(
            f"`output_attentions` needs attn_implementation='eager'; {config._attn_implementation!r} makes no weights to return."
        )
    return hidden_states, attentions


__all__ = ["HopeForCausalLM", "HopeModel", "HopePreTrainedModel"]
