"""One call of a model: what it reads, row by row and stretch by stretch, and what is learned on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .cache_hope import OFFLOADED, HopeCache
from .inputs import Inputs
from .key_layout import Span
from .learning import (
    Pace,
    Stretch,
    act,
    connected_levels,
    gather,
    gradients,
    next_stretch,
    run_weights,
    segment_loss,
    to_last_segment,
)
from .mixer_state import MixerState
from .sharding import in_one_order, whole_weights
from .stream_record import NO_TOKEN


if TYPE_CHECKING:
    from .modeling_hope import HopeModel


F = TypeVar("F", bound=Callable[..., Any])
Head = Callable[[torch.Tensor], torch.Tensor]

NOT_COMPILED = (
    "What is read at once and what is learned turns on what a memory holds, so that a call with a memory, or one that "
    "learns, is not compiled. To compile or export a call, give use_cache=False and learn='off'."
)


def with_memory(read: F) -> F:
    """
    Run `read`, a model's method that works with a memory, outside of compiled graphs and of inference mode, with the
    model's weights whole.

    Tensors made in inference mode can never take part in a gradient, and a memory's tensors have to: a segment may end
    in a later call. There `read` runs as under `no_grad`.
    """

    @wraps(read)
    def wrapped(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            raise ValueError(NOT_COMPILED)
        if not torch.is_inference_mode_enabled():
            with whole_weights(model):
                return read(model, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad(), whole_weights(model):
            return read(model, *args, **kwargs)

    return torch.compiler.disable(wrapped, reason=NOT_COMPILED)


class Run:
    """
    What one run of the model gave: `rows` of the batch read `lengths` tokens from `offsets` on in the packed batch.

    `hidden`, `logits` (where they were needed) and the layers' `hidden_states` are `[rows, width, ...]`.
    """

    def __init__(self, rows: list[int], offsets: list[int], lengths: list[int], hidden: torch.Tensor):
        self.rows, self.offsets, self.lengths, self.hidden = rows, offsets, lengths, hidden
        self.logits: torch.Tensor | None = None
        self.hidden_states: list[torch.Tensor] = []
        self.attentions: list[torch.Tensor] = []


@dataclass
class CallOutput:
    """
    What a call has read, in packed rows.

    Attributes:
        hidden: the last hidden states, normed, `[batch, longest, hidden_size]`; unset where there are `logits`.
        logits: `[batch, longest, vocab_size]`, where some were made on the way.
        hidden_states: every layer's, `[batch, longest, hidden_size]`; `None` unless they were asked for.
        attentions: every attention layer's, `[batch, heads, longest, slots]`; likewise.
    """

    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = None


class Stream:
    """
    One call: its inputs checked and packed, the memory it reads with, and how far each row has read.

    Attributes:
        cache: the memory that the call works on. The caller's own takes its place in `close()`, when all has gone well.
        keep: whether the mixers' states have to be kept: for the caller, or for a later stretch of this call.
        home: where they are put away after each layer; `None` where they stay with it.
        head_of: the model that was called, which a memory notes as its own.
    """

    def __init__(self, model: HopeModel, inputs: Inputs):
        self.model, self.batch, self.width, self.packing = model, inputs.packing.rows, inputs.width, inputs.packing
        self.lengths = inputs.lengths
        self.given = inputs.memory
        self.cache = HopeCache(model.config, self.batch) if self.given is None else self.given.clone()
        self.ids = None if inputs.ids is None else _usable(inputs.ids)
        self.embeds = None if inputs.embeds is None else _usable(inputs.embeds)
        for row, record in enumerate(self.cache.rows):
            if record.ids.device != inputs.device:
                self.cache.rows[row] = replace(record, ids=record.ids.to(inputs.device))
        self.pace = Pace.of(model.config)
        self.offsets = [0] * self.batch
        self.coming = [torch.zeros(length, dtype=torch.bool) for length in self.lengths]
        self.keep = True
        self.home = OFFLOADED if self.cache.offloading else None
        self.head_of: nn.Module = model

    def learns(self) -> bool:
        """Whether something is learned or applied before the end of the call."""
        stretches = [
            next_stretch(record, coming, self.pace) for record, coming in zip(self.cache.rows, self.coming, strict=True)
        ]
        return stretches != [Stretch(length) for length in self.lengths]

    def mark(self, learn: bool, learn_mask: torch.Tensor | None) -> None:
        """Mark the call's tokens to be learned from, if any: all, or where `learn_mask`, `[batch, width]`, is nonzero."""
        if not learn or self.ids is None:
            return
        if learn_mask is None:
            self.coming = [torch.ones_like(coming) for coming in self.coming]
            return
        packed = self.packing.pack(_usable(learn_mask)).bool().cpu()
        self.coming = [packed[row, :length] for row, length in enumerate(self.lengths)]

    @property
    def finished(self) -> bool:
        return self.offsets == self.lengths

    def stretches(self) -> list[Stretch]:
        """What each row reads before something is learned or applied, or before the open segment that it will leave."""
        stretches = [
            next_stretch(record, coming[offset:], self.pace)
            for record, coming, offset in zip(self.cache.rows, self.coming, self.offsets, strict=True)
        ]
        if not self.keep or self.pace.segment is None or self.model.config.rewinds:
            return stretches
        return [
            stretch if stretch.learn else Stretch(to_last_segment(record.seen, stretch.length, self.pace.segment))
            for record, stretch in zip(self.cache.rows, stretches, strict=True)
        ]

    def read(
        self, rows: list[int], stretches: list[Stretch], hidden_states: bool = False, attentions: bool = False
    ) -> Run:
        """Let rows read on, nothing learned from the run."""
        if any(self.offsets) and torch.is_grad_enabled() and _reentrant(self.model):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` loses the gradient through a memory that is read on "
                "from within a call: give {'use_reentrant': False}, or use_cache=False."
            )
        offsets = [self.offsets[row] for row in rows]
        lengths = [stretches[row].length for row in rows]
        width = max(*lengths, 1)
        embeds = in_one_order(self._embeds(rows, offsets, width), self.model)
        run = Run(rows, offsets, lengths, embeds)
        span = Span([self.cache.rows[row].seen for row in rows], lengths, width, embeds.device)
        constant = not torch.is_grad_enabled()
        run.hidden, states = self.model.run(
            embeds,
            span,
            self._states(rows),
            run_weights(
                self.model,
                self.cache,
                rows,
                learn=False,
                constant=constant,
                stacks=self.given.stacks if self.given is not None and width == 1 else None,
            ),
            self.keep,
            self.home,
            run.hidden_states if hidden_states else None,
            run.attentions if attentions else None,
        )
        self._keep(rows, states)
        self._advance(run)
        self._open_segments()
        return run

    def learn(
        self, rows: list[int], stretches: list[Stretch], head: Head, keep_logits: bool, hidden_states: bool
    ) -> Run:
        """
        Let rows read to the end of their open segments, and learn from those.

        The segment is read from its start, with gradients, in the place of reading its last part alone: its first part
        may have been read in earlier calls, and the work at a segment's end is that of one segment.
        """
        config, cache = self.model.config, self.cache
        if _reentrant(self.model):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` cannot take the gradients that learning needs: "
                "give {'use_reentrant': False}."
            )
        segment = config.segment_length
        assert segment is not None
        offsets, lengths = [self.offsets[row] for row in rows], [stretches[row].length for row in rows]
        records = [cache.rows[row] for row in rows]
        opened = [segment - length for length in lengths]
        constant = not torch.is_grad_enabled()
        learn = torch.stack(
            [
                torch.cat([record.learn, self.coming[row][offset : offset + length]])
                for record, row, offset, length in zip(records, rows, offsets, lengths, strict=True)
            ]
        )
        embeds, ids = self._segments(rows, opened, lengths)
        embeds = in_one_order(embeds, self.model)
        learn_here = learn.to(embeds.device)
        connected = [self._connected(row, length) for row, length in zip(rows, lengths, strict=True)]
        weights = run_weights(self.model, cache, rows, learn=True, constant=constant, connected=any(connected))
        span = Span(
            [r.seen - o for r, o in zip(records, opened, strict=True)], [segment] * len(rows), segment, embeds.device
        )
        layers: list[torch.Tensor] | None = [] if hidden_states else None
        first = next(index for index, layer in enumerate(weights) if any(level.traced for level in layer.values()))
        with torch.enable_grad():
            hidden, states = self.model.run(
                embeds,
                span,
                self._states(rows, opened=True),
                weights,
                self.keep,
                self.home,
                layers,
                grad_from=first if constant else 0,
            )
            logits = head(hidden)
            losses = segment_loss(logits, ids, learn_here)
            found = gradients(losses, weights, learn_here, config, keep_graph=not constant, connected=connected)
        if constant:
            hidden, logits = hidden.detach(), logits.detach()
            states = [state.detach() if state is not None else None for state in states]
        run = Run(rows, offsets, lengths, _tails(hidden, lengths))
        run.logits = _tails(logits, lengths) if keep_logits else None
        run.hidden_states = [_tails(layer.detach() if constant else layer, lengths) for layer in layers or []]
        self._keep(rows, states)
        self._advance(run)
        self._open_segments()
        pairs = learn[:, 1:].sum(1).tolist()
        for index, (row, loss) in enumerate(zip(rows, losses.detach().tolist(), strict=True)):
            of_row = [{level: of_rows[index] for level, of_rows in layer.items()} for layer in found]
            gather(cache, row, loss, pairs[index], of_row, config)
        return run

    def _connected(self, row: int, length: int) -> list[int]:
        """Levels through whose next update an outer gradient flows, when a row learns from the next `length` tokens."""
        if not (self.model.training and self.model.config.cms_training == "second_order" and torch.is_grad_enabled()):
            return []
        seen = self.cache.rows[row].seen
        return connected_levels(self.model.config, seen + length, seen + self.lengths[row] - self.offsets[row])

    def act(self) -> None:
        """Let the levels whose periods have ended, row by row, apply what they have gathered."""
        for row, record in enumerate(self.cache.rows):
            if any(record.pairs):
                act(self.model, self.cache, row)

    def assemble(self, runs: list[Run], parts: list[torch.Tensor]) -> torch.Tensor:
        """Runs' outputs `[rows, width of the run, ...]` as one packed batch, zero where nothing was read."""
        aligned = all(run.rows == list(range(self.batch)) and len(set(run.offsets)) == 1 for run in runs)
        if aligned and all(set(run.lengths) == {part.shape[1]} for run, part in zip(runs, parts, strict=True)):
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        whole = parts[0].new_zeros(self.batch, self.packing.longest, *parts[0].shape[2:])
        for run, part in zip(runs, parts, strict=True):
            for index, (row, offset, length) in enumerate(zip(run.rows, run.offsets, run.lengths, strict=True)):
                whole[row, offset : offset + length] = part[index, :length]
        return whole

    def reading(self, runs: list[Run], hidden_states: bool, attentions: bool, head: Head | None = None) -> CallOutput:
        """What the runs gave. With a `head`: the logits, for those that learning has made already are used again."""
        reading = CallOutput(attentions=runs[0].attentions if attentions else None)
        if head is None:
            reading.hidden = self.assemble(runs, [run.hidden for run in runs])
        else:
            reading.logits = self.assemble(
                runs, [head(run.hidden) if run.logits is None else run.logits for run in runs]
            )
        if hidden_states:
            layers = zip(*(run.hidden_states for run in runs), strict=True)
            reading.hidden_states = [self.assemble(runs, list(parts)) for parts in layers]
        return reading

    def close(self) -> HopeCache:
        """Make the call's work the caller's, once nothing can fail any more."""
        self.cache.detach()
        self.cache.columns += self.width
        self.cache.model = weakref.ref(self.head_of)
        if self.given is None:
            return self.cache
        self.given.assign(self.cache)
        return self.given

    def _embeds(self, rows: list[int], offsets: list[int], width: int) -> torch.Tensor:
        """The next `width` embeddings of the rows, `[rows, width, hidden_size]`."""
        source = self.ids if self.ids is not None else self.embeds
        assert source is not None
        if len(set(offsets)) == 1 and rows == list(range(self.batch)):
            part = source[:, offsets[0] : offsets[0] + width]
        else:
            index = torch.tensor(offsets, device=source.device)[:, None] + torch.arange(width, device=source.device)
            part = source[torch.tensor(rows, device=source.device)[:, None], index.clamp(max=source.shape[1] - 1)]
        return self.model.embed_tokens(part) if self.ids is not None else part

    def _segments(self, rows: list[int], opened: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[rows, segment, hidden_size]` and ids `[rows, segment]` of segments that these rows complete."""
        ids = torch.stack(
            [
                torch.cat([self.cache.rows[row].ids[seen - count :], self._new_ids(row, length)])
                for row, count, length in zip(rows, opened, lengths, strict=True)
                for seen in [self.cache.rows[row].seen]
            ]
        )
        known = ids.clamp(min=0)
        embeds = self.model.embed_tokens(known)
        if bool((ids == NO_TOKEN).any()):
            embeds = embeds.clone()
            for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                given = self._open_embeds(row, length)
                if given is not None:
                    taken = ids[index] == NO_TOKEN
                    embeds[index, taken] = given[taken]
        return embeds, known

    def _new_ids(self, row: int, length: int) -> torch.Tensor:
        offset = self.offsets[row]
        if self.ids is not None:
            return self.ids[row, offset : offset + length]
        assert self.embeds is not None
        return torch.full((length,), NO_TOKEN, device=self.embeds.device)

    def _open_embeds(self, row: int, length: int) -> torch.Tensor | None:
        """Embeddings of the open segment and the next `length` tokens, zero for tokens; `None` where all are tokens."""
        record, offset = self.cache.rows[row], self.offsets[row]
        if record.embeds is None and self.embeds is None:
            return None
        like = self.embeds if self.embeds is not None else record.embeds
        assert like is not None
        before = record.embeds if record.embeds is not None else like.new_zeros(len(record.learn), like.shape[-1])
        if self.embeds is None:
            return torch.cat([before, like.new_zeros(length, like.shape[-1])])
        return torch.cat([before, self.embeds[row, offset : offset + length].detach().to(before.dtype)])

    def _states(self, rows: list[int], opened: bool = False) -> list[MixerState | None]:
        """The mixers' states of some rows; `opened`: as they were when the open segments began, or can go back to."""
        states = [
            cache_layer.opened if opened and not layer.mixer.rewinds else cache_layer.mixer
            for cache_layer, layer in zip(self.cache.layers, self.model.layers, strict=True)
        ]
        if rows == list(range(self.batch)):
            return states
        return [None if state is None else state.select(torch.tensor(rows, device=state.device)) for state in states]

    def _keep(self, rows: list[int], states: list[MixerState | None]) -> None:
        if not self.keep:
            return
        for cache_layer, layer, state in zip(self.cache.layers, self.model.layers, states, strict=True):
            assert state is not None
            if rows == list(range(self.batch)):
                cache_layer.mixer = state
                continue
            before = cache_layer.mixer or layer.mixer.empty_state(self.batch, state.first)
            cache_layer.mixer = before.place(torch.tensor(rows, device=state.device), state)

    def _open_segments(self) -> None:
        """Note the states of rows that stand at the start of a segment, which will be read again from there."""
        segment = self.model.config.segment_length
        if not self.keep or self.model.config.rewinds or segment is None:
            return
        starting = [row for row, record in enumerate(self.cache.rows) if record.seen % segment == 0]
        for cache_layer, layer in zip(self.cache.layers, self.model.layers, strict=True):
            state = cache_layer.mixer
            if layer.mixer.rewinds or state is None:
                continue
            if len(starting) == self.batch:
                cache_layer.opened = state
                continue
            if cache_layer.opened is None:
                cache_layer.opened = layer.mixer.empty_state(self.batch, state.first)
            if starting:
                index = torch.tensor(starting, device=state.device)
                cache_layer.opened = cache_layer.opened.place(index, state.select(index))

    def _advance(self, run: Run) -> None:
        """Note what the rows of a run have read."""
        segment = self.model.config.segment_length
        for row, offset, length in zip(run.rows, run.offsets, run.lengths, strict=True):
            record = self.cache.rows[row]
            embeds = self._open_embeds(row, length)
            ids = torch.cat([record.ids, self._new_ids(row, length)])
            opened = len(ids) % segment if segment is not None else 0
            learn = torch.cat([record.learn, self.coming[row][offset : offset + length]])
            self.cache.rows[row] = replace(
                record,
                ids=ids,
                learn=learn[len(learn) - opened :],
                embeds=None if embeds is None or not opened else embeds[len(embeds) - opened :],
                pending=None if length else record.pending,
            )
            self.offsets[row] = offset + length


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that a memory may keep: one made in inference mode can never take part in a gradient."""
    return tensor.clone() if tensor.is_inference() else tensor


def _reentrant(model: HopeModel) -> bool:
    checkpoint = getattr(model.layers[0], "_gradient_checkpointing_func", None)
    if not (model.training and model.layers[0].gradient_checkpointing and checkpoint is not None):
        return False
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", False))


def _tails(tensor: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The last `lengths` columns of each row, moved to the left, `[rows, max(lengths), ...]`."""
    width = tensor.shape[1]
    if len(set(lengths)) == 1:
        return tensor[:, width - lengths[0] :].contiguous()
    tails = tensor.new_zeros(tensor.shape[0], max(lengths), *tensor.shape[2:])
    for row, length in enumerate(lengths):
        tails[row, :length] = tensor[row, width - length :]
    return tails
