"""
The operations of a chunk with their backward passes derived by hand; `memory_rule.py` and `delta_rule.py` say in
plain torch what they compute, and are what a gradient of a gradient is taken of.

Autograd would keep and read again every intermediate. Here each pass keeps what its backward needs, and works in place.
A compiler chooses by itself what to keep and what to fuse, and is handed the plain operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from .delta_rule import Chunk, Decay, Write, in_full, inverse
from .delta_rule import delta_chunk as plain_delta_chunk
from .memory_rule import SMALLEST, Inner, Maps, Rule, toward
from .memory_rule import go_on as plain_go_on
from .memory_rule import inner_gradients as plain_inner_gradients
from .memory_rule import read as plain_read
from .memory_rule import read_within as plain_read_within
from .memory_rule import unit as plain_unit


F = TypeVar("F", bound=Callable[..., Any])


def twin_of(plain: F) -> Callable[[F], F]:
    """An operation that stands in for `plain`, except in a compiled graph."""

    def decorate(fused: F) -> F:
        @wraps(fused)
        def chosen(*args: Any) -> Any:
            return plain(*args) if torch.compiler.is_compiling() else fused(*args)

        return chosen  # type: ignore[return-value]

    return decorate


class _WithPlainTwin(torch.autograd.Function):
    """An operation whose backward, where it has to be differentiable itself, is that of its plain twin."""

    @staticmethod
    def again(
        plain: Callable[..., tuple[torch.Tensor | None, ...]],
        inputs: tuple[torch.Tensor | None, ...],
        wanted: tuple[bool, ...],
        gradients: tuple[torch.Tensor | None, ...],
    ) -> list[torch.Tensor | None]:
        """The gradients of `plain` at its inputs, with a graph of their own."""
        # One input may have been made of another: as views of themselves, none of them is on another's path.
        inputs = tuple(x if x is None else x.view_as(x) for x in inputs)
        with torch.enable_grad():
            given = [
                (out, g) for out, g in zip(plain(*inputs), gradients, strict=True) if out is not None and g is not None
            ]
            chosen = [x for x, want in zip(inputs, wanted, strict=True) if want]
            outputs, weights = zip(*given, strict=True)
            found = iter(torch.autograd.grad(outputs, chosen, weights, create_graph=True, allow_unused=True))  # type: ignore[arg-type]
        return [next(found) if want else None for want in wanted]


@twin_of(plain_unit)
def unit(a: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """`memory_rule.unit`."""
    return _Unit.apply(a, dim)


class _Unit(_WithPlainTwin):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, dim: int) -> torch.Tensor:
        norm = torch.linalg.vector_norm(a, dim=dim, keepdim=True).clamp_(min=SMALLEST)
        normed = a / norm
        ctx.dim = dim
        ctx.save_for_backward(a, norm, normed)
        return normed

    @staticmethod
    @in_full
    def backward(ctx: Any, d_normed: torch.Tensor) -> Any:
        a, norm, normed = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_WithPlainTwin.again(lambda a: (plain_unit(a, ctx.dim),), (a,), (True,), (d_normed,)), None
        along = (d_normed * normed).sum(ctx.dim, keepdim=True).masked_fill_(norm <= SMALLEST, 0.0)
        return torch.addcmul(d_normed, normed, along, value=-1).div_(norm), None


@twin_of(plain_read)
def read(maps: Maps, gamma: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """`memory_rule.read`."""
    if gamma is None:
        return plain_read(maps, gamma, inputs)
    return _Read.apply(*maps, gamma, inputs)


class _Read(_WithPlainTwin):
    @staticmethod
    def forward(ctx: Any, w2: torch.Tensor, w1: torch.Tensor, gamma: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        _, _, hidden, rise, _, scale, normed = _through(w2, w1, a)
        ctx.save_for_backward(w2, w1, gamma, a, hidden, rise, scale, normed)
        return torch.addcmul(a[:, None], gamma, normed)

    @staticmethod
    @in_full
    def backward(ctx: Any, d_read: torch.Tensor) -> Any:
        w2, w1, gamma, a, hidden, rise, scale, normed = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(
                _WithPlainTwin.again(
                    lambda w2, w1, gamma, a: (plain_read((w2, w1), gamma, a),),
                    (w2, w1, gamma, a),
                    ctx.needs_input_grad,
                    (d_read,),
                )
            )
        d_gamma = (d_read * normed).sum(-1, keepdim=True)
        d_out = _rms_backward(gamma * d_read, normed, scale)
        d_w1 = d_out @ hidden.mT
        d_before = (w1.mT @ d_out).mul_(rise)
        d_w2, d_a = _first_backward(d_before, w2, a)
        return d_w2, d_w1, d_gamma, d_a.add_(d_read.sum(1))


def _through(w2: torch.Tensor, w1: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x = W2 a, s = sigmoid(x), silu(x) = x s, silu'(x), W1 silu(x), the scale 1 / rms of that, and it times the scale."""
    x = torch.bmm(w2[:, 0], a).unflatten(1, (w1.shape[1], -1))
    s = torch.sigmoid(x)
    hidden = x * s
    rise = _rise(hidden, s)
    out = w1 @ hidden
    scale = _inverse_rms(out)
    return x, s, hidden, rise, out, scale, out * scale


