"""The kernel's place: what it is handed, checked with a stand-in that loops over tokens; and the fallback without it."""

import pytest
import torch

from modeling_hope import fused_memory, kernels
from modeling_hope.delta_rule import Chunk, decay_of


def comba(q, k, v, p, g, beta, scale, initial_state, output_final_state):
    """flash-linear-attention's `chunk_comba`, by token: `[batch, C, heads, features]`, states `[batch, heads, in, out]`."""
    state, outputs = initial_state, []
    for t in range(k.shape[1]):
        error = v[:, t] - torch.einsum("bhio,bhi->bho", state, p[:, t])
        written = torch.einsum("bhi,bho->bhio", k[:, t], beta[:, t][..., None] * error)
        state = state * g[:, t].exp()[..., None, None] + written
        outputs.append(torch.einsum("bhio,bhi->bho", state, q[:, t]) * scale)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize(("size", "forgetting"), [(6, 1.0), (64, 40.0)])
def test_by_kernel_equals_the_fallback(monkeypatch, rest, momentum, tokens, earlier, size, forgetting):
    torch.manual_seed(0)
    rows, memories, out, into = 2, 3, 4, 5
    state, resting, sums = torch.randn(3, rows, memories, out, into, dtype=torch.float64)
    keys = torch.randn(rows, memories, into, size, dtype=torch.float64)
    gradients = torch.randn(rows, memories, out, size, dtype=torch.float64)
    rates = torch.rand(rows, 1, 1, size, dtype=torch.float64)
    rates[..., -1] = 0  # padding
    log_alpha = -forgetting * torch.rand(rows, size, dtype=torch.float64)
    log_alpha[..., -1] = 0
    erasing = rates / keys.square().sum(2, keepdim=True)
    state.requires_grad_()
    arguments = (state, resting if rest else None, keys, gradients, state @ keys, rates, erasing, decay_of(log_alpha))
    options = {"momentum": momentum, "tokens": tokens, "sums": sums if momentum and earlier else None}
    expected = fused_memory.delta_chunk(Chunk(*arguments, **options))
    monkeypatch.setattr(kernels, "find_kernel", lambda state: comba)
    found = kernels.delta_chunk(Chunk(*arguments, **options))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    slopes = [torch.autograd.grad(each.state.sum(), state, retain_graph=True)[0] for each in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-10)
    (slope,) = torch.autograd.grad(found.state.square().sum(), state, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


def test_without_a_gpu_nothing_is_asked_of_a_kernel():
    assert kernels.find_kernel(torch.zeros(1, 1, 4, 4)) is None
