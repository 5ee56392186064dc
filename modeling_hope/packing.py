"""The one place where raggedness disappears: rows are packed to the left by their masks, and unpacked at the exit."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """
    How a batch, padded or of several documents in a row, becomes rows that start with their real tokens.

    Attributes:
        batch, width: of the caller's batch.
        places: `[rows, longest]` int64, for each token its place in the caller's batch, laid end to end; `None` when the
            rows are the caller's and nothing is padded.
        real: `[rows, longest]` bool, the positions that hold a token; `None` likewise.
    """

    batch: int
    width: int
    places: torch.Tensor | None = None
    real: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the packed batch: the caller's, or the documents in them."""
        return self.batch if self.places is None else self.places.shape[0]

    @property
    def longest(self) -> int:
        """Columns of the packed batch, at least one."""
        return self.width if self.places is None else self.places.shape[1]

    @classmethod
    def from_mask(cls, mask: torch.Tensor | None, batch: int, width: int) -> Packing:
        """`mask`: `[batch, width]`, nonzero where a token is real; `None` when all are."""
        compiling = torch.compiler.is_compiling()
        if mask is None or (not compiling and bool(mask.all())):
            return cls(batch, width)
        padded = mask == 0
        lengths = width - padded.sum(1)
        # No shape of a compiled graph depends on what a mask holds.
        longest = width if compiling else max(int(lengths.max()), 1)
        columns = torch.argsort(padded.to(torch.uint8), dim=1, stable=True)[:, :longest]
        starts = torch.arange(batch, device=mask.device)[:, None] * width
        return cls(batch, width, starts + columns, torch.arange(longest, device=mask.device) < lengths[:, None])

    @classmethod
    def from_positions(cls, positions: torch.Tensor, mask: torch.Tensor | None) -> Packing | None:
        """
        Several documents in a row, a new one wherever positions start at 0 again, each a row of its own.

        Args:
            positions: `[batch, width]` int64.
            mask: `[batch, width]`, 0 where padded; `None` when nothing is.

        Returns:
            `None` when positions do not count documents from 0 on.
        """
        batch, width = positions.shape
        real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask != 0
        places = real.flatten().nonzero()[:, 0]
        counted = positions.flatten()[places]
        starts = (counted == 0).nonzero()[:, 0].tolist()
        rows = (places // width).tolist()
        ends = [*starts[1:], len(rows)]
        if (
            not starts
            or starts[0] != 0
            or any(rows[start] != rows[end - 1] for start, end in zip(starts, ends, strict=True))
        ):
            return None
        lengths = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
        steps = torch.arange(int(lengths.max()))
        index = (torch.tensor(starts)[:, None] + steps).clamp(max=len(rows) - 1).to(positions.device)
        held = (steps < lengths[:, None]).to(positions.device)
        if not bool(((counted[index] == steps.to(positions.device)) | ~held).all()):
            return None
        return cls(batch, width, places[index], held)

    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [self.width] * self.batch if self.real is None else self.real.sum(1).tolist()

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`[batch, width, ...]` to `[rows, longest, ...]`; whatever pads hold, past its length a row repeats its start."""
        if self.places is None or self.real is None:
            return padded
        return padded.flatten(0, 1)[torch.where(self.real, self.places, self.places[:, :1])]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[rows, longest, ...]` to `[batch, width, ...]`, zero where the batch is padded."""
        if self.places is None or self.real is None:
            return packed
        shape, size = packed.shape[2:], self.batch * self.width
        beyond = packed.new_zeros(size + 1, *shape)  # one place more, for what is no token
        index = torch.where(self.real, self.places, size).flatten().view(-1, *[1] * len(shape))
        filled = beyond.scatter(0, index.expand(-1, *shape), packed.flatten(0, 1))
        return filled[:size].unflatten(0, (self.batch, self.width))
