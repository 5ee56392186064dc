"""GGUF files: Transformers reads them, and what it would pass over in silence is refused here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .quiet import quiet


MAGIC = b"GGUF"
# What llama.cpp keeps the factors of scaled rotary positions in.
ROPE_TENSORS = ("rope_freqs", "rope_factors")


class GgufFile:
    """
    A GGUF file.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: its header is not whole, it is one part of several, or it says what Transformers does not read.
    """

    def __init__(self, path: Path):
        self.path = path
        fields = self._reader.fields
        parts = fields["split.count"].contents() if "split.count" in fields else 1
        if parts > 1:
            raise ValueError(
                f"`source` {path} is one part of {parts}: merge them with llama.cpp's `llama-gguf-split --merge`."
            )
        scaled = [tensor.name for tensor in self._reader.tensors if tensor.name.startswith(ROPE_TENSORS)]
        scaled += [n for n, field in fields.items() if n.endswith(".rope.scaling.type") and field.contents() != "none"]
        if scaled:
            raise ValueError(
                f"`source` {path} scales its rotary positions ({scaled[0]}), which Transformers does not read from GGUF: "
                f"the logits would be wrong. Convert the safetensors checkpoint it was made from."
            )

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a file begins as a GGUF file does."""
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    @cached_property
    def _reader(self) -> Any:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ImportError("reading a GGUF file takes the package gguf") from error
        with self._readable():
            return GGUFReader(self.path)

    def config(self) -> Any:
        """Its Transformers config, without its quantization: the tensors come back at full precision."""
        with quiet(), self._readable():
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        _drop_quantization(config)
        return config

    def tokenizer(self, vocab_size: int) -> Any:
        """
        Its tokenizer, `None` where it has none.

        Raises:
            ValueError: it lists more tokens than the model has embeddings for. An end of text that Transformers may add of
                its own after them is not the file's fault.
        """
        fields = self._reader.fields
        if "tokenizer.ggml.model" not in fields or "tokenizer.ggml.tokens" not in fields:
            return None
        tokens = len(fields["tokenizer.ggml.tokens"].data)
        if tokens > vocab_size:
            raise ValueError(
                f"The tokenizer of `source` {self.path} disagrees with the model's `vocab_size`: it has {tokens} tokens, "
                f"and the model {vocab_size} embeddings. Make the file again, or give another tokenizer (`tokenizer`)."
            )
        with quiet(), self._readable():
            return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)

    def model(self) -> PreTrainedModel:
        """
        Its model, in float32.

        Raises:
            ValueError: it lacks tensors of its model, or has some that Transformers has no place for.
        """
        options: dict[str, Any] = {"gguf_file": self.path.name, "dtype": torch.float32}
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with quiet(), self._readable():
            model, loading = AutoModelForCausalLM.from_pretrained(self.path.parent, output_loading_info=True, **options)
        if loading["missing_keys"]:
            raise ValueError(f"`source` {self.path} lacks {', '.join(sorted(loading['missing_keys']))}.")
        # Transformers leaves out what it does not know and says nothing. It rearranges the rest, number for number.
        held = sum(math.prod(int(size) for size in tensor.shape) for tensor in self._reader.tensors)
        taken = sum(parameter.numel() for parameter in model.parameters())
        if held != taken:
            raise ValueError(
                f"`source` {self.path} holds {held:,} numbers, and Transformers takes {taken:,} for its "
                f"{type(model).__name__}: some would be lost. Convert the safetensors checkpoint it was made from."
            )
        _drop_quantization(model.config)
        return model.eval()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except ImportError:
            raise
        except Exception as error:  # gguf, NumPy and tokenizers raise what has no narrower class in common
            raise ValueError(
                f"`source` {self.path} is not whole, or not a GGUF file that Transformers reads: {error}"
            ) from error


def _drop_quantization(config: Any) -> None:
    """What the file said of quantization is not true of tensors at full precision."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
