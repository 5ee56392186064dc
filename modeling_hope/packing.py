"""The one place where raggedness disappears: rows are packed to the left by their masks, and unpacked at the exit."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """
    How a padded batch becomes rows that start with their real tokens.

    Attributes:
        width: columns of the padded batch.
        columns: `[batch, longest]` int64, the padded columns, each row's real ones first; `None` when nothing is padded.
        real: `[batch, longest]` bool, the positions that hold a token; `None` likewise.
    """

    width: int
    columns: torch.Tensor | None = None
    real: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        """Columns of the packed batch, at least one."""
        return self.width if self.columns is None else self.columns.shape[1]

    @classmethod
    def from_mask(cls, mask: torch.Tensor | None, width: int) -> Packing:
        """`mask`: `[batch, width]`, nonzero where a token is real; `None` when all are."""
        compiling = torch.compiler.is_compiling()
        if mask is None or (not compiling and bool(mask.all())):
            return cls(width)
        padded = mask == 0
        lengths = width - padded.sum(1)
        # No shape of a compiled graph depends on what a mask holds.
        longest = width if compiling else max(int(lengths.max()), 1)
        columns = torch.argsort(padded.to(torch.uint8), dim=1, stable=True)[:, :longest]
        return cls(width, columns, torch.arange(longest, device=mask.device) < lengths[:, None])

    def lengths(self, batch: int) -> list[int]:
        """Real tokens of each row."""
        return [self.width] * batch if self.real is None else self.real.sum(1).tolist()

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`[batch, width, ...]` to `[batch, longest, ...]`; whatever pads hold, past its length a row repeats its start."""
        if self.columns is None or self.real is None:
            return padded
        return _along_columns(padded, torch.where(self.real, self.columns, self.columns[:, :1]))

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[batch, longest, ...]` to `[batch, width, ...]`, zero where the batch is padded."""
        if self.columns is None or self.real is None:
            return packed
        kept = packed * self.real.view(*self.real.shape, *[1] * (packed.dim() - 2)).to(packed.dtype)
        padded = packed.new_zeros(packed.shape[0], self.width, *packed.shape[2:])
        index = self.columns.view(*self.columns.shape, *[1] * (packed.dim() - 2)).expand_as(packed)
        return padded.scatter(1, index, kept)


def _along_columns(padded: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    index = columns.view(*columns.shape, *[1] * (padded.dim() - 2))
    return padded.gather(1, index.expand(*columns.shape, *padded.shape[2:]))
