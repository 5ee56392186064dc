"""Attention as a mixer: Llama's, with the keys kept in a state that is passed in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv
from transformers.utils.generic import is_flash_attention_requested

from .configuration_hope import HopeConfig
from .key_layout import AttentionPlan, Block, KeyLayout, Span
from .mixer_state import MixerState
from .norm import HopeRMSNorm
from .rotary import Rotation, turn


class AttentionState(MixerState):
    """
    What an attention layer remembers: keys (normed and rotated) and values of the positions in its `KeyLayout`, left-packed.

    Tensors `keys` and `values`: `[batch, key_value_heads, slots, head_dim]`.
    """

    growing = frozenset({"keys", "values"})


class HopeAttention(LlamaAttention):
    """Causal self-attention, over everything read or over a sliding window with sinks."""

    def __init__(self, config: HopeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layout = key_layout(config, layer_idx)
        self.rewinds, self.state_class = True, AttentionState
        self.scaling = config.layer_attention_multipliers[layer_idx]
        heads = config.num_attention_heads, config.num_key_value_heads
        if config.attention_output_bias != config.attention_bias:
            width = config.num_attention_heads * self.head_dim
            self.o_proj = nn.Linear(width, config.hidden_size, bias=bool(config.attention_output_bias))
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            widths = [self.head_dim * (count if config.qk_norm == "all" else 1) for count in heads]
            self.q_norm, self.k_norm = (
                HopeRMSNorm(width, config.rms_norm_eps, config.norm_weight_offset) for width in widths
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: AttentionState | None,
        span: Span,
        position_embeddings: dict[str, Rotation],
        keep_state: bool,
    ) -> tuple[torch.Tensor, AttentionState | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[batch, width, hidden_size]`.
            state: what the rows have cached; `None` when they have read nothing.
            span: the stretch of its stream that each row reads, with a plan for this kind of attention.
            position_embeddings: by rope, cosines and sines of the positions, `[batch or 1, width, turned features]`.
            keep_state: whether the caller wants the new state.

        Returns:
            The output `[batch, width, hidden_size]`, the new state or `None`, and the attention weights
            `[batch, heads, width, slots]` over the cached keys and the new ones, where they are made (`eager`).
        """
        batch, width, _ = hidden_states.shape
        queries = self._by_head(self.q_proj(hidden_states), self.q_norm)
        keys = self._by_head(self.k_proj(hidden_states), self.k_norm)
        values = self._by_head(self.v_proj(hidden_states), None)
        if self.layout.rope is not None:
            queries, keys = turn(queries, keys, position_embeddings[self.layout.rope])

        plan = span.plans[self.layout]
        if plan.cached:
            assert state is not None
            keys, values = plan.pack(state.tensors["keys"], keys), plan.pack(state.tensors["values"], values)
        output, weights = attend(self, queries, keys, values, plan)
        new_state = AttentionState(keys=plan.keep(keys), values=plan.keep(values)) if keep_state else None
        return self.o_proj(output.reshape(batch, width, -1)), new_state, weights

    def _by_head(self, projected: torch.Tensor, norm: HopeRMSNorm | None) -> torch.Tensor:
        """`[batch, width, heads * head_dim]`, normed, to `[batch, heads, width, head_dim]`."""
        if norm is not None and self.config.qk_norm == "all":
            projected = norm(projected)
        by_head = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return norm(by_head) if norm is not None and self.config.qk_norm == "head" else by_head

    def empty_state(self, batch: int, like: torch.Tensor) -> AttentionState:
        """Of rows that have read nothing; `like` gives dtype and device."""
        none = like.new_zeros(batch, self.config.num_key_value_heads, 0, self.head_dim)
        return AttentionState(keys=none, values=none)

    def slots(self, seen: int) -> int:
        """Slots that a row which has read `seen` tokens fills in the growing tensors."""
        return self.layout.count(seen)

    def most_slots(self, seen: int) -> int:
        """The most that such a row has filled up to then."""
        return self.layout.most(seen)


def key_layout(config: HopeConfig, layer_idx: int) -> KeyLayout:
    """The layout of the keys of a layer."""
    rope = config.layer_ropes[layer_idx]  # type: ignore[index]
    return KeyLayout(config.layer_windows[layer_idx], config.layer_sinks[layer_idx], config.segment_length, rope)


