"""What a mixer remembers of a batch of streams: tensors that are passed in and out, never kept on a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from torch.nn import functional as F


State = TypeVar("State", bound="MixerState")


class MixerState:
    """
    Tensors by name, rows first. Never changed in place, so rows and forks may share them.

    Class attributes:
        growing: names of tensors whose last-but-one axis has as many slots as the rows need, left-packed; slots past
            a row's count hold nothing of meaning.
    """

    growing: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **tensors: torch.Tensor):
        self.tensors = tensors

    @property
    def first(self) -> torch.Tensor:
        """A tensor of the dtype that the layer computes in, on its device."""
        return next(iter(self.tensors.values()))

    @property
    def device(self) -> torch.device:
        return self.first.device

    def select(self: State, rows: torch.Tensor) -> State:
        """The state of some rows, `[rows]` int64, in that order."""
        return self._map(lambda tensor: tensor.index_select(0, rows))

    @classmethod
    def join(cls: type[State], states: Sequence[State]) -> State:
        """The rows of several states."""
        parts = {name: [state.tensors[name] for state in states] for name in states[0].tensors}
        return cls(**{name: torch.cat(cls._alike(name, of_states)) for name, of_states in parts.items()})

    def trim(self: State, slots: int) -> State:
        """Without the growing tensors' slots from `slots` on; what is left over is no part of them any more."""
        return type(self)(
            **{
                name: tensor[..., :slots, :].clone() if name in self.growing and tensor.shape[-2] > slots else tensor
                for name, tensor in self.tensors.items()
            }
        )

    def place(self: State, rows: torch.Tensor, state: State) -> State:
        """This state with the rows `rows` replaced by those of `state`."""
        placed = {}
        for name, tensor in self.tensors.items():
            whole, part = self._alike(name, [tensor, state.tensors[name]])
            placed[name] = whole.index_copy(0, rows, part)
        return type(self)(**placed)

    def clone(self: State) -> State:
        return self._map(torch.Tensor.clone)

    def detach(self: State) -> State:
        return self._map(torch.Tensor.detach)

    def to(self: State, device: torch.device, dtype: torch.dtype | None = None) -> State:
        """On a device, and for a model of another dtype."""
        return self._map(lambda tensor: tensor.to(device, dtype))

    @classmethod
    def _alike(cls, name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of one name, with as many slots as the longest of them."""
        if name not in cls.growing:
            return tensors
        slots = max(tensor.shape[-2] for tensor in tensors)
        return [F.pad(tensor, (0, 0, 0, slots - tensor.shape[-2])) for tensor in tensors]

    def _map(self: State, function) -> State:  # type: ignore[no-untyped-def]
        # Where two names hold one tensor, they go on doing so.
        distinct = {id(tensor): tensor for tensor in self.tensors.values()}
        mapped = {key: function(tensor) for key, tensor in distinct.items()}
        return type(self)(**{name: mapped[id(tensor)] for name, tensor in self.tensors.items()})
