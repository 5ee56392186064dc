"""Pretrained Transformers become Hope models whose logits are the same until they learn, and Transformers again."""

from .comparison import Comparison, compare
from .convert import convert, convert_checkpoint
from .export import export_transformer
from .recipe import Recipe
from .report import ConversionReport
from .tokenizer_files import load_tokenizer


__all__ = [
    "Comparison",
    "ConversionReport",
    "Recipe",
    "compare",
    "convert",
    "convert_checkpoint",
    "export_transformer",
    "load_tokenizer",
]
