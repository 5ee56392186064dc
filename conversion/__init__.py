"""Pretrained Transformers become Hope models whose logits are the same until they learn."""

from .comparison import Comparison, compare
from .convert import convert
from .report import ConversionReport


__all__ = ["Comparison", "ConversionReport", "compare", "convert"]
