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
    packing = Packing.from_mask(mask, *mask.shape)
    packed = packing.pack(x)
    for row, length in enumerate(packing.lengths()):
        assert length == int(mask[row].sum())
        assert torch.equal(packed[row, :length], x[row, mask[row]])
    assert packed.shape[1] == packing.longest == max(1, *packing.lengths())
    assert torch.equal(packing.unpack(packed), x * mask[..., None])


@given(masks)
def test_ids_pack_too(mask):
    mask = torch.tensor(mask)
    ids = torch.arange(mask.numel()).view(mask.shape)
    packing = Packing.from_mask(mask, *mask.shape)
    for row, length in enumerate(packing.lengths()):
        assert packing.pack(ids)[row, :length].tolist() == ids[row, mask[row]].tolist()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5)])
def test_without_padding_nothing_moves(mask):
    packing = Packing.from_mask(mask, 2, 5)
    x = torch.randn(2, 5, 3)
    assert packing.lengths() == [5, 5] and packing.places is None and packing.rows == 2
    assert packing.pack(x) is x and packing.unpack(x) is x


def test_gradients_pass_both_ways():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    packing = Packing.from_mask(mask, *mask.shape)
    torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x)), x)


def test_documents_are_rows_of_their_own():
    positions = torch.tensor([[0, 1, 0, 0, 1, 2], [7, 0, 1, 2, 3, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    packing = Packing.from_positions(positions, mask)
    assert packing.rows == 4 and packing.lengths() == [2, 1, 3, 4]
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    packed = packing.pack(x)
    assert torch.equal(packed[2, :3], x[0, 3:]) and torch.equal(packed[3, :4], x[1, 1:5])
    assert torch.equal(packing.unpack(packed), x * mask[..., None])
    torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x)), x)
    for wrong in (positions + 1, positions.flip(1), torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])):
        assert Packing.from_positions(wrong, None) is None
