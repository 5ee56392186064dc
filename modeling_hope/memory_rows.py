"""Rows of several memories as one batch, and rows of a batch as memories of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .cache_hope import HopeCache, check_memory
from .memory_checks import hope_decoder
from .mixer_state import MixerState
from .slow_weights import device_of


if TYPE_CHECKING:
    from .modeling_hope import HopePreTrainedModel


def join_rows(memories: Sequence[HopeCache], model: HopePreTrainedModel) -> HopeCache:
    """
    One memory with the rows of several, in their order: a batch that reads on together, each row where it stands.

    Learned changes are shared, not copied; keys, values and the mixers' states are copied into one tensor each, with as
    many slots as the longest row needs. Notes stay with the memories that they were made in.

    Raises:
        ValueError: a memory is of another model, or some are offloaded and others are not.
    """
    for memory in memories:
        check_memory(memory, model.config)
    if len({memory.offloading for memory in memories}) > 1:
        raise ValueError("`memories` differ in `offloading`: make all of them with it, or none.")
    if len(memories) == 1:
        return memories[0].clone()
    joined, sizes = HopeCache(model.config, 0, memories[0].offloading), [memory.batch_size for memory in memories]
    with torch.inference_mode(False), torch.no_grad():
        for index, (layer, decoder_layer) in enumerate(zip(joined.layers, hope_decoder(model).layers, strict=True)):
            parts, mixer = [memory.layers[index] for memory in memories], decoder_layer.mixer
            layer.mixer = _joined([part.mixer for part in parts], sizes, mixer)
            same = all(part.opened is part.mixer for part in parts)
            layer.opened = layer.mixer if same else _joined([part.opened for part in parts], sizes, mixer)
            layer.levels = {level: [row for part in parts for row in part.levels[level]] for level in layer.levels}
    joined.rows = [row for memory in memories for row in memory.rows]
    joined.columns = max(memory.columns for memory in memories)
    joined.model = memories[0].model
    return joined


def take_row(memory: HopeCache, row: int, model: HopePreTrainedModel) -> HopeCache:
    """A row of a batch as a memory of its own, which takes no more than it would, had it always been alone."""
    taken = memory.clone()
    taken.select([row])
    seen, segment = taken.seen[0], model.config.segment_length
    taken.columns = seen
    opened_at = seen - seen % segment if segment is not None else seen
    for layer, decoder_layer in zip(taken.layers, hope_decoder(model).layers, strict=True):
        same = layer.opened is layer.mixer
        if layer.mixer is not None:
            layer.mixer = layer.mixer.trim(decoder_layer.mixer.slots(seen))
        if layer.opened is not None:
            layer.opened = layer.mixer if same else layer.opened.trim(decoder_layer.mixer.slots(opened_at))
    return taken


class RowSize:
    """
    Bytes that a row's memory takes at most, with all that its levels may have learned and gathered, and the sums of slow
    weights and changes that it is read with, alone and in a batch.
    """

    def __init__(self, model: HopePreTrainedModel):
        config, self.fixed = model.config, 0
        self.growing: list[tuple[Any, int]] = []  # mixers, with the bytes of a slot
        # Of a map that learns: its change, the sums, and what is gathered; and what some updates need.
        kinds = 4 + (config.cms_optimizer == "momentum") + (config.cms_variant == "nested")
        width = max(model.dtype.itemsize, torch.float32.itemsize)
        for layer in hope_decoder(model).layers:
            copies = 1 if layer.mixer.rewinds or config.rewinds else 2
            state = layer.mixer.empty_state(1, torch.empty(0, dtype=model.dtype, device=device_of(layer)))
            for name, tensor in state.tensors.items():
                if name in state.growing:
                    slot = tensor.shape[:-2].numel() * tensor.shape[-1] * tensor.element_size()
                    self.growing.append((layer.mixer, copies * slot))
                else:
                    self.fixed += copies * tensor.nbytes
            for level in set(config.learning_levels) & set(layer.cms.held):
                maps = [getattr(layer.cms.level(level), name) for name in config.learned_maps]
                self.fixed += kinds * width * sum(each.in_features * each.out_features for each in maps)

    def at(self, tokens: int) -> int:
        """Once it has read so many tokens."""
        ids = 8 * tokens
        return self.fixed + ids + sum(size * mixer.most_slots(tokens) for mixer, size in self.growing)


def _joined(states: list[MixerState | None], sizes: list[int], mixer: torch.nn.Module) -> MixerState | None:
    """States of memories with `sizes` rows; those that have read nothing get what a mixer starts with."""
    known = next((state for state in states if state is not None), None)
    if known is None:
        return None
    whole = [
        mixer.empty_state(size, known.first) if state is None else state  # type: ignore[operator]
        for state, size in zip(states, sizes, strict=True)
    ]
    return type(known).join(whole)
