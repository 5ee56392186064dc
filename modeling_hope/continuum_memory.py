"""The continuum memory system (Eq. 70-74): MLP blocks at several paces, and how a layer joins them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_hope import HopeConfig
from .fast_weights import LevelWeights
from .norm import add, norms_around
from .sharding import in_every_gradient
from .slow_weights import check_on_device


class HopeLevel(nn.Module):
    """One level's MLP, gated (SwiGLU) or plain. A Llama MLP is a level, name by name."""

    def __init__(self, config: HopeConfig, level: int):
        super().__init__()
        hidden, inner = config.hidden_size, config.level_intermediate_sizes[level]
        self.level = level
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, weights: LevelWeights | None = None) -> torch.Tensor:
        """`[batch, width, hidden_size]` to the same; `weights` where rows have learned, or are to learn."""
        if weights is None:
            up = self.up_proj(x)
            return self.down_proj(self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up)
        up = weights.linear("up_proj", self.up_proj, x)
        if self.gate_proj is None:
            return weights.linear("down_proj", self.down_proj, self.act_fn(up))
        gate = weights.linear("gate_proj", self.gate_proj, x)
        return weights.linear("down_proj", self.down_proj, self.act_fn(gate) * up)


class HopeContinuumMemory(nn.Module):
    """
    The levels a layer holds, with their norms and residuals.

    `sequential` and `nested` (Eq. 70, 72, 73): `x <- x + MLP_l(norm_l(x))` for each level in order, fastest first.
    `independent` (Eq. 74): `x <- x + Agg(MLP_1(norm(x)), ..., MLP_K(norm(x)))`.

    Norms may also come after, `x + norm(MLP(x))`, or on both sides.
    """

    levels: Sequence[HopeLevel]

    def __init__(self, config: HopeConfig, layer_idx: int):
        super().__init__()
        held = config.cms_levels_per_layer[layer_idx]  # type: ignore[index]
        self.held = list(held)
        self.config = config
        self.independent = config.cms_variant == "independent"
        self.levels = nn.ModuleList(HopeLevel(config, level) for level in held)  # type: ignore[assignment]
        normed = held[:1] if self.independent else held
        norms = [norms_around(config, config.level_norm_placements[level]) for level in normed]
        self.norms = nn.ModuleList(before for before, _ in norms)
        self.output_norms = nn.ModuleList(after for _, after in norms)
        self.aggregation = HopeAggregation(config, len(held)) if self.independent else None
        self.log_learning_rates = nn.Parameter(torch.empty(len(held))) if config.cms_learn_rates else None

    def forward(self, x: torch.Tensor, weights: dict[int, LevelWeights] | None = None) -> torch.Tensor:
        """`[batch, width, hidden_size]` to the same; `weights` by level, for the levels whose rows differ."""
        weights, multiplier = weights or {}, self.config.residual_multiplier
        if self.log_learning_rates is not None and self.training and self.config.cms_training == "second_order":
            x = in_every_gradient(x, [self.log_learning_rates])  # updates may use them, or not
        if self.aggregation is not None:
            normed = self.norms[0](x)
            outputs = [level(normed, weights.get(level.level)) for level in self.levels]
            joined = self.aggregation(normed, torch.stack(outputs, dim=2))
            return add(x, self.output_norms[0](joined), multiplier)
        for norm, level, output_norm in zip(self.norms, self.levels, self.output_norms, strict=True):
            x = add(x, output_norm(level(norm(x), weights.get(level.level))), multiplier)
        return x

    def level(self, level: int) -> HopeLevel:
        """The MLP of a level, by its index in `config.cms_periods`."""
        return self.levels[self.held.index(level)]

    def learning_rate(self, level: int) -> float:
        """Inner learning rate of a level in this layer."""
        if self.log_learning_rates is None:
            return float(self.config.level_learning_rates[level])
        check_on_device(self)
        return self.log_learning_rates[self.held.index(level)].exp().item()

    def learned_rate(self, level: int) -> torch.Tensor | float:
        """The same, with its gradient where it is learned."""
        if self.log_learning_rates is None:
            return self.learning_rate(level)
        return self.log_learning_rates[self.held.index(level)].exp()

    def initialise(self) -> None:
        if self.log_learning_rates is not None:
            rates = torch.tensor([self.config.level_learning_rates[level] for level in self.held])
            init.copy_(self.log_learning_rates, rates.log())


class HopeAggregation(nn.Module):
    """
    Agg of Eq. 74: the outputs of a layer's levels become one.

    `sum`; `weighted_sum` by a softmax over one learned score per level; `gated` by a softmax over scores computed from
    the input; `concat` and project; `attention` of the input over the levels' outputs.
    """

    def __init__(self, config: HopeConfig, levels: int):
        super().__init__()
        self.kind = config.cms_aggregation
        hidden = config.hidden_size
        if self.kind == "weighted_sum":
            self.scores = nn.Parameter(torch.empty(levels))
        elif self.kind == "gated":
            self.gate = nn.Linear(hidden, levels)
        elif self.kind == "concat":
            self.proj = nn.Linear(levels * hidden, hidden, bias=False)
        elif self.kind == "attention":
            self.query = nn.Linear(hidden, hidden, bias=False)
            self.key = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """`x`: `[batch, width, hidden_size]`; `outputs`: `[batch, width, levels, hidden_size]`."""
        if self.kind == "sum":
            return outputs.sum(2)
        if self.kind == "concat":
            return self.proj(outputs.flatten(2))
        if self.kind == "weighted_sum":
            shares = self.scores.softmax(-1)
        elif self.kind == "gated":
            shares = self.gate(x).softmax(-1)
        else:
            scores = (self.key(outputs) * self.query(x)[:, :, None]).sum(-1) / x.shape[-1] ** 0.5
            shares = scores.softmax(-1)
        return (shares[..., None] * outputs).sum(2)

    def initialise(self) -> None:
        """All levels count alike at the start; linear maps are initialised with the rest of the model's."""
        if self.kind == "weighted_sum":
            init.zeros_(self.scores)
