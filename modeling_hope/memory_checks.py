"""Whether a saved memory fits a model: its form, its numbers, and its tensors. Every problem is a `ValueError`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .configuration_hope import HopeConfig
from .fast_weights import MEMORY_TENSORS
from .slow_weights import stored_parameters
from .stream_record import LOSSES_KEPT, NO_TOKEN


# The form of a description: a dict has exactly these entries, a list any number of such, a tuple gives alternatives.
NONE = type(None)
FORM: dict[str, Any] = {
    "model": dict,
    "dtype": (str, NONE),
    "columns": int,
    "rows": [
        {
            "pending": (int, NONE),
            "pairs": [int],
            "updates": [int],
            "segments": int,
            "skipped": int,
            "nonfinite": int,
            "losses": [float],
        }
    ],
    "notes": dict,
    "lost": (
        {
            "dtype": (str, NONE),
            "low_rank_error": (float, NONE),
            "relative_error": float,
            "worst_tensor": str,
            "worst_error": float,
        },
        NONE,
    ),
}
SAMPLES_PER_PARAMETER = 16


class Described(Protocol):
    """What is checked of a tensor that is not read yet."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def check_contents(description: dict[str, Any], tensors: Mapping[str, Described], model: Any) -> None:
    """
    Raise `ValueError` unless a memory is one that this model could have come to; see `HopeCache.tensors` for the names.

    Changes nothing and allocates nothing on the model's device.

    Args:
        description: as `memory_format.describe` makes it.
        tensors: by name; `rows.*.ids` are `torch.Tensor`s on any device.
        model: a Hope model, with or without a head.
    """
    decoder, config = hope_decoder(model), model.config
    check_form(description, FORM, "memory.json")
    differing = differing_fields(description["model"], config.memory_fields)
    if differing:
        raise ValueError(f"it belongs to another model: {differing}")
    lost = description["lost"]
    if lost is not None and not all(0 <= lost[name] < math.inf for name in ("relative_error", "worst_error")):
        raise ValueError("`lost` holds an error that is no number of 0 or more")
    unplaced = dict(tensors)
    rows = description["rows"]
    seen = [_check_row(f"rows.{index}", row, unplaced, config) for index, row in enumerate(rows)]
    if description["columns"] < max(seen, default=0):
        raise ValueError(f"`columns` is {description['columns']}, and a row has read {max(seen)} tokens")
    for index, layer in enumerate(decoder.layers):
        _check_mixer(f"layers.{index}", layer.mixer, index, seen, unplaced, config)
        for level in config.cms_levels_per_layer[index]:
            for number, row in enumerate(rows):
                place = f"layers.{index}.levels.{level}.rows.{number}"
                _check_level(
                    place, layer.cms.level(level), row["updates"][level], row["pairs"][level], unplaced, config
                )
    if unplaced:
        raise ValueError(f"it holds {next(iter(unplaced))}, which the model has no place for")


def check_form(value: Any, form: Any, place: str) -> None:
    """Raise `ValueError` unless JSON has a form such as `FORM`; a whole number is no float, and true no number."""
    if isinstance(form, tuple):
        fitting = [kind for kind in form if type(value) is (kind if isinstance(kind, type) else type(kind))]
        check_form(value, fitting[0] if fitting else form[0], place)
    elif isinstance(form, dict) and isinstance(value, dict):
        odd = sorted(form.keys() ^ value.keys())
        if odd:
            raise ValueError(f"{place} {'lacks' if odd[0] in form else 'has an unknown'} `{odd[0]}`")
        for name, kind in form.items():
            check_form(value[name], kind, f"{place}: `{name}`")
    elif isinstance(form, list) and isinstance(value, list):
        for index, item in enumerate(value):
            check_form(item, form[0], f"{place}[{index}]")
    elif type(value) is not form:
        kind = form if isinstance(form, type) else type(form)
        raise ValueError(f"{place} has to be a {kind.__name__}, not {json.dumps(value)[:40]}")


