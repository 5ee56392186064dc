"""The optimizers against loops written from the equations, what they reduce to, and how they are handled."""

import copy
import functools

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from modeling_hope.optimizers import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    MultiFrequency,
    level_groups,
    make_optimizer,
)
from modeling_hope.optimizers.newton_schulz import newton_schulz

from .conftest import random_ids, tiny_model


EXACT = {"rtol": 1e-10, "atol": 1e-12}
SAME = {"rtol": 0, "atol": 1e-12}
SHAPES = [(3, 5), (7, 4), (3, 5), (6,), (2, 3, 2), ()]
m3 = functools.partial(M3, ns_dtype=torch.float64)
KINDS = {
    "delta_momentum": functools.partial(DeltaMomentum, lr=0.05, weight_decay=0.1),
    "delta_momentum as written": functools.partial(DeltaMomentum, lr=0.05, max_key_norm=None),
    "deep_momentum": functools.partial(DeepMomentum, lr=0.05, hidden_size=4, weight_decay=0.1),
    "m3": functools.partial(m3, lr=0.05, slow_period=3, weight_decay=0.1),
    "m3 as written": functools.partial(m3, lr=0.05, slow_period=3, form="literal"),
    "m3 with nesterov": functools.partial(m3, lr=0.05, nesterov=True, adjust_lr_fn="match_rms_adamw"),
    "several paces": lambda params, **options: MultiFrequency(
        torch.optim.AdamW, [{"params": params[:2], "period": 3}, {"params": params[2:]}], lr=0.05, **options
    ),
}


def parameters(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(params, step, scale=0.3):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p)


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def rows(tensor):
    return tensor.reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.reshape(1, -1)


# The equations, by loops.


def naive_delta_momentum(params, steps, lr, alpha, delta, largest, decay):
    m = [torch.zeros_like(rows(p)) for p in params]
    for step in range(steps):
        give_gradients(params, step)
        for i, p in enumerate(params):
            w, g = rows(p.detach()), rows(p.grad)
            key = g if largest is None or g.norm() <= largest else g / g.norm() * largest
            n = g.shape[1]
            m[i] = (
                m[i] @ (alpha * torch.eye(n, dtype=torch.float64) - delta * sum(torch.outer(row, row) for row in key))
                + g
            )
            p.data = (w * (1 - lr * decay) - lr * m[i]).reshape(p.shape)


