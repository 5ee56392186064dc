"""How a run's tokens fall into chunks: each row counts its own, from where its last whole chunk ended."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional as F

from .key_layout import Span


class ChunkPlan:
    """
    The columns of one run: a row's open tokens, read in earlier runs, and then its new ones, so that all rows stand at a
    chunk boundary in column 0.

    Args:
        span: the stretch of its stream that each row reads.
        size: tokens in a chunk.
    """

    def __init__(self, span: Span, size: int):
        self.span, self.size = span, size
        self.opened = [begin % size for begin in span.begin]
        self.counts = [opened + length for opened, length in zip(self.opened, span.lengths, strict=True)]
        self.columns = max(self.opened) + span.width
        self.aligned = len(set(self.opened)) == 1

    def join(self, opened: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """
        Open tokens `[batch, H, slots, features]` (`None`: zeros) and new ones `[batch, width, H, features]`:
        `[batch, H, columns, features]`, left-packed.
        """
        new, slots = new.transpose(1, 2), max(self.opened)
        before = new.new_zeros(*new.shape[:2], slots, new.shape[3]) if opened is None else opened[:, :, :slots]
        joined = torch.cat([before, new], 2) if slots else new
        if self.aligned:
            return joined
        columns = torch.arange(self.columns, device=new.device)
        own = torch.tensor(self.opened, device=new.device)[:, None]
        index = torch.where(columns < own, columns, columns - own + slots).clamp(max=self.columns - 1)
        return joined.gather(2, index[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))

    def chunks(self, joined: torch.Tensor) -> Iterable[torch.Tensor]:
        """`[batch, H, columns, features]` as chunks `[batch times H, features, C]`; the last may be shorter."""
        number = -(-self.columns // self.size)
        missing = number * self.size - self.columns
        padded = F.pad(joined, (0, 0, 0, missing)) if missing else joined
        by_chunk = padded.unflatten(2, (number, self.size)).permute(2, 0, 1, 4, 3).flatten(1, 2)
        *whole, last = by_chunk.contiguous().unbind(0)
        return [*whole, last[..., : self.columns - (number - 1) * self.size]]

    def unchunk(self, parts: list[torch.Tensor], batch: int) -> torch.Tensor:
        """Chunks `[batch times H, features, C]` to `[batch, columns, H, features]`."""
        return torch.cat(parts, -1).unflatten(0, (batch, -1)).permute(0, 3, 1, 2)

    def new_part(self, columns: torch.Tensor) -> torch.Tensor:
        """Of `[batch, columns, H, features]` the new tokens, `[batch, width, H, features]`."""
        return _window(columns, self.opened, self.span.width)

    def open_part(self, joined: torch.Tensor) -> torch.Tensor:
        """Of `[batch, H, columns, features]` what lies beyond the last boundary, `[batch, H, slots, features]`."""
        starts = [count - count % self.size for count in self.counts]
        slots = max(count - start for count, start in zip(self.counts, starts, strict=True))
        return _window(joined.transpose(1, 2), starts, slots).transpose(1, 2)

    def last_inputs(self, inputs: torch.Tensor, width: int) -> torch.Tensor:
        """Of `[batch, width + new tokens, hidden]` the last `width` real ones of each row."""
        return _window(inputs, self.span.lengths, width)

    def whole(self, index: int, keep_state: bool) -> bool | torch.Tensor | None:
        """
        Which rows fill a chunk, so that it is written: all, `[batch]` bool, or `None` for none.

        What the last one would write is for a kept state only.
        """
        if not keep_state and (index + 1) * self.size >= self.columns:
            return None
        filled = [count >= (index + 1) * self.size for count in self.counts]
        if all(filled):
            return True
        return torch.tensor(filled, device=self.span.device) if any(filled) else None

    def few(self, whole: bool | torch.Tensor | None, heads: int) -> torch.Tensor | None:
        """
        The rows times heads `[n]` int64 that fill a chunk, where they are less than half of all: it is cheaper to write
        it for them alone.
        """
        if not isinstance(whole, torch.Tensor):
            return None
        rows = whole.nonzero()
        if 2 * len(rows) >= len(whole):
            return None
        return (rows * heads + torch.arange(heads, device=rows.device)).flatten()

    def ends(self, index: int, size: int, heads: int) -> bool | torch.Tensor:
        """Where a chunk of another size ends with this one: everywhere, nowhere, or `[batch times H, 1, 1, 1]` by row."""
        ends = [(begin // self.size + index + 1) * self.size % size == 0 for begin in self.span.begin]
        if all(ends):
            return True
        if not any(ends):
            return False
        return self.by_head(torch.tensor(ends, device=self.span.device), heads)

    def by_head(self, rows: torch.Tensor, heads: int) -> torch.Tensor:
        """`[batch]` to `[batch times H, 1, 1, 1]`."""
        return rows.repeat_interleave(heads, 0)[:, None, None, None]


def _window(tensor: torch.Tensor, starts: list[int], width: int) -> torch.Tensor:
    """From each row's start on, `width` places along axis 1; places past the end repeat the last."""
    if len(set(starts)) == 1 and starts[0] + width <= tensor.shape[1]:
        return tensor[:, starts[0] : starts[0] + width]
    index = torch.tensor(starts, device=tensor.device)[:, None] + torch.arange(width, device=tensor.device)
    index = index.clamp(max=tensor.shape[1] - 1)
    return tensor[torch.arange(len(starts), device=tensor.device)[:, None], index]