def _check_row(place: str, row: dict[str, Any], tensors: dict[str, Described], config: HopeConfig) -> int:
    """Returns the tokens that the row has read."""
    ids, learn = (_take(tensors, f"{place}.{name}") for name in ("ids", "learn"))
    embeds = tensors.pop(f"{place}.embeds", None)
    _require(len(ids.shape) == 1 and ids.dtype == torch.int64, f"{place}.ids", ids, "[tokens] int64")
    assert isinstance(ids, torch.Tensor)
    seen, segment, vocab = ids.shape[0], config.segment_length, config.vocab_size
    if seen and not (int(ids.min()) >= NO_TOKEN and int(ids.max()) < vocab):
        raise ValueError(f"{place}.ids holds ids outside the vocabulary of {vocab} tokens")
    if row["pending"] is not None and not 0 <= row["pending"] < vocab:
        raise ValueError(f"{place}: `pending` is {row['pending']}, outside the vocabulary of {vocab} tokens")
    opened = seen % segment if segment is not None else 0
    _require(learn.shape == (opened,) and learn.dtype == torch.bool, f"{place}.learn", learn, f"[{opened}] bool")
    if embeds is not None:
        fits = bool(opened) and tuple(embeds.shape) == (opened, config.hidden_size) and embeds.dtype.is_floating_point
        _require(fits, f"{place}.embeds", embeds, f"[{opened}, {config.hidden_size}] of an open segment")
    elif opened and bool((ids[seen - opened :] == NO_TOKEN).any()):
        raise ValueError(f"{place}.embeds is missing: the open segment has tokens that were given as embeddings")
    _check_numbers(place, row, seen, config)
    return seen


