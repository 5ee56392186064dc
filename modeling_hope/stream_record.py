"""What is known of one row's stream besides the tensors of the layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


LOSSES_KEPT = 16
NO_TOKEN = -1  # stands for a position that was read as an embedding


@dataclass(frozen=True)
class StreamRecord:
    """
    What is known of one row's stream besides the tensors of the layers. Never changed in place.

    Attributes:
        ids: tokens read, `[seen]` int64; -1 where an embedding was read.
        learn: of the open segment, which tokens are to be learned from, `[open]` bool on the CPU.
        embeds: of the open segment, the embeddings, `[open, hidden_size]`, where some were given as such.
        pending: a token that was sampled for this row and not read yet.
        pairs: by level, input-target pairs learned since its last update.
        updates: by level, how often it changed.
        segments, skipped, nonfinite: segments learned, not surprising enough, and with a gradient that was not finite.
        losses: mean losses (nats per token) of the last segments with something to learn, newest last.
    """

    ids: torch.Tensor
    learn: torch.Tensor
    pairs: tuple[int, ...]
    updates: tuple[int, ...]
    embeds: torch.Tensor | None = None
    pending: int | None = None
    segments: int = 0
    skipped: int = 0
    nonfinite: int = 0
    losses: tuple[float, ...] = ()

    @classmethod
    def new(cls, levels: int, device: torch.device | str | None = None) -> StreamRecord:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return cls(none, torch.empty(0, dtype=torch.bool), (0,) * levels, (0,) * levels)

    @property
    def seen(self) -> int:
        """Tokens read."""
        return len(self.ids)
