"""The self-modifying memory: against its slow reference, against the published models it contains, and its gradients."""

import pytest
import torch
from torch.nn.functional import conv1d, normalize, pad, silu

from modeling_hope import HopeConfig, HopeForCausalLM, delta_rule, fused_memory, memory_rule
from modeling_hope.delta_rule import Chunk, decay_of
from modeling_hope.key_layout import Span
from modeling_hope.memory_reference import SlowMemory
from modeling_hope.memory_rule import Rule
from modeling_hope.self_modifying_memory import SelfModifyingMemory

from .conftest import MEMORY, random_ids, tiny_model


WIDTH, HEADS, D, HIDDEN = 12, 2, 6, 5
KINDS = ("now", "start", "momentum", "written")


def memory_config(**fields):
    sizes = {"vocab_size": 10, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    return HopeConfig(**{**sizes, "memory_head_dim": D, "memory_hidden_size": HIDDEN, **fields})


def mixer_of(seed=0, **fields):
    """A mixer with weights large enough for every write to show."""
    torch.manual_seed(seed)
    fields = {"projection_chunk_size": fields.get("memory_chunk_size", 16), **fields}
    mixer = SelfModifyingMemory(memory_config(**fields), 0).double()
    for name, parameter in mixer.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name == "output_norm.weight"), std=0.5)
    return mixer


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(mixer, x, state=None, begin=None, lengths=None):
    """Output and new state of rows `x`, `[batch, width, hidden_size]`."""
    batch, width = x.shape[:2]
    span = Span(begin or [0] * batch, lengths or [width] * batch, width, x.device)
    out, state, _ = mixer(x, state, span, None, True)
    return out, state


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def assert_same(found, expected, what="", tolerance=1e-9):
    """Up to rounding, and relative to the largest element."""
    scale = 1 + expected.detach().abs().amax().item() if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}")


# --- against the reference


def fast_weights(mixer, state):
    """What a state holds of its first row, by kind, head, memory and map, as `SlowHead` has it."""
    found = {}
    for name, group in mixer.groups.items():
        members = ["memory", *mixer.adaptive][group.memories]
        for kind in KINDS:
            for i, map_name in enumerate(mixer.memories.map_names):
                if f"{name}.{kind}.{map_name}" not in state.tensors:
                    continue
                for head, maps in enumerate(state.tensors[f"{name}.{kind}.{map_name}"][0]):
                    each = maps if i else maps[0].unflatten(0, (len(members), -1))
                    found |= {(kind, head, m, i): weights for m, weights in zip(members, each, strict=True)}
    return found


def slow_weights(slow):
    return {
        (kind, index, name, i): weights
        for kind in KINDS
        for index, head in enumerate(slow.heads)
        for name, maps in getattr(head, kind).items()
        for i, weights in enumerate(maps)
    }


def assert_is_the_reference(mixer, x):
    """Outputs, the state, and gradients of every parameter through both; `x` `[length, hidden_size]`."""
    length, boundary = len(x), len(x) - len(x) % mixer.chunk_size
    parameters = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    slow, outputs = SlowMemory(parameters, mixer.config), []
    kept = slow_weights(slow)
    for t in range(length):
        outputs.append(slow.step(x[t]))
        if t + 1 == boundary:
            kept = slow_weights(slow)
    expected = torch.stack(outputs)
    out, state = read(mixer, x[None])
    assert_same(out[0], expected, "output")
    assert_same(state.tensors["conv"][0], torch.stack(slow.past), "conv")
    weights = fast_weights(mixer, state)
    assert all(place in weights for place in kept if place[0] == "now")
    for place, found in weights.items():
        assert_same(found, kept[place], place)
    probe = noise(*expected.shape, seed=2)
    loss = (out[0] * probe).sum() + sum(found.square().sum() for found in weights.values())
    slow_loss = (expected * probe).sum() + sum(kept[place].square().sum() for place in weights)
    both = zip(gradients(loss, list(mixer.parameters())), gradients(slow_loss, list(parameters.values())), strict=True)
    for name, (found, wanted) in zip(parameters, both, strict=True):
        assert wanted.any(), name
        assert_same(found, wanted, name)


