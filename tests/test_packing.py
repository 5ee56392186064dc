"""Left-packing of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_hope.packing import Packing


masks = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 7).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch)
    )
)


@given(masks)
def test_pack_then_unpack_keeps_what_is_real_and_zeroes_the_rest(mask):
    mask = torch.tensor(mask)
    x = torch.arange(1.0, mask.numel() * 3 + 1).view(*mask.shape, 3)
    packing = Packing.from_mask(mask, mask.shape[1])
    packed = packing.pack(x)
    for row, length in enumerate(packing.lengths(len(mask))):
        assert length == int(mask[row].sum())
        assert torch.equal(packed[row, :length], x[row, mask[row]])
    assert packed.shape[1] == packing.longest == max(1, *packing.lengths(len(mask)))
    assert torch.equal(packing.unpack(packed), x * mask[..., None])


@given(masks)
def test_ids_pack_too(mask):
    mask = torch.tensor(mask)
    ids = torch.arange(mask.numel()).view(mask.shape)
    packing = Packing.from_mask(mask, mask.shape[1])
    for row, length in enumerate(packing.lengths(len(mask))):
        assert packing.pack(ids)[row, :length].tolist() == ids[row, mask[row]].tolist()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5)])
def test_without_padding_nothing_moves(mask):
    packing = Packing.from_mask(mask, 5)
    x = torch.randn(2, 5, 3)
    assert packing.lengths(2) == [5, 5] and packing.columns is None
    assert packing.pack(x) is x and packing.unpack(x) is x


def test_gradients_pass_both_ways():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    packing = Packing.from_mask(mask, 4)
    torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x)), x)
