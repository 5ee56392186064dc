"""GGUF files: Transformers reads them; here is what it would pass over in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging


MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf_config(path: Path) -> Any:
    """
    The Transformers config of a GGUF file. Its quantization is not said: the tensors come back at full precision.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is not whole, one part of several, or says what Transformers does not read.
    """
    _check_header(path)
    with _quiet(), _readable(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    _drop_quantization(config)
    return config


def read_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file, `None` where there is none."""
    from gguf import GGUFReader

    if "tokenizer.ggml.model" not in GGUFReader(path).fields:
        return None
    with _quiet(), _readable(path):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def read_gguf_model(path: Path) -> PreTrainedModel:
    """
    The model in a GGUF file, in float32.

    Raises:
        ValueError: the file is not whole, or lacks tensors of its model.
    """
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet(), _readable(path):
        model, loading = AutoModelForCausalLM.from_pretrained(path.parent, output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise ValueError(f"`source` {path} lacks {', '.join(sorted(loading['missing_keys']))}.")
    _drop_quantization(model.config)
    return model.eval()


def _check_header(path: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("Reading a GGUF file takes the package gguf") from error
    with _readable(path):
        reader = GGUFReader(path)
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise ValueError(
            f"`source` {path} is one part of {parts.contents()}: merge them with llama.cpp's `llama-gguf-split --merge`."
        )
    scaled = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    scaled += [
        name
        for name, field in reader.fields.items()
        if name.endswith(".rope.scaling.type") and field.contents() != "none"
    ]
    if scaled:
        raise ValueError(
            f"`source` {path} scales its rotary positions ({scaled[0]}), which Transformers does not read from GGUF: "
            f"the logits would be wrong. Convert the safetensors checkpoint it was made from."
        )


def _drop_quantization(config: Any) -> None:
    """What the file said of quantization is not true of tensors at full precision."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError) as error:
        raise ValueError(f"`source` {path} cannot be read as GGUF: {error}. Is the file whole?") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers remarks on every file that a directory would have and a GGUF file has not."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