CHUNKS = {
    "1": (8, {"memory_chunk_size": 1}),
    "8": (21, {"memory_chunk_size": 8}),
    "16": (37, {"memory_chunk_size": 16, "num_memory_heads": 1, "adaptive_projections": ("v", "alpha")}),
    "64": (70, {"memory_chunk_size": 64, "num_memory_heads": 1, "adaptive_projections": ("k", "eta")}),
    "1 and 8": (19, {"memory_chunk_size": 1, "projection_chunk_size": 8}),
    "4 and 8": (21, {"memory_chunk_size": 4, "projection_chunk_size": 8}),
    "8 and 4": (21, {"memory_chunk_size": 8, "projection_chunk_size": 4}),
    "16 and 8": (37, {"memory_chunk_size": 16, "projection_chunk_size": 8, "num_memory_heads": 1}),
    "4 and 1": (7, {"memory_chunk_size": 4, "projection_chunk_size": 1}),
}


@pytest.mark.parametrize("by", ["token", "chunk"])
@pytest.mark.parametrize(("length", "fields"), CHUNKS.values(), ids=CHUNKS.keys())
def test_any_chunk_sizes_are_the_reference(length, fields, by):
    assert_is_the_reference(mixer_of(memory_read=by, **fields), noise(length, WIDTH))


FIELDS = {
    "retention zero": {"memory_retention": "zero"},
    "no momentum": {"memory_momentum": False},
    "dot": {"memory_objective": "dot"},
    "depth 1": {"memory_depth": 1},
    "depth 1, dot": {"memory_depth": 1, "memory_objective": "dot"},
    "no delta term": {"memory_delta_decay": False},
    "no decay": {"memory_weight_decay": False},
    "shared values": {"memory_self_values": False},
    "b_max 1": {"memory_max_rate": 1.0},
    "all off": {
        "memory_retention": "zero",
        "memory_momentum": False,
        "memory_delta_decay": False,
        "memory_weight_decay": False,
        "memory_self_values": False,
    },
    "depth 1, shared values, zero": {"memory_depth": 1, "memory_self_values": False, "memory_retention": "zero"},
    "dot, shared values, no decay": {
        "memory_objective": "dot",
        "memory_self_values": False,
        "memory_weight_decay": False,
    },
    "no adaptive": {"adaptive_projections": ()},
    "all adaptive": {"adaptive_projections": ("k", "v", "q", "eta", "alpha")},
    **{f"only {name}": {"adaptive_projections": (name,)} for name in ("k", "v", "q", "eta", "alpha")},
    "k and q, depth 1": {"adaptive_projections": ("k", "q"), "memory_depth": 1},
}


@pytest.mark.parametrize(
    "chunks",
    [
        {"memory_chunk_size": 4},
        {"memory_chunk_size": 6, "projection_chunk_size": 3, "memory_read": "chunk"},
        {"memory_chunk_size": 3, "projection_chunk_size": 6},
    ],
    ids=["4", "6 and 3", "3 and 6"],
)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_every_field_is_the_reference(fields, chunks):
    assert_is_the_reference(mixer_of(**chunks, **fields), noise(10, WIDTH))


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_of_zeros_are_the_reference(depth):
    x = noise(13, WIDTH)
    x[:7] = 0
    assert_is_the_reference(mixer_of(memory_chunk_size=4, memory_depth=depth), x)


@pytest.mark.parametrize("scale", [1e-5, 1e-6])
def test_hidden_units_next_to_zero_are_the_reference(scale):
    """The key of W1 is a unit unless it is smaller than 1e-6."""
    mixer = mixer_of(memory_chunk_size=4)
    with torch.no_grad():
        mixer.memories.w2.mul_(scale)
    assert_is_the_reference(mixer, noise(10, WIDTH))


# --- the published models that a config reaches


def slow_maps(mixer, x):
    """
    What the static maps of a mixer make of `x` `[T, hidden_size]`.

    Returns:
        u `[T, hidden_size]`, and by head q, k, v `[H, T, D]`, rates b and decays alpha `[H, T]`.
    """
    p = dict(mixer.named_parameters())
    u = silu(conv1d(pad(x.T, (3, 0)), p["conv.weight"], groups=WIDTH).T)
    q, k, v = (torch.stack((u @ p[f"{name}_proj.weight"].T).split(D, 1)) for name in "qkv")
    b = mixer.config.memory_max_rate * torch.sigmoid(5 * (u @ p["eta_proj.weight"].T + p["eta_proj.bias"])).T
    alpha = torch.ones_like(b)
    if mixer.config.memory_weight_decay:
        alpha = torch.sigmoid(5 * (u @ p["alpha_proj.weight"].T + p["alpha_proj.bias"])).T
    return u, normalize(q, dim=-1), normalize(k, dim=-1), v, b, alpha


