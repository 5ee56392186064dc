"""HopeConfig: every choice that makes a Hope model, typed, validated once."""

import math
import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import configuration_utils
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


MIXERS = ("hope_memory", "full_attention", "sliding_attention")
# `Trainer` reads the config of a checkpoint that it resumes as one of no certain class, which has to know all mixers.
if "hope_memory" not in configuration_utils.ALLOWED_ATTN_LAYER_TYPES:
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES += ("hope_memory",)
PROJECTIONS = ("k", "v", "q", "eta", "alpha")
MEMORY_READS = ("chunk", "token")
RETENTIONS = ("initial", "zero")
OBJECTIVES = ("l2", "dot")
VARIANTS = ("sequential", "nested", "independent")
AGGREGATIONS = ("sum", "weighted_sum", "gated", "concat", "attention")
FAST_WEIGHTS = ("all", "down_proj")
OPTIMIZERS = ("sgd", "momentum", "dgd")
TRAINING_MODES = ("static", "first_order", "second_order")
NORMS = ("rms_norm", "layer_norm")
NORM_PLACEMENTS = ("pre", "post", "both")
QK_NORMS = ("head", "all")
ROPES = ("global", "local")
LARGEST_MEMORY_HEAD = 256  # the widest head that kernels serve
PROJECTION_CHUNK = 256  # tokens; small changes of a memory grow with every renewal of what makes its keys and values
ROPE_FIELDS = ("rope_parameters", "local_rope_parameters")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

SCALES = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
)
PER_LEVEL_FIELDS = ("intermediate_size", "cms_learning_rates", "cms_decay", "cms_norm_placement")
PER_LAYER_FIELDS = ("sliding_window", "attention_sinks", "attention_multiplier", "layer_ropes")

# What a memory's tensors and its place in the stream depend on: a cache fits a model when these agree.
MEMORY_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "layer_types",
    "sliding_window",
    "attention_sinks",
    "rope_parameters",
    "local_rope_parameters",
    "layer_ropes",
    "learned_positions",
    "gated_mlp",
    "tie_word_embeddings",
    "num_memory_heads",
    "memory_head_dim",
    "memory_hidden_size",
    "memory_chunk_size",
    "projection_chunk_size",
    "memory_read",
    "adaptive_projections",
    "memory_retention",
    "memory_objective",
    "memory_depth",
    "memory_max_rate",
    "memory_delta_decay",
    "memory_momentum",
    "memory_weight_decay",
    "memory_self_values",
    "cms_periods",
    "cms_levels_per_layer",
    "cms_variant",
    "cms_aggregation",
    "cms_fast_weights",
    "cms_optimizer",
)