def naive_deep_momentum(params, steps, lr, alpha, rate, hidden, decay):
    """The gradient of the inner objective by autograd."""
    memories = []
    for p in params:
        cols = rows(p).shape[1]
        start = torch.randn(hidden, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        memories.append((torch.zeros(cols, hidden, dtype=torch.float64), start, start))

    def read(u, w1, w2):
        return torch.stack([r + r.norm() * w1 @ torch.tanh(w2 @ (r / r.norm())) / hidden**0.5 for r in u])

    for step in range(steps):
        give_gradients(params, step)
        for i, p in enumerate(params):
            u, (w1, w2, start) = rows(p.grad), memories[i]
            w1, w2 = w1.requires_grad_(), w2.detach().clone().requires_grad_()
            loss = -(read(u, w1, w2) * u).sum() / u.square().sum()
            g1, g2 = torch.autograd.grad(loss, (w1, w2))
            w1, w2 = alpha * w1.detach() - rate * g1, start + alpha * (w2.detach() - start) - rate * g2
            memories[i] = w1, w2, start
            p.data = p.data * (1 - lr * decay) - lr * read(u, w1, w2).reshape(p.shape)


def naive_m3(params, steps, lr, betas, alpha, f, eps, form, decay):
    """Algorithm 1 with its two loops."""
    b1, b2, b3 = betas
    zeros = [torch.zeros_like(p.detach()) for p in params]
    m1, m2, v, o2 = ([z.clone() for z in zeros] for _ in range(4))
    past, t = [], 0
    for k in range(steps // f + 1):
        if k:
            for i, p in enumerate(params):
                chunk = sum(g[i] for g in past[-f:])
                m2[i] = m2[i] + b3 * chunk if form == "literal" else b3 * m2[i] + (1 - b3) * chunk / f
                o2[i] = newton_schulz(rows(m2[i]), 5, torch.float64).reshape(p.shape) if p.dim() > 1 else m2[i]
                if p.dim() < 2 and form == "ema":
                    o2[i] = m2[i] / (1 - b3**k)
        for _ in range(f):
            if t == steps:
                return
            t += 1
            give_gradients(params, t - 1)
            past.append([p.grad.clone() for p in params])
            for i, p in enumerate(params):
                g = past[-1][i]
                if form == "literal":
                    m1[i], v[i] = m1[i] + b1 * g, v[i] + b2 * g**2
                    o1, below = m1[i], v[i].sqrt() + eps
                else:
                    m1[i], v[i] = b1 * m1[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g**2
                    vhat = v[i] / (1 - b2**t)
                    s = vhat.mean().sqrt()
                    o1, below = m1[i] / (1 - b1**t) / s, vhat.sqrt() / s + eps
                shape = 1.0
                slow = o2[i] if form == "literal" or p.dim() > 1 else o2[i] / s
                if p.dim() > 1:
                    o1 = newton_schulz(rows(m1[i]), 5, torch.float64).reshape(p.shape)
                    shape = max(1, rows(p).shape[0] / rows(p).shape[1]) ** 0.5
                p.data = p.data * (1 - lr * decay) - lr * shape * (o1 + alpha * slow) / below


@pytest.mark.parametrize("foreach", [False, True])
def test_each_follows_its_equation(foreach):
    def close(ours, naive):
        for a, b in zip(ours, naive, strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), **EXACT)

    for largest in (1.0, None, 0.5):
        ours, naive = parameters(), parameters()
        run(DeltaMomentum(ours, 0.05, 0.8, 0.7, largest, 0.1, foreach=foreach), ours, 7)
        naive_delta_momentum(naive, 7, 0.05, 0.8, 0.7, largest, 0.1)
        close(ours, naive)
    ours, naive = parameters(), parameters()
    run(DeepMomentum(ours, 0.05, 0.8, 0.7, 4, 0.1, foreach=foreach), ours, 7)
    naive_deep_momentum(naive, 7, 0.05, 0.8, 0.7, 4, 0.1)
    close(ours, naive)
    for form in ("ema", "literal"):
        ours, naive = parameters(), parameters()
        run(m3(ours, 0.05, (0.9, 0.8, 0.7), 0.4, 3, 0.2, 0.1, form=form, foreach=foreach), ours, 8)
        naive_m3(naive, 8, 0.05, (0.9, 0.8, 0.7), 0.4, 3, 0.2, form, 0.1)
        close(ours, naive)


def test_at_once_is_what_the_loop_does():
    for name, kind in KINDS.items():
        one, many = parameters(), parameters()
        loop, at_once = run(kind(one, foreach=False), one, 8), run(kind(many, foreach=True), many, 8)
        for a, b in zip(loop, at_once, strict=True):
            torch.testing.assert_close(a, b, **EXACT, msg=name)


# Reductions.


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_m3_without_slow_memory_and_second_moment_is_muon(foreach, nesterov, adjust):
    shapes = [(6, 4), (4, 6), (5, 5), (6, 4)]
    ours, theirs = parameters(shapes=shapes), parameters(shapes=shapes)
    same = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust, "ns_steps": 4}
    found = run(M3(ours, betas=(0.9, None, 0.0), alpha=0.0, foreach=foreach, **same), ours, 20)
    # Of stacked matrices in bfloat16 a product may round differently.
    near = {"rtol": 0, "atol": 0.01} if foreach else SAME
    for a, b in zip(found, run(torch.optim.Muon(theirs, momentum=0.9, **same), theirs, 20), strict=True):
        torch.testing.assert_close(a, b, **near)


def rate_of(step):
    return 1 / (1 + step)


@pytest.mark.parametrize("foreach", [False, True])
def test_without_what_is_new_they_are_what_torch_has(foreach):
    pairs = [
        (functools.partial(DeltaMomentum, momentum=0.8, delta=0.0), functools.partial(torch.optim.SGD, momentum=0.8)),
        (functools.partial(DeepMomentum, memory_lr=0.0), torch.optim.SGD),
    ]
    for maximize in (False, True):
        for ours, theirs in pairs:
            one, other = parameters(), parameters()
            options = {"foreach": foreach, "maximize": maximize}
            first = ours(one, lr=torch.tensor(0.1), **options)
            second = theirs(other, lr=torch.tensor(0.1), **options)
            schedules = LambdaLR(first, rate_of), LambdaLR(second, rate_of)
            for step in range(6):
                for optimizer, params, schedule in zip((first, second), (one, other), schedules, strict=True):
                    run(optimizer, params, 1, step)
                    schedule.step()
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, **SAME)