def output_of(mixer, u, o):
    """The mixer's output from what was read, `o` `[H, T, D]`."""
    p = dict(mixer.named_parameters())
    normed = o / (o.square().mean(-1, keepdim=True) + mixer.config.rms_norm_eps).sqrt() * p["output_norm.weight"]
    return (torch.cat(list(normed), 1) * silu(u @ p["gate_proj.weight"].T)) @ p["o_proj.weight"].T


def assert_is_published(mixer, published, length=13):
    """`published(head, q, k, v, b, alpha)` gives what one head reads, `[T, D]`, and its last weights."""
    x = noise(length, WIDTH)
    u, *streams = slow_maps(mixer, x)
    found = [published(head, *each) for head, each in enumerate(zip(*streams, strict=True))]
    expected = output_of(mixer, u, torch.stack([o for o, _ in found]))
    with torch.no_grad():
        out, state = read(mixer, x[None])
    assert_same(out[0], expected.detach(), "output")
    if length % mixer.chunk_size == 0:
        for head, (_, last) in enumerate(found):
            for i, weights in enumerate(last):
                assert_same(fast_weights(mixer, state)["now", head, "memory", i], weights.detach(), f"map {i}")


def linear_attention(state, k, v, b, alpha):
    """Katharopoulos et al. 2020, without their feature map: S + b v k^T."""
    return state + b * torch.outer(v, k)


def delta_net(state, k, v, b, alpha):
    """Schlag et al. 2021: S - b (S k - v) k^T."""
    return state - b * torch.outer(state @ k - v, k)


def gated_delta_net(state, k, v, b, alpha):
    """Yang et al. 2024: alpha S (I - b k k^T) + b v k^T, here with values scaled by alpha."""
    return alpha * (state - b * torch.outer(state @ k, k)) + b * torch.outer(alpha * v, k)


STATIC = {"adaptive_projections": (), "memory_self_values": False, "memory_momentum": False}
MATRIX = {**STATIC, "memory_depth": 1, "memory_objective": "dot", "memory_retention": "zero"}
BARE = {"memory_delta_decay": False, "memory_weight_decay": False}


@pytest.mark.parametrize(
    ("published", "fields"),
    [
        *((linear_attention, {**MATRIX, **BARE, "memory_chunk_size": size}) for size in (1, 4, 13)),
        (delta_net, {**MATRIX, **BARE, "memory_objective": "l2", "memory_chunk_size": 1}),
        *((delta_net, {**MATRIX, "memory_weight_decay": False, "memory_chunk_size": size}) for size in (1, 4, 13)),
        *((gated_delta_net, {**MATRIX, "memory_chunk_size": size}) for size in (1, 4, 13)),
    ],
    ids=lambda value: (
        value.__name__ if callable(value) else f"{value['memory_objective']}-{value['memory_chunk_size']}"
    ),
)
def test_matrix_memories_of_the_literature(published, fields):
    """Models whose state is a matrix that every token reads, S_{t-1} q_t, and then writes. S_0 is the learned W."""
    mixer = mixer_of(**fields)

    def token_loop(head, q, *streams):
        state, o = mixer.memories.w[head, 0], []
        for q_t, *token in zip(q, *streams, strict=True):
            o.append(state @ q_t)
            state = published(state, *token)
        return torch.stack(o), [state]

    assert_is_published(mixer, token_loop)


def mlp(w2, w1, gamma, a):
    """a + gamma * rms(W1 silu(W2 a)) of rows `a`; TTT-MLP and Titans have a LayerNorm here."""
    y = silu(a @ w2.T) @ w1.T
    return a + gamma * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def step(maps, gamma, k, v, b):
    """-sum_s b_s grad(1/2 |M(k_s) - v_s|^2) at `maps`."""
    maps = [w.detach().requires_grad_() for w in maps]
    loss = (0.5 * b * (mlp(*maps, gamma, k) - v).square().sum(-1)).sum()
    return [-g for g in torch.autograd.grad(loss, maps)]