@strict
class HopeConfig(PreTrainedConfig):
    r"""
    Configuration of a Hope model (*Nested Learning*, arXiv 2512.24695). Fields that Llama has bear Llama's names.

    Each layer is a mixer followed by a continuum memory system (CMS): MLP blocks, the *levels*, that learn at test time,
    each at its own pace.

    Args:
        intermediate_size (`int` or `list[int]`, *optional*):
            Hidden units of a level's MLP, one number for all levels or one per level. Unset: a layer's levels together
            have about the parameters of one Llama MLP of this width.
        gated_mlp (`bool`, defaults to `True`):
            `True`: a level is `down(act(gate(x)) * up(x))`; `False`: `down(act(up(x)))`.
        initializer_range (`float`, *optional*):
            Standard deviation of initial linear maps and embeddings. Unset: `hidden_size ** -0.5`, with which maps keep
            the size of their inputs at every width.
        layer_types (`list[str]`, *optional*):
            The mixer of each layer: `"hope_memory"` (the self-modifying memory), `"full_attention"` or
            `"sliding_attention"`. Unset: all `"hope_memory"`, or all `"sliding_attention"` when `sliding_window` is set.
        sliding_window (`int` or `list[int | None]`, *optional*):
            Tokens in view of a sliding-attention layer, the current one included; one number, or one per layer.
        attention_sinks (`int` or `list[int]`, defaults to 4):
            First tokens of the stream that stay in view of a sliding window; one number, or one per layer. Without them
            a window that leaves the start behind ruins a model that was not trained with it.
        rope_parameters (`dict`, *optional*):
            Rotary positions, as Transformers has them for one kind of layer: `rope_type`, `rope_theta` and so on;
            `partial_rotary_factor` turns the first part of a head only. Unset: Llama's defaults.
        local_rope_parameters (`dict`, *optional*):
            The same for layers that `layer_ropes` calls `"local"`.
        layer_ropes (`list[str | None]`, *optional*):
            What turns each attention layer's queries and keys: `"global"` (`rope_parameters`), `"local"`
            (`local_rope_parameters`), or `None` for nothing. Unset: `"global"` in all.
        learned_positions (`bool`, defaults to `False`):
            Add a learned embedding of its position to each token's. Nothing can be read beyond
            `max_position_embeddings` then. Ropes turn as `layer_ropes` says, whether or not there are such embeddings.
        attention_output_bias (`bool`, *optional*):
            Whether the output projection has a bias. Unset: as `attention_bias` says, which the others follow.
        qk_norm (`str`, *optional*):
            RMSNorm of queries and keys, whatever the `norm_type`: of each `"head"`, or over `"all"` heads together.
        attention_multiplier (`float` or `list[float]`, *optional*):
            Factor of the attention scores, one number or one per layer. Unset: `head_dim ** -0.5`.
        attn_logit_softcapping (`float`, *optional*):
            c: attention scores become `c tanh(scores / c)`, which `"sdpa"` cannot: `"eager"` is the default then.
        final_logit_softcapping (`float`, *optional*):
            The same of the logits.
        norm_type (`str`, defaults to `"rms_norm"`):
            `"rms_norm"`, or `"layer_norm"` with a bias. `rms_norm_eps` is the epsilon of both.
        norm_weight_offset (`float`, defaults to 0.0):
            Added to the weights of RMSNorms, those of `qk_norm` too; not in the self-modifying memory.
        norm_placement (`str`, defaults to `"pre"`):
            Where the norms of mixers and levels are: `"pre"`, `x + f(norm(x))`; `"post"`, `x + norm(f(x))`; or `"both"`.
        cms_norm_placement (`str` or `list[str]`, *optional*):
            The same of levels, one for all or one per level. Unset: `norm_placement`.
        parallel_residual (`bool`, defaults to `False`):
            The levels read what the mixer reads, and the outputs of both are added.
        residual_multiplier, embedding_multiplier, logits_scaling (`float`, default to 1.0):
            Factors of what a mixer or a level adds and of the embeddings (rounded to their dtype); divisor of the logits.
        num_memory_heads (`int`, *optional*):
            Heads H of the self-modifying memory. Unset: `num_attention_heads`.
        memory_head_dim (`int`, *optional*):
            Width D of a head, at most 256. Unset: `hidden_size // num_memory_heads`, at most 256.
        memory_hidden_size (`int`, *optional*):
            Hidden units m of a memory. Unset: half of `memory_head_dim`. What a memory holds grows with it: 64 pairs of
            64 features need 64.
        memory_chunk_size (`int`, defaults to 16):
            Tokens after which the main memory's new weights are used by what is computed from it (Eq. 90).
        projection_chunk_size (`int`, *optional*):
            The same for the memories that make keys, values, rates and decays; one of the two is a multiple of the
            other. Each renewal of these multiplies small differences, and gradients through time with them. Unset: the
            largest multiple of `memory_chunk_size` up to 256.
        memory_read (`str`, defaults to `"token"`):
            `"token"` reads the main memory as the token before left it; `"chunk"` as the chunk found it (Eq. 86).
        adaptive_projections (`list[str]`, defaults to `["k", "v", "eta", "alpha"]`):
            Which of `"k"`, `"v"`, `"q"`, `"eta"`, `"alpha"` are made by memories of their own (Eq. 87). The others are
            static linear maps.
        memory_retention (`str`, defaults to `"initial"`):
            What decay and the delta term lead to: the learned `"initial"` weights, so that only what was written is
            forgotten and erased, or `"zero"` (the paper).
        memory_objective (`str`, defaults to `"l2"`):
            What a memory minimises: `"l2"`, 1/2 |M(k) - v|^2, or `"dot"`, -<M(k), v>.
        memory_depth (`int`, defaults to 2):
            2: a memory is a residual MLP (Eq. 89); 1: a matrix.
        memory_max_rate (`float`, *optional*):
            b_max, the largest inner rate, at most 2. Above 1 a write may turn a direction's sign, which tracking states
            needs. Unset: 2, or 1 where the gradient erases as well (depth 1, `"l2"` and the delta term). At depth 1 with
            `"l2"` and no delta term only the gradients erase, all from the chunk's start, and a key that fills a chunk
            amplifies above `2 / memory_chunk_size`.
        memory_initial_rate (`float`, *optional*):
            Inner rate b that a new model's memories begin with. Unset: 0.025, or half of `memory_max_rate` where that is less.
        memory_initial_decay, memory_initial_momentum (`float`, default to 0.9995 and 0.1):
            The same of alpha and of the momentum.
        memory_delta_decay (`bool`, defaults to `True`):
            The delta term of delta gradient descent: a write erases along its key.
        memory_momentum (`bool`, defaults to `True`):
            Momentum from chunk to chunk.
        memory_weight_decay (`bool`, defaults to `True`):
            Decay by alpha at every token. Without it no alpha is made.
        memory_self_values (`bool`, defaults to `True`):
            Every memory makes its own targets (Eq. 84). `False`: all learn the same values (Eq. 79-82).
        cms_periods (`list[int | None]`, defaults to `[512, 2048, 8192]`):
            Tokens between two updates of each level, fastest first, each a multiple of the one before; `None` for a
            level that never learns at test time. The first is also the length of a segment.
        cms_levels_per_layer (`list[list[int]]`, *optional*):
            Indices into `cms_periods` of the levels that each layer holds. Unset: every layer holds all.
        cms_variant (`str`, defaults to `"sequential"`):
            `"sequential"` (Eq. 70, 73), `"nested"` (Eq. 72) or `"independent"` (Eq. 74).
        cms_aggregation (`str`, defaults to `"weighted_sum"`):
            How `"independent"` levels are joined: `"sum"`, `"weighted_sum"`, `"gated"`, `"concat"` or `"attention"`.
        cms_learning_rates (`float` or `list[float]`, defaults to 0.1):
            Inner learning rate, one for all levels or one per level. A level with rate 0 never changes.
        cms_learn_rates (`bool`, defaults to `False`):
            Make the rates parameters, one per layer and level, that start at `cms_learning_rates`.
        cms_decay (`float` or `list[float]`, defaults to 0.0):
            Fraction of a level's change that is forgotten at each of its updates.
        cms_nested_rate (`float`, defaults to 0.5):
            `"nested"` only: how far a level's initial change moves toward where the level got to.
        cms_surprise_threshold (`float`, defaults to 0.0):
            Segments with a mean loss below this (nats per token) are not learned.
        cms_max_update_norm (`float`, *optional*, defaults to 1.0):
            Largest norm of the mean gradient of one row and level; `None` for no bound.
        cms_fast_weights (`str`, defaults to `"all"`):
            Which maps of a level learn: `"all"` or `"down_proj"`.
        cms_optimizer (`str`, defaults to `"sgd"`):
            Inner optimizer: `"sgd"`, `"momentum"` or `"dgd"` (delta gradient descent, Eq. 57).
        cms_momentum (`float`, defaults to 0.9):
            Momentum of the inner optimizer `"momentum"`.
        cms_learning (`bool`, defaults to `True`):
            Whether the model learns at test time, in `eval()` mode, when the call does not say.
        cms_training (`str`, defaults to `"static"`):
            The same in `train()` mode: `"static"` (levels are plain MLPs), `"first_order"` (updates run in the forward
            pass; the outer gradient takes them as constants) or `"second_order"` (the outer gradient flows through them,
            into the initial weights and into learned rates).
        cms_max_backprop_updates (`int`, *optional*, defaults to 4):
            `"second_order"` only: through how many of a level's last updates in a call the gradient flows; the earlier
            ones are constants. What the graph of the updates takes in memory grows with it. `None` for all.
        converted_from (`dict`, *optional*):
            The config of the Transformer that this model was converted from, to which it can be exported back.

    Raises:
        StrictDataclassClassValidationError, StrictDataclassFieldValidationError: Transformers' own errors for a field
            with an impossible value or type; the message names the field and the fix.

    ```python
    >>> from modeling_hope import HopeConfig, HopeForCausalLM
    >>> config = HopeConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> model = HopeForCausalLM(config)
    ```
    """

    model_type = "hope"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | list[int] | tuple[int, ...] | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float | None = None
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    local_rope_parameters: dict[str, Any] | None = None
    layer_ropes: list[str | None] | tuple[str | None, ...] | None = None
    learned_positions: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: int | float = 0.0
    qk_norm: str | None = None
    attention_multiplier: int | float | list[int | float] | tuple[int | float, ...] | None = None
    attn_logit_softcapping: int | float | None = None
    final_logit_softcapping: int | float | None = None
    mlp_bias: bool = False
    gated_mlp: bool = True
    norm_type: str = "rms_norm"
    norm_weight_offset: int | float = 0.0
    norm_placement: str = "pre"
    cms_norm_placement: str | list[str] | tuple[str, ...] | None = None
    parallel_residual: bool = False
    residual_multiplier: int | float = 1.0
    embedding_multiplier: int | float = 1.0
    logits_scaling: int | float = 1.0
    layer_types: list[str] | tuple[str, ...] | None = None
    sliding_window: int | list[int | None] | tuple[int | None, ...] | None = None
    attention_sinks: int | list[int] | tuple[int, ...] = 4
    num_memory_heads: int | None = None
    memory_head_dim: int | None = None
    memory_hidden_size: int | None = None
    memory_chunk_size: int = 16
    projection_chunk_size: int | None = None
    memory_read: str = "token"
    adaptive_projections: list[str] | tuple[str, ...] = ("k", "v", "eta", "alpha")
    memory_retention: str = "initial"
    memory_objective: str = "l2"
    memory_depth: int = 2
    memory_max_rate: int | float | None = None
    memory_initial_rate: float | None = None
    memory_initial_decay: float = 0.9995
    memory_initial_momentum: float = 0.1
    memory_delta_decay: bool = True
    memory_momentum: bool = True
    memory_weight_decay: bool = True
    memory_self_values: bool = True
    cms_periods: list[int | None] | tuple[int | None, ...] = (512, 2048, 8192)
    cms_levels_per_layer: list[list[int]] | tuple[list[int] | tuple[int, ...], ...] | None = None
    cms_variant: str = "sequential"
    cms_aggregation: str = "weighted_sum"
    cms_learning_rates: int | float | list[int | float] | tuple[int | float, ...] = 0.1
    cms_learn_rates: bool = False
    cms_decay: int | float | list[int | float] | tuple[int | float, ...] = 0.0
    cms_nested_rate: int | float = 0.5
    cms_surprise_threshold: int | float = 0.0
    cms_max_update_norm: int | float | None = 1.0
    cms_fast_weights: str = "all"
    cms_optimizer: str = "sgd"
    cms_momentum: int | float = 0.9
    cms_learning: bool = True
    cms_training: str = "static"
    cms_max_backprop_updates: int | None = 4
    converted_from: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = [
            name for name in kwargs if name.startswith(("cms_", "memory_", "projection_", "adaptive_", "num_memory_"))
        ]
        if unknown:
            raise ValueError(
                f"HopeConfig has no field `{unknown[0]}`; see its documentation for those that start with "
                f"{unknown[0].split('_')[0]}_."
            )
        for name in ROPE_FIELDS:
            _refuse_nested(name, getattr(self, name))
        self.complete()
        super().__post_init__(**kwargs)

    def complete(self) -> None:
        """Fill in what was left unset, and turn tuples into lists, so that a config equals its reading from JSON."""
        self.cms_periods = list(self.cms_periods)
        levels = len(self.cms_periods)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.layer_types is None:
            mixer = "hope_memory" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [mixer] * self.num_hidden_layers
        self.layer_types = list(self.layer_types)
        if self.layer_ropes is None:
            self.layer_ropes = ["global"] * self.num_hidden_layers
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.cms_norm_placement is None:
            self.cms_norm_placement = self.norm_placement
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        if self.num_memory_heads is None:
            self.num_memory_heads = self.num_attention_heads
        if self.memory_head_dim is None:
            self.memory_head_dim = min(self.hidden_size // max(self.num_memory_heads, 1), LARGEST_MEMORY_HEAD)
        if self.memory_hidden_size is None:
            self.memory_hidden_size = max(self.memory_head_dim // 2, 1)
        if self.projection_chunk_size is None:
            chunks = PROJECTION_CHUNK // max(self.memory_chunk_size, 1)
            self.projection_chunk_size = self.memory_chunk_size * max(chunks, 1)
        if self.memory_max_rate is None:
            self.memory_max_rate = 1.0 if self.memory_erases_twice else 2.0
        if self.memory_initial_rate is None:
            self.memory_initial_rate = min(0.025, self.memory_max_rate / 2)
        self.adaptive_projections = [name for name in PROJECTIONS if name in self.adaptive_projections] + [
            name for name in self.adaptive_projections if name not in PROJECTIONS
        ]
        if self.cms_levels_per_layer is None:
            self.cms_levels_per_layer = [list(range(levels)) for _ in range(self.num_hidden_layers)]
        self.cms_levels_per_layer = [list(held) for held in self.cms_levels_per_layer]
        if self.intermediate_size is None:
            held_at_most = max((len(held) for held in self.cms_levels_per_layer), default=1)
            maps = 3 if self.gated_mlp else 2
            self.intermediate_size = _llama_intermediate_size(self.hidden_size, max(held_at_most, 1), maps)
        for name in ROPE_FIELDS:
            rope = getattr(self, name)
            if isinstance(rope, dict):
                setattr(self, name, {k: list(v) if isinstance(v, tuple) else v for k, v in rope.items()})
        for name in (*PER_LEVEL_FIELDS, *PER_LAYER_FIELDS):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As Transformers' own. A config with an `auto_map`, as one from a directory with code has, writes the code too."""
        if getattr(self, "auto_map", None):
            self._auto_class = "AutoConfig"
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """As Transformers' own. An `auto_map`, in which Transformers names the class that is saved, then names them all."""
        if getattr(self, "auto_map", None):
            # This import ties config and models into one circle of files, all of which Transformers then copies.
            from .auto_hope import AUTO_MAP

            self.auto_map = dict(AUTO_MAP)
        super().to_json_file(json_file_path, use_diff)

    @property
    def memory_erases_twice(self) -> bool:
        """The delta term erases along a key, and so does the gradient: of a matrix, under `"l2"`."""
        return self.memory_depth == 1 and self.memory_objective == "l2" and self.memory_delta_decay

    @property
    def segment_length(self) -> int | None:
        """Tokens in a segment, the period of the fastest level; `None` when no level ever learns."""
        return self.cms_periods[0] if self.cms_periods else None

    @property
    def learning_levels(self) -> list[int]:
        """Levels that can change at test time, fastest first: held by a layer, with a period and a rate."""
        held = {level for levels in self.cms_levels_per_layer or [] for level in levels}
        return [
            level
            for level, (period, rate) in enumerate(zip(self.cms_periods, self.level_learning_rates, strict=True))
            if level in held and period is not None and (self.cms_learn_rates or rate != 0)
        ]

    @property
    def rewinds(self) -> bool:
        """Whether the open segment can be read again from its start without a copy of the state it began with."""
        return "hope_memory" not in (self.layer_types or []) or not self.learning_levels

    @property
    def level_intermediate_sizes(self) -> list[int]:
        """Hidden units of each level's MLP."""
        return _one_for_each(self.intermediate_size, len(self.cms_periods))

    @property
    def level_learning_rates(self) -> list[float]:
        """Inner learning rate of each level."""
        return _one_for_each(self.cms_learning_rates, len(self.cms_periods))

    @property
    def level_decays(self) -> list[float]:
        """What each level forgets of its change at an update, as a fraction."""
        return _one_for_each(self.cms_decay, len(self.cms_periods))

    @property
    def level_norm_placements(self) -> list[str]:
        """Where each level's norms are."""
        return _one_for_each(self.cms_norm_placement, len(self.cms_periods))

    @property
    def learned_maps(self) -> tuple[str, ...]:
        """The maps of a level's MLP that learn."""
        if self.cms_fast_weights == "down_proj":
            return ("down_proj",)
        return ("gate_proj", "up_proj", "down_proj") if self.gated_mlp else ("up_proj", "down_proj")

    @property
    def layer_windows(self) -> list[int | None]:
        """Tokens in view of each layer's attention; `None` for all, and where there is no attention."""
        windows = _one_for_each(self.sliding_window, self.num_hidden_layers)
        return [
            window if kind == "sliding_attention" else None
            for window, kind in zip(windows, self.layer_types or [], strict=True)
        ]

    @property
    def layer_sinks(self) -> list[int]:
        """First tokens that stay in view of each layer's window; 0 where there is none."""
        sinks = _one_for_each(self.attention_sinks, self.num_hidden_layers)
        return [0 if window is None else count for count, window in zip(sinks, self.layer_windows, strict=True)]

    @property
    def layer_attention_multipliers(self) -> list[float]:
        """Factor of each layer's attention scores."""
        default = self.head_dim**-0.5  # type: ignore[operator]
        multipliers = _one_for_each(self.attention_multiplier, self.num_hidden_layers)
        return [default if multiplier is None else multiplier for multiplier in multipliers]

    @property
    def longest_stream(self) -> int | None:
        """Tokens that a row can read in all; `None` when there is no end."""
        return self.max_position_embeddings if self.learned_positions else None

    @property
    def memory_fields(self) -> dict[str, Any]:
        """The fields a memory depends on; a `HopeCache` made for one set of them serves no other."""
        return {name: getattr(self, name) for name in MEMORY_FIELDS}

    def validate_layer_type(self) -> None:
        """Our mixers, in place of the list that Transformers keeps."""
        if len(self.layer_types or []) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self.layer_types or [])} entries for num_hidden_layers={self.num_hidden_layers}: "
                "give one mixer per layer."
            )
        for mixer in self.layer_types or []:
            _one_of("layer_types", mixer, MIXERS)
        for name in PER_LAYER_FIELDS:
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` has {len(values)} entries for num_hidden_layers={self.num_hidden_layers}: give one per layer"
                    + ("." if name == "layer_ropes" else ", or one for all.")
                )
        if self.sliding_window is not None and "sliding_attention" not in (self.layer_types or []):
            raise ValueError(
                "`sliding_window` is set and `layer_types` has no 'sliding_attention': name the layers that slide, or unset it."
            )
        for mixer, window in zip(self.layer_types or [], self.layer_windows, strict=True):
            if mixer == "sliding_attention" and (window or 0) < 1:
                raise ValueError(
                    "`sliding_window` must be at least 1 where `layer_types` has 'sliding_attention', got "
                    f"{self.sliding_window}."
                )

    def validate_architecture(self) -> None:
        """Part of the strict validation of Transformers' configs."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:  # type: ignore[operator]
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        if self.head_dim < 2 or self.head_dim % 2:  # type: ignore[operator]
            raise ValueError(
                f"`head_dim` must be even and at least 2 (rotary positions turn pairs), got {self.head_dim}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` {self.hidden_act!r} is no activation of Transformers.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie between 0 and vocab_size - 1 = {self.vocab_size - 1}, got {self.pad_token_id}."
            )
        if not self.rms_norm_eps >= 0:
            raise ValueError(f"`rms_norm_eps` must be 0 or more, got {self.rms_norm_eps}.")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"`attention_dropout` must be at least 0 and below 1, got {self.attention_dropout}.")
        if any(sinks < 0 for sinks in _one_for_each(self.attention_sinks, 1)):
            raise ValueError(f"`attention_sinks` must be 0 or more, got {self.attention_sinks}.")
        _one_of("norm_type", self.norm_type, NORMS)
        _one_of("norm_placement", self.norm_placement, NORM_PLACEMENTS)
        for placement in self.level_norm_placements:
            _one_of("cms_norm_placement", placement, NORM_PLACEMENTS)
        if self.cms_variant == "independent" and len(set(self.level_norm_placements)) > 1:
            raise ValueError(
                "`cms_norm_placement` must be one for all levels with cms_variant='independent', whose levels share their norms."
            )
        if self.qk_norm is not None:
            _one_of("qk_norm", self.qk_norm, QK_NORMS)
        for name in SCALES:
            for value in _one_for_each(getattr(self, name), 1):
                if value is not None and not 0 < value < math.inf:
                    raise ValueError(f"`{name}` must be above 0 and finite, got {getattr(self, name)}.")
        if not math.isfinite(self.norm_weight_offset):
            raise ValueError(f"`norm_weight_offset` must be finite, got {self.norm_weight_offset}.")
        if self.norm_weight_offset and self.norm_type != "rms_norm":
            raise ValueError(
                f"`norm_weight_offset` is added to the weights of RMSNorms: with norm_type={self.norm_type!r} leave it 0, and "
                "add it to the weights."
            )

    def validate_positions(self) -> None:
        """Part of the strict validation of Transformers' configs."""
        for rope in self.layer_ropes or []:
            if rope is not None:
                _one_of("layer_ropes", rope, ROPES)
        if "local" in (self.layer_ropes or []) and self.local_rope_parameters is None:
            raise ValueError("`layer_ropes` has 'local' and `local_rope_parameters` is not set: set it.")
        if self.max_position_embeddings < 1:
            raise ValueError(f"`max_position_embeddings` must be at least 1, got {self.max_position_embeddings}.")
        for name in ROPE_FIELDS:
            self._check_rope(name, getattr(self, name) or {})

    def _check_rope(self, name: str, parameters: dict[str, Any]) -> None:
        _refuse_nested(name, parameters)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(map(repr, ["default", *ROPE_INIT_FUNCTIONS]))
            raise ValueError(f"`{name}` has rope_type {kind!r}: Transformers has {known}.")
        if kind in LENGTH_DEPENDENT_ROPE and not (kind == "longrope" and _same_at_all_lengths(parameters)):
            raise ValueError(
                f"`{name}` has rope_type {kind!r}, whose angles depend on the length of the call: the same text read in one "
                "call or in several would give different outputs. Use 'default', 'linear', 'yarn' or 'llama3', or "
                "'longrope' with equal `short_factor` and `long_factor`."
            )
        theta, part = parameters.get("rope_theta"), parameters.get("partial_rotary_factor", 1.0)
        if theta is not None and not (isinstance(theta, int | float) and 0 < theta < math.inf):
            raise ValueError(f"`{name}` has rope_theta {theta!r}: give a number above 0.")
        assert self.head_dim is not None
        turned = int(self.head_dim * part) if isinstance(part, int | float) and 0 < part <= 1 else 0
        if turned < 2 or turned % 2:
            raise ValueError(
                f"`{name}` has partial_rotary_factor {part!r}, which turns {turned} of `head_dim` {self.head_dim} features: "
                "pairs are turned, give a factor of at most 1 that makes their number even."
            )
        if kind == "longrope" and len(parameters["short_factor"]) != turned // 2:
            raise ValueError(
                f"`{name}` has {len(parameters['short_factor'])} factors in `short_factor` for {turned // 2} pairs that are "
                "turned: give one for each."
            )

    def validate_self_modifying_memory(self) -> None:
        """Part of the strict validation of Transformers' configs."""
        for name in (
            "num_memory_heads",
            "memory_head_dim",
            "memory_hidden_size",
            "memory_chunk_size",
            "projection_chunk_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.memory_head_dim > LARGEST_MEMORY_HEAD:  # type: ignore[operator]
            raise ValueError(
                f"`memory_head_dim` must be at most {LARGEST_MEMORY_HEAD}, got {self.memory_head_dim}: use more heads."
            )
        if self.memory_depth not in (1, 2):
            raise ValueError(f"`memory_depth` must be 1 (a matrix) or 2 (a residual MLP), got {self.memory_depth}.")
        _one_of("memory_read", self.memory_read, MEMORY_READS)
        _one_of("memory_retention", self.memory_retention, RETENTIONS)
        _one_of("memory_objective", self.memory_objective, OBJECTIVES)
        for name in self.adaptive_projections:
            _one_of("adaptive_projections", name, PROJECTIONS)
        chunks: tuple[int, int] = (self.memory_chunk_size, self.projection_chunk_size)  # type: ignore[assignment]
        if max(chunks) % min(chunks):
            raise ValueError(
                f"`memory_chunk_size` ({chunks[0]}) and `projection_chunk_size` ({chunks[1]}): one must be a multiple of "
                "the other."
            )
        if not 0 < self.memory_max_rate <= 2:  # type: ignore[operator]
            raise ValueError(
                f"`memory_max_rate` must be above 0 and at most 2, beyond which a write amplifies, got {self.memory_max_rate}."
            )
        if self.memory_erases_twice and self.memory_max_rate > 1:  # type: ignore[operator]
            raise ValueError(
                f"`memory_max_rate` must be at most 1 with memory_depth=1, memory_objective='l2' and memory_delta_decay: the "
                f"gradient and the delta term both erase, and together would amplify; got {self.memory_max_rate}."
            )
        for name, most in (("rate", self.memory_max_rate), ("decay", 1), ("momentum", 1)):
            if not 0 < (value := getattr(self, f"memory_initial_{name}")) < most:
                raise ValueError(f"`memory_initial_{name}` must be above 0 and below {most}, got {value}.")

    def validate_continuum_memory(self) -> None:
        """Part of the strict validation of Transformers' configs."""
        _one_of("cms_variant", self.cms_variant, VARIANTS)
        _one_of("cms_aggregation", self.cms_aggregation, AGGREGATIONS)
        _one_of("cms_fast_weights", self.cms_fast_weights, FAST_WEIGHTS)
        _one_of("cms_optimizer", self.cms_optimizer, OPTIMIZERS)
        _one_of("cms_training", self.cms_training, TRAINING_MODES)
        _check_periods(self.cms_periods)
        levels = len(self.cms_periods)
        for name in PER_LEVEL_FIELDS:
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != levels:
                raise ValueError(
                    f"`{name}` has {len(values)} entries for {levels} levels in `cms_periods`: give one for all, or one "
                    "per level."
                )
        if any(size < 1 for size in self.level_intermediate_sizes):
            raise ValueError(f"`intermediate_size` must be at least 1 for every level, got {self.intermediate_size}.")
        if any(not 0 <= rate < math.inf for rate in self.level_learning_rates):
            raise ValueError(f"`cms_learning_rates` must be 0 or more, got {self.cms_learning_rates}.")
        if self.cms_learn_rates and any(rate == 0 for rate in self.level_learning_rates):
            raise ValueError(
                "`cms_learn_rates` needs every entry of `cms_learning_rates` above 0: rates are learned as logarithms."
            )
        if any(not 0 <= decay <= 1 for decay in self.level_decays):
            raise ValueError(f"`cms_decay` must lie between 0 and 1, got {self.cms_decay}.")
        for name in ("cms_nested_rate", "cms_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        if self.cms_max_backprop_updates is not None and self.cms_max_backprop_updates < 0:
            raise ValueError(
                f"`cms_max_backprop_updates` must be 0 or more, or None for all, got {self.cms_max_backprop_updates}."
            )
        if math.isnan(self.cms_surprise_threshold):
            raise ValueError("`cms_surprise_threshold` must be a number of nats, got nan.")
        if self.cms_max_update_norm is not None and not self.cms_max_update_norm > 0:
            raise ValueError(
                f"`cms_max_update_norm` must be above 0, or None for no bound, got {self.cms_max_update_norm}."
            )
        held_by_layer = self.cms_levels_per_layer or []
        if len(held_by_layer) != self.num_hidden_layers:
            raise ValueError(
                f"`cms_levels_per_layer` has {len(held_by_layer)} entries for num_hidden_layers={self.num_hidden_layers}: "
                "give one list of levels per layer."
            )
        for layer, held in enumerate(held_by_layer):
            if not held or len(set(held)) != len(held) or any(not 0 <= level < levels for level in held):
                raise ValueError(
                    f"`cms_levels_per_layer[{layer}]` is {held}: give one or more different levels between 0 and {levels - 1} "
                    "(indices into `cms_periods`; for a layer that never learns, one whose period is None)."
                )


def _llama_intermediate_size(hidden_size: int, blocks: int, maps: int) -> int:
    """Hidden units of each of `blocks` MLPs of so many maps that have the parameters of one Llama MLP (8 widths squared)."""
    return max(8 * round(8 * hidden_size / maps / blocks / 8), 8)


def _one_for_each(value: Any, count: int) -> list[Any]:
    """Of a field that is one for all levels or layers, or one for each."""
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{field}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _refuse_nested(field: str, rope: dict[str, Any] | None) -> None:
    """Raise `ValueError` for parameters by layer type, as some models of Transformers have them."""
    nested = next((key for key, value in (rope or {}).items() if isinstance(value, dict)), None)
    if nested is not None:
        raise ValueError(
            f"`{field}` has a dict for {nested!r}: give the parameters of one rope here, those of another as "
            "`local_rope_parameters`, and say in `layer_ropes` which layer has which."
        )


def _same_at_all_lengths(longrope: dict[str, Any]) -> bool:
    return "short_factor" in longrope and longrope["short_factor"] == longrope.get("long_factor")


def _check_periods(periods: list[int | None] | tuple[int | None, ...]) -> None:
    if not periods:
        raise ValueError("`cms_periods` is empty: give one period per level, or [None] for a model that never learns.")
    previous = 1
    for level, period in enumerate(periods):
        if period is None:
            if any(later is not None for later in periods[level:]):
                raise ValueError(
                    f"`cms_periods` must end with its None entries (levels that never learn), got {list(periods)}."
                )
            return
        if period < 2:
            raise ValueError(
                f"`cms_periods[{level}]` must be at least 2 (a segment needs an input and a target), got {period}."
            )
        if period % previous:
            raise ValueError(
                f"`cms_periods[{level}]` is {period}, not a multiple of the faster level's {previous}: every period must be "
                "a multiple of the one before it."
            )
        previous = period


__all__ = ["HopeConfig"]