def _rise(hidden: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """silu'(x), of silu(x) and sigmoid(x)."""
    return torch.addcmul(hidden, hidden, s, value=-1).add_(s)


def _inverse_rms(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean(-2, keepdim=True).add_(SMALLEST).rsqrt_()


def _rms_backward(d_normed: torch.Tensor, normed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Through y * scale, scale = (mean(y^2) + eps)^-1/2; may write into `d_normed`."""
    along = (d_normed * normed).mean(-2, keepdim=True)
    return d_normed.addcmul_(normed, along, value=-1).mul_(scale)


def _first_backward(d_before: torch.Tensor, w2: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Through W2 a, for W2 `[G, 1, X m, D]` and `a` `[G, D, C]`."""
    d_rows = d_before.flatten(1, 2)
    return torch.bmm(d_rows, a.mT)[:, None], torch.bmm(w2[:, 0].mT, d_rows)


@twin_of(plain_inner_gradients)
def inner_gradients(maps: Maps, gamma: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> Inner:
    """`memory_rule.inner_gradients`."""
    if gamma is None:
        return plain_inner_gradients(maps, gamma, k, v, rule)
    target = read(maps, gamma, v) if rule.self_values else v[:, None]
    hidden, square, at_hidden, at_out, recalled, recalled_out = _Inner.apply(*maps, gamma, k, target, rule.objective)
    return Inner((k[:, None], hidden), (at_hidden, at_out), (recalled, recalled_out), (None, square))


class _Inner(_WithPlainTwin):
    @staticmethod
    def forward(
        ctx: Any,
        w2: torch.Tensor,
        w1: torch.Tensor,
        gamma: torch.Tensor,
        k: torch.Tensor,
        target: torch.Tensor,
        objective: str,
    ) -> tuple[torch.Tensor, ...]:
        x, s, hidden, rise, out, scale, normed = _through(w2, w1, k)
        if objective == "l2":
            error = torch.addcmul(k[:, None], gamma, normed).sub_(target)
        else:
            error = -target.expand_as(normed)
        at_out = gamma * error
        along = (normed * at_out).mean(-2, keepdim=True)
        at_out.addcmul_(normed, along, value=-1).mul_(scale)
        back = w1.mT @ at_out
        at_hidden = back * rise
        ctx.objective = objective
        ctx.save_for_backward(w2, w1, gamma, k, target, s, hidden, rise, scale, normed, error, along, at_out, back)
        square = hidden.square().sum(-2, keepdim=True)
        return hidden, square, at_hidden.flatten(1, 2)[:, None], at_out, x.flatten(1, 2)[:, None], out

    @staticmethod
    @in_full
    def backward(ctx: Any, *d: torch.Tensor) -> Any:
        w2, w1, gamma, k, target, s, hidden, rise, scale, normed, error, along, at_out, back = ctx.saved_tensors
        l2 = ctx.objective == "l2"
        if torch.is_grad_enabled():

            def plain(*inputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
                w2, w1, gamma, k, target = inputs
                inner = toward((w2, w1), gamma, k, target, ctx.objective)
                return inner.keys[1], inner.squares[1], *inner.gradients, *inner.recalled

            return *_WithPlainTwin.again(plain, (w2, w1, gamma, k, target), ctx.needs_input_grad[:5], d), None
        d_hidden, d_square, d_at_hidden, d_at_out, d_recalled, d_recalled_out = d
        d_at_hidden = d_at_hidden.reshape(back.shape)

        # at_hidden = (W1^T at_out) silu'(x); silu'' = s + silu' - 2 s silu'
        d_x = torch.addcmul(rise, rise, s, value=-2).add_(s).mul_(back).mul_(d_at_hidden)
        d_x.add_(d_recalled.reshape(back.shape))
        d_back = d_at_hidden * rise
        d_w1 = at_out @ d_back.mT
        d_at_out = (w1 @ d_back).add_(d_at_out)

        # at_out = (slope - n along) scale, slope = gamma error, along = mean(n slope)
        d_scale = (d_at_out * at_out).sum(-2, keepdim=True)  # times the scale
        d_slope = d_at_out.mul_(scale)
        d_along = (d_slope * normed).mean(-2, keepdim=True)
        d_normed = (error * gamma).mul_(d_along).addcmul_(d_slope, along).neg_()
        d_slope.addcmul_(normed, d_along, value=-1)
        d_gamma = (d_slope * error).sum(-1, keepdim=True)
        d_error = d_slope.mul_(gamma)

        # error = k + gamma n - target, or without what is not the target
        d_k = d_error.sum(1) if l2 else torch.zeros_like(k)
        if l2:
            d_gamma += (d_error * normed).sum(-1, keepdim=True)
            d_normed.addcmul_(d_error, gamma)
        d_target = d_error.neg_()
        if target.shape[1] < d_target.shape[1]:
            d_target = d_target.sum(1, keepdim=True)

        # n = out scale, scale = (mean(out^2) + eps)^-1/2
        d_out = _rms_backward(d_normed, normed, scale)
        d_out.addcmul_(normed, d_scale * scale, value=-1.0 / k.shape[-2]).add_(d_recalled_out)
        d_w1 += d_out @ hidden.mT
        d_hidden = (w1.mT @ d_out).add_(d_hidden).addcmul_(hidden, d_square, value=2)
        d_w2, d_a = _first_backward(d_hidden.mul_(rise).add_(d_x), w2, k)
        return d_w2, d_w1, d_gamma, d_k.add_(d_a), d_target, None


@twin_of(plain_delta_chunk)
def delta_chunk(chunk: Chunk) -> Write:
    """`delta_rule.delta_chunk`; fused where there is a delta term, a whole chunk, and no sum from parts before it."""
    if chunk.erasing is None or not chunk.ends or chunk.sums is not None:
        return plain_delta_chunk(chunk)
    return Write(*_Delta.apply(*chunk[:7], *chunk.decay, chunk.momentum, chunk.tokens))


class _Delta(_WithPlainTwin):
    @staticmethod
    def forward(
        ctx: Any,
        state: torch.Tensor,
        rest: torch.Tensor | None,
        keys: torch.Tensor,
        gradients: torch.Tensor,
        recalled: torch.Tensor,
        rates: torch.Tensor,
        erasing: torch.Tensor,
        between: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        whole: torch.Tensor,
        momentum: bool,
        tokens: int,
    ) -> tuple[torch.Tensor | None, ...]:
        driven = gradients * rates
        changed = recalled if rest is None else recalled - rest @ keys
        erased = before * changed
        inputs = torch.addcmul(driven, erased, erasing)
        gram = keys.mT @ keys
        inverted = inverse((gram * between).mul_(erasing))
        carried = inverted @ (keys * after).mT
        base = whole * state if rest is None else torch.lerp(rest, state, whole)
        end = _flat(base).baddbmm_(_flat(inputs), _flat(carried), alpha=-1).view_as(base)
        sums = (driven @ carried).neg_() if momentum else None
        own = inputs[:, :1, :tokens] @ inverted[:, :1] if tokens else None
        ctx.momentum, ctx.tokens = momentum, tokens
        ctx.save_for_backward(
            state, rest, keys, gradients, recalled, rates, erasing, between, before, after, whole,
            changed, driven, inputs, erased, gram, inverted, carried, own,
        )  # fmt: skip
        return end, sums, own

    @staticmethod
    @in_full
    def backward(ctx: Any, d_end: torch.Tensor, d_sums: torch.Tensor | None, d_own: torch.Tensor | None) -> Any:
        (
            state, rest, keys, gradients, recalled, rates, erasing, between, before, after, whole,
            changed, driven, inputs, erased, gram, inverted, carried, own,
        ) = ctx.saved_tensors  # fmt: skip
        if torch.is_grad_enabled():

            def plain(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
                own, decay = tensors[:7], Decay(*tensors[7:])  # type: ignore[arg-type]
                return plain_delta_chunk(Chunk(*own, decay, True, ctx.momentum, None, ctx.tokens))  # type: ignore[arg-type, call-arg]

            given = (state, rest, keys, gradients, recalled, rates, erasing, between, before, after, whole)
            found = _WithPlainTwin.again(plain, given, ctx.needs_input_grad[:11], (d_end, d_sums, d_own))
            return *found, None, None
        carried_t = carried.mT
        d_inputs = (d_end @ carried_t).neg_()
        d_carried = inputs.mT @ d_end
        d_own_inputs = None
        if d_own is not None:
            d_own_inputs = d_own @ inverted[:, :1].mT
            d_inputs[:, :1, : ctx.tokens] += d_own_inputs
        d_driven = d_inputs
        if d_sums is not None:
            d_driven = torch.baddbmm(_flat(d_inputs), _flat(d_sums), _flat(carried_t), alpha=-1).view_as(d_inputs)
            _flat(d_carried).baddbmm_(_flat(driven.mT), _flat(d_sums))

        # carried = (I + A)^-1 late, A = gram between erasing
        d_late = (inverted.mT @ d_carried).neg_()
        d_coupled = (d_late @ carried_t).neg_()
        if d_own_inputs is not None:
            d_coupled[:, :1] -= own.mT @ d_own_inputs
        d_keys = d_late.mT * after
        d_after = (d_late.mT * keys).sum((1, 2), keepdim=True)
        d_decayed = d_coupled * gram
        d_erasing = (d_decayed * between).sum(2, keepdim=True)
        d_between = (d_decayed.mul_(erasing)).sum(1, keepdim=True)
        d_gram = d_coupled.mul_(between).mul_(erasing)
        d_keys += keys @ (d_gram + d_gram.mT)

        d_rates = (d_driven * gradients).sum((1, 2), keepdim=True)
        d_gradients = d_driven * rates
        d_erasing += (d_inputs * erased).sum(2, keepdim=True)
        d_erased = d_inputs.mul_(erasing)
        d_before = (d_erased * changed).sum((1, 2), keepdim=True)
        d_recalled = d_erased.mul_(before)
        d_state = whole * d_end
        if rest is None:
            d_rest = None
            d_whole = (d_end * state).sum((1, 2, 3), keepdim=True)
        else:
            d_whole = (d_end * (state - rest)).sum((1, 2, 3), keepdim=True)
            d_rest = _flat(d_end - d_state).baddbmm_(_flat(d_recalled), _flat(keys.mT), alpha=-1).view_as(d_end)
            d_keys -= rest.mT @ d_recalled
        if erasing.shape[1] < d_erasing.shape[1]:
            d_erasing = d_erasing.sum(1, keepdim=True)
        return (
            d_state, d_rest, d_keys, d_gradients, d_recalled, d_rates, d_erasing,
            d_between, d_before, d_after, d_whole, None, None,
        )  # fmt: skip


@twin_of(plain_go_on)
def go_on(
    now: torch.Tensor, sums: torch.Tensor, momentum: torch.Tensor, mu: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`memory_rule.go_on`."""
    return _GoOn.apply(now, sums, momentum, mu)


class _GoOn(torch.autograd.Function):
    """Its backward is differentiable as it is."""

    @staticmethod
    def forward(
        ctx: Any, now: torch.Tensor, sums: torch.Tensor, momentum: torch.Tensor, mu: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ahead, moved = plain_go_on(now, sums, momentum, mu)
        ctx.save_for_backward(momentum, mu, moved)
        return ahead, moved

    @staticmethod
    @in_full
    def backward(ctx: Any, d_ahead: torch.Tensor, d_moved: torch.Tensor) -> Any:
        momentum, mu, moved = ctx.saved_tensors
        d_sums = torch.addcmul(d_moved, mu, d_ahead)
        d_mu = torch.addcmul(d_ahead * moved, d_sums, momentum).sum(-1, keepdim=True)
        return d_ahead, d_sums, d_sums * mu, d_mu


@twin_of(plain_read_within)
def read_within(
    maps: Maps,
    rest: Maps | None,
    gamma: torch.Tensor | None,
    q: torch.Tensor,
    keys: Maps,
    tokens: Maps,
    decay: Decay,
) -> torch.Tensor:
    """`memory_rule.read_within`; fused for deep memories with somewhere to rest."""
    if gamma is None or rest is None:
        return plain_read_within(maps, rest, gamma, q, keys, tokens, decay)
    flat = (_flat(tensor) for tensor in (*maps, *rest, gamma, *keys, *tokens))
    return _ReadWithin.apply(q, *flat, _flat(decay.between), _flat(decay.before))


class _ReadWithin(_WithPlainTwin):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        w2: torch.Tensor,
        w1: torch.Tensor,
        rest2: torch.Tensor,
        rest1: torch.Tensor,
        gamma: torch.Tensor,
        k2: torch.Tensor,
        k1: torch.Tensor,
        u2: torch.Tensor,
        u1: torch.Tensor,
        between: torch.Tensor,
        before: torch.Tensor,
    ) -> torch.Tensor:
        x, *first = _recall(w2, rest2, q, k2, u2, between, before)
        s = torch.sigmoid(x)
        hidden = x * s
        out, *second = _recall(w1, rest1, hidden, k1, u1, between, before)
        scale = _inverse_rms(out)
        normed = out.mul_(scale)
        ctx.save_for_backward(
            q, w2, w1, rest2, rest1, gamma, k2, k1, u2, u1, between, before, s, hidden, scale, normed, *first, *second
        )
        return torch.addcmul(q, gamma, normed)

    @staticmethod
    @in_full
    def backward(ctx: Any, d_read: torch.Tensor) -> Any:
        # Checkpointing hands out what was saved only once.
        saved = ctx.saved_tensors
        inputs, rest = saved[:12], saved[12:]
        if torch.is_grad_enabled():

            def plain(*tensors: torch.Tensor) -> tuple[torch.Tensor]:
                q, *others, between, before = tensors
                w2, w1, rest2, rest1, gamma, k2, k1, u2, u1 = (tensor[:, None] for tensor in others)
                decay = Decay(between[:, None], before[:, None], before, before)
                return (plain_read_within((w2, w1), (rest2, rest1), gamma, q, (k2, k1), (u2, u1), decay),)

            return tuple(_WithPlainTwin.again(plain, inputs, ctx.needs_input_grad, (d_read,)))
        q, w2, w1, rest2, rest1, gamma, k2, k1, u2, u1, between, before = inputs
        s, hidden, scale, normed, match2, apart2, match1, apart1 = rest
        d_gamma = (d_read * normed).sum(-1, keepdim=True)
        d_out = _rms_backward(gamma * d_read, normed, scale)
        second = _recall_backward(d_out, w1, rest1, hidden, k1, u1, between, before, match1, apart1)
        d_w1, d_rest1, d_hidden, d_k1, d_u1, d_between, d_before = second
        d_x = d_hidden.mul_(_rise(hidden, s))
        first = _recall_backward(d_x, w2, rest2, q, k2, u2, between, before, match2, apart2)
        d_w2, d_rest2, d_q, d_k2, d_u2, d_between2, d_before2 = first
        return (
            d_q.add_(d_read), d_w2, d_w1, d_rest2, d_rest1, d_gamma, d_k2, d_k1, d_u2, d_u1,
            d_between.add_(d_between2), d_before.add_(d_before2),
        )  # fmt: skip


def _recall(
    state: torch.Tensor,
    rest: torch.Tensor,
    x: torch.Tensor,
    keys: torch.Tensor,
    u: torch.Tensor,
    between: torch.Tensor,
    before: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """W_{t-1} x_t, and for the backward <k_s, x_t> and (W_0 - R) x_t."""
    stay = torch.bmm(rest, x)
    apart = torch.bmm(state, x).sub_(stay)
    match = torch.bmm(keys.mT, x)
    return stay.addcmul_(before, apart).baddbmm_(u, match * between, alpha=-1), match, apart


def _recall_backward(
    d: torch.Tensor,
    state: torch.Tensor,
    rest: torch.Tensor,
    x: torch.Tensor,
    keys: torch.Tensor,
    u: torch.Tensor,
    between: torch.Tensor,
    before: torch.Tensor,
    match: torch.Tensor,
    apart: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Of W_0, R, x, keys, u, between and before."""
    d_u = torch.bmm(d, (match * between).mT).neg_()
    d_decayed = torch.bmm(u.mT, d).neg_()
    d_between = d_decayed * match
    d_match = d_decayed.mul_(between)
    d_start = d * before
    d_stay = d - d_start
    d_x = torch.bmm(state.mT, d_start).baddbmm_(rest.mT, d_stay).baddbmm_(keys, d_match)
    d_before = (d * apart).sum(1, keepdim=True)
    return torch.bmm(d_start, x.mT), torch.bmm(d_stay, x.mT), d_x, torch.bmm(x, d_match.mT), d_u, d_between, d_before


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(0, 1)
