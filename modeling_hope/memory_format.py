"""A HopeCache as a description and named tensors, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .fast_weights import MEMORY_TENSORS, NOTHING_LEARNED, LevelMemory
from .memory_checks import check_contents, check_weights, hope_decoder, weight_sample
from .memory_files import read_files, write_files
from .memory_precision import LowRank, decode, encode
from .mixer_state import MixerState
from .slow_weights import device_of
from .stream_record import StreamRecord


if TYPE_CHECKING:
    from .cache_hope import HopeCache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The fields of a StreamRecord that are numbers; its tensors are saved with the others.
RECORD_FIELDS = ("pending", "pairs", "updates", "segments", "skipped", "nonfinite", "losses")
FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class SavedMemory:
    """
    What a memory's files take, and what was lost in them. `str()` says it in a line.

    Attributes:
        path: the directory.
        bytes: of its files.
        full_bytes: of the tensors as they are held, what is shared counted once.
        relative_error: root mean square, over the floating-point tensors, of |read back - held| / |held|.
        worst_tensor, worst_error: the tensor with the largest such error; empty and 0 when nothing was lost.
    """

    path: Path
    bytes: int
    full_bytes: int
    relative_error: float = 0.0
    worst_tensor: str = ""
    worst_error: float = 0.0

    def __str__(self) -> str:
        size = f"{self.path}: {self.bytes / 2**20:,.1f} MiB"
        if not self.worst_tensor:
            return f"{size}, nothing lost"
        return (
            f"{size} for {self.full_bytes / 2**20:,.1f} MiB, relative error {self.relative_error:.2%}, "
            f"at most {self.worst_error:.2%} ({self.worst_tensor})"
        )


def save_memory(
    cache: HopeCache, path: Path, model: nn.Module | None, dtype: torch.dtype | None, low_rank_error: float | None
) -> SavedMemory:
    """See `HopeCache.save_pretrained`."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, or None to keep it, got {dtype}.")
    if low_rank_error is not None and not 0 < low_rank_error < 1:
        raise ValueError(f"`low_rank_error` must lie between 0 and 1, or be None for none, got {low_rank_error}.")
    if model is None and any(cache.seen):
        raise ValueError(
            "The memory was not saved: the model that it was last used with is gone, and its weights are noted with it. Give "
            "that model, loaded again: `save_pretrained(directory, model=...)`."
        )
    description, tensors = describe(cache, model), cache.tensors()
    if model is not None:
        try:
            check_contents(description, tensors, model)
        except ValueError as error:
            raise ValueError(f"The memory was not saved, for this model could not read it again: {error}.") from error
    stored, errors = encode(tensors, dtype, low_rank_error)
    lost: dict[str, Any] = {}
    worst = max(errors, key=lambda name: errors[name], default="")
    if worst and errors[worst] > 0:
        mean = math.sqrt(sum(error**2 for error in errors.values()) / len(errors))
        lost = {"relative_error": mean, "worst_tensor": worst, "worst_error": errors[worst]}
        options = {"dtype": None if dtype is None else str(dtype), "low_rank_error": low_rank_error}
        description["lost"] = {**options, **lost}
    if model is not None:
        stored[FINGERPRINT] = weight_sample(model)
    full_bytes = sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values())
    return SavedMemory(path, write_files(path, description, stored), full_bytes, **lost)