@pytest.mark.parametrize("by", ["token", "chunk"])
@pytest.mark.parametrize("size", [1, 4, 13])
def test_ttt_mlp(size, by):
    """
    Sun et al. 2024, mini-batch gradient descent: with W the weights at the start of token t's chunk,

        o_t = M(q_t; W - sum_{s < t in the chunk} b_s grad L_s(W)),     read by chunk: o_t = M(q_t; W)

    and the chunk ends at W less the sum over all its tokens. What a map is written, -b g input^T, is its gradient.
    """
    mixer = mixer_of(**STATIC, **BARE, memory_chunk_size=size, memory_read=by)

    def mini_batches(head, q, k, v, b, alpha):
        maps, gamma, o = [mixer.memories.w2[head, 0], mixer.memories.w1[head, 0]], mixer.memories.gamma[head, 0], []
        for start in range(0, len(q), size):
            end = min(start + size, len(q))
            for t in range(start, end):
                seen = slice(start, t if by == "token" else start)
                moved = step(maps, gamma, k[seen], v[seen], b[seen])
                o.append(mlp(*(w + s for w, s in zip(maps, moved, strict=True)), gamma, q[t]))
            moved = step(maps, gamma, k[start:end], v[start:end], b[start:end])
            maps = [w + s for w, s in zip(maps, moved, strict=True)]
        return torch.stack(o), maps

    assert_is_published(mixer, mini_batches, length=13 if size != 4 else 12)


@pytest.mark.parametrize("retention", ["initial", "zero"])
def test_titans(retention):
    """
    Behrouz et al. 2024, token by token: with G_t the gradient of 1/2 |M(k_t) - v_t|^2 at W'_t and eta = alpha b,

        W'_t = W_{t-1} + mu S_{t-1}
        W_t  = alpha_t W'_t + (1 - alpha_t) W_rest - eta_t G_t
        S_t  = mu S_{t-1} - eta_t G_t
        o_t  = M(q_t; W'_t)

    Titans takes the gradient before the momentum's step, at W_{t-1}, and forgets to zero, W_rest = 0.
    """
    fields = {**STATIC, "memory_momentum": True, "memory_delta_decay": False, "memory_retention": retention}
    mixer = mixer_of(**fields, memory_chunk_size=1)

    def token_loop(head, q, k, v, b, alpha):
        learned = [mixer.memories.w2[head, 0], mixer.memories.w1[head, 0]]
        gamma, mu = mixer.memories.gamma[head, 0], torch.sigmoid(mixer.memories.momentum[head, 0])
        rest = learned if retention == "initial" else [torch.zeros_like(w) for w in learned]
        maps, momentum, o = learned, [torch.zeros_like(w) for w in learned], []
        for t in range(len(q)):
            ahead = [w + mu * s for w, s in zip(maps, momentum, strict=True)]
            o.append(mlp(*ahead, gamma, q[t]))
            moved = step(ahead, gamma, k[t], v[t], alpha[t] * b[t])
            maps = [alpha[t] * w + (1 - alpha[t]) * r + s for w, r, s in zip(ahead, rest, moved, strict=True)]
            momentum = [mu * s + m for s, m in zip(momentum, moved, strict=True)]
        return torch.stack(o), [w + mu * s for w, s in zip(maps, momentum, strict=True)]

    assert_is_published(mixer, token_loop)


# --- the backward passes that were derived by hand


RULES = {
    f"{objective}, {'self-made' if own else 'shared'} values": Rule(objective, True, own)
    for objective in ("l2", "dot")
    for own in (True, False)
}