def test_with_every_period_one_several_paces_are_the_wrapped_optimizer():
    for kind, options in (
        (torch.optim.Adam, {}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
        (DeltaMomentum, {}),
    ):
        one, other = parameters(), parameters()
        wrapped = MultiFrequency(kind, [{"params": one[:3]}, {"params": one[3:], "period": 1}], lr=0.1, **options)
        assert all(map(torch.equal, run(wrapped, one, 5), run(kind(other, lr=0.1, **options), other, 5)))


# Delta gradient descent: the inputs.


def layers(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).to(dtype)


def naive_delta_descent(model, batches, lr, delta, normalize):
    """Eq. 57, token by token; the gradients of `model`, the inputs from its layers one after the other."""
    loss = sum(F.mse_loss(model(x), y) for x, y in batches)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        inputs = {id(p): [] for p in model.parameters()}
        for x, _ in batches:
            for layer in model:
                if isinstance(layer, nn.Linear):
                    inputs[id(layer.weight)] += list(x.reshape(-1, x.shape[-1]))
                x = layer(x)
        for p, g in zip(model.parameters(), gradients, strict=True):
            seen = [x / x.norm() if normalize else x for x in inputs[id(p)]]
            forgotten = sum(torch.outer(p @ x, x) for x in seen) / len(seen) if seen else 0
            p -= lr * (g + delta * forgotten)


def data(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(*shape, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_delta_gradient_descent_follows_its_equation(foreach, normalize):
    """One vector, a batch, sequences, and gradients accumulated over calls of different sizes."""
    for batches in ([data()], [data(6)], [data(2, 3)], [data(2, 3), data(5, seed=1)]):
        ours, naive = layers(), layers()
        optimizer = DeltaGradientDescent(
            ours.parameters(), ours, lr=0.2, delta=0.7, normalize=normalize, foreach=foreach
        )
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in batches:
                F.mse_loss(ours(x), y).backward()
            with torch.no_grad():
                ours(batches[0][0] * 9)  # read only
            optimizer.step()
            naive_delta_descent(naive, batches, 0.2, 0.7, normalize)
        for a, b in zip(ours.parameters(), naive.parameters(), strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_one_input_gives_the_proximal_step():
    """Eq. 56 solved by its normal equations."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    x, y = data()
    x, eta, before = x / x.norm(), 0.7, layer.weight.detach().clone()
    optimizer = DeltaGradientDescent(layer.parameters(), layer, lr=eta / (1 + eta))
    output = layer(x)
    (0.5 * (output - y).square().sum()).backward()
    optimizer.step()
    u = -(output - y).detach()
    expected = (before + eta * torch.outer(u, x)) @ torch.linalg.inv(torch.eye(4) + eta * torch.outer(x, x))
    torch.testing.assert_close(layer.weight.detach(), expected, **EXACT)


def test_without_the_delta_term_delta_gradient_descent_is_sgd():
    one, other = layers(), layers()
    optimizers = (
        DeltaGradientDescent(one.parameters(), one, lr=0.3, delta=0.0),
        torch.optim.SGD(other.parameters(), lr=0.3),
    )
    for model, optimizer in zip((one, other), optimizers, strict=True):
        for step in range(5):
            optimizer.zero_grad()
            x, y = data(6, seed=step)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_only_inputs_that_taught_something_count():
    """Padding, recomputed calls, calls without a backward pass; half precision counts in float32."""

    def after(teach, dtype=torch.float64):
        model = layers(dtype)
        optimizer = DeltaGradientDescent(model.parameters(), model, lr=0.2)
        teach(model, optimizer)
        optimizer.step()
        return [p.detach() for p in model.parameters()]

    x, y = data(4, 3)

    def alone(model, _):
        (model(x).sub(y).square().sum() / 36).backward()

    def padded(model, _):
        more = torch.cat([x, 50 * torch.ones(4, 2, 4)], 1)
        (model(more)[:, :3].sub(y).square().sum() / 36).backward()

    def recomputed(reentrant):
        def teach(model, _):
            given = x.clone().requires_grad_()
            (checkpoint(model, given, use_reentrant=reentrant).sub(y).square().sum() / 36).backward()

        return teach

    def dropped(model, optimizer):
        model(9 * x)
        model(-9 * x).sum().backward()
        optimizer.zero_grad()
        alone(model, optimizer)

    for teach in (padded, recomputed(True), recomputed(False), dropped):
        for a, b in zip(after(teach), after(alone), strict=True):
            torch.testing.assert_close(a, b, **EXACT)

    def half(model, optimizer):
        model(x.bfloat16()).sum().backward()
        assert optimizer.state[model[0].weight]["input_gram"].dtype == torch.float32

    after(half, torch.bfloat16)


def one_of_two(rank, place, found):
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    model = layers()
    optimizer = DeltaGradientDescent(model.parameters(), model, lr=0.2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x, y = data(6)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(wrapped(x[3 * rank : 3 * rank + 3]), y[3 * rank : 3 * rank + 3]).backward()
        optimizer.step()
    found[rank] = [p.detach().tolist() for p in model.parameters()]
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_their_inputs(tmp_path):
    with multiprocessing.Manager() as manager:
        found = manager.dict()
        multiprocessing.spawn(one_of_two, (str(tmp_path / "meet"), found), nprocs=2)
        both = [found[0], found[1]]
    alone = layers()
    for _ in range(2):
        naive_delta_descent(alone, [data(6)], 0.2, 1.0, True)
    assert both[0] == both[1]
    for a, b in zip(both[0], alone.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(a, dtype=torch.float64), b.detach(), **EXACT)


def test_shared_layers_count_together_and_hooks_can_go():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = DeltaGradientDescent(model.parameters(), model, lr=0.1)
    x, _ = data(5)
    model(x).square().sum().backward()
    assert optimizer.state[first.weight]["input_gram"][-1, -1] == 10
    copied = copy.deepcopy(model)
    copied(x).square().sum().backward()
    assert optimizer.state[first.weight]["input_gram"][-1, -1] == 10
    optimizer.step()
    optimizer.zero_grad()
    assert not optimizer.state[first.weight]
    F.linear(x, first.weight).sum().backward()
    before = first.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"`0.weight` has a gradient.*delta=0"):
        optimizer.step()
    assert torch.equal(first.weight, before)
    optimizer.remove_hooks()
    assert not first._forward_hooks and not second._forward_hooks


# Several paces.


def test_each_group_steps_on_its_own_period():
    for reduction, share in (("sum", 1.0), ("mean", 0.25)):
        params, expected = parameters(), parameters()
        groups = [{"params": params[:2], "period": 4}, {"params": params[2:3], "period": 2}, {"params": params[3:]}]
        optimizer = MultiFrequency(torch.optim.SGD(groups, lr=0.1), reduction=reduction)
        slow = torch.optim.SGD(expected[:2], lr=0.1)
        for step in range(9):
            give_gradients(params, step)
            optimizer.step()
            assert all(p.grad is not None for p in params)
            optimizer.zero_grad()
            give_gradients(expected, step)
            if step % 4 == 0:
                sums = [torch.zeros_like(p) for p in expected[:2]]
            for total, p in zip(sums, expected[:2], strict=True):
                total += p.grad
            if step % 4 == 3:
                for total, p in zip(sums, expected[:2], strict=True):
                    p.grad = share * total
                slow.step()
            for a, b in zip(params[:2], expected[:2], strict=True):
                torch.testing.assert_close(a, b, **SAME)


def test_a_wrapped_optimizer_sees_only_its_own_steps():
    """Adam's own count, schedulers, clipping, the scaler, half precision, a closure."""
    params = parameters(dtype=torch.float32, shapes=[(3, 2), (4,)])
    optimizer = MultiFrequency(torch.optim.Adam, [{"params": params[:1], "period": 3}, {"params": params[1:]}], lr=0.1)
    schedule = LambdaLR(optimizer, rate_of)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(7):
        optimizer.zero_grad(set_to_none=bool(step % 2))
        loss = sum((p * (step + 1)).sum() for p in params)
        scaler.scale(loss * (torch.inf if step == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert optimizer.state[params[0]]["step"] == 2 and optimizer.state[params[1]]["step"] == 6
    assert optimizer.param_groups[0]["lr"] == 0.1 * rate_of(7) and optimizer.param_groups[0]["elapsed"] == 0

    half = parameters(dtype=torch.bfloat16, shapes=[(2, 2)])
    optimizer = MultiFrequency(torch.optim.SGD, [{"params": half, "period": 300}], lr=1.0)
    before = half[0].detach().clone()
    for _ in range(300):
        half[0].grad = torch.full_like(half[0], 2.0**-9)
        optimizer.step()
    torch.testing.assert_close(half[0].detach(), before - torch.tensor(300 * 2.0**-9).bfloat16())
    calls = []
    assert optimizer.step(lambda: calls.append(torch.is_grad_enabled()) or 3.0) == 3.0 and calls == [True]


def test_what_the_wrapped_optimizer_refuses_changes_nothing():
    params = parameters()
    groups = [{"params": params[:2], "period": 2}, {"params": params[2:]}]
    optimizer = MultiFrequency(DeltaMomentum, groups, lr=0.1)
    before = run(optimizer, params, 3)
    state = copy.deepcopy(optimizer.state_dict())
    give_gradients(params, 3)
    params[2].grad = params[2].grad.to_sparse()
    with pytest.raises(RuntimeError, match="DeltaMomentum does not support sparse"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and params[2].grad.is_sparse
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_delta_gradient_descent_keeps_its_inputs_for_a_period():
    one, other = layers(), layers()
    groups = [{"params": list(one.parameters()), "period": 2}]
    optimizer = MultiFrequency(DeltaGradientDescent(groups, one, lr=0.2))
    for step in range(4):
        optimizer.zero_grad()
        x, y = data(6, seed=step)
        F.mse_loss(one(x), y).backward()
        optimizer.step()
    for step in (0, 2):
        naive_delta_descent(other, [data(6, seed=step), data(6, seed=step + 1)], 0.2, 1.0, True)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_groups_of_the_levels_of_a_model():
    model = tiny_model(cms_periods=[4, 8, 32, None], cms_learning_rates=[0.7, 0.4, 0.1, 0.0], tie_word_embeddings=True)
    groups = level_groups(model)
    assert [(g["level"], g["period"]) for g in groups] == [(None, 1), (0, 1), (1, 2), (2, 8), (3, 1)]
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    third = {id(p) for layer in model.model.layers for p in layer.cms.level(2).parameters()}
    assert {id(p) for p in groups[3]["params"]} == third
    model.model.layers[0].cms.level(1).requires_grad_(False)
    assert len(level_groups(model, (1, 2, 3, 4))[2]["params"]) * 2 == len(groups[2]["params"])
    with pytest.raises(ValueError, match="one for each of 4 levels"):
        level_groups(model, (1, 2))
    with pytest.raises(ValueError, match="no continuum memory"):
        level_groups(nn.Linear(2, 2))


# What every optimizer has to do.


def saved(optimizer, tmp_path):
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    return torch.load(tmp_path / "optimizer.pt", weights_only=True)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    """In the middle of a slow memory's chunk and of a period."""
    for name, kind in KINDS.items():
        for dtype in (torch.float64, torch.bfloat16):
            params = parameters(dtype=dtype)
            optimizer = kind(params)
            run(optimizer, params, 4)
            others = [nn.Parameter(p.detach().clone()) for p in params]
            other = kind(others)
            other.load_state_dict(saved(optimizer, tmp_path))
            expected, found = run(optimizer, params, 5, 4), run(other, others, 5, 4)
            assert all(map(torch.equal, expected, found)), (name, dtype)
        # As torch does, a state goes to the dtype of the parameters that it is loaded for.
        wide = kind(parameters(dtype=torch.float32))
        wide.load_state_dict(optimizer.state_dict())
        moved = [t for state in wide.state.values() for k, t in state.items() if k != "step"]
        assert moved and all(t.dtype == torch.float32 for t in moved), name
        with pytest.raises(ValueError, match=r"different number of parameter groups|doesn't match"):
            kind(parameters()[:3]).load_state_dict(optimizer.state_dict())


def test_gradients_that_cannot_be_are_refused_before_anything_changed():
    for name, kind in KINDS.items():
        params = parameters()
        optimizer = kind(params)
        before = run(optimizer, params, 2)
        state = copy.deepcopy(optimizer.state_dict())
        give_gradients(params, 2)
        params[1].grad = params[1].grad.to_sparse()
        with pytest.raises(RuntimeError, match="sparse gradients"):
            optimizer.step()
        assert all(map(torch.equal, params, before)), name
        torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
        assert optimizer.state_dict()["param_groups"] == state["param_groups"], name
        calls = []
        give_gradients(params, 2)
        assert optimizer.step(lambda calls=calls: calls.append(torch.is_grad_enabled()) or 1.5) == 1.5
        assert calls == [True]
    for kind in (DeltaMomentum, DeepMomentum, M3):
        param = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="complex parameters"):
            kind([param]).step()


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        (DeltaMomentum, {"lr": -1}, "`lr`"),
        (DeltaMomentum, {"lr": torch.ones(2)}, "`lr`"),
        (DeltaMomentum, {"lr": float("nan")}, "`lr`"),
        (DeltaMomentum, {"momentum": 1.0}, "`momentum`"),
        (DeltaMomentum, {"delta": -0.1}, "`delta`"),
        (DeltaMomentum, {"max_key_norm": -1.0}, "`max_key_norm`"),
        (DeltaMomentum, {"weight_decay": -1.0}, "`weight_decay`"),
        (DeepMomentum, {"hidden_size": 0}, "`hidden_size`"),
        (DeepMomentum, {"memory_lr": -1}, "`memory_lr`"),
        (DeepMomentum, {"seed": 1.5}, "`seed`"),
        (M3, {"betas": (0.9, 0.9)}, "`betas`"),
        (M3, {"betas": (0.9, 1.0, 0.9)}, r"`betas\[1\]`"),
        (M3, {"slow_period": 0}, "`slow_period`"),
        (M3, {"form": "sum"}, "`form`"),
        (M3, {"form": "literal", "nesterov": True}, "`nesterov`"),
        (M3, {"adjust_lr_fn": "none"}, "`adjust_lr_fn`"),
        (M3, {"ns_dtype": torch.int8}, "`ns_dtype`"),
    ],
)
def test_impossible_options_are_named(kind, options, names):
    with pytest.raises(ValueError, match=names):
        kind(parameters(), **options)
    optimizer = kind(parameters())
    with pytest.raises(ValueError, match=names):
        optimizer.add_param_group({"params": parameters(1), **options})
    assert len(optimizer.param_groups) == 1


class Sharded(torch.Tensor):
    """A tensor that is not all there, as DTensor's."""


def test_parts_of_a_parameter_are_refused_where_all_of_it_is_needed():
    layer = nn.Linear(3, 2, bias=False)
    layer.weight = nn.Parameter(torch.ones(2, 3).as_subclass(Sharded))
    with pytest.raises(ValueError, match=r"`0.weight` is sharded"):
        DeltaGradientDescent(layer.parameters(), nn.Sequential(layer))
    layer.weight.grad = torch.ones(2, 3).as_subclass(Sharded)
    with pytest.raises(ValueError, match="some are sharded"):
        DeepMomentum(layer.parameters()).step()
    for kind in (DeltaMomentum, M3):
        kind(layer.parameters()).step()


def test_impossible_wrappings_are_named():
    params = parameters()
    for arguments, options, names in (
        ((torch.optim.SGD,), {}, "`params` is missing"),
        ((torch.optim.SGD(params), params), {}, "an optimizer's class"),
        ((torch.optim.SGD, params), {"reduction": "max"}, "`reduction`"),
        ((torch.optim.SGD, [{"params": params, "period": 0}]), {}, "`period`"),
        ((torch.optim.SGD, [{"params": params, "period": 1.5}]), {}, "`period`"),
        ((torch.optim.LBFGS, params), {}, "LBFGS evaluates the loss itself"),
    ):
        with pytest.raises(ValueError, match=names):
            MultiFrequency(*arguments, **options)
    optimizer = MultiFrequency(torch.optim.SGD, params[:1], lr=0.5)
    optimizer.add_param_group({"params": params[1:2], "period": 2})
    assert [(g["period"], g["lr"]) for g in optimizer.param_groups] == [(1, 0.5), (2, 0.5)]
    with pytest.raises(ValueError, match="`period`"):
        optimizer.add_param_group({"params": params[2:3], "period": -1})
    with pytest.raises(ValueError, match=r"no nn.Linear layer"):
        DeltaGradientDescent(params, layers())


NAMES = ("sgd", "adamw", "delta_gradient_descent", "delta_momentum", "deep_momentum", "m3")


def train(tmp_path, name, periods, resume=None, **fields):
    """Five steps with a schedule, clipping and accumulation: the losses, and the weights."""
    rate = {"sgd": 0.3, "delta_gradient_descent": 0.3, "delta_momentum": 0.1, "deep_momentum": 0.1}.get(name, 0.01)
    model = tiny_model(dtype=torch.float32, **fields).train()
    optimizer = make_optimizer(name, model, periods=periods, lr=rate, weight_decay=0.01)
    arguments = TrainingArguments(
        tmp_path, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, logging_steps=1, save_strategy="steps", save_steps=3, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in random_ids(16, 12)]
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, LambdaLR(optimizer, rate_of)))
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("name", "periods"), [*((name, "config") for name in NAMES), ("m3", None)])
def test_trainer_takes_each_and_resumes(tmp_path, name, periods):
    """By its name, the levels at one pace or at their own; resumed in the middle of a period and of a slow memory."""
    losses, weights = train(tmp_path, name, periods)
    assert losses[-1] < losses[0]
    resumed, again = train(tmp_path, name, periods, str(tmp_path / "checkpoint-3"))
    assert resumed == losses and all(map(torch.equal, weights, again))


def test_trainer_takes_them_while_levels_learn(tmp_path):
    """Whose layers are called by passes of their own."""
    fields = {
        "layer_types": ["hope_memory", "full_attention"],
        "num_memory_heads": 2,
        "memory_chunk_size": 3,
        "projection_chunk_size": 6,
    }
    name = "delta_gradient_descent"
    losses, _ = train(tmp_path, name, "config", cms_training="first_order", sliding_window=None, **fields)
    assert losses[-1] < losses[0]


def test_by_name():
    model = tiny_model()
    optimizer = make_optimizer("m3", model, lr=0.01, weight_decay=0.1, betas=(0.9, None, 0.9))
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert set(held) == {id(p) for p in model.parameters()}
    assert held[id(model.model.embed_tokens.weight)]["ns_steps"] == held[id(model.lm_head.weight)]["ns_steps"] == 0
    assert held[id(model.model.norm.weight)]["weight_decay"] == 0
    inside = held[id(model.model.layers[0].cms.level(0).up_proj.weight)]
    assert inside["ns_steps"] == 5 and inside["weight_decay"] == 0.1
    mixer = tiny_model(num_hidden_layers=1, layer_types=["hope_memory"], sliding_window=None).model.layers[0].mixer
    held = {id(p): g for g in make_optimizer("m3", mixer, lr=0.01, weight_decay=0.1).param_groups for p in g["params"]}
    parts = [held[id(getattr(mixer.memories, name))] for name in ("w1", "gamma", "momentum")]
    assert [(group["weight_decay"], group.get("ns_steps")) for group in parts] == [(0.1, 5), (0, 0), (0, 0)]
    paces = make_optimizer("adamw", model, periods=[1, 2, 3], reduction="mean")
    assert isinstance(paces, MultiFrequency) and {g["period"] for g in paces.param_groups} == {1, 2, 3}
    for arguments, names in (
        ({"name": "adam"}, "'adamw', 'sgd'"),
        ({"name": "m3", "learning_rate": 0.1}, "no option `learning_rate`.*lr"),
        ({"name": "m3", "reduction": "sum"}, "no option `reduction`"),
        ({"name": "m3", "periods": [1]}, "`periods`"),
    ):
        with pytest.raises(ValueError, match=names):
            make_optimizer(model=model, **arguments)


# What they do.


def test_what_is_written_of_momentum_holds():
    """Eq. 49 to the letter overflows on gradients that the bounded key does not mind."""

    def norm(largest):
        x = nn.Parameter(torch.full((8,), 3.0, dtype=torch.float64))
        optimizer = DeltaMomentum([x], lr=0.05, max_key_norm=largest)
        for _ in range(200):
            x.grad = x.detach().clone()
            optimizer.step()
        return float(x.detach().norm())

    assert not norm(None) < 1e6 and norm(1.0) < 1e-2


def test_delta_gradient_descent_on_correlated_inputs():
    """
    A stream of keys along nearly one line, taught their values by a dot product, one after the other: gradient descent
    adds up without end, and keys disturb each other; Eq. 57 comes to the map that gives each its value. On a loss of
    its own minimum, the decay regularises.
    """
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(6, generator=generator, dtype=torch.float64)
    x = F.normalize(line + 0.7 * torch.randn(32, 6, generator=generator, dtype=torch.float64), dim=1)
    assert (x @ x.T).mean() > 0.7
    true = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    v = x @ true.T

    def train(kind, steps, loss, batch):
        layer = nn.Linear(6, 3, bias=False).double()
        optimizer = kind(layer)
        for step in range(steps):
            optimizer.zero_grad()
            rows = slice(None) if batch else [step % 32]
            loss(layer(x[rows]), v[rows]).backward()
            optimizer.step()
        return layer.weight.detach()

    def dot(y, v):
        return -(y * v).sum(-1).mean()

    def squared(y, v):
        return 0.5 * (y - v).square().sum(-1).mean()

    def delta(layer):
        return DeltaGradientDescent(layer.parameters(), layer, lr=0.9)

    def plain(layer):
        return torch.optim.SGD(layer.parameters(), lr=0.9)

    found = train(delta, 640, dot, batch=False)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
    grown = [train(plain, steps, dot, batch=False).norm() for steps in (160, 320)]
    assert grown[1] > 1.9 * grown[0] > 10 * true.norm()
    torch.testing.assert_close(train(delta, 500, squared, batch=True), true / 2, rtol=1e-3, atol=1e-3)


def test_averages_stay_bounded_where_sums_grow():
    """2,000 steps on a noisy quadratic: M3 as written has sums that grow with the steps, its averages do not."""

    def train(form, steps):
        torch.manual_seed(0)
        w = nn.Parameter(torch.zeros(6, 4))
        target = torch.randn(6, 4)
        optimizer = M3([w], lr=0.01, form=form, ns_dtype=torch.float32)
        sizes, distances = [], []
        for _ in range(steps):
            w.grad = w.detach() - target + 0.5 * torch.randn(6, 4) + 1.0
            optimizer.step()
            sizes.append(float(optimizer.state[w]["second_moment"].mean()))
            distances.append(float((w.detach() - target + 1.0).norm()))
        return sizes, distances

    sizes, distances = train("ema", 2000)
    assert max(sizes) < 10 * sizes[0] + 10 and max(distances[1000:]) < 1.0
    whole, small = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    for params, scale in ((whole, 1.0), (small, 1e-4)):
        optimizer = M3(params, lr=0.05, ns_dtype=torch.float32)
        for step in range(15):
            give_gradients(params, step, scale)
            optimizer.step()
    for a, b in zip(whole, small, strict=True):  # its step does not depend on the loss's scale
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    sizes, distances = train("literal", 1000)
    assert sizes[-1] > 100 * sizes[0] and sizes[-1] > 1.9 * sizes[499]
    assert distances[499] - distances[999] < 0.7 * (distances[0] - distances[499])
