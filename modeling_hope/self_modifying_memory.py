"""The self-modifying memory as a mixer (Eq. 83-97): memories that make their own keys, values, rates and decays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .chunk_plan import ChunkPlan
from .configuration_hope import HopeConfig
from .delta_rule import decay_of
from .fused_memory import read, unit
from .key_layout import Span
from .memory_chunk import (
    Constants,
    FastWeights,
    after_chunk,
    choose,
    memory_at,
    of_rows,
    place,
    read_tokens,
    split,
    split_constants,
    write,
)
from .memory_rule import LOGIT_GAIN, Maps, Rule
from .mixer_state import MixerState
from .norm import HopeRMSNorm
from .sharding import in_every_gradient


CONV_WIDTH = 4
START_AT_TOKEN, START_NOISE = 0.75, 0.1  # of the convolution
START_OUTER = 0.5


class MemoryState(MixerState):
    """
    What a self-modifying memory remembers.

    Tensors (H heads; X memories in a group; `group` is `memories`, or `memory` and `projections` where their chunk sizes
    differ; `map` is `w2` and `w1`, or `w` at depth 1):
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
        moved = self._map(lambda tensor: tensor.to(device, wide)).tensors
        return MemoryState(**{**moved, "conv": self.tensors["conv"].to(device, dtype)})


class Group(NamedTuple):
    """Memories that share a chunk size: which, and how many tokens."""

    memories: slice
    chunk_size: int


