"""A checkpoint written tensor by tensor, of which only the tensor at hand is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .tensor_info import TensorInfo


DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}
WRITTEN_AT_ONCE = 2**20  # bytes: little enough for the allocator to use the room of one cast for the next


class CheckpointWriter:
    """
    Writes a model's weights as `save_pretrained` would: the same shards, names and index.

    A shard's size, and where in it each tensor lies, follow from `infos` alone. The files are laid out at the start and
    every tensor goes to its place when it comes, so that tensors may come in any order and none waits for another.
    safetensors' own `save_file` wants all tensors of a shard at once.

    Args:
        directory: where the files go; exists.
        infos: every tensor of the checkpoint, in the order of the state dict.
        max_shard_size: bytes, or a size such as `"5GB"`. A larger tensor has a shard to itself.
    """

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo], max_shard_size: int | str = "5GB"):
        self.directory = Path(directory)
        self.infos = dict(infos)
        try:
            self.split = split_state_dict_into_shards_factory(
                self.infos,
                get_storage_size=lambda info: info.nbytes,
                filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise ValueError(f"`max_shard_size` is not a size: {error}") from error
        self.missing = dict.fromkeys(self.infos)
        self._offsets: dict[str, int] = {}
        for filename, names in self.split.filename_to_tensors.items():
            self._lay_out(self.directory / filename, names)

    def _lay_out(self, file: Path, names: Sequence[str]) -> None:
        """The file with its header (https://huggingface.co/docs/safetensors, "Format"), its tensors still zeros."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes first, as safetensors has them: every tensor is then aligned.
        for name in sorted(names, key=lambda name: (-self.infos[name].dtype.itemsize, name)):
            info = self.infos[name]
            start, end = end, end + info.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
            self._offsets[name] = start
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with file.open("xb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            data = opened.tell()
            opened.truncate(data + end)
        for name in names:
            self._offsets[name] += data

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """
        Write a tensor, cast to the dtype that its info says; it may be a view, and share its storage with others.

        Raises:
            ValueError: the checkpoint has no such tensor, or has it already, it is of another shape, or the cast makes
                finite values infinite.
        """
        info = self.infos.get(name)
        if info is None:
            raise ValueError(f"Tensor {name!r} has no place in the checkpoint.")
        if name not in self.missing:
            raise ValueError(f"Tensor {name!r} was written already.")
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"Tensor {name!r} is {tuple(tensor.shape)}, its place in the checkpoint {info.shape}.")
        with (self.directory / self.split.tensor_to_filename[name]).open("r+b") as file:
            file.seek(self._offsets[name])
            for part in _parts(tensor.detach()):
                cast = cast_finite(name, part.cpu(), info.dtype).contiguous()
                file.write(cast.view(-1).view(torch.uint8).numpy().data)
        del self.missing[name]

    def close(self) -> None:
        """
        Write the index, where there are several shards.

        Raises:
            ValueError: tensors are missing.
        """
        if self.missing:
            raise ValueError(f"The checkpoint lacks {', '.join(map(repr, self.missing))}.")
        if self.split.is_sharded:
            parameters = sum(info.numel for info in self.infos.values())
            metadata = {"total_parameters": parameters, **self.split.metadata}
            index = {"metadata": metadata, "weight_map": self.split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.directory / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def write_pretrained(
    directory: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    infos: Mapping[str, TensorInfo],
    config: PreTrainedConfig,
    generation_config: GenerationConfig,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Write what `save_pretrained` of a model and of its tokenizer would, the weights tensor by tensor.

    Args:
        directory: where the files go; exists.
        tensors: every tensor of `infos`, in any order.
        tokenizer: `None` where there is none.

    Raises:
        ValueError: as in `CheckpointWriter`.
    """
    writer = CheckpointWriter(directory, infos, max_shard_size)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.close()
    config.save_pretrained(directory)
    generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def cast_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    A tensor in another dtype.

    Raises:
        ValueError: finite values become infinite; `name` is the tensor's.
    """
    cast = tensor.to(dtype)
    if _narrows(tensor.dtype, dtype) and bool((cast.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"Tensor {name!r} has values too large for {dtype}: choose another dtype.")
    return cast


def _narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether finite values can become infinite."""
    floating = source.is_floating_point and target.is_floating_point
    return floating and torch.finfo(target).max < torch.finfo(source).max


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tensor's rows, as many together as `WRITTEN_AT_ONCE` has room for."""
    if tensor.dim() == 0:
        return [tensor]
    row = max(tensor[:1].nbytes, 1)
    return tensor.split(max(WRITTEN_AT_ONCE // row, 1))