def describe(cache: HopeCache, model: nn.Module | None) -> dict[str, Any]:
    """All of a memory but its tensors, as JSON says it; `memory_checks.FORM` is its form."""
    try:
        notes = json.loads(json.dumps(cache.notes, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`notes` cannot be saved as JSON: {error}.") from error
    if notes != cache.notes:
        raise ValueError("`notes` would come back from JSON changed: use dicts with str keys, and lists for tuples.")
    description = {
        "model": cache.memory_fields,
        "dtype": None if model is None else str(model.dtype),
        "columns": cache.columns,
        "rows": [{name: getattr(row, name) for name in RECORD_FIELDS} for row in cache.rows],
        "notes": notes,
        "lost": cache.lost,
    }
    return json.loads(json.dumps(description))


def load_memory(cache: HopeCache, path: Path, model: Any) -> None:
    """Fill an empty cache of a model; see `HopeCache.from_pretrained`."""
    description, stored = read_files(path)
    try:
        sample, dtype = stored.pop(FINGERPRINT, None), description.get("dtype")
        tensors = decode(stored)
        check_contents(description, tensors, model)
        if (sample is None) != (dtype is None):
            raise ValueError(f"`dtype` and {FINGERPRINT} go together, and one is missing")
        if sample is not None:
            check_weights(sample, str(dtype), model)
    except ValueError as error:
        raise ValueError(
            f"The memory in {path} cannot be used: {error}. Load it with the model that it was saved with; if this is that "
            "model, take it from a backup, or read the text again."
        ) from error
    cache.columns, cache.notes, cache.lost = description["columns"], description["notes"], description["lost"]
    _fill(cache, description["rows"], _Contents(tensors), model)


class _Contents:
    """A memory's tensors, each copied out of its file once: what was shared is shared again."""

    def __init__(self, tensors: dict[str, torch.Tensor | LowRank]):
        self.tensors = tensors
        self.made: dict[Any, Any] = {}
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            place = name.split(".", 3)
            if len(place) == 4 and place[2] in ("mixer", "opened") and isinstance(tensor, torch.Tensor):
                self.states.setdefault(".".join(place[:3]), {})[place[3]] = tensor

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def copy(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.tensors[name]
        return self.once((id(tensor), device, dtype), lambda: tensor.to(device, dtype, copy=True))

    def state(self, name: str, mixer: Any, device: torch.device, dtype: torch.dtype) -> MixerState | None:
        """Of the dtypes that the mixer uses in a model of this one: a model keeps its memory when it is cast."""
        found = self.states.get(name)
        if found is None:
            return None

        def make() -> MixerState:
            return mixer.state_class(**found).clone().to(device, dtype)

        return self.once((device, *((key, id(tensor)) for key, tensor in found.items())), make)

    def level(self, prefix: str, maps: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> LevelMemory:
        kinds: dict[str, Any] = {
            kind: {
                name: self.copy(place, device, dtype)
                for name in maps
                if (place := f"{prefix}{kind}.{name}") in self.tensors
            }
            for kind in MEMORY_TENSORS
        }
        key = tuple((kind, name, id(tensor)) for kind, found in kinds.items() for name, tensor in found.items())
        return self.once(key, lambda: LevelMemory(**kinds)) if key else NOTHING_LEARNED


def _fill(cache: HopeCache, rows: list[dict[str, Any]], contents: _Contents, model: Any) -> None:
    wide = torch.promote_types(model.dtype, torch.float32)
    device = device_of(hope_decoder(model))
    for index, row in enumerate(rows):
        numbers: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
        embeds = f"rows.{index}.embeds"
        record = StreamRecord(
            ids=contents.copy(f"rows.{index}.ids", device, torch.int64),
            learn=contents.copy(f"rows.{index}.learn", torch.device("cpu"), torch.bool),
            embeds=contents.copy(embeds, device, model.dtype) if embeds in contents.tensors else None,
            **numbers,
        )
        cache.rows.append(record)
    maps = model.config.learned_maps
    for index, (layer, decoder_layer) in enumerate(zip(cache.layers, hope_decoder(model).layers, strict=True)):
        mixer, place = decoder_layer.mixer, device_of(decoder_layer)
        layer.mixer = contents.state(f"layers.{index}.mixer", mixer, place, model.dtype)
        if not (mixer.rewinds or model.config.rewinds):  # else it would not be kept up to date
            layer.opened = contents.state(f"layers.{index}.opened", mixer, place, model.dtype)
        for level in layer.levels:
            prefix = f"layers.{index}.levels.{level}.rows."
            layer.levels[level] = [contents.level(f"{prefix}{row}.", maps, place, wide) for row in range(len(rows))]
