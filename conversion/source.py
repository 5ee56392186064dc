"""Where a pretrained Transformer comes from: a directory, a hub name, a GGUF file, or a model in memory."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .checkpoint_files import CheckpointFiles
from .config_file import read_config
from .gguf_file import GgufFile
from .hub import download_description, download_weights, is_hub_name
from .tensor_info import TensorInfo
from .tokenizer_files import check_vocabulary, read_tokenizer


@dataclass
class Source:
    """
    A pretrained model to convert. What describes it is read when it is opened, its weights when they are asked for.

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

    def infos(self) -> dict[str, TensorInfo]:
        """
        Shape and dtype of every tensor that `tensors()` gives, by its name, from headers where they come from files.

        Raises:
            ValueError: the weights are not whole.
        """
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Every tensor by its name, one at a time, file by file.

        They may be maps of a file, or the model's own: copy one before changing it. Let go of each before the next, and
        no more than one is in memory.
        """
        raise NotImplementedError

    def model(self) -> PreTrainedModel:
        """The model itself, in float32 and `eval()` mode, to compare with."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most of the weights have."""
        sizes: Counter[torch.dtype] = Counter()
        for info in self.infos().values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] += info.numel
        if not sizes:
            raise ValueError(f"`source` {self.name} has no floating-point weights.")
        return sizes.most_common(1)[0][0]


class ModelSource(Source):
    """A model in memory, which stays as it is."""

    def __init__(self, model: PreTrainedModel, name: str, tokenizer: Any = None):
        config = copy.deepcopy(model.config)
        # What the model is, and not what the checkpoint was that it came from.
        config.architectures = [type(model).__name__]
        check_vocabulary(tokenizer, config)
        super().__init__(name, config, tokenizer, getattr(model, "generation_config", None))
        self._model = model

    def infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, tensor in self.tensors():
            if tensor.is_meta:
                raise ValueError(
                    f"`source` has {name!r} outside memory (`device_map`): load it without, or give its directory."
                )
            infos[name] = TensorInfo.of(tensor)
        return infos

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        tied = set(getattr(self._model, "all_tied_weights_keys", None) or {})
        for name, tensor in self._model.state_dict().items():
            if name not in tied:
                yield name, tensor

    def model(self) -> PreTrainedModel:
        if any(parameter.dtype != torch.float32 for parameter in self._model.parameters()):
            # Made anew: a model that was cast has its rotary angles rounded too, which its config does not say.
            with init.no_init_weights():
                made = type(self._model)(copy.deepcopy(self._model.config)).float()
            made.load_state_dict(self._model.state_dict())
            return made.eval()
        return copy.deepcopy(self._model).eval() if self._model.training else self._model


class GgufSource(Source):
    """A GGUF file, which Transformers reads whole and at full precision when its tensors are asked for."""

    def __init__(self, path: Path, tokenizer: Any = None):
        self.file = GgufFile(path)
        config = self.file.config()
        check_vocabulary(tokenizer, config)
        if tokenizer is None:
            tokenizer = self.file.tokenizer(config.vocab_size)
        super().__init__(str(path), config, tokenizer, GenerationConfig.from_model_config(config))

    @cached_property
    def _loaded(self) -> ModelSource:
        return ModelSource(self.file.model(), self.name)

    def infos(self) -> dict[str, TensorInfo]:
        return self._loaded.infos()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._loaded.tensors()

    def model(self) -> PreTrainedModel:
        return self._loaded.model()


class DirectorySource(Source):
    """
    A directory as `save_pretrained` writes one.

    Args:
        name: what the user called it; the directory itself by default.
        tokenizer: to use in place of its own.
        allow_pickle: read weights that are pickled.
        complete: called before its weights are looked for, to put them there.
    """

    def __init__(
        self,
        directory: Path,
        name: str | None = None,
        tokenizer: Any = None,
        allow_pickle: bool = False,
        complete: Callable[[], None] = lambda: None,
    ):
        name = name or str(directory)
        config = read_config(directory, name)
        tokenizer = read_tokenizer(directory) if tokenizer is None else tokenizer
        check_vocabulary(tokenizer, config)
        super().__init__(name, config, tokenizer)
        if (directory / GENERATION_CONFIG_NAME).is_file():
            try:
                self.generation_config = GenerationConfig.from_pretrained(directory)
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"`source` {name} has a {GENERATION_CONFIG_NAME} that cannot be read: {error}"
                ) from error
        self.directory = directory
        self._allow_pickle = allow_pickle
        self._complete = complete

    @cached_property
    def files(self) -> CheckpointFiles:
        self._complete()
        return CheckpointFiles(self.directory, self._allow_pickle)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return self.files.infos()

    def infos(self) -> dict[str, TensorInfo]:
        return dict(self._infos)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.infos()  # refuses a checkpoint that is not whole before the first tensor is given
        return self.files.tensors()

    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=torch.float32, use_safetensors=not self.files.pickled, trust_remote_code=False
        ).eval()


def open_source(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Source:
    """
    The source that a user named.

    Args:
        source: a directory of safetensors, a GGUF file, a name on the hub ("owner/name"), or a model in memory. A path
            that exists wins over a hub name.
        tokenizer: to use in place of the source's own, or where it has none: a tokenizer, or where to load one from.
        revision: a branch, tag or commit on the hub.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors; tensors only, but from whom you trust.

    Raises:
        ValueError: it is none of these, or its config or tokenizer cannot be used. Its weights are looked at when they
            are asked for, after the architecture was checked.
    """
    if isinstance(tokenizer, (str, Path)):
        place, tokenizer = tokenizer, read_tokenizer(tokenizer)
        if tokenizer is None:
            raise ValueError(f"`tokenizer` {place} holds no tokenizer.")
    if hasattr(source, "merge_and_unload") or getattr(source, "_hf_peft_config_loaded", False):
        raise ValueError("`source` is a model with an adapter: merge it first (PEFT's `merge_and_unload`).")
    if isinstance(source, str) and is_hub_name(source) and not os.path.exists(source):
        return _open_hub(source, revision, tokenizer, allow_pickle)
    if revision is not None:
        raise ValueError("`revision` is of a name on the hub (owner/name): leave it out.")
    if isinstance(source, PreTrainedModel):
        return ModelSource(source, type(source).__name__, tokenizer)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(os.path.expanduser(source)), tokenizer, allow_pickle)
    raise ValueError(f"`source` must be a path, a hub name or a PreTrainedModel, got a {type(source).__name__}.")


def _open_hub(name: str, revision: str | None, tokenizer: Any, allow_pickle: bool) -> DirectorySource:
    """What describes a model is fetched now, so that one that cannot be converted costs no more than that."""
    description = download_description(name, revision)
    return DirectorySource(
        description, name, tokenizer, allow_pickle, lambda: download_weights(name, description, allow_pickle)
    )


def _open_path(path: Path, tokenizer: Any, allow_pickle: bool) -> Source:
    if path.is_dir():
        return DirectorySource(path, tokenizer=tokenizer, allow_pickle=allow_pickle)
    if not path.exists():
        raise ValueError(f"`source` {path} does not exist, and is no name on the hub (owner/name).")
    if not GgufFile.recognises(path):
        raise ValueError(
            f"`source` {path} is neither a directory with a {CONFIG_NAME} nor a .gguf file: "
            f"of safetensors, give the directory that holds them and their config."
        )
    return GgufSource(path, tokenizer)
