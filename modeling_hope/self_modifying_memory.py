"""The self-modifying memory as a mixer (Eq. 83-97): memories that make their own keys, values, rates and decays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .chunk_plan import ChunkPlan
from .configuration_hope import HopeConfig
from .continuum_memory import HopeRMSNorm
from .delta_rule import decay_of
from .key_layout import Span
from .memory_chunk import (
    Constants,
    FastWeights,
    Maps,
    Rule,
    after_chunk,
    choose,
    read,
    read_tokens,
    unit,
    write,
)
from .mixer_state import MixerState


CONV_WIDTH = 4
START_RATE, START_DECAY = 0.1, 0.995


class MemoryState(MixerState):
    """
    What a self-modifying memory remembers.

    Tensors (H heads, X memories in a group, `group` `memory` or `projections`, `map` `w2` and `w1`, or `w` at depth 1):
        conv: `[batch, 3, hidden_size]`, the mixer's last inputs.
        open: `[batch, H, slots, features]`, the streams of the tokens since the last chunk boundary.
        group.now.map: the fast weights, in float32 or better: `[batch, H, 1, X m, D]` and `[batch, H, X, D, m]`.
        group.momentum.map: S, shaped alike; only with momentum.
        group.start.map, group.written.map: for the group with the longer chunks, the weights its open chunk started
            with, and U, what it has written.
    """

    growing = frozenset({"open"})

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> MemoryState:
        """The fast weights stay in float32 or better."""
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
        moved = {name: tensor.to(device, dtype if name == "conv" else wide) for name, tensor in self.tensors.items()}
        return MemoryState(**moved)


class MemoryGroup(nn.Module):
    """
    The initial weights of memories that share a chunk size.

    Parameters: `w2` `[H, X, m, D]` and `w1` `[H, X, D, m]`, `gamma` `[H, X, D]`; at depth 1 `w` `[H, X, D, D]`. And
    `momentum` `[H, X]`, of which mu is the sigmoid.
    """

    def __init__(self, config: HopeConfig, names: Sequence[str], chunk_size: int):
        super().__init__()
        heads, d, m = config.num_memory_heads, config.memory_head_dim, config.memory_hidden_size
        assert heads is not None and d is not None and m is not None
        self.names, self.chunk_size, self.retention = list(names), chunk_size, config.memory_retention
        count = len(self.names)
        if config.memory_depth == 2:
            self.map_names = ["w2", "w1"]
            self.w2 = nn.Parameter(torch.empty(heads, count, m, d))
            self.w1 = nn.Parameter(torch.empty(heads, count, d, m))
            self.gamma = nn.Parameter(torch.empty(heads, count, d))
        else:
            self.map_names = ["w"]
            self.w = nn.Parameter(torch.empty(heads, count, d, d))
        self.momentum = nn.Parameter(torch.empty(heads, count)) if config.memory_momentum else None

    @property
    def deep(self) -> bool:
        return len(self.map_names) == 2

    def maps(self, batch: int, dtype: torch.dtype) -> Maps:
        """The initial maps of every row, laid out as `memory_chunk` takes them."""
        first = getattr(self, self.map_names[0]).to(dtype).flatten(1, 2)[:, None]
        maps = (first, self.w1.to(dtype)) if self.deep else (first,)
        return tuple(_for_rows(weights, batch) for weights in maps)

    def constants(self, maps: Maps, batch: int) -> Constants:
        dtype, mu, gamma = maps[0].dtype, None, None
        if self.deep:
            gamma = _for_rows(self.gamma.to(dtype)[..., None], batch)
        if self.momentum is not None:
            kept = _for_rows(torch.sigmoid(self.momentum.to(dtype))[..., None, None], batch)
            first = kept.expand(-1, -1, maps[0].shape[2] // len(self.names), -1).flatten(1, 2)[:, None]
            mu = (first, kept) if self.deep else (first,)
        return Constants(maps if self.retention == "initial" else None, gamma, mu)

    def initialise(self) -> None:
        for name in self.map_names:
            weights = getattr(self, name)
            init.normal_(weights, std=1.0 if name == "w2" else weights.shape[-1] ** -0.5)
        if self.deep:
            init.constant_(self.gamma, self.gamma.shape[-1] ** -0.5)
        if self.momentum is not None:
            init.zeros_(self.momentum)


class HeadScalars(nn.Module):
    """One number per head from what its memory read: `<weight, a> + bias`, weight `[H, D]`, bias `[H]`."""

    def __init__(self, heads: int, d: int, start: float):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(heads, d))
        self.bias = nn.Parameter(torch.empty(heads))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """`[rows times heads, D, C]` to `[rows times heads, C]`."""
        weight, bias = (_for_rows(p.to(a.dtype), a.shape[0] // len(p)) for p in (self.weight, self.bias))
        return (weight[:, None] @ a).squeeze(1) + bias[:, None]

    def initialise(self) -> None:
        """The sigmoid starts near `start`, and not so exactly that the memory would have no gradient."""
        init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
        init.constant_(self.bias, math.log(self.start / (1 - self.start)))


class StaticScalars(nn.Linear):
    """One number per head from the slow maps' input, `[..., hidden_size]` to `[..., H]`."""

    def __init__(self, hidden: int, heads: int, start: float):
        super().__init__(hidden, heads)
        self.start = start

    def initialise(self) -> None:
        init.constant_(self.bias, math.log(self.start / (1 - self.start)))


