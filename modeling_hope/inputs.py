"""What a call is given to read: checked, and packed to the left."""

from __future__ import annotations

from functools import cached_property

import torch

from .cache_hope import HopeCache, check_memory
from .configuration_hope import HopeConfig
from .packing import Packing


class Inputs:
    """
    The tokens of one call.

    What tensors hold is not looked at while a graph is compiled or exported: only shapes are checked there.

    Attributes:
        batch, width: of what was given.
        packing: how its rows were packed.
        several: rows hold several documents each, which are read as rows of their own.
        ids: `[rows, longest]` int64, packed; `None` where embeddings were given.
        embeds: `[rows, longest, hidden_size]`, packed; `None` where ids were given.
        memory: what is read with, unchanged; `None` where nothing was read before.
        labels, learn_mask: `[batch, width]`, as they were given.
        logits_to_keep: likewise.
    """

    def __init__(
        self,
        config: HopeConfig,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: HopeCache | None,
        inputs_embeds: torch.Tensor | None,
        idle_rows: bool = False,
        labels: torch.Tensor | None = None,
        learn_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        assert inputs is not None
        name, rank = ("input_ids", 2) if input_ids is not None else ("inputs_embeds", 3)
        if inputs.dim() != rank or inputs.shape[0] == 0 or inputs.shape[1] == 0:
            raise ValueError(f"`{name}` has shape {tuple(inputs.shape)}: give at least one row of at least one token.")
        if input_ids is not None:
            check_ids(input_ids, config.vocab_size)
        elif inputs.shape[-1] != config.hidden_size:
            raise ValueError(
                f"`inputs_embeds` has width {inputs.shape[-1]}, the model hidden_size={config.hidden_size}."
            )
        self.batch, self.width, self.device = inputs.shape[0], inputs.shape[1], inputs.device
        if past_key_values is not None:
            check_memory(past_key_values, config, self.batch)
        self.memory = past_key_values
        mask = check_mask(attention_mask, self.batch, self.width, past_key_values)
        documents = None if position_ids is None else self._documents(position_ids, mask)
        self.packing = documents or Packing.from_mask(mask, self.batch, self.width)
        self.several = documents is not None
        if self.packing.real is not None and not idle_rows and not torch.compiler.is_compiling():
            self._check_rows()
        if config.longest_stream is not None:
            self._check_end(config.longest_stream)
        if position_ids is not None and not self.several:
            self._check_positions(position_ids)
        self.ids = None if input_ids is None else self.packing.pack(input_ids)
        self.embeds = None if inputs_embeds is None else self.packing.pack(inputs_embeds)
        self.labels, self.learn_mask, self.logits_to_keep = labels, learn_mask, logits_to_keep
        self.wants_all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None:
            self._check_labels(labels, config.vocab_size)
        if learn_mask is not None and learn_mask.shape != (self.batch, self.width):
            raise ValueError(
                f"`learn_mask` has shape {tuple(learn_mask.shape)}, the tokens {(self.batch, self.width)}: give one entry for each."
            )

    @cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return self.packing.lengths()

    def unpack_states(self, layers: list[torch.Tensor] | None) -> tuple[torch.Tensor, ...] | None:
        """Hidden states as the caller's batch."""
        return None if layers is None else tuple(self.packing.unpack(layer) for layer in layers)

    def unpack_attentions(self, layers: list[torch.Tensor] | None) -> tuple[torch.Tensor, ...] | None:
        """
        Attention weights `[batch, heads, longest, slots]` as the caller's batch: `[batch, heads, width, width]`.

        What a memory holds has no columns: over its keys they stay as they are kept, `[batch, heads, width, slots]`.
        """
        if layers is not None and self.several:
            raise ValueError("`output_attentions` of several documents in one row: give each its own row.")
        if layers is None or self.packing.places is None:
            return None if layers is None else tuple(layers)
        found = [self.packing.unpack(layer.transpose(1, 2)) for layer in layers]
        if self.memory is None or not any(self.memory.seen):
            found = [self.packing.unpack(layer.transpose(1, 3)).transpose(1, 3) for layer in found]
        return tuple(layer.transpose(1, 2) for layer in found)

    def _documents(self, position_ids: torch.Tensor, mask: torch.Tensor | None) -> Packing | None:
        """The documents in each row, where positions say that there are several."""
        if torch.compiler.is_compiling() or position_ids.shape not in ((1, self.width), (self.batch, self.width)):
            return None
        packing = Packing.from_positions(position_ids.expand(self.batch, -1), mask)
        if packing is None or packing.rows <= self.batch:
            return None
        if self.memory is not None:
            raise ValueError(
                "`position_ids` start anew within a row: its documents have a memory each, and `past_key_values` has one for "
                "the row. Leave it out."
            )
        return packing

    def _check_rows(self) -> None:
        for row, length in enumerate(self.lengths):
            if length == 0 and (self.memory is None or self.memory.rows[row].seen == 0):
                raise ValueError(f"`attention_mask` row {row} is all padding: a row needs at least one token.")

    def _check_end(self, longest: int) -> None:
        lengths = [self.width] if torch.compiler.is_compiling() else self.lengths
        seen = [0] * len(lengths) if self.memory is None else self.memory.seen
        for row, (before, length) in enumerate(zip(seen, lengths, strict=True)):
            if before + length > longest:
                raise ValueError(
                    f"Row {row} would have read {before + length} tokens: this model has learned positions, and none beyond "
                    f"max_position_embeddings={longest}. Give less text, or a new memory: `consolidate` keeps what "
                    "levels have learned."
                )

    def _check_positions(self, position_ids: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            raise ValueError("`position_ids` cannot be checked in a compiled graph: leave them out.")
        longest = self.packing.longest
        counted = torch.zeros(self.batch, longest, dtype=torch.bool)
        if position_ids.shape in ((1, self.width), (self.batch, self.width)):
            given = self.packing.pack(position_ids.expand(self.batch, -1)).cpu()
            steps = torch.arange(longest)
            seen = [0] * self.batch if self.memory is None else self.memory.seen
            counted = (given == torch.tensor(seen)[:, None] + steps) | (steps >= torch.tensor(self.lengths)[:, None])
        if not counted.all():
            raise ValueError(
                "`position_ids` do not count each row's tokens from where its memory stands. Leave them out: a Hope model "
                "counts by itself. For several documents in one row, count each from 0, without a memory."
            )

    def _check_labels(self, labels: torch.Tensor, vocab_size: int) -> None:
        if labels.shape != (self.batch, self.width):
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)}, the tokens {(self.batch, self.width)}: give one for each."
            )
        if not self.wants_all_logits:
            raise ValueError("`labels` need the logits of all tokens: leave out `logits_to_keep`.")
        if torch.compiler.is_compiling():
            return
        if bool(((labels != -100) & ((labels < 0) | (labels >= vocab_size))).any()):
            raise ValueError(f"`labels` must lie between 0 and vocab_size - 1 = {vocab_size - 1}, or be -100 for none.")


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise `ValueError` for ids outside the vocabulary, which would crash or read memory that is not theirs."""
    if torch.compiler.is_compiling():
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`input_ids` must lie between 0 and vocab_size - 1 = {vocab_size - 1}, got {low} to {high}. "
            "Was the text encoded with this model's tokenizer?"
        )


def check_mask(mask: torch.Tensor | None, batch: int, width: int, cache: HopeCache | None) -> torch.Tensor | None:
    """The part of the mask that is about the new tokens, `[batch, width]`."""
    if mask is None:
        return None
    columns = cache.columns if cache is not None else 0
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (width, columns + width):
        full = f", or {(batch, columns + width)} with the {columns} columns read before" if columns else ""
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}: it must be {(batch, width)} as the tokens{full}."
        )
    return mask[:, -width:]
