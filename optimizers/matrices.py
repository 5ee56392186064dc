"""Parameters seen as matrices, and equal matrices as one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """`[out, ...]` as `[out, the rest]`; a vector or a number as one row. A view where that is possible."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(len(tensor), -1) if tensor.dim() > 2 else tensor.reshape(1, -1)


def map_matrices(function: Callable[..., Any], *lists: Sequence[torch.Tensor], at_once: bool) -> list[Any]:
    """
    `[function(a, b, ...) for a, b, ... in zip(*lists)]`.

    Args:
        function: of matrices `[rows, cols]`, or of batches of them `[n, rows, cols]`; returns one tensor or a tuple.
        at_once: call it once for all that are equal in shape, dtype and device.
    """
    together = list(zip(*lists, strict=True))
    if not at_once:
        return [function(*tensors) for tensors in together]
    places = defaultdict(list)
    for index, tensors in enumerate(together):
        places[tuple((t.shape, t.dtype, t.device) for t in tensors)].append(index)
    results: list[Any] = [None] * len(together)
    for indices in places.values():
        batch = function(*(torch.stack([tensors[index] for index in indices]) for tensors in lists))
        parts = zip(*batch, strict=True) if isinstance(batch, tuple) else batch.unbind()
        for index, part in zip(indices, parts, strict=True):
            results[index] = part
    return results
