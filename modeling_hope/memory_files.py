"""A memory on disk: its tensors as safetensors, the rest as JSON, and never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .fast_weights import LEARNED_MAPS, MEMORY_TENSORS, LevelMemory, Tensors
from .slow_weights import device_of, stored_parameters
from .stream_record import StreamRecord


if TYPE_CHECKING:
    from .cache_hope import HopeCache

FORMAT_VERSION = 1
TENSORS_FILE = "memory.safetensors"
DESCRIPTION_FILE = "memory.json"
SAMPLES_PER_PARAMETER = 16
# The fields of a StreamRecord that are numbers; its tensors are saved with the others.
RECORD_FIELDS = ("pairs", "updates", "pending", "segments", "skipped", "nonfinite", "losses")


def save_memory(cache: HopeCache, directory: str | os.PathLike[str], model: nn.Module | None) -> None:
    """Write `directory/memory.safetensors` and `directory/memory.json`; see `HopeCache.tensors` for the names."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    # Files take contiguous tensors that share nothing, and rows and views share.
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in cache.tensors().items()}
    if model is not None:
        tensors["fingerprint"] = weight_sample(model)
    description = {
        "dtype": None if model is None else str(next(model.parameters()).dtype),
        "format_version": FORMAT_VERSION,
        "model": cache.memory_fields,
        "columns": cache.columns,
        "notes": cache.notes,
        "rows": [{name: getattr(row, name) for name in RECORD_FIELDS} for row in cache.rows],
    }
    # Both are complete before either takes its name.
    staged = {name: path / f".{name}" for name in (TENSORS_FILE, DESCRIPTION_FILE)}
    save_file(tensors, staged[TENSORS_FILE])
    staged[DESCRIPTION_FILE].write_text(json.dumps(description, indent=2) + "\n")
    for name, written in staged.items():
        written.replace(path / name)


def load_memory(cache: HopeCache, directory: str | os.PathLike[str], model: Any) -> None:
    """Fill an empty cache of a model; `ValueError` says what is wrong with the files."""
    path = Path(directory)
    try:
        description = json.loads((path / DESCRIPTION_FILE).read_text())
        tensors = load_file(path / TENSORS_FILE)
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no memory: it needs {DESCRIPTION_FILE} and {TENSORS_FILE}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"The memory in {path} is damaged: {error}.") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"The memory in {path} has format version {version}, this code reads {FORMAT_VERSION}: update it."
        )
    try:
        differing = differing_fields(description["model"], model.config.memory_fields)
        if differing:
            raise ValueError(f"it belongs to another model: {differing}")
        sample = tensors.pop("fingerprint", None)
        exact = model.dtype if description["dtype"] == str(model.dtype) else None
        if sample is not None and not _same_weights(sample, weight_sample(model), exact):
            raise ValueError("it belongs to another model, of the same shape and other weights (adapters count)")
        _fill(cache, description, tensors, model)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The memory in {path} cannot be used: {error}.") from error


def _fill(cache: HopeCache, description: dict[str, Any], tensors: Tensors, model: Any) -> None:
    decoder = model.get_decoder()
    cache.columns, cache.notes, device = description["columns"], description["notes"], device_of(decoder)
    for index, row in enumerate(description["rows"]):
        numbers: dict[str, Any] = {
            name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in RECORD_FIELDS
        }
        embeds = tensors.pop(f"rows.{index}.embeds", None)
        record = StreamRecord(
            ids=tensors.pop(f"rows.{index}.ids").to(device),
            learn=tensors.pop(f"rows.{index}.learn"),
            embeds=None if embeds is None else embeds.to(device, model.dtype),
            **numbers,
        )
        cache.rows.append(record)
    maps = LEARNED_MAPS[model.config.cms_fast_weights]
    wide = torch.promote_types(model.dtype, torch.float32)
    for index, (layer, decoder_layer) in enumerate(zip(cache.layers, decoder.layers, strict=True)):
        place = device_of(decoder_layer)
        for kind in ("mixer", "opened"):
            prefix = f"layers.{index}.{kind}."
            state = {name[len(prefix) :]: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            if state:
                # A model keeps its memory when it is cast.
                setattr(layer, kind, decoder_layer.mixer.state_class(**state).to(place, model.dtype))
        for level in layer.levels:
            mlp = decoder_layer.cms.level(level)
            shapes = {name: (getattr(mlp, name).out_features, getattr(mlp, name).in_features) for name in maps}
            prefixes = [f"layers.{index}.levels.{level}.rows.{row}." for row in range(len(cache.rows))]
            layer.levels[level] = [_level_memory(tensors, prefix, shapes, place, wide) for prefix in prefixes]
    if tensors:
        raise ValueError(f"it holds {next(iter(tensors))}, which the model has no place for")


def _level_memory(
    tensors: Tensors, prefix: str, shapes: dict[str, tuple[int, int]], place: torch.device, dtype: torch.dtype
) -> LevelMemory:
    kinds: dict[str, Tensors] = {kind: {} for kind in MEMORY_TENSORS}
    for kind, found in kinds.items():
        for name, shape in shapes.items():
            tensor = tensors.pop(f"{prefix}{kind}.{name}", None)
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(f"{prefix}{kind}.{name} is {tuple(tensor.shape)}, the model's map {shape}")
            found[name] = tensor.to(place, dtype)
    return LevelMemory(kinds["change"], kinds["initial"], kinds["gradient"], kinds["momentum"])


def differing_fields(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """In words, where two sets of memory fields differ; empty when they do not."""
    return ", ".join(
        f"`{name}` is {ours.get(name)!r} in the memory and {theirs.get(name)!r} in the model"
        for name in theirs
        if ours.get(name) != theirs.get(name)
    )


def weight_sample(model: Any) -> torch.Tensor:
    """A few numbers of every parameter, evenly spaced, `[samples]` float32: tells models of one shape apart."""
    samples = []
    for parameter in stored_parameters(model.get_decoder()):  # with or without a head
        flat = parameter.reshape(-1)
        step = max(flat.numel() // SAMPLES_PER_PARAMETER, 1)
        samples.append(flat[::step][:SAMPLES_PER_PARAMETER].float().cpu())
    return torch.cat(samples)


def _same_weights(sample: torch.Tensor, other: torch.Tensor, exact: torch.dtype | None) -> bool:
    """Of models of one dtype, `exact`, or of several: what a model of low precision has in float32 may have been cast."""
    if sample.shape != other.shape:
        return False
    if exact is not None:
        return torch.equal(sample.to(exact), other.to(exact))
    # A cast rounds, to bfloat16 by at most 2**-9. A hash of rounded numbers would not do: a cast to float16 on the way
    # may round to another bfloat16 than none.
    return torch.allclose(sample, other, rtol=2**-8, atol=1e-6)