def flat(results):
    """The tensors of nested tuples."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for part in results if part is not None for tensor in flat(part)]


def memory_inputs(rows, memories, m, d, tokens, inputs=2):
    """W2, W1, gamma, and columns `[rows, d, tokens]`."""
    shapes = [(rows, 1, memories * m, d), (rows, memories, d, m), (rows, memories, d, 1), *[(rows, d, tokens)] * inputs]
    return [noise(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def inner_of(module, rule):
    return lambda w2, w1, gamma, k, v: flat(module.inner_gradients((w2, w1), gamma, k, v, rule)[1:])


def read_of(module):
    return lambda w2, w1, gamma, a: [module.read((w2, w1), gamma, a)]


DELTAS = {
    f"{'initial' if rest else 'zero'}, {'momentum' if momentum else 'no momentum'}, {tokens} rows read": (
        rest,
        {"momentum": momentum, "tokens": tokens},
    )
    for rest in (True, False)
    for momentum in (True, False)
    for tokens in (0, 2)
}


def delta_inputs(rows, states, out, width, tokens, rest=True, shared=False):
    """
    State, rest, keys, gradients, recalled, rates, erasing and log alpha.

    `shared`: one rate of erasing for all states.
    """
    maps, columns = (rows, states, out, width), (rows, states, out, tokens)
    inputs = [
        noise(*maps, seed=0),
        noise(*maps, seed=1) if rest else None,
        normalize(noise(rows, states, width, tokens, seed=2), dim=2),
        noise(*columns, seed=3),
        noise(*columns, seed=4),
        noise(rows, 1, 1, tokens, seed=5).sigmoid(),
        noise(rows, 1 if shared else states, 1, tokens, seed=6).sigmoid(),
        noise(rows, tokens, seed=7).sigmoid().log(),
    ]
    return [x if x is None else x.requires_grad_() for x in inputs]


def delta_of(module, **given):
    return lambda *inputs: flat(module.delta_chunk(Chunk(*inputs[:7], decay_of(inputs[7]), **given)))


def within_inputs(rows, m, d, tokens):
    """W2, W1, what they rest at, gamma, queries, keys and writes of both maps, and log alpha."""
    maps, first, second = [(rows, 1, m, d), (rows, 1, d, m)], (rows, 1, m, tokens), (rows, 1, d, tokens)
    shapes = [*maps, *maps, (rows, 1, d, 1), (rows, d, tokens), second, first, first, second]
    inputs = [noise(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return [x.requires_grad_() for x in (*inputs, noise(rows, tokens, seed=20).sigmoid().log())]


def within_of(module):
    return lambda w2, w1, rest2, rest1, gamma, q, k2, k1, u2, u1, log_alpha: [
        module.read_within((w2, w1), (rest2, rest1), gamma, q, (k2, k1), (u2, u1), decay_of(log_alpha))
    ]


def assert_derivatives(function, inputs):
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_derivatives_of_inner_gradients(rule):
    assert_derivatives(inner_of(fused_memory, rule), memory_inputs(1, 2, 3, 2, 3))


def test_derivatives_of_reading():
    assert_derivatives(read_of(fused_memory), memory_inputs(1, 2, 3, 2, 3, inputs=1))


@pytest.mark.parametrize(("rest", "given"), DELTAS.values(), ids=DELTAS.keys())
def test_derivatives_of_writing(rest, given):
    assert_derivatives(delta_of(fused_memory, **given), delta_inputs(1, 2, 3, 2, 3, rest))


def test_derivatives_of_writing_with_one_rate_for_all_states():
    given = {"momentum": True, "tokens": 2}
    assert_derivatives(delta_of(fused_memory, **given), delta_inputs(1, 2, 3, 2, 3, shared=True))


def test_derivatives_of_reading_within_a_chunk():
    assert_derivatives(within_of(fused_memory), within_inputs(1, 3, 2, 3))


def go_on_inputs(rows, states, out, width):
    """W, U, S and mu."""
    shapes = [*[(rows, states, out, width)] * 3, (rows, states, out, 1)]
    return [noise(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def test_derivatives_of_going_on():
    assert_derivatives(fused_memory.go_on, go_on_inputs(1, 2, 3, 2))


def test_derivatives_of_units():
    assert_derivatives(fused_memory.unit, [noise(2, 3, 4).requires_grad_()])


def test_derivatives_of_the_inverse():
    coupled = noise(2, 3, 4, 4).triu(1).requires_grad_()
    torch.testing.assert_close(
        delta_rule.inverse(coupled) @ (torch.eye(4) + coupled), torch.eye(4).double().expand(2, 3, 4, 4)
    )
    assert_derivatives(lambda coupled: delta_rule.inverse(coupled.triu(1)), [coupled])


@pytest.mark.parametrize(
    "fields",
    [{}, {"memory_depth": 1}, {"memory_retention": "zero", "memory_read": "chunk"}, {"adaptive_projections": []}],
    ids=["defaults", "depth 1", "zero, by chunk", "all static"],
)
def test_gradients_of_a_mixer_can_be_differentiated(fields):
    """In a mixer one input of an operation is made of another, as it is not where an operation is checked alone."""
    mixer, x = mixer_of(memory_chunk_size=3, **fields), noise(1, 7, WIDTH)
    inputs = [x.requires_grad_(), *mixer.parameters()]
    once, twice = (
        torch.autograd.grad(read(mixer, x)[0].square().sum(), inputs, create_graph=graph, allow_unused=True)
        for graph in (False, True)
    )
    for ours, theirs in zip(twice, once, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_same(ours, theirs, tolerance=1e-11)
    direction = noise(*x.shape, seed=9)

    def slope(x):
        return torch.autograd.grad(read(mixer, x)[0].square().sum(), x, create_graph=True)[0]

    (curvature,) = torch.autograd.grad((slope(x) * direction).sum(), x)
    ahead, behind = (slope((x + step * direction).detach().requires_grad_()) for step in (1e-6, -1e-6))
    assert_same(curvature, ((ahead - behind) / 2e-6).detach(), tolerance=1e-7)


def assert_twins(fused, plain, inputs):
    """Same values and gradients, and these finite; `None` among the inputs is left alone."""
    wanted = [x for x in inputs if x is not None]
    found = []
    for function in (fused, plain):
        results = function(*inputs)
        loss = sum((r * noise(*r.shape, seed=50 + i)).sum() for i, r in enumerate(results))
        found.append([*results, *gradients(loss, wanted)])
    for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert theirs.isfinite().all()
        assert_same(ours, theirs, f"tensor {i}", tolerance=1e-11)


def blank(columns, last=2, scale=0.0):
    """`columns` `[..., tokens]` with the last tokens made as small as `scale`."""
    kept = torch.ones(columns.shape[-1], dtype=columns.dtype)
    kept[-last:] = scale
    return (columns.detach() * kept).requires_grad_()


@pytest.mark.parametrize("scale", [1.0, 1e-7, 0.0])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_inner_gradients_are_their_plain_twin(rule, scale):
    """Keys and values of nothing, or next to it, as tokens of zeros give, included."""
    w2, w1, gamma, k, v = memory_inputs(3, 4, 5, 6, 7)
    inputs = [w2, w1, gamma, blank(k, scale=scale), blank(v, scale=scale)]
    assert_twins(inner_of(fused_memory, rule), inner_of(memory_rule, rule), inputs)


@pytest.mark.parametrize("scale", [1.0, 1e-7, 0.0])
@pytest.mark.parametrize("dim", [-2, -1])
def test_units_are_their_plain_twin(dim, scale):
    columns = blank(noise(3, 4, 5), scale=scale)
    inputs = [columns.mT if dim == -1 else columns]
    assert_twins(lambda a: [fused_memory.unit(a, dim)], lambda a: [memory_rule.unit(a, dim)], inputs)


def test_going_on_is_its_plain_twin():
    assert_twins(fused_memory.go_on, memory_rule.go_on, go_on_inputs(3, 4, 5, 6))


@pytest.mark.parametrize("scale", [1.0, 1e-7, 0.0])
def test_reading_is_its_plain_twin(scale):
    w2, w1, gamma, a = memory_inputs(3, 4, 5, 6, 7, inputs=1)
    assert_twins(read_of(fused_memory), read_of(memory_rule), [w2, w1, gamma, blank(a, scale=scale)])


def test_reading_within_a_chunk_is_its_plain_twin():
    inputs = within_inputs(3, 5, 6, 7)
    assert_twins(within_of(fused_memory), within_of(memory_rule), inputs)
    for place in (5, 6, 7, 10):  # padded tokens
        inputs[place] = blank(inputs[place])
    assert_twins(within_of(fused_memory), within_of(memory_rule), inputs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("rest", "given"), DELTAS.values(), ids=DELTAS.keys())
def test_writing_is_its_plain_twin(rest, given, padded):
    """A padded token has neither rate nor decay, and may have no key."""
    inputs = delta_inputs(3, 4, 5, 6, 7, rest)
    if padded:
        inputs[2:] = [blank(columns) for columns in inputs[2:]]
    assert_twins(delta_of(fused_memory, **given), delta_of(delta_rule, **given), inputs)


@pytest.mark.parametrize(
    "given",
    [{"erasing": None, "momentum": True}, {"ends": False, "tokens": 2}, {"momentum": True, "sums": noise(3, 4, 5, 6)}],
    ids=["no delta term", "an open chunk", "a part of a longer chunk"],
)
def test_other_writes_are_their_plain_twin(given):
    given = dict(given)
    inputs = delta_inputs(3, 4, 5, 6, 7)
    if "erasing" in given:
        inputs[6] = given.pop("erasing")
    assert_twins(delta_of(fused_memory, **given), delta_of(delta_rule, **given), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fields", [{}, {"memory_depth": 1}, {"adaptive_projections": ()}])
def test_a_stream_of_zeros_has_finite_gradients(fields, dtype):
    mixer = mixer_of(memory_chunk_size=4, **fields).to(dtype)
    x = torch.zeros(1, 10, WIDTH, dtype=dtype, requires_grad=True)
    out, state = read(mixer, x)
    loss = (out + 1).square().sum() + sum(t.square().sum() for t in state.tensors.values())
    assert all(g.isfinite().all() for g in gradients(loss, [x, *mixer.parameters()]))


# --- pieces and rows


@torch.no_grad()
def test_a_state_is_its_own():
    """It shares no memory with the parameters, and none with what the call that made it computed."""
    for mixer in (mixer_of(memory_chunk_size=4), mixer_of(memory_chunk_size=4, projection_chunk_size=8)):
        for length in (3, 9):
            _, state = read(mixer, noise(1, length, WIDTH))
            before = {name: tensor.clone() for name, tensor in state.tensors.items()}
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.tensors.values())
            for parameter in mixer.parameters():
                parameter.mul_(2)
            assert all(torch.equal(state.tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "fields",
    [
        {"memory_chunk_size": 4},
        {"memory_chunk_size": 2, "projection_chunk_size": 6},
        {"memory_chunk_size": 6, "projection_chunk_size": 3, "memory_read": "chunk"},
    ],
    ids=["4", "2 and 6", "6 and 3"],
)
@torch.no_grad()
def test_pieces_and_ragged_rows_are_one_call_of_each_row(fields):
    mixer, pieces = mixer_of(**fields), [[5, 3, 7], [2, 6, 4], [4, 0, 1]]
    rows = [noise(sum(lengths), WIDTH, seed=seed) for seed, lengths in enumerate(pieces)]
    state, begin, outputs = None, [0, 0, 0], [[], [], []]
    for lengths in zip(*pieces, strict=True):
        x = torch.full((3, max(lengths), WIDTH), 9.0, dtype=torch.float64)
        for row, length in enumerate(lengths):
            x[row, :length] = rows[row][begin[row] : begin[row] + length]
        out, state = read(mixer, x, state, begin, list(lengths))
        for row, length in enumerate(lengths):
            outputs[row].append(out[row, :length])
            begin[row] += length
    for row, x in enumerate(rows):
        out, alone = read(mixer, x[None])
        assert_same(torch.cat(outputs[row]), out[0], f"row {row}")
        assert state.tensors.keys() == alone.tensors.keys()
        for name, expected in alone.tensors.items():
            found = state.tensors[name][row]
            assert_same(found[:, : expected.shape[2]] if name == "open" else found, expected[0], f"row {row}, {name}")


# --- in a model


@pytest.mark.parametrize(
    "fields",
    [
        {"projection_chunk_size": 4},
        {"projection_chunk_size": 8},
        {"projection_chunk_size": 4, "memory_read": "chunk", "adaptive_projections": ["k", "v", "q", "eta", "alpha"]},
        {"projection_chunk_size": 4, "memory_depth": 1},
    ],
    ids=["one chunk size", "two chunk sizes", "all adaptive", "depth 1"],
)
def test_nothing_is_dead_in_the_first_training_step(fields):
    """Every slice by head and memory of every parameter has a gradient, from the loss alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = HopeForCausalLM(HopeConfig(**sizes, memory_chunk_size=4, **fields)).train()
    ids = random_ids(2, 24)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        for name, parameter in layer.mixer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            slices = 2 if name.startswith("memories.") else int(name.startswith(("eta_proj", "alpha_proj")))
            largest = parameter.grad.abs().reshape(*parameter.shape[:slices], -1).amax(-1)
            assert (largest > 0).all(), f"{name}: {largest}"


