"""The dtype of the weights that are written."""

from __future__ import annotations

from typing import Any

import torch


def floating_dtype(dtype: Any) -> torch.dtype | str:
    """
    A dtype, by itself or by its name; `"auto"` as it is.

    Raises:
        ValueError: it is none, or not of floating numbers.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if named == "auto" or (isinstance(named, torch.dtype) and named.is_floating_point):
        return named
    raise ValueError(f"`dtype` must be a floating torch.dtype, its name, or 'auto' (the source's), got {dtype!r}.")


def chosen_dtype(dtype: torch.dtype | str, own: torch.dtype) -> torch.dtype:
    """What was asked for; with `"auto"` the dtype that the weights have."""
    return own if isinstance(dtype, str) else dtype


def loses_nothing(read: torch.dtype, written: torch.dtype) -> bool:
    """Whether every number of one dtype is one of the other's too."""
    return torch.promote_types(read, written) == written