def _check_numbers(place: str, row: dict[str, Any], seen: int, config: HopeConfig) -> None:
    """Whether the counts of a row can be those of a stream of `seen` tokens."""
    periods, learning = config.cms_periods, config.learning_levels
    whole = seen // periods[0] if periods[0] is not None else 0
    segments, skipped, nonfinite, losses = (row[name] for name in ("segments", "skipped", "nonfinite", "losses"))
    counts = {"segments": segments, "skipped": skipped, "nonfinite": nonfinite}
    negative = [name for name, count in counts.items() if count < 0]
    if negative:
        raise ValueError(f"{place}: `{negative[0]}` is {counts[negative[0]]}")
    if segments + skipped > whole or nonfinite > whole * (1 + len(periods)):
        raise ValueError(f"{place}: {counts} cannot be: {seen} tokens have {whole} whole segments")
    if not min(segments + skipped, LOSSES_KEPT) <= len(losses) <= min(segments + skipped + nonfinite, LOSSES_KEPT):
        raise ValueError(f"{place}: {len(losses)} `losses` do not go with {counts}")
    for name in ("pairs", "updates"):
        if len(row[name]) != len(periods):
            raise ValueError(f"{place}: `{name}` has {len(row[name])} entries for {len(periods)} levels")
    held = {level for levels in config.cms_levels_per_layer or [] for level in levels}
    for level, period in enumerate(periods):
        pairs, updates = row["pairs"][level], row["updates"][level]
        most_pairs = most_updates = 0
        if period is not None and level in held:
            assert periods[0] is not None
            since = seen % period if level in learning else seen  # a level that does not learn does not update
            most_pairs = min(since // periods[0], segments) * (periods[0] - 1)
            most_updates = min(seen // period, segments)
        if not (0 <= pairs <= most_pairs and 0 <= updates <= most_updates):
            raise ValueError(
                f"{place}: level {level} has {pairs} `pairs` and {updates} `updates`; after {seen} tokens and {segments} "
                f"segments learned it can have {most_pairs} and {most_updates}"
            )


def _check_mixer(
    place: str, mixer: Any, index: int, seen: list[int], tensors: dict[str, Described], config: HopeConfig
) -> None:
    segment = config.segment_length
    with torch.device("meta"):  # one like it, that has shapes only
        like = torch.empty(0, dtype=torch.float32)
        expected = type(mixer)(config, index).empty_state(len(seen), like)
    starts = [count - count % segment if segment is not None else count for count in seen]
    kinds = {"mixer": seen} if mixer.rewinds else {"mixer": seen, "opened": starts}
    for kind, counts in kinds.items():
        prefix = f"{place}.{kind}."
        found = {name: tensors.pop(prefix + name, None) for name in expected.tensors}
        missing = [name for name, tensor in found.items() if tensor is None]
        needed = any(seen) and not (kind == "opened" and config.rewinds)
        if missing and (needed or len(missing) < len(found)):
            raise ValueError(f"{prefix}{missing[0]} is missing")
        slots = max((mixer.slots(count) for count in counts), default=0)
        for name, tensor in found.items():
            if tensor is None:
                continue
            shape, least = list(expected.tensors[name].shape), 0
            if name in expected.growing and len(tensor.shape) == len(shape):
                shape[-2], least = tensor.shape[-2], slots
            fits = list(tensor.shape) == shape and shape[-2] >= least and tensor.dtype.is_floating_point
            words = f"{shape} of floats" + (f", with {least} slots or more" if least else "")
            _require(fits, prefix + name, tensor, words)


def _check_level(
    place: str, mlp: nn.Module, updates: int, pairs: int, tensors: dict[str, Described], config: HopeConfig
) -> None:
    maps = config.learned_maps
    for kind in MEMORY_TENSORS:
        found = {name: tensors.pop(f"{place}.{kind}.{name}", None) for name in maps}
        held = [name for name, tensor in found.items() if tensor is not None]
        wanted = {
            "change": updates > 0,
            "initial": None if updates and config.cms_variant == "nested" else False,
            "gradient": pairs > 0,
            "momentum": updates > 0 and config.cms_optimizer == "momentum",
        }[kind]
        if len(held) not in (0, len(maps)) or (wanted is not None and bool(held) != wanted):
            name = next((name for name in maps if (found[name] is None) == bool(wanted)), maps[0])
            raise ValueError(
                f"{place}.{kind}.{name} is {'missing' if found[name] is None else 'there'}, which does not go with "
                f"{updates} updates and {pairs} waiting pairs"
            )
        for name, tensor in found.items():
            if tensor is not None:
                module = getattr(mlp, name)
                shape = (module.out_features, module.in_features)
                fits = tuple(tensor.shape) == shape and tensor.dtype.is_floating_point
                _require(fits, f"{place}.{kind}.{name}", tensor, f"{list(shape)} of floats, as the model's map")


def _take(tensors: dict[str, Described], name: str) -> Described:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors.pop(name)


def _require(fits: bool, name: str, tensor: Described, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {list(tensor.shape)} {str(tensor.dtype)[6:]} and has to be {expected}")


def hope_decoder(model: Any) -> Any:
    """The `HopeModel` of a model, whatever is around it; `ValueError` when it is no Hope model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not hasattr(getattr(decoder, "config", None), "memory_fields"):
        raise ValueError(f"`model` is a {type(model).__name__}: give the Hope model that the memory belongs to.")
    return decoder


def differing_fields(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """In words, where two sets of memory fields differ; empty when they do not."""
    return ", ".join(
        f"`{name}` is {ours.get(name)!r} in the memory and {theirs.get(name)!r} in the model"
        for name in {**theirs, **ours}
        if name not in ours or name not in theirs or ours[name] != theirs[name]
    )


def weight_sample(model: Any) -> torch.Tensor:
    """A few numbers of every parameter, evenly spaced, `[samples]` float32: tells models of one shape apart."""
    samples = []
    for parameter in stored_parameters(hope_decoder(model)):  # with or without a head
        flat = parameter.reshape(-1)
        step = max(flat.numel() // SAMPLES_PER_PARAMETER, 1)
        samples.append(flat[::step][:SAMPLES_PER_PARAMETER].float().cpu())
    return torch.cat(samples)


def check_weights(sample: torch.Tensor, dtype: str, model: Any) -> None:
    """Raise `ValueError` unless the sample is of this model's weights, as they are or cast from or to `dtype`."""
    own = weight_sample(model)
    if sample.dtype != own.dtype or not same_weights(sample, own, dtype, model.dtype):
        raise ValueError("it belongs to another model, of the same shape and other weights (adapters count)")


def same_weights(sample: torch.Tensor, own: torch.Tensor, dtype: str, own_dtype: torch.dtype) -> bool:
    """Whether two samples are of one model's weights, in these dtypes."""
    if sample.shape != own.shape:
        return False
    if dtype == str(own_dtype):
        # What a model of low precision holds in float32 may have been cast since.
        return torch.equal(sample.to(own_dtype), own.to(own_dtype))
    # A cast rounds, to bfloat16 by at most 2**-9. A hash of rounded numbers would not do: a cast to float16 on the way
    # may round to another bfloat16 than none.
    return torch.allclose(sample, own, rtol=2**-8, atol=1e-6)