@pytest.mark.parametrize("fields", [{}, {"memory_depth": 1}, {"memory_retention": "zero"}])
def test_a_backward_pass_inside_autocast(fields):
    """Of a training step, and of what the levels learn from: neither fails, and gradients are close to those outside it."""
    model = tiny_model(dtype=torch.float32, **MEMORY, **fields)
    ids = random_ids(1, 24)
    with torch.autocast("cpu", torch.bfloat16):
        memory = model.eval()(ids).past_key_values
        loss = model.train()(ids, labels=ids, use_cache=False).loss
        inside = gradients(loss, list(model.parameters()))
        loss = model(ids, labels=ids, use_cache=False).loss
    outside = gradients(loss, list(model.parameters()))
    assert memory.rows[0].updates[0] > 0
    largest = max(gradient.norm() for gradient in outside)
    for ours, theirs in zip(inside, outside, strict=True):
        assert (ours - theirs).norm() <= 0.1 * theirs.norm() + 1e-4 * largest


def test_a_bf16_model_remembers_in_float32():
    fields = {"layer_types": ["hope_memory"] * 2, "sliding_window": None, "memory_chunk_size": 16}
    model, ids = tiny_model(dtype=torch.bfloat16, initializer_range=0.02, **fields), random_ids(2, 30)
    exact = tiny_model(**fields)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        output, expected = model(ids, learn="off"), exact(ids, learn="off")
    memory = output.past_key_values
    moved = expected.past_key_values.layers[0].mixer.to(memory.layers[0].mixer.device, torch.bfloat16)
    for tensors in memory.tensors(), {f".{name}": tensor for name, tensor in moved.tensors.items()}:
        for kind, dtype in {".now.": torch.float32, ".momentum.": torch.float32, ".conv": torch.bfloat16}.items():
            assert {tensor.dtype for name, tensor in tensors.items() if kind in name} == {dtype}
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.double() - expected.logits).norm() < 3e-2 * expected.logits.norm()