def attend(
    module: HopeAttention, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention by the implementation that `config._attn_implementation` names.

    Args:
        queries: `[batch, heads, width, head_dim]`.
        keys, values: `[batch, key_value_heads, slots, head_dim]`, packed.

    Returns:
        `[batch, width, heads, head_dim]`, and the weights or `None`.
    """
    implementation = module.config._attn_implementation
    dropout = module.attention_dropout if module.training else 0.0
    options: dict[str, Any] = {"dropout": dropout, "scaling": module.scaling}
    if module.config.attn_logit_softcapping is not None:
        options["softcap"] = module.config.attn_logit_softcapping
    if _needs_second_derivative(module):
        implementation = _twice_differentiable(implementation)
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        return _flash_attend(module, queries, keys, values, plan, options)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    outputs, weights = [], []
    for block in plan.blocks:
        seen_keys, seen_values = _seen(block, keys), values[:, :, block.first : block.last]
        if block.sinks:
            seen_values = torch.cat([values[:, :, : block.sinks], seen_values], dim=2)
        part = queries if len(plan.blocks) == 1 else queries[:, :, block.start : block.stop]
        output, seen = function(module, part, seen_keys, seen_values, block.mask, **options)
        outputs.append(output)
        if implementation == "eager":
            weights.append(_over_all(seen, block, keys.shape[2]))
    if len(outputs) == 1:
        return outputs[0], weights[0] if weights else None
    return torch.cat(outputs, dim=1), torch.cat(weights, dim=2) if weights else None


def _needs_second_derivative(module: HopeAttention) -> bool:
    return module.training and module.config.cms_training == "second_order"


def _twice_differentiable(implementation: str | None) -> str | None:
    """In the place of sdpa, whose kernels have a first derivative only, eager attention."""
    if implementation == "sdpa":
        return "eager"
    if implementation == "flex_attention" or is_flash_attention_requested(
        requested_attention_implementation=implementation
    ):
        raise ValueError(
            f"`attn_implementation={implementation!r}` has no second derivative, which cms_training='second_order' needs: "
            "load the model with attn_implementation='eager' or 'sdpa' (which trains as eager does)."
        )
    return implementation


def _over_all(weights: torch.Tensor, block: Block, slots: int) -> torch.Tensor:
    """A block's weights `[batch, heads, queries, keys]` over all key slots, 0 where it sees none: `[..., slots]`."""
    if weights.shape[3] == slots:
        return weights
    sinks, window = weights.split([block.sinks, block.last - block.first], dim=3)
    between = nn.functional.pad(sinks, (0, block.first - block.sinks))
    return nn.functional.pad(torch.cat([between, window], dim=3), (0, slots - block.last))


def _seen(block: Block, keys: torch.Tensor) -> torch.Tensor:
    """The keys that a block's queries see, the sinks first, moved to where they see them."""
    window = keys[:, :, block.first : block.last]
    if not block.sinks:
        return window
    sinks = keys[:, :, : block.sinks]
    if block.rotation is not None:
        sinks, _ = turn(sinks, sinks, block.rotation)
    return torch.cat([sinks, window], dim=2)


def eager_attention(
    module: HopeAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scaling q k^T) v, in float32 or better, with the interface of Transformers' attention functions."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if attention_mask is None:
        attention_mask = torch.ones_like(scores, dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _flash_attend(
    module: HopeAttention,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    options: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Flash attention takes no mask: rows that differ are laid end to end, and their lengths say where one ends."""
    layout = plan.layout
    if layout.window is not None and layout.sinks:
        raise ValueError(
            f"`attn_implementation={module.config._attn_implementation!r}` cannot keep `attention_sinks` "
            f"({layout.sinks}) in view of a sliding window: load the model with attn_implementation='sdpa', or set "
            "attention_sinks=0."
        )
    function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    options["sliding_window"] = layout.window
    if not plan.query_counts:
        return function(module, queries, keys, values, None, **options)[0], None
    batch, heads, width, head_dim = queries.shape
    device = queries.device
    slots = torch.arange(width, device=device)
    real = slots < torch.tensor(plan.query_counts, device=device)[:, None]
    valid = torch.arange(keys.shape[2], device=device) < torch.tensor(plan.key_counts, device=device)[:, None]
    flat_queries = queries.transpose(1, 2)[real].transpose(0, 1)[None]
    flat_keys = keys.transpose(1, 2)[valid].transpose(0, 1)[None]
    flat_values = values.transpose(1, 2)[valid].transpose(0, 1)[None]
    output, _ = function(
        module,
        flat_queries,
        flat_keys,
        flat_values,
        None,
        cu_seq_lens_q=_offsets(plan.query_counts, device),
        cu_seq_lens_k=_offsets(plan.key_counts, device),
        max_length_q=max(plan.query_counts),
        max_length_k=max(plan.key_counts),
        **options,
    )
    unpacked = output.new_zeros(batch, width, heads, head_dim)
    unpacked[real] = output[0]
    return unpacked, None


def _offsets(lengths: list[int], device: torch.device) -> torch.Tensor:
    return nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
