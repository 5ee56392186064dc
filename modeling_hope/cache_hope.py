"""HopeCache: everything a Hope model remembers of the streams it reads."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_hope import HopeConfig
from .fast_weights import MEMORY_TENSORS, NOTHING_LEARNED, LevelMemory
from .memory_checks import differing_fields, hope_decoder
from .memory_format import SavedMemory, load_memory, save_memory
from .mixer_state import MixerState
from .row_stack import RowStacks
from .stream_record import StreamRecord


OFFLOADED = torch.device("cpu")


class HopeCacheLayer(CacheLayerMixin):
    """
    One layer's part of a `HopeCache`.

    Attributes:
        mixer: the mixer's state, batched; `None` while nothing was read.
        opened: what it was when each row's open segment began, where a mixer cannot go back to that by itself; `None`
            while nothing was read, or where nothing is learned.
        levels: by level, what each row has learned.
    """

    _layer_type = "hope"

    def __init__(self, held: Iterable[int] = (), batch: int = 0, **kwargs: Any):
        super().__init__()
        self.mixer: MixerState | None = None
        self.opened: MixerState | None = None
        self.levels: dict[int, list[LevelMemory]] = {level: [NOTHING_LEARNED] * batch for level in held}

    def select(self, rows: Sequence[int]) -> None:
        self.map_states(lambda state: state.select(torch.tensor(rows, dtype=torch.int64, device=state.device)))
        self.levels = {level: [memories[row] for row in rows] for level, memories in self.levels.items()}

    def map_states(self, function: Callable[[MixerState], MixerState]) -> None:
        """Replace the mixer's states, where there are any."""
        same = self.opened is self.mixer
        self.mixer = None if self.mixer is None else function(self.mixer)
        if same:
            self.opened = self.mixer
        else:
            self.opened = None if self.opened is None else function(self.opened)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: states are made by the mixers."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("A HopeCache is written by Hope's own layers; it does not serve other models.")

    def get_mask_sizes(self, query_length: int) -> NoReturn:
        raise NotImplementedError("Hope's layers make their own masks; a HopeCache does not serve other models.")

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class HopeCache(Cache):
    """
    The memory of a batch of streams: keys and values, and what the levels have learned.

    Made empty for a model's config, handed to `forward()` or `generate()` as `past_key_values`, and changed by them.
    The tensors and records inside are never changed in place, so `clone()` copies nothing but references.

    Args:
        config (`HopeConfig`): of the model that will use it.
        batch_size (`int`, defaults to 1): rows.
        offloading (`bool`, defaults to `False`): keep the mixers' states (keys and values among them) in CPU memory while
            their layer does not run. What the levels have learned stays with the model: every token is read with it.

    ```python
    >>> memory = HopeCache(model.config)
    >>> with torch.no_grad():
    ...     model(**tokenizer("A long document.", return_tensors="pt"), past_key_values=memory)
    >>> memory.save_pretrained("memory")
    >>> memory = HopeCache.from_pretrained("memory", model=model)
    ```
    """

    def __init__(self, config: HopeConfig, batch_size: int = 1, offloading: bool = False):
        if not isinstance(config, HopeConfig):
            raise ValueError(
                f"`config` is a {type(config).__name__}: give `model.config`, or call `model.new_memory()`."
            )
        if batch_size < 0:
            raise ValueError(f"`batch_size` must be 0 or more, got {batch_size}.")
        held = config.cms_levels_per_layer or []
        super().__init__(layers=[HopeCacheLayer(levels, batch_size) for levels in held])
        self.memory_fields = config.memory_fields
        self.offloading = offloading
        self.periods: list[int | None] = list(config.cms_periods)
        self.rows = [StreamRecord.new(len(self.periods)) for _ in range(batch_size)]
        # The model it was last used with, whose weights a saved memory is checked against.
        self.model: Callable[[], nn.Module | None] = lambda: None
        # Columns of the padded batches read so far: what a mask over history and new tokens has to cover.
        self.columns = 0
        # What its user wants kept with it, as JSON can say it: goes along with forks and files.
        self.notes: dict[str, Any] = {}
        # What its rows have learned, made ready for steps of one token a row. Its own: a fork makes others.
        self.stacks: RowStacks = {}
        # What it lost when it was saved in less than full precision; `None` when it never was.
        self.lost: dict[str, Any] | None = None

    def __repr__(self) -> str:
        tokens, updates = _extent(self.seen), _extent([sum(row.updates) for row in self.rows])
        size = f"{self.nbytes() / 2**20:,.1f} MiB"
        return f"{type(self).__name__}(rows={self.batch_size}, tokens={tokens}, updates={updates}, size={size})"

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def seen(self) -> list[int]:
        """Tokens read, by row."""
        return [row.seen for row in self.rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: what was learned from a token cannot be taken back."""
        raise ValueError(
            "A HopeCache cannot be cropped: what was learned from a token cannot be taken back. Keep a `clone()` from "
            "before, and go on from that."
        )

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may come more than once. Copies no change."""
        if list(rows) == list(range(self.batch_size)):
            return
        with torch.inference_mode(False):
            for layer in self.layers:
                layer.select(rows)
        self.rows = [self.rows[row] for row in rows]
        self.stacks = {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(torch.arange(self.batch_size)[indices.cpu()].tolist())

    def clone(self) -> HopeCache:
        """A fork: both go on by themselves, and share what neither has changed."""
        fork: HopeCache = object.__new__(type(self))
        fork.__dict__.update(self.__dict__)
        fork.stacks = {}
        fork.assign(self)
        return fork

    __copy__ = clone

    def __deepcopy__(self, memo: dict[int, Any]) -> HopeCache:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused: use `save_pretrained`."""
        raise TypeError(
            "A HopeCache is not pickled: a pickle could not tell whose memory it is. Use `save_pretrained` and "
            "`HopeCache.from_pretrained`."
        )

    def assign(self, other: HopeCache) -> None:
        """Become a fork of another memory of the same model."""
        self.layers: list[HopeCacheLayer] = []
        for layer in other.layers:
            copy = HopeCacheLayer()
            copy.mixer, copy.opened = layer.mixer, layer.opened
            copy.levels = {level: list(rows) for level, rows in layer.levels.items()}
            self.layers.append(copy)
        self.rows, self.columns, self.model = list(other.rows), other.columns, other.model
        self.notes, self.lost = deepcopy(other.notes), other.lost

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> HopeCache:
        """
        Move the memory, in place, what rows share as one; returns it. It keeps its dtypes: the model's decide. With
        `offloading` the mixers' states stay in CPU memory.
        """
        place = torch.device(device)
        tensors: dict[int, torch.Tensor] = {}
        memories: dict[int, LevelMemory] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in tensors:
                tensors[id(tensor)] = tensor.to(place)
            return tensors[id(tensor)]

        for layer in self.layers:
            layer.map_states(lambda state: state.to(OFFLOADED if self.offloading else place))
            for level, rows in layer.levels.items():
                memories |= {id(memory): memory.map(move) for memory in rows if id(memory) not in memories}
                layer.levels[level] = [memories[id(memory)] for memory in rows]
        self.rows = [
            replace(row, ids=row.ids.to(place), embeds=None if row.embeds is None else row.embeds.to(place))
            for row in self.rows
        ]
        return self

    def reset(self, levels: Iterable[int] | None = None) -> None:
        """
        Forget everything, notes included; the rows stay, empty.

        With `levels`, indices into `config.cms_periods`, forget what these have learned and gathered, and that they
        did: their changes, waiting gradients and counts of updates. The text read, with its keys and values, stays, and
        so does what other levels have learned.
        """
        if levels is not None:
            self._reset_levels(set(levels))
            return
        for layer in self.layers:
            layer.mixer = layer.opened = None
            layer.levels = {level: [NOTHING_LEARNED] * self.batch_size for level in layer.levels}
        self.rows = [StreamRecord.new(len(self.periods)) for _ in self.rows]
        self.columns = 0
        self.notes, self.lost, self.stacks = {}, None, {}

    def _reset_levels(self, levels: set[int]) -> None:
        unknown = [level for level in levels if level not in range(len(self.periods))]
        if unknown:
            raise ValueError(f"`levels` must lie between 0 and {len(self.periods) - 1}, got {unknown[0]!r}.")
        for layer in self.layers:
            for level in levels & set(layer.levels):
                layer.levels[level] = [NOTHING_LEARNED] * self.batch_size

        def kept(counts: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(0 if level in levels else count for level, count in enumerate(counts))

        self.rows = [replace(row, pairs=kept(row.pairs), updates=kept(row.updates)) for row in self.rows]

    def detach(self) -> None:
        """Drop the graph of an outer gradient; a memory that outlives its call must not keep it alive."""
        for layer in self.layers:
            layer.map_states(lambda state: state.detach())
            for level, memories in layer.levels.items():
                layer.levels[level] = [memory.detach() for memory in memories]

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        Every tensor of the memory, by the name it is saved under:

            rows.{row}.ids | learn | embeds
            layers.{layer}.mixer.{tensor of the mixer's state}
            layers.{layer}.opened.{the same, when the open segment began}
            layers.{layer}.levels.{level}.rows.{row}.{change | initial | gradient | momentum}.{map}
        """
        found: dict[str, torch.Tensor] = {}
        for index, row in enumerate(self.rows):
            found |= {f"rows.{index}.ids": row.ids, f"rows.{index}.learn": row.learn}
            if row.embeds is not None:
                found[f"rows.{index}.embeds"] = row.embeds
        for index, layer in enumerate(self.layers):
            for kind, state in (("mixer", layer.mixer), ("opened", layer.opened)):
                if state is not None:
                    found |= {f"layers.{index}.{kind}.{name}": t for name, t in state.tensors.items()}
            for level, memories in layer.levels.items():
                for row_index, memory in enumerate(memories):
                    place = f"layers.{index}.levels.{level}.rows.{row_index}"
                    for kind in MEMORY_TENSORS:
                        found |= {f"{place}.{kind}.{name}": t for name, t in getattr(memory, kind).items()}
        return found

    def nbytes(self) -> int:
        """Bytes that the memory takes, sums of slow weights and changes included; what rows share counts once."""
        return sum(self.storages().values())

    def storages(self) -> dict[tuple[torch.device, int], int]:
        """The bytes of each storage that it takes, by device and address: what two memories share is in both."""
        held = list(self.tensors().values())
        memories = [memory for layer in self.layers for rows in layer.levels.values() for memory in rows]
        held += [tensor for memory in memories for tensor in memory.merged_weights()]
        held += [tensor for stack in list(self.stacks.values()) for tensor in list(stack.tensors.values())]
        return {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in held}

    def summary(self) -> dict[str, Any]:
        """
        What the memory has read and learned, as JSON can say it.

        `bytes`: see `nbytes`. `lost`: what it lost when it was saved in less than full precision, or `None`. `rows`: for
        each row its `tokens`; `segments_learned`, `segments_skipped` (not surprising enough) and `segments_nonfinite`;
        `last_losses`, nats per token, newest last; and `levels`: of each its `period` in tokens, its `updates`, their
        `frequency` f = updates / tokens, the `change_norm` (Frobenius, over all layers), and `waiting_pairs`, learned
        since its last update.
        """
        rows = [self._row_summary(index) for index in range(self.batch_size)]
        return {"bytes": self.nbytes(), "lost": self.lost, "rows": rows}

    def _row_summary(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        levels = []
        for level, period in enumerate(self.periods):
            memories = [layer.levels[level][index] for layer in self.layers if level in layer.levels]
            squares = [float(change.square().sum()) for memory in memories for change in memory.change.values()]
            levels.append(
                {
                    "period": period,
                    "updates": row.updates[level],
                    "frequency": row.updates[level] / row.seen if row.seen else 0.0,
                    "change_norm": sum(squares) ** 0.5,
                    "waiting_pairs": row.pairs[level],
                }
            )
        return {
            "tokens": row.seen,
            "segments_learned": row.segments,
            "segments_skipped": row.skipped,
            "segments_nonfinite": row.nonfinite,
            "last_losses": list(row.losses),
            "levels": levels,
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        dtype: torch.dtype | None = None,
        low_rank_error: float | None = None,
    ) -> SavedMemory:
        """
        Write the memory to a directory, in place of the one that is there: tensors as safetensors, the rest as JSON.

        A crash at any moment leaves the old memory or the new one. Other files in the directory, a model's say, stay.
        What rows share is written once, and shared again when read.

        Args:
            save_directory: made if need be.
            model: the one it belongs to, unset the one it was last used with. A sample of its slow weights is noted, so
                that loading refuses another model of the same shape. Adapters count: give the merged model to save for
                that what was learned over its adapters.
            dtype: `torch.bfloat16`, `torch.float16` or `torch.float32`: wider floating-point tensors are written in it,
                but for those with numbers beyond its range. Unset: as they are, nothing lost.
            low_rank_error: between 0 and 1. Each changed matrix is written as two factors of the least rank with at most
                this relative error (Frobenius), where they are smaller than the matrix; rounding to `dtype` comes on
                top. Waiting gradients, momentum and the mixers' states are never factored. Takes a singular value
                decomposition for each matrix. Unset: none.

        Returns:
            What the files take and what they lost, which is noted in them too: see `summary()["lost"]` after loading.

        Raises:
            ValueError: an option is impossible, what was put in `memory.notes` is not JSON, or the model could not read the memory again.
            OSError: the directory cannot be written, or the disk is full; the memory that was there is unharmed.
        """
        return save_memory(self, Path(save_directory), self.model() if model is None else model, dtype, low_rank_error)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, model: Any) -> HopeCache:
        """
        Read a memory that `save_pretrained` wrote, for the model it belongs to, onto the model's devices.

        Raises:
            ValueError: the directory holds no memory, one of another model or format version, or a damaged file; the
                message names it and says what to do.
        """
        hope_decoder(model)
        cache = cls(model.config, 0)
        with torch.inference_mode(False), torch.no_grad():
            load_memory(cache, Path(directory), model)
        cache.model = weakref.ref(model)
        return cache


def _extent(counts: list[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def check_memory(memory: Any, config: HopeConfig, batch_size: int | None = None) -> HopeCache:
    """The memory; `ValueError` unless it is one that fits a model of this config and, given, a batch size."""
    if not isinstance(memory, HopeCache):
        kind = type(memory)
        if kind.__name__ == "HopeCache":
            raise ValueError(
                f"`past_key_values` is of other code, {kind.__module__}, than the model's, {__name__}: save it with "
                "`save_pretrained`, and load it with `model.load_memory`."
            )
        raise ValueError(
            f"`past_key_values` is a {kind.__name__}; a Hope model needs a HopeCache: model.new_memory(batch_size)."
        )
    differing = differing_fields(memory.memory_fields, config.memory_fields)
    if differing:
        raise ValueError(f"`past_key_values` is the memory of another model: {differing}. Use model.new_memory().")
    if batch_size not in (None, memory.batch_size):
        raise ValueError(
            f"`past_key_values` holds {memory.batch_size} rows and the batch has {batch_size}: use one row for each, "
            "`model.new_memory(batch_size)`, or `batch_select_indices` and `batch_repeat_interleave`."
        )
    return memory


__all__ = ["HopeCache"]
