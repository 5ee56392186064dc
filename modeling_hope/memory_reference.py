"""
The self-modifying memory, slowly: one row, one token, one head and one memory at a time (Eq. 83-97).

Written from the equations alone, to be read beside them and to be tested against. Inner gradients are taken by
`torch.autograd.grad`; nothing is solved, masked or batched. The parameters are those of `SelfModifyingMemory`, by name.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from .configuration_hope import HopeConfig
from .memory_rule import LOGIT_GAIN


Parameters = dict[str, torch.Tensor]
Maps = list[torch.Tensor]


def unit(a: torch.Tensor) -> torch.Tensor:
    return a / a.norm().clamp(min=1e-6)


def rms(a: torch.Tensor) -> torch.Tensor:
    return a / (a.square().mean() + 1e-6).sqrt()


class SlowMemory:
    """
    One layer's memory of one stream.

    Args:
        parameters: of a `SelfModifyingMemory`, by name.
        config: of the model.
    """

    def __init__(self, parameters: Parameters, config: HopeConfig):
        self.p, self.c = parameters, config
        self.heads = [SlowHead(parameters, config, head) for head in range(config.num_memory_heads)]  # type: ignore[arg-type]
        self.past = [torch.zeros_like(parameters["conv.weight"][:, 0, 0])] * 3

    def detach(self) -> None:
        """Forget how the memory came to be what it is."""
        self.past = [x.detach() for x in self.past]
        for head in self.heads:
            for kind in (head.start, head.now, head.momentum, head.written):
                for name, maps in kind.items():
                    kind[name] = [weights.detach() for weights in maps]

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: the block's normed input at one token, `[hidden_size]`; returns the mixer's output, the same shape."""
        window = [*self.past, x]
        self.past = window[1:]
        u = silu(sum(self.p["conv.weight"][:, 0, j] * window[j] for j in range(4)))  # type: ignore[arg-type]
        outputs = [head.step(u) for head in self.heads]
        normed = [o / (o.square().mean() + self.c.rms_norm_eps).sqrt() * self.p["output_norm.weight"] for o in outputs]
        gate = silu(self.p["gate_proj.weight"] @ u)
        return self.p["o_proj.weight"] @ (torch.cat(normed) * gate)


