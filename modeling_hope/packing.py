"""The one place where raggedness disappears: rows are packed to the left by their masks, and unpacked at the exit."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """
    How a padded batch becomes rows that start with their real tokens.

    Attributes:
        lengths: real tokens of each row, `[batch]` Python ints.
        width: columns of the padded batch.
        columns: `[batch, longest]` int64, the padded column that each packed position comes from; `None` when
            nothing is padded. Positions past a row's length hold one of its pads.
    """

    lengths: list[int]
    width: int
    columns: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        """Columns of the packed batch, at least one."""
        return max(*self.lengths, 1)

    @classmethod
    def from_mask(cls, mask: torch.Tensor | None, batch: int, width: int) -> Packing:
        """`mask`: `[batch, width]`, nonzero where a token is real; `None` when all are."""
        if mask is None or bool(mask.all()):
            return cls([width] * batch, width)
        real = mask.bool()
        lengths = real.sum(1).tolist()
        columns = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)[:, : max(*lengths, 1)]
        return cls(lengths, width, columns)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`[batch, width, ...]` to `[batch, longest, ...]`."""
        if self.columns is None:
            return padded
        return _along_columns(padded, self.columns)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[batch, longest, ...]` to `[batch, width, ...]`, zero where the batch is padded."""
        if self.columns is None:
            return packed
        positions = torch.arange(self.columns.shape[1], device=packed.device)
        real = positions < torch.tensor(self.lengths, device=packed.device)[:, None]
        kept = packed * real.view(*real.shape, *[1] * (packed.dim() - 2)).to(packed.dtype)
        padded = packed.new_zeros(packed.shape[0], self.width, *packed.shape[2:])
        index = self.columns.view(*self.columns.shape, *[1] * (packed.dim() - 2)).expand_as(packed)
        return padded.scatter(1, index, kept)


def _along_columns(padded: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    index = columns.view(*columns.shape, *[1] * (padded.dim() - 2))
    return padded.gather(1, index.expand(*columns.shape, *padded.shape[2:]))
