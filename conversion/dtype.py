"""The dtype of the weights that are written."""

from __future__ import annotations

from typing import Any

import torch


def check_dtype(dtype: Any) -> None:
    """Raise `ValueError` for what is neither a floating `torch.dtype` nor `"auto"`."""
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating torch.dtype or 'auto' (the source's), got {dtype!r}.")


def chosen_dtype(dtype: torch.dtype | str, own: torch.dtype) -> torch.dtype:
    """What was asked for; with `"auto"` the dtype that the weights have."""
    return own if isinstance(dtype, str) else dtype


def loses_nothing(read: torch.dtype, written: torch.dtype) -> bool:
    """Whether every number of one dtype is one of the other's too."""
    return torch.promote_types(read, written) == written
