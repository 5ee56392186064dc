"""Where a pretrained Transformer comes from: a directory of safetensors, a GGUF file, or a model in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel


INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass
class Source:
    """
    A pretrained model to convert.

    Attributes:
        name: what the user called it.
        config: its Transformers config.
        tokenizer: its tokenizer, `None` where there is none.
        generation_config: its generation config, `None` where there is none.
    """

    name: str
    config: Any
    tokenizer: Any = None
    generation_config: GenerationConfig | None = None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor by its name, one at a time."""
        raise NotImplementedError

    def model(self) -> PreTrainedModel:
        """The model itself, in float32, to compare with."""
        raise NotImplementedError


class ModelSource(Source):
    """A model in memory."""

    def __init__(self, model: PreTrainedModel, name: str, tokenizer: Any = None):
        super().__init__(name, model.config, tokenizer, model.generation_config)
        self._model = model

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        tied = set(getattr(self._model, "all_tied_weights_keys", None) or {})
        for name, tensor in self._model.state_dict().items():
            if name not in tied:
                yield name, tensor

    def model(self) -> PreTrainedModel:
        if self._model.dtype == torch.float32 and not self._model.training:
            return self._model
        return copy.deepcopy(self._model).float().eval()


class DirectorySource(Source):
    """A directory that `save_pretrained` wrote. One shard at a time is open, and one tensor of it in memory."""

    def __init__(self, directory: Path):
        self.directory = directory
        super().__init__(str(directory), AutoConfig.from_pretrained(directory))
        self.files = self._files()
        if (directory / "tokenizer_config.json").exists():
            self.tokenizer = AutoTokenizer.from_pretrained(directory)
        if (directory / "generation_config.json").exists():
            self.generation_config = GenerationConfig.from_pretrained(directory)

    def _files(self) -> list[Path]:
        index = self.directory / INDEX_FILE
        if index.exists():
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [self.directory / name for name in named]
        else:
            files = [self.directory / WEIGHTS_FILE]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(
                f"`source` {self.directory} lacks {', '.join(missing)}: give a directory with all its safetensors weights."
            )
        return files

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (not a dict)
                        yield name, shard.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"`source` has a damaged shard, {file}: {error}.") from error

    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()


def open_source(source: str | Path | PreTrainedModel, tokenizer: Any = None) -> Source:
    """
    The source that a user named.

    Raises:
        ValueError: it is neither a model, a directory with a config, nor a GGUF file.
    """
    if isinstance(source, PreTrainedModel):
        return ModelSource(source, type(source).__name__, tokenizer)
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"`source` {path} is neither a directory with a config.json nor a .gguf file.")
    return DirectorySource(path)


def _open_gguf(path: Path) -> ModelSource:
    """Transformers reads GGUF; its tensors come back at full precision."""
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    # What the file said of quantization is no longer true of these tensors.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return ModelSource(model, str(path), tokenizer)
