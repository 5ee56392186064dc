"""The weight files of a checkpoint directory: which there are, what they hold, and their tensors one at a time."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .tensor_info import TensorInfo


class SafetensorsFile:
    """A file of safetensors. Its tensors are maps of the file: reading their shapes reads none of their numbers."""

    def __init__(self, path: Path):
        self.path = path

    def infos(self) -> dict[str, TensorInfo]:
        with safe_open(self.path, framework="pt") as file:
            return {name: TensorInfo.of(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.infos():
            # Opened for each tensor: pages that were read stay in memory until the map they were read through goes.
            with safe_open(self.path, framework="pt") as file:
                tensor = file.get_tensor(name)
            yield name, tensor
            del tensor


class PickleFile:
    """A file that `torch.save` wrote. Its tensors are maps of the file, but where the file is older than PyTorch 1.6."""

    def __init__(self, path: Path):
        self.path = path

    def _load(self) -> dict[str, torch.Tensor]:
        held = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
        if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
            raise ValueError("it is not a dict of tensors")
        return held

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo.of(tensor) for name, tensor in self._load().items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._load().items()


# What the two formats raise for a file that is not whole, or not theirs.
DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError, KeyError, OSError, RuntimeError, ValueError)


class CheckpointFiles:
    """
    The weights in a directory, looked for as Transformers does: one file before an index, safetensors before pickles.

    Args:
        directory: that holds them.
        allow_pickle: read `pytorch_model.bin` too, tensors only.

    Raises:
        ValueError: there are none, only pickles that were not allowed, a shard is missing, or the index cannot be read.
    """

    def __init__(self, directory: Path, allow_pickle: bool = False):
        self.directory = directory
        self.pickled, self.places = self._find(allow_pickle)
        names = [WEIGHTS_NAME if self.pickled else SAFE_WEIGHTS_NAME]
        if self.places is not None:
            names = sorted(set(self.places.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(
                f"`source` {directory} lacks {', '.join(missing)}, which its index names: copy or download it again, whole."
            )
        kind = PickleFile if self.pickled else SafetensorsFile
        self.files: list[SafetensorsFile | PickleFile] = [kind(directory / name) for name in names]

    def _find(self, allow_pickle: bool) -> tuple[bool, dict[str, str] | None]:
        """Whether they are pickles, and what their index says where there is one."""
        for pickled, single, index in (
            (False, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
            (True, WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
        ):
            found = next((name for name in (single, index) if (self.directory / name).is_file()), None)
            if found is None:
                continue
            if pickled and not allow_pickle:
                raise ValueError(
                    f"`source` {self.directory} has its weights in {found}, a pickle, and reading a pickle can run code. "
                    f"Save it as safetensors, or, if you trust who made it, set `allow_pickle`: only tensors are read then."
                )
            return pickled, read_index(self.directory / index) if found == index else None
        shards = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if shards:
            raise ValueError(
                f"`source` {self.directory} lacks {SAFE_WEIGHTS_INDEX_NAME}, which says what is in {shards[0]} and others."
            )
        raise ValueError(
            f"`source` {self.directory} lacks {SAFE_WEIGHTS_NAME}: give a directory with all its safetensors weights."
        )

    def infos(self) -> dict[str, TensorInfo]:
        """
        Every tensor's shape and dtype, from the headers.

        Raises:
            ValueError: a file is damaged or not whole, or holds other tensors than the index says.
        """
        infos: dict[str, TensorInfo] = {}
        for file in self.files:
            try:
                held = file.infos()
            except DAMAGED as error:
                raise self._damaged(file, error) from error
            self._check_places(file.path.name, held)
            infos |= held
        for name, info in infos.items():
            if info.dtype.is_floating_point and info.dtype.itemsize < 2:
                raise ValueError(
                    f"`source` tensor {name!r} is stored as {info.dtype}, quantized: save it in bfloat16 or wider first."
                )
        return infos

    def _check_places(self, file: str, held: dict[str, TensorInfo]) -> None:
        if self.places is None:
            return
        for name, place in self.places.items():
            if place == file and name not in held:
                raise ValueError(
                    f"`source` {self.directory} has an index that says {name!r} is in {file}, which does not hold it: "
                    f"download the checkpoint again, whole."
                )
        for name in held:
            if self.places.get(name) != file:
                said = f"says is in {self.places[name]}" if name in self.places else "does not name"
                raise ValueError(
                    f"`source` {self.directory} has {name!r} in {file}, which its index {said}: "
                    f"these files are not of one checkpoint."
                )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Every tensor, file by file. One is in memory at a time, of a pickle the parts of one file that were read.

        Raises:
            ValueError: a file cannot be read to its end.
        """
        for file in self.files:
            read = file.tensors()
            while True:
                try:
                    name, tensor = next(read)
                except StopIteration:
                    break
                except DAMAGED as error:
                    raise self._damaged(file, error) from error
                yield name, tensor
                del tensor

    def _damaged(self, file: SafetensorsFile | PickleFile, error: Exception) -> ValueError:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        return ValueError(f"`source` has a damaged shard, {file.path}: {reason}. Copy or download it again, whole.")


def read_index(path: Path) -> dict[str, str]:
    """
    Tensor to the file that holds it, as an index file says.

    Raises:
        ValueError: it is no index, or names a file outside its directory.
    """
    try:
        # Transformers loads no checkpoint whose index lacks `metadata`, whatever it says.
        _, places = itemgetter("metadata", "weight_map")(json.loads(path.read_bytes()))
        files = {Path(file) for file in places.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`source` has an index, {path}, that is not JSON with `metadata` and a `weight_map`: copy or download it again."
        ) from error
    outside = sorted(str(file) for file in files if len(file.parts) != 1 or file.parts == ("..",))
    if outside or not files:
        raise ValueError(
            f"`source` has an index, {path}, that names {outside or 'no file'}: shards lie next to their index."
        )
    return places
