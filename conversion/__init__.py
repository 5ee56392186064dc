"""Pretrained Transformers become Hope models whose logits are the same until they learn."""

from .convert import convert
from .report import ConversionReport


__all__ = ["ConversionReport", "convert"]