# --- the config


def test_a_bare_config_is_all_memory():
    config = HopeConfig(vocab_size=10, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    assert config.layer_types == ["hope_memory"] * 3
    assert (config.num_memory_heads, config.memory_head_dim) == (2, 8)
    assert (config.memory_chunk_size, config.projection_chunk_size) == (16, 256)
    assert config.adaptive_projections == ["k", "v", "eta", "alpha"]


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({}, 2.0),
        ({"memory_depth": 1}, 1.0),
        ({"memory_depth": 1, "memory_objective": "dot"}, 2.0),
        ({"memory_depth": 1, "memory_delta_decay": False}, 2.0),
    ],
)
def test_the_largest_rate_is_one_where_the_gradient_erases_as_well(fields, rate):
    assert memory_config(**fields).memory_max_rate == rate


@pytest.mark.parametrize("adaptive", [["k", "v", "eta", "alpha"], ["k", "v"]], ids=["adaptive", "static"])
@pytest.mark.parametrize(
    ("fields", "rate", "decay"),
    [
        ({}, 0.025, 0.9995),
        ({"memory_max_rate": 0.01}, 0.005, 0.9995),
        ({"memory_initial_rate": 0.1, "memory_initial_decay": 0.99}, 0.1, 0.99),
    ],
    ids=["default", "small", "told"],
)
def test_rates_and_decays_start_where_they_are_told_to(adaptive, fields, rate, decay):
    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = HopeConfig(**sizes, adaptive_projections=adaptive, memory_initial_momentum=0.3, **fields)
    mixer = HopeForCausalLM(config).model.layers[0].mixer
    _, kept = mixer._streams(0.5 * noise(1, 256, 64).float(), torch.float32)
    streams = kept[0].permute(1, 2, 0)
    maps, constants = mixer.memories(slice(1, None), 1, torch.float32)
    _, _, rates, log_alpha, _ = mixer._project(maps, constants, streams, noise(2, 32, 256).float())
    assert rate / 2 < rates.median() < rate * 2 and rates.max() < rate * 20
    assert 1 - decay < (1 - log_alpha.exp()).mean() * 2 < 4 * (1 - decay)
    torch.testing.assert_close(mixer.memories.momentum.sigmoid(), torch.full_like(mixer.memories.momentum, 0.3))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"memory_depth": 3}, "memory_depth"),
        ({"memory_max_rate": 2.5}, "memory_max_rate"),
        ({"memory_max_rate": 0.0}, "memory_max_rate"),
        ({"memory_initial_rate": 2.0}, "memory_initial_rate"),
        ({"memory_initial_rate": 0.5, "memory_max_rate": 0.5}, "memory_initial_rate"),
        ({"memory_initial_decay": 1.0}, "memory_initial_decay"),
        ({"memory_initial_momentum": 0.0}, "memory_initial_momentum"),
        ({"memory_max_rate": 2, "memory_depth": 1}, "memory_max_rate"),
        ({"memory_chunk_size": 6, "projection_chunk_size": 4}, "memory_chunk_size"),
        ({"memory_chunk_size": 4, "projection_chunk_size": 6}, "projection_chunk_size"),
        ({"memory_chunk_size": 0}, "memory_chunk_size"),
        ({"adaptive_projections": ("k", "beta")}, "adaptive_projections"),
        ({"memory_head_dim": 300}, "memory_head_dim"),
        ({"memory_read": "always"}, "memory_read"),
        ({"memory_retention": "none"}, "memory_retention"),
        ({"memory_objective": "l1"}, "memory_objective"),
        ({"memory_typo": 1}, "memory_typo"),
        ({"adaptive_projection": ["k"]}, "adaptive_projection"),
        ({"projection_chunk_sizes": 8}, "projection_chunk_sizes"),
    ],
)
def test_memories_that_cannot_be(fields, named):
    with pytest.raises(Exception, match=f"`{named}`"):
        memory_config(**fields)