class SlowHead:
    """
    One head: `memory`, and a memory for each of `config.adaptive_projections`.

    Attributes:
        rest: by name, the maps' initial weights W_rest; W2 `[m, D]` then W1 `[D, m]`, or one matrix `[D, D]`.
        start: the maps as the chunk found them.
        now: the maps as the last token left them.
        momentum, written: S and U of the momentum, shaped as the maps.
    """

    def __init__(self, parameters: Parameters, config: HopeConfig, head: int):
        self.p, self.c, self.head = parameters, config, head
        adaptive = [name for name in config.adaptive_projections if name != "alpha" or config.memory_weight_decay]
        self.places = {name: index for index, name in enumerate(["memory", *adaptive])}
        self.rest = {name: self._maps(name) for name in self.places}
        self.start = {name: list(maps) for name, maps in self.rest.items()}
        self.now = {name: list(maps) for name, maps in self.rest.items()}
        self.momentum = {name: [torch.zeros_like(w) for w in maps] for name, maps in self.rest.items()}
        self.written = {name: [torch.zeros_like(w) for w in maps] for name, maps in self.rest.items()}
        self.seen = 0

    def _of(self, name: str, parameter: str) -> torch.Tensor:
        return self.p[f"memories.{parameter}"][self.head, self.places[name]]

    def _maps(self, name: str) -> Maps:
        return [self._of(name, "w2"), self._of(name, "w1")] if self.c.memory_depth == 2 else [self._of(name, "w")]

    def apply(self, name: str, maps: Maps, a: torch.Tensor) -> torch.Tensor:
        """M(a), Eq. 89: a + gamma * rms(W1 silu(W2 a)); a matrix at depth 1."""
        if len(maps) == 1:
            return maps[0] @ a
        w2, w1 = maps
        return a + self._of(name, "gamma") * rms(w1 @ silu(w2 @ a))

    def _project(self, name: str, u: torch.Tensor) -> torch.Tensor:
        """This head's part of a slow linear map of u, `[D]`."""
        d = self.c.memory_head_dim
        return self.p[f"{name}_proj.weight"].unflatten(0, (-1, d))[self.head] @ u

    def _scalar(self, name: str, u: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        """The sigmoid that makes a rate or a decay, Eq. 87."""
        bias = self.p[f"{name}_proj.bias"][self.head]
        if name in self.places:
            assert z is not None
            read = self.apply(name, self.start[name], z)
            return torch.sigmoid(LOGIT_GAIN * (self.p[f"{name}_proj.weight"][self.head] @ read + bias))
        return torch.sigmoid(LOGIT_GAIN * (self.p[f"{name}_proj.weight"][self.head] @ u + bias))

    def step(self, u: torch.Tensor) -> torch.Tensor:
        """One token: `u`, `[hidden_size]`, to what is read, `[D]`. Eq. 86-88, 90."""
        c = self.c
        z = unit(self._project("z", u)) if set(self.places) & {"k", "v", "eta", "alpha"} else None
        q = unit(self._project("q", u))
        if "q" in self.places:
            q = unit(self.apply("q", self.start["q"], q))
        k = unit(self.apply("k", self.start["k"], z) if "k" in self.places else self._project("k", u))  # type: ignore[arg-type]
        v = self.apply("v", self.start["v"], z) if "v" in self.places else self._project("v", u)  # type: ignore[arg-type]
        b = self._scalar("eta", u, z) * c.memory_max_rate  # type: ignore[operator]
        alpha = self._scalar("alpha", u, z) if c.memory_weight_decay else torch.ones_like(b)
        eta = alpha * b

        weights = self.start if c.memory_read == "chunk" else self.now
        o = self.apply("memory", weights["memory"], q)
        for name in self.places:
            self.write(name, k, v, eta, alpha)
        self.seen += 1
        for name in self.places:
            self.end_chunk(name)
        return o

    def write(self, name: str, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor, alpha: torch.Tensor) -> None:
        """
        W_t = W_rest + (W_{t-1} - W_rest) (alpha I - eta key key^T) - eta g input^T, for each map: Eq. 88, where W_rest is 0.

        g is the gradient at the map's output, at the weights that the chunk started with (Eq. 90); the target (Eq. 84) is
        constant for it.
        """
        c, start = self.c, self.start[name]
        target = self.apply(name, start, v) if c.memory_self_values else v
        with torch.enable_grad():
            inputs, outputs = [k], [_traced(start[0] @ k)]
            read = outputs[0]
            if len(start) == 2:
                inputs.append(silu(outputs[0]))
                outputs.append(_traced(start[1] @ inputs[1]))
                read = k + self._of(name, "gamma") * rms(outputs[1])
            loss = 0.5 * (read - target).square().sum() if c.memory_objective == "l2" else -(read * target).sum()
            # The target depends on the same weights and not on these outputs, so it is constant.
            gradients = torch.autograd.grad(loss, outputs, create_graph=True)
        for i, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
            key = x if i == 0 else unit(x)
            erased = torch.outer(key, key) if c.memory_delta_decay else torch.zeros_like(torch.outer(key, key))
            transition = alpha * torch.eye(len(key), dtype=key.dtype) - eta * erased
            rest = self.rest[name][i] if c.memory_retention == "initial" else torch.zeros_like(self.rest[name][i])
            self.now[name][i] = rest + (self.now[name][i] - rest) @ transition - eta * torch.outer(g, x)
            self.written[name][i] = self.written[name][i] @ transition - eta * torch.outer(g, x)

    def end_chunk(self, name: str) -> None:
        """At a chunk's end S <- mu S + U, and the next chunk starts from W + mu S."""
        size = self.c.memory_chunk_size if name == "memory" else self.c.projection_chunk_size
        if self.seen % size:  # type: ignore[operator]
            return
        if self.c.memory_momentum:
            mu = torch.sigmoid(self._of(name, "momentum"))
            for i, written in enumerate(self.written[name]):
                self.momentum[name][i] = mu * self.momentum[name][i] + written
                self.now[name][i] = self.now[name][i] + mu * self.momentum[name][i]
                self.written[name][i] = torch.zeros_like(written)
        self.start[name] = list(self.now[name])


def _traced(a: torch.Tensor) -> torch.Tensor:
    """Something to take a gradient at, whether or not the parameters ask for one."""
    return a if a.requires_grad else a.detach().requires_grad_()