class Memories(nn.Module):
    """
    The initial weights of a layer's memories, `memory` first.

    Parameters: `w2` `[H, X, m, D]` and `w1` `[H, X, D, m]`, `gamma` `[H, X, D]`; at depth 1 `w` `[H, X, D, D]`. And
    `momentum` `[H, X]`, of which mu is the sigmoid.
    """

    def __init__(self, config: HopeConfig, names: Sequence[str]):
        super().__init__()
        heads, d, m = config.num_memory_heads, config.memory_head_dim, config.memory_hidden_size
        assert heads is not None and d is not None and m is not None
        self.deep, self.retention, count = config.memory_depth == 2, config.memory_retention, len(names)
        self.initial_momentum = config.memory_initial_momentum
        self.map_names = ("w2", "w1") if self.deep else ("w",)
        if self.deep:
            self.w2 = nn.Parameter(torch.empty(heads, count, m, d))
            self.w1 = nn.Parameter(torch.empty(heads, count, d, m))
            self.gamma = nn.Parameter(torch.empty(heads, count, d))
        else:
            self.w = nn.Parameter(torch.empty(heads, count, d, d))
        self.momentum = nn.Parameter(torch.empty(heads, count)) if config.memory_momentum else None

    def forward(self, memories: slice, batch: int, dtype: torch.dtype) -> tuple[Maps, Constants]:
        """
        The initial maps of some memories in every row, laid out as `memory_chunk` takes them, and what goes with them in
        every chunk.
        """
        first, *others = (getattr(self, name)[:, memories].to(dtype) for name in self.map_names)
        count = first.shape[1]
        maps = tuple(_for_rows(weights, batch) for weights in (first.flatten(1, 2)[:, None], *others))
        mu, gamma = None, None
        if self.deep:
            gamma = _for_rows(self.gamma[:, memories].to(dtype)[..., None], batch)
        if self.momentum is not None:
            kept = _for_rows(torch.sigmoid(self.momentum[:, memories].to(dtype))[..., None, None], batch)
            by_row = kept.expand(-1, -1, maps[0].shape[2] // count, -1).flatten(1, 2)[:, None]
            mu = (by_row, kept) if self.deep else (by_row,)
        return maps, Constants(count, maps if self.retention == "initial" else None, gamma, mu)

    def initialise(self) -> None:
        """
        Hidden units start at the bend of silu, for the inputs are units. W1 starts small: what is written adds to it, and
        the rms after it makes a first write count for more, the smaller it is.
        """
        for name in self.map_names:
            weights = getattr(self, name)
            scale = {"w2": 1.0, "w1": START_OUTER * weights.shape[-1] ** -0.5, "w": weights.shape[-1] ** -0.5}
            init.normal_(weights, std=scale[name])
        if self.deep:
            init.constant_(self.gamma, self.gamma.shape[-1] ** -0.5)
        if self.momentum is not None:
            init.constant_(self.momentum, _logit(self.initial_momentum))


class HeadScalars(nn.Module):
    """One logit per head from what its memory read: `5 (<weight, a> + bias)`, weight `[H, D]`, bias `[H]`."""

    def __init__(self, heads: int, d: int, start: float):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(heads, d))
        self.bias = nn.Parameter(torch.empty(heads))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """`[rows times heads, D, C]` to `[rows times heads, C]`."""
        weight, bias = (_for_rows(p.to(a.dtype), a.shape[0] // len(p)) for p in (self.weight, self.bias))
        return ((weight[:, None] @ a).squeeze(1) + bias[:, None]) * LOGIT_GAIN

    def initialise(self) -> None:
        """The sigmoid starts near `start`, and not so exactly that the memory would have no gradient."""
        init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5 / LOGIT_GAIN)
        init.constant_(self.bias, _logit(self.start) / LOGIT_GAIN)


class StaticScalars(nn.Module):
    """
    One logit per head from the slow maps' input, 5 times a linear map: weight `[H, hidden_size]`, bias `[H]`.

    No `nn.Linear`: what takes the place of those, quantized or adapted, would lose the factor.
    """

    def __init__(self, hidden: int, heads: int, start: float):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(heads, hidden))
        self.bias = nn.Parameter(torch.empty(heads))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to `[..., H]`, in float32 or better."""
        wide = torch.promote_types(u.dtype, torch.float32)
        return F.linear(u.to(wide), self.weight.to(wide), self.bias.to(wide)) * LOGIT_GAIN

    def initialise(self) -> None:
        init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5 / LOGIT_GAIN)
        init.constant_(self.bias, _logit(self.start) / LOGIT_GAIN)


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
        """
        Every channel starts by looking at one token, most at the newest, some at one of the three before it. Random mixes
        of all four have to be undone first by tasks that turn on what each token is.
        """
        channels = self.weight.shape[0]
        earlier = [(1 - START_AT_TOKEN) / (CONV_WIDTH - 1)] * (CONV_WIDTH - 1)
        looks = torch.tensor([*earlier, START_AT_TOKEN], device=self.weight.device)
        look = F.one_hot(looks.multinomial(channels, replacement=True), CONV_WIDTH)
        start = look[:, None] + START_NOISE * torch.randn(channels, 1, CONV_WIDTH, device=self.weight.device)
        init.copy_(self.weight, start)


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
        self.memories = Memories(config, ["memory", *self.adaptive])
        # Memories with one chunk size are written together.
        sizes = (config.memory_chunk_size, config.projection_chunk_size)
        if sizes[0] == sizes[1] or not self.adaptive:
            self.groups = {"memories": Group(slice(None), sizes[0])}
        else:
            self.groups = {"memory": Group(slice(0, 1), sizes[0]), "projections": Group(slice(1, None), sizes[1])}
        self.conv = ShortConvolution(hidden)
        self.z_proj = nn.Linear(hidden, heads * d, bias=False) if set(self.adaptive) - {"q"} else None
        self.q_proj = nn.Linear(hidden, heads * d, bias=False)
        self.k_proj = None if "k" in self.adaptive else nn.Linear(hidden, heads * d, bias=False)
        self.v_proj = None if "v" in self.adaptive else nn.Linear(hidden, heads * d, bias=False)
        self.eta_proj = self._scalars("eta", config.memory_initial_rate / config.memory_max_rate)  # type: ignore[operator]
        self.alpha_proj = self._scalars("alpha", config.memory_initial_decay) if config.memory_weight_decay else None
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
        return min(group.chunk_size for group in self.groups.values())

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: MemoryState | None,
        span: Span,
        position_embeddings: Any,
        keep_state: bool,
    ) -> tuple[torch.Tensor, MemoryState | None, None]:
        """
        Args:
            hidden_states: `[batch, width, hidden_size]`.
            state: what the rows remember; `None` when they have read nothing.
            span: the stretch of its stream that each row reads.
            position_embeddings: for mixers that know positions; this one does not.
            keep_state: whether the caller wants the new state.

        Returns:
            The output `[batch, width, hidden_size]`, the new state or `None`, and no attention weights.
        """
        if self.training:
            hidden_states = in_every_gradient(hidden_states, self._for_writing())
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
            read_out, weights = self._read_chunks(queries, kept, plan, state, keep_state)
            new_state = None
            if keep_state:
                # Copies: a view would keep the whole call's streams alive.
                open_part, tail = plan.open_part(kept).clone(), plan.last_inputs(inputs, CONV_WIDTH - 1).clone()
                new_state = self._state(weights, open_part, tail)
            read_out = self.output_norm(plan.new_part(read_out))
        return self.o_proj(read_out.flatten(2).to(gate.dtype) * gate), new_state, None

    def empty_state(self, batch: int, like: torch.Tensor) -> MemoryState:
        """Of rows that have read nothing; `like` gives dtype and device."""
        wide = torch.promote_types(like.dtype, torch.float32)
        weights = self._fast_weights(None, batch, wide)
        features = sum(self._stream_sizes().values())
        kept = torch.zeros(batch, self.heads, 0, features, dtype=wide, device=like.device)
        tail = torch.zeros(batch, CONV_WIDTH - 1, self.config.hidden_size, dtype=like.dtype, device=like.device)
        return self._state(weights, kept, tail)

    def slots(self, seen: int) -> int:
        """Slots that a row which has read `seen` tokens fills in the growing tensors."""
        return seen % self.chunk_size

    def most_slots(self, seen: int) -> int:
        """The most that such a row has filled up to then."""
        return min(seen, self.chunk_size - 1)

    def _for_writing(self) -> list[nn.Parameter]:
        """Parameters on which what is read may not depend, before a chunk has been written."""
        found = [] if self.memories.momentum is None else [self.memories.momentum]
        if self.config.memory_read == "chunk":
            maps = (self.z_proj, self.k_proj, self.v_proj, self.eta_proj, self.alpha_proj)
            found += [parameter for module in maps if module is not None for parameter in module.parameters()]
        return found

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
        self, queries: torch.Tensor, kept: torch.Tensor, plan: ChunkPlan, state: MemoryState | None, keep_state: bool
    ) -> tuple[torch.Tensor, dict[str, FastWeights]]:
        """
        The loop over chunks.

        Returns:
            What is read, `[batch, columns, H, D]`, and each group's weights after the last whole chunk.
        """
        batch = queries.shape[0]
        weights = self._fast_weights(state, batch, queries.dtype)
        constants = {
            name: self.memories(group.memories, batch, queries.dtype)[1] for name, group in self.groups.items()
        }
        (main, *_), (*_, last) = self.groups, self.groups
        by_token = self.config.memory_read == "token"
        own, projecting = constants[main], constants[last]
        if main == last:
            own, projecting = split_constants(constants[main])
        outputs = []
        for index, (q, streams) in enumerate(zip(plan.chunks(queries), plan.chunks(kept), strict=True)):
            whole = plan.whole(index, keep_state)
            maps, projections = weights[main].now if by_token else weights[main].start, weights[last].start
            if main == last:
                maps, projections = split(maps, constants[main].memories)
            k, v, rates, log_alpha, q = self._project(projections, projecting, streams, q)
            few = plan.few(whole, self.heads)
            rates, decay = rates[:, None, None], decay_of(log_alpha)
            written = {}
            for name, group_weights in weights.items():
                within, ending = by_token and name == main, whole is not None and few is None
                if ending or within:
                    written[name] = write(group_weights, constants[name], k, v, rates, decay, self.rule, ending, within)
            if by_token:
                outputs.append(read_tokens(maps, own, written[main], q, decay))
            else:
                outputs.append(read(maps, own.gamma, q)[:, 0])
            if whole is None:
                continue
            for name, old in weights.items():
                ends = plan.ends(index, self.groups[name].chunk_size, self.heads)
                if few is not None:
                    chunk = (each.index_select(0, few) for each in (k, v, rates, log_alpha))
                    weights[name] = place(few, self._written_alone(old, constants[name], few, chunk, ends), old)
                    continue
                new = after_chunk(old, constants[name], written[name], ends)
                weights[name] = new if isinstance(whole, bool) else choose(plan.by_head(whole, self.heads), new, old)
        return plan.unchunk(outputs, batch), weights

    def _written_alone(
        self,
        weights: FastWeights,
        constants: Constants,
        rows: torch.Tensor,
        chunk: Iterable[torch.Tensor],
        ends: bool | torch.Tensor,
    ) -> FastWeights:
        """What a chunk of k, v, rates and log alpha makes of a group in the rows times heads `rows` that fill it."""
        k, v, rates, log_alpha = chunk
        weights, constants = of_rows(weights, constants, rows)
        written = write(weights, constants, k, v, rates, decay_of(log_alpha), self.rule, ends=True, by_token=False)
        return after_chunk(weights, constants, written, ends if isinstance(ends, bool) else ends[rows])

    def _project(
        self, maps: Maps, constants: Constants, streams: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Keys, values, rates, decays and queries from the weights at the chunk's start (Eq. 86-87).

        Args:
            maps, constants: of the adaptive projections.
            streams: `[G, features, C]`.
            q: `[G, D, C]`.

        Returns:
            k and v `[G, D, C]`, b and log alpha `[G, C]`, and q.
        """
        sizes = self._stream_sizes()
        found = dict(zip(sizes, streams.split(list(sizes.values()), 1), strict=True))
        if "z" in found:
            found |= dict(zip(self.adaptive, read(maps, constants.gamma, found["z"]).unbind(1), strict=True))
        if "q" in self.adaptive:
            place = self.adaptive.index("q")
            q = unit(read(*memory_at(maps, constants.gamma, place, len(self.adaptive)), q)[:, 0])
        rates = self._logits("eta", found).sigmoid() * self.config.memory_max_rate  # type: ignore[operator]
        log_alpha = torch.zeros_like(rates)
        if self.alpha_proj is not None:
            log_alpha = F.logsigmoid(self._logits("alpha", found))
        return unit(found["k"]), found["v"], rates, log_alpha, q

    def _logits(self, name: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
        return getattr(self, f"{name}_proj")(found[name]) if name in self.adaptive else found[name][:, 0]

    def _fast_weights(self, state: MemoryState | None, batch: int, dtype: torch.dtype) -> dict[str, FastWeights]:
        found = {}
        for name, group in self.groups.items():
            if state is None:
                maps, _ = self.memories(group.memories, batch, dtype)
                zeros = tuple(torch.zeros_like(weights) for weights in maps)
                found[name] = FastWeights(maps, maps, None if self.memories.momentum is None else zeros)
                continue
            kinds = {}
            for kind in ("now", "start", "momentum", "written"):
                names = [f"{name}.{kind}.{map_name}" for map_name in self.memories.map_names]
                if names[0] in state.tensors:
                    kinds[kind] = tuple(state.tensors[n].to(dtype).flatten(0, 1) for n in names)
            found[name] = FastWeights(**({"start": kinds["now"]} | kinds))
        return found

    def _state(self, weights: dict[str, FastWeights], kept: torch.Tensor, tail: torch.Tensor) -> MemoryState:
        tensors = {"conv": tail, "open": kept}
        laid_out: dict[int, torch.Tensor] = {}
        for name, group in self.groups.items():
            own = weights[name]
            kinds: dict[str, Maps | None] = {"now": own.now, "momentum": own.momentum}
            if group.chunk_size > self.chunk_size:
                nothing = tuple(torch.zeros_like(maps) for maps in own.now)
                kinds |= {"start": own.start}
                kinds |= {} if own.momentum is None else {"written": own.written or nothing}
            for kind, maps in kinds.items():
                if maps is not None:
                    for map_name, weight in zip(self.memories.map_names, maps, strict=True):
                        # At a boundary, the weights are those that the chunk starts with: one tensor.
                        whole = laid_out.setdefault(id(weight), weight.unflatten(0, (-1, self.heads)))
                        tensors[f"{name}.{kind}.{map_name}"] = whole
        return MemoryState(**tensors)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _for_rows(parameter: torch.Tensor, batch: int) -> torch.Tensor:
    """`[H, ...]` for every row, never the parameter itself: `[batch times H, ...]`."""
    return parameter.repeat(batch, *[1] * (parameter.dim() - 1))
