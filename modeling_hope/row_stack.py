"""What the rows of a batch have learned, side by side: one product for all rows in the place of one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .fast_weights import LevelMemory, can_merge


class RowStack:
    """
    The weights of one level of one layer in every row of a memory, `[rows, out_features, in_features]` by map.

    A memory keeps it from step to step for itself alone: rows whose change is another by then are written anew, in
    place. It holds the sums of slow weights and changes, or changes alone where a sum would lose some of them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._changes: list[dict[str, torch.Tensor]] = []
        self._made_of: dict[str, tuple[torch.Tensor | None, tuple[int, int], torch.dtype, int]] = {}

    def refresh(self, mlp: nn.Module, memories: Sequence[LevelMemory], maps: Sequence[str], dtype: torch.dtype) -> None:
        """Bring it up to date with what the rows have learned; products are wanted in `dtype`."""
        changes = [memory.change for memory in memories]
        known = self._changes if len(self._changes) == len(changes) else [None] * len(changes)
        stale = [row for row, (change, old) in enumerate(zip(changes, known, strict=True)) if change is not old]
        for name in maps:
            module = getattr(mlp, name)
            slow = module.weight if can_merge(module) else None
            # A slow weight that was changed in place, or is another, makes all sums others.
            state = (0, 0) if slow is None else (slow.data_ptr(), slow._version)
            made_of = (slow, state, dtype, len(changes))
            old_made_of = self._made_of.get(name)
            whole = old_made_of is None or old_made_of[0] is not slow or old_made_of[1:] != made_of[1:]
            if whole:
                like = next(change[name] for change in changes if change)
                shape = (len(changes), *like.shape)
                self.tensors[name] = torch.empty(shape, dtype=dtype if slow is None else slow.dtype, device=like.device)
                self._made_of[name] = made_of
            for row in range(len(changes)) if whole else stale:
                self._write(self.tensors[name][row], slow, changes[row].get(name))
        self._changes = changes

    def linear(self, name: str, module: nn.Module, x: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
        """The map of some rows, `None` for all: `[rows, width, in_features]` to `[rows, width, out_features]`."""
        weight = self.tensors.get(name)
        if weight is None:  # a map that does not learn
            return module(x)
        if rows is None:
            y = torch.bmm(weight, x.mT).mT
        else:
            # To multiply zeros costs less than to copy the weights of these rows.
            index = torch.tensor(rows, device=x.device)
            y = torch.bmm(weight, x.new_zeros(len(weight), *x.shape[1:]).index_copy(0, index, x).mT).mT[index]
        if self._made_of[name][0] is None:
            return module(x) + y
        bias = module.bias
        return y if bias is None else y + bias  # type: ignore[operator]

    @staticmethod
    def _write(row: torch.Tensor, slow: torch.Tensor | None, change: torch.Tensor | None) -> None:
        if slow is None:
            row.zero_() if change is None else row.copy_(change)
        elif change is None:
            row.copy_(slow)
        else:
            torch.add(slow, change, out=row)


Place = tuple[int, int]  # a layer and a level
RowStacks = dict[Place, RowStack]


def stack_of(stacks: RowStacks, place: Place, memories: Sequence[LevelMemory], rows: Sequence[int]) -> RowStack | None:
    """
    The stack of a memory's rows, of which some are about to read; `None` where a product for each costs less.

    It is made for the second of two steps with the same rows: beams are other rows at every step, and share much.
    """
    learned = {id(memory.change) for memory in memories if memory.change}
    if len(memories) < 2 or 2 * len(learned) < len(memories) or 2 * len(rows) < len(memories):
        return None
    if place not in stacks:
        stacks[place] = RowStack()
        return None
    return stacks[place]
