"""Pretrained Transformers become Hope models whose logits are the same until they learn, and Transformers again."""

from .convert import convert, convert_checkpoint
from .recipe import Recipe
from .report import ConversionReport


__all__ = ["ConversionReport", "Recipe", "convert", "convert_checkpoint"]