class ShortConvolution(nn.Module):
    """Causal convolution of each channel over 4 tokens; `weight` `[channels, 1, 4]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, CONV_WIDTH))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, 3 + width, channels]` to `[batch, width, channels]`."""
        width = inputs.shape[1] - CONV_WIDTH + 1
        return sum(inputs[:, j : j + width] * self.weight[:, 0, j] for j in range(CONV_WIDTH))  # type: ignore[return-value]

    def initialise(self) -> None:
        init.normal_(self.weight, std=CONV_WIDTH**-0.5)


class SelfModifyingMemory(nn.Module):
    """A layer's memories, with the slow maps that feed them and read them out."""

    def __init__(self, config: HopeConfig, layer_idx: int):
        super().__init__()
        hidden, heads, d = config.hidden_size, config.num_memory_heads, config.memory_head_dim
        assert heads is not None and d is not None and config.projection_chunk_size is not None
        self.config, self.heads, self.head_dim = config, heads, d
        self.rewinds, self.state_class = False, MemoryState
        self.rule = Rule(config.memory_objective, config.memory_delta_decay, config.memory_self_values)
        self.adaptive = [name for name in config.adaptive_projections if name != "alpha" or config.memory_weight_decay]
        self.memory = MemoryGroup(config, ["memory"], config.memory_chunk_size)
        self.projections = MemoryGroup(config, self.adaptive, config.projection_chunk_size) if self.adaptive else None
        self.conv = ShortConvolution(hidden)
        self.z_proj = nn.Linear(hidden, heads * d, bias=False) if set(self.adaptive) - {"q"} else None
        self.q_proj = nn.Linear(hidden, heads * d, bias=False)
        self.k_proj = None if "k" in self.adaptive else nn.Linear(hidden, heads * d, bias=False)
        self.v_proj = None if "v" in self.adaptive else nn.Linear(hidden, heads * d, bias=False)
        self.eta_proj = self._scalars("eta", START_RATE / float(config.memory_max_rate or 1))
        self.alpha_proj = self._scalars("alpha", START_DECAY) if config.memory_weight_decay else None
        self.gate_proj = nn.Linear(hidden, heads * d, bias=False)
        self.output_norm = HopeRMSNorm(d, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(heads * d, hidden, bias=False)

    def _scalars(self, name: str, start: float) -> HeadScalars | StaticScalars:
        if name in self.adaptive:
            return HeadScalars(self.heads, self.head_dim, start)
        return StaticScalars(self.config.hidden_size, self.heads, start)

    @property
    def chunk_size(self) -> int:
        """Tokens between two boundaries at which the state is kept: the smaller of the chunk sizes."""
        assert self.config.projection_chunk_size is not None
        return min(self.config.memory_chunk_size, self.config.projection_chunk_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: MemoryState | None,
        span: Span,
        position_embeddings: Any,
        rotary: Any,
        keep_state: bool,
    ) -> tuple[torch.Tensor, MemoryState | None, None]:
        """
        Args:
            hidden_states: `[batch, width, hidden_size]`.
            state: what the rows remember; `None` when they have read nothing.
            span: the stretch of its stream that each row reads.
            position_embeddings, rotary: for mixers that know positions; this one does not.
            keep_state: whether the caller wants the new state.

        Returns:
            The output `[batch, width, hidden_size]`, the new state or `None`, and no attention weights.
        """
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        before = None if state is None else state.tensors["conv"].to(hidden_states.dtype)
        inputs = (
            F.pad(hidden_states, (0, 0, CONV_WIDTH - 1, 0)) if before is None else torch.cat([before, hidden_states], 1)
        )
        u = F.silu(self.conv(inputs))
        gate = F.silu(self.gate_proj(u))
        with torch.autocast(hidden_states.device.type, enabled=False):
            queries, kept = self._streams(u, wide)
            plan = ChunkPlan(span, self.chunk_size)
            opened = None if state is None else state.tensors["open"].to(wide)
            kept = plan.join(opened, kept)
            queries = plan.join(None, queries)
            read_out, groups = self._read_chunks(queries, kept, plan, state, wide)
            new_state = None
            if keep_state:
                new_state = self._state(groups, plan.open_part(kept), plan.last_inputs(inputs, CONV_WIDTH - 1))
            read_out = self.output_norm(plan.new_part(read_out))
        output = self.o_proj(read_out.flatten(2).to(gate.dtype) * gate)
        return output, new_state, None

    def empty_state(self, batch: int, like: torch.Tensor) -> MemoryState:
        """Of rows that have read nothing; `like` gives dtype and device."""
        wide = torch.promote_types(like.dtype, torch.float32)
        groups = self._groups(None, batch, wide)
        features = sum(self._stream_sizes().values())
        kept = torch.zeros(batch, self.heads, 0, features, dtype=wide, device=like.device)
        tail = torch.zeros(batch, CONV_WIDTH - 1, self.config.hidden_size, dtype=like.dtype, device=like.device)
        return self._state(groups, kept, tail)

    def _stream_sizes(self) -> dict[str, int]:
        """Features of what chunks take from the slow maps of every token, besides queries, in their order."""
        d = self.head_dim
        sizes = {"z": d if self.z_proj is not None else 0, "k": d if self.k_proj is not None else 0}
        sizes |= {"v": d if self.v_proj is not None else 0, "eta": int("eta" not in self.adaptive)}
        static_decay = self.alpha_proj is not None and "alpha" not in self.adaptive
        return {name: size for name, size in (sizes | {"alpha": int(static_decay)}).items() if size}

    def _streams(self, u: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[batch, width, H, D]`, and the other streams side by side, `[batch, width, H, features]`."""
        by_head = (*u.shape[:2], self.heads, -1)
        found = [getattr(self, f"{name}_proj")(u).to(dtype).view(by_head) for name in self._stream_sizes()]
        found = [unit(a, -1) if name in "zk" else a for name, a in zip(self._stream_sizes(), found, strict=True)]
        kept = found[0] if len(found) == 1 else torch.cat(found, -1)
        return unit(self.q_proj(u).to(dtype).view(by_head), -1), kept

    def _read_chunks(
        self,
        queries: torch.Tensor,
        kept: torch.Tensor,
        plan: ChunkPlan,
        state: MemoryState | None,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, dict[str, FastWeights]]:
        """The loop over chunks: `[batch, columns, H, D]` of what is read, and the weights after the last whole chunk."""
        batch = queries.shape[0]
        groups = self._groups(state, batch, dtype)
        modules = self.memory_groups()
        constants = {name: module.constants(module.maps(batch, dtype), batch) for name, module in modules.items()}
        by_token = self.config.memory_read == "token"
        outputs = []
        for index, (q, streams) in enumerate(zip(plan.chunks(queries), plan.chunks(kept), strict=True)):
            whole = plan.whole(index)
            k, v, rates, log_alpha, q = self._project(groups, constants, streams, q)
            real = plan.real(index, self.heads)
            if real is not None:
                rates, log_alpha = rates * real, log_alpha * real
            rates, decay = rates[:, None, None], decay_of(log_alpha)
            written = {}
            for name, weights in groups.items():
                if whole is not None or (by_token and name == "memory"):
                    momentum = whole is not None and weights.momentum is not None
                    written[name] = write(weights, constants[name], k, v, rates, decay, self.rule, momentum)
            memory = groups["memory"]
            if by_token:
                outputs.append(read_tokens(memory, constants["memory"], written["memory"], q, decay))
            else:
                outputs.append(read(memory.start, constants["memory"].gamma, q)[:, 0])
            if whole is None:
                continue
            for name, weights in groups.items():
                ends = plan.ends(index, modules[name].chunk_size, self.heads)
                after = after_chunk(weights, constants[name], written[name], decay, ends)
                groups[name] = after if whole is True else choose(plan.by_head(whole, self.heads), after, weights)
        return plan.unchunk(outputs, batch), groups

    def _project(
        self, groups: dict[str, FastWeights], constants: dict[str, Constants], streams: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """k, v `[G, D, C]`, b and log alpha `[G, C]`, and q, from the weights at the chunk's start (Eq. 86-87)."""
        sizes = self._stream_sizes()
        found = dict(zip(sizes, streams.split(list(sizes.values()), 1), strict=True))
        if self.projections is not None:
            weights, gamma = groups["projections"].start, constants["projections"].gamma
            names = self.projections.names
            if "z" in found:
                reads = read(weights, gamma, found["z"]).unbind(1)
                found |= {name: a for name, a in zip(names, reads, strict=True) if name != "q"}
            if "q" in names:
                q = unit(read(_one_of(weights, names.index("q"), len(names)), _one(gamma, names.index("q")), q)[:, 0])
        rates = self._logits("eta", found).sigmoid() * self.config.memory_max_rate
        log_alpha = torch.zeros_like(rates)
        if self.alpha_proj is not None:
            log_alpha = F.logsigmoid(self._logits("alpha", found))
        return unit(found["k"]), found["v"], rates, log_alpha, q

    def _logits(self, name: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
        return getattr(self, f"{name}_proj")(found[name]) if name in self.adaptive else found[name][:, 0]

    def memory_groups(self) -> dict[str, MemoryGroup]:
        return {"memory": self.memory} | ({} if self.projections is None else {"projections": self.projections})

    def _groups(self, state: MemoryState | None, batch: int, dtype: torch.dtype) -> dict[str, FastWeights]:
        groups = {}
        for name, module in self.memory_groups().items():
            if state is None:
                maps = module.maps(batch, dtype)
                zeros = tuple(torch.zeros_like(weights) for weights in maps)
                groups[name] = FastWeights(maps, maps, None if module.momentum is None else zeros)
                continue
            kinds = {}
            for kind in ("now", "start", "momentum", "written"):
                names = [f"{name}.{kind}.{map_name}" for map_name in module.map_names]
                if names[0] in state.tensors:
                    kinds[kind] = tuple(state.tensors[n].to(dtype).flatten(0, 1) for n in names)
            groups[name] = FastWeights(**({"start": kinds["now"]} | kinds))
        return groups

    def _state(self, groups: dict[str, FastWeights], kept: torch.Tensor, tail: torch.Tensor) -> MemoryState:
        tensors = {"conv": tail, "open": kept}
        for name, weights in groups.items():
            module = self.memory_groups()[name]
            kinds: dict[str, Maps | None] = {"now": weights.now, "momentum": weights.momentum}
            if module.chunk_size > self.chunk_size:
                nothing = tuple(torch.zeros_like(maps) for maps in weights.now)
                kinds |= {"start": weights.start}
                kinds |= {} if weights.momentum is None else {"written": weights.written or nothing}
            for kind, maps in kinds.items():
                for map_name, weight in zip(module.map_names, maps or (), strict=maps is not None):
                    tensors[f"{name}.{kind}.{map_name}"] = weight.unflatten(0, (-1, self.heads))
        return MemoryState(**tensors)


def _for_rows(parameter: torch.Tensor, batch: int) -> torch.Tensor:
    """`[H, ...]` for every row: `[batch times H, ...]`."""
    return parameter[None].expand(batch, *parameter.shape).flatten(0, 1)


def _one_of(maps: Maps, index: int, count: int) -> Maps:
    """The maps of one memory of a group."""
    rows = maps[0].shape[2] // count
    return (maps[0][:, :, index * rows : (index + 1) * rows], *(other[:, index : index + 1] for other in maps[1:]))


def _one(gamma: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if gamma is None else gamma[:, index : index + 1]
