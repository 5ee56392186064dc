"""Which positions an attention layer's cached keys hold, what a query sees of them, and how they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .rotary import HopeRotaryEmbedding, Rotation


@dataclass(frozen=True)
class KeyLayout:
    """
    The keys that one kind of attention keeps of a row, as a function of how many tokens the row has read.

    Full attention keeps positions `0 .. seen - 1`. Sliding attention keeps the sinks and what the *open segment* can
    still see, for a segment is read again, from its start, when it is learned:
    `0 .. sinks - 1` and `first(seen) .. seen - 1`. Keys lie left-packed in that order.

    Sinks are moved along with the window, in steps of a block: at their own positions they would be ever farther away,
    and beyond the distances a model was trained on attention to them, and the model with it, breaks down.

    Attributes:
        window: tokens in view of a query, itself included; `None` for all.
        sinks: first tokens of the stream that stay in view of a window.
        segment: tokens in a segment; `None` when nothing is ever read again.
        rope: what turns keys by their positions, a name in `config.layer_ropes`; `None` for nothing.
    """

    window: int | None
    sinks: int
    segment: int | None
    rope: str | None = "global"

    def first(self, seen: int) -> int:
        """Oldest position kept besides the sinks, 0 while nothing was dropped."""
        if self.window is None:
            return 0
        open_segment_start = seen if self.segment is None else seen - seen % self.segment
        first = open_segment_start - self.window + 1
        return first if first > self.sinks else 0

    def count(self, seen: int) -> int:
        """Keys kept of a row that has read `seen` tokens."""
        first = self.first(seen)
        return seen - first + (self.sinks if first else 0)

    def most(self, seen: int) -> int:
        """The most keys kept of a row until it has read `seen` tokens."""
        if self.window is None:
            return seen
        return min(seen, self.window + self.sinks + (self.segment or 1) - 1)

    def slots(self, begin: int, end: int) -> torch.Tensor:
        """Positions in order of their slots, `[slots]` int64 on the CPU: those kept at `begin`, and the new up to `end`."""
        first = self.first(begin)
        sinks = torch.arange(self.sinks if first else 0)
        return torch.cat([sinks, torch.arange(first, end)])

    def shift(self, position: int) -> int:
        """How far the sinks have moved for a query at `position`; the same for a block of neighbouring queries."""
        if self.window is None:
            return 0
        return max(0, position - position % self.block - self.window - self.sinks)

    @property
    def block(self) -> int:
        """Queries that see the sinks at the same place: a quarter of the window."""
        assert self.window is not None
        return max(self.window // 4, 1)

    def block_starts(self, begin: int, end: int) -> list[int]:
        """Positions in `begin + 1 .. end - 1` at which the sinks move."""
        if self.window is None:
            return []
        still = self.window + self.sinks  # the sinks stay where they are until a block starts beyond this
        start = (max(begin, still) // self.block + 1) * self.block
        starts = []
        while start < end:  # a range would tie a compiled graph to one length
            starts.append(start)
            start += self.block
        return starts

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """
        Whether a query sees a key: `[batch, n, k]` bool from positions `[batch, n]` and `[batch, k]` int64.

        An empty key slot has position -1 and is seen by nothing; a padded query has position -1 and sees everything,
        so that its (unused) output stays finite.
        """
        queries, keys = queries[:, :, None], keys[:, None, :]
        seen = (keys >= 0) & (keys <= queries)
        if self.window is not None:
            seen &= (queries - keys < self.window) | (keys < self.sinks)
        return seen | (queries < 0)


@dataclass
class Span:
    """
    One run of the model: every row reads a stretch of its stream, packed to the left.

    Attributes:
        begin: position of each row's first token in this run. What a row had cached from there on is replaced.
        lengths: tokens of each row in this run, at most `width`; a row may have none.
        width: columns of the run.
        device: where positions and masks live.
        plans: how each kind of attention attends; made once, and shared by its layers.

    Where all rows are alike, one entry in `begin` and `lengths` may stand for all.
    """

    begin: list[int]
    lengths: list[int]
    width: int
    device: torch.device
    plans: dict[KeyLayout, AttentionPlan] = field(default_factory=dict)

    @property
    def uniform(self) -> bool:
        """All rows read the same positions, so one mask and one slice serve all."""
        return len(set(self.begin)) <= 1 and all(length == self.width for length in self.lengths)

    @property
    def end(self) -> list[int]:
        return [begin + length for begin, length in zip(self.begin, self.lengths, strict=True)]

    def positions(self) -> torch.Tensor:
        """`[batch, width]` int64, or `[1, width]` when uniform; -1 past a row's length."""
        steps = torch.arange(self.width, device=self.device)
        if self.uniform:
            return steps[None] + self.begin[0]
        begin = torch.tensor(self.begin, device=self.device)[:, None]
        lengths = torch.tensor(self.lengths, device=self.device)[:, None]
        return torch.where(steps < lengths, begin + steps, -1)

    def make_plan(self, layout: KeyLayout, rotary: HopeRotaryEmbedding | None, like: torch.Tensor, flex: bool) -> None:
        """Plan a kind of attention, unless that was done. `rotary`: of its rope. `flex`: masks are for flex attention."""
        if layout in self.plans:
            return
        self.plans[layout] = _uniform_plan(self, layout) if self.uniform else _ragged_plan(self, layout)
        for block in self.plans[layout].blocks:
            if rotary is not None:
                block.make_rotation(rotary, like)
            if flex:
                block.mask = block.flex_mask(like.device)


@dataclass
class Block:
    """
    Neighbouring queries that see the sinks at the same place.

    Attributes:
        start, stop: columns of the run.
        first, last: the slots that any of them sees, besides the sinks: `first .. last - 1`.
        sinks: slots of the sinks in front of them; 0 where they are among them, unmoved.
        shifts: how far each row's sinks have moved, `[batch or 1]`.
        mask: `[batch or 1, 1, stop - start, keys]` bool, true where a query sees a key; `None` for plain causal
            attention over no other keys, or for one query that sees every key. For flex attention a `BlockMask`.
        rotation: cosines and sines of the move, `[batch or 1, 1, turned features]`; `None` when nothing has moved.
    """

    start: int
    stop: int
    first: int
    last: int
    sinks: int
    shifts: list[int]
    mask: torch.Tensor | BlockMask | None
    rotation: Rotation | None = None

    def flex_mask(self, device: torch.device) -> BlockMask | None:
        """`mask` as flex attention takes it, to which none means that every query sees every key."""
        width, dense = self.stop - self.start, self.mask
        assert not isinstance(dense, BlockMask)
        if dense is None:
            if width == 1:
                return None
            dense = torch.ones(1, 1, width, width, dtype=torch.bool, device=device).tril()
        rows, _, _, keys = dense.shape
        seen = dense[:, 0]

        def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return seen[row % rows, query, key]

        return create_block_mask(sees, rows if rows > 1 else None, None, width, keys, device=device)

    def make_rotation(self, rotary: HopeRotaryEmbedding, like: torch.Tensor) -> None:
        if self.sinks and any(self.shifts):
            cos, sin = rotary(like, torch.tensor(self.shifts, device=like.device)[:, None])
            # Rotations compose, but some kinds scale as well, and a key is scaled already.
            self.rotation = cos / rotary.attention_scaling, sin / rotary.attention_scaling


@dataclass(frozen=True)
class AttentionPlan:
    """
    How the layers of one kind attend in one run, and what they keep of its keys.

    Attributes:
        layout: the kind of attention.
        cached: cached key slots that take part, the most of any row.
        blocks: the queries, divided by where they see the sinks.
        query_counts, key_counts: of each row of a ragged run, its queries, and its keys, cached and new.
        packed: `[batch, width]`, for ragged runs over cached keys: the slots that the new keys go to.
        slots: of packed keys, in ragged runs.
        kept: `[batch, kept]`, for ragged runs: which of the packed slots are kept; `None` for all.
        dropped: for uniform runs, how many slots right after the sinks are dropped.
    """

    layout: KeyLayout
    cached: int
    blocks: list[Block]
    query_counts: list[int] = field(default_factory=list)
    key_counts: list[int] = field(default_factory=list)
    packed: torch.Tensor | None = None
    slots: int = 0
    kept: torch.Tensor | None = None
    dropped: int = 0

    def pack(self, cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Each row's keys, cached and new `[batch, heads, width, head_dim]`, left-packed: `[batch, heads, slots, head_dim]`."""
        cached = cached[:, :, : self.cached]
        if self.packed is None:
            return torch.cat([cached, new], dim=2)
        # As `cat` would; autocast makes new keys narrower than those of a cache.
        dtype = torch.promote_types(cached.dtype, new.dtype)
        # One slot more takes what is no token.
        room = F.pad(cached.to(dtype), (0, 0, 0, self.slots + 1 - self.cached))
        return room.scatter(2, _by_slot(self.packed, new), new.to(dtype))[:, :, : self.slots]

    def keep(self, keys: torch.Tensor) -> torch.Tensor:
        """What a cache keeps of packed keys, `[batch, heads, kept, head_dim]`."""
        if self.kept is not None:
            return keys.gather(2, _by_slot(self.kept, keys))
        if self.dropped:
            sinks = self.layout.sinks
            return torch.cat([keys[:, :, :sinks], keys[:, :, sinks + self.dropped :]], dim=2)
        return keys


def _uniform_plan(span: Span, layout: KeyLayout) -> AttentionPlan:
    begin, end = span.begin[0], span.end[0]
    cached = layout.count(begin)
    slots, queries = layout.slots(begin, end).to(span.device), span.positions()
    offset = cached - begin  # from a position to its slot, the sinks aside
    blocks = []
    bounds = [begin, *layout.block_starts(begin, end), end]
    for start, stop in pairwise(bounds):
        oldest = 0 if layout.window is None else max(start - layout.window + 1, 0) + offset
        last, shift = stop + offset, layout.shift(start)
        sinks, first = _in_front(layout, max(oldest, 0), moved=shift > 0)
        keys = torch.cat([slots[:sinks], slots[first:last]])
        mask = None
        if not _plainly_causal(layout, start, stop, keys.shape[0]):
            mask = layout.visible(queries[:, start - begin : stop - begin], keys[None])[:, None]
        blocks.append(Block(start - begin, stop - begin, first, last, sinks, [shift], mask))
    return AttentionPlan(layout, cached, blocks, dropped=cached + span.width - layout.count(end))


def _in_front(layout: KeyLayout, oldest: int, moved: bool) -> tuple[int, int]:
    """Slots of sinks to put in front of a block's keys, and the first of those, when `oldest` is the oldest in view."""
    if not moved and oldest <= layout.sinks:
        return 0, 0
    return layout.sinks, max(oldest, layout.sinks)


def _plainly_causal(layout: KeyLayout, start: int, stop: int, keys: int) -> bool:
    """No mask is needed: causal order alone decides, and attention implementations know it."""
    if keys != stop - start and stop - start > 1:
        return False
    return layout.window is None or keys <= layout.window


def _ragged_plan(span: Span, layout: KeyLayout) -> AttentionPlan:
    counts = [layout.count(begin) for begin in span.begin]
    cached, positions = max(counts), span.positions()
    key_counts = [count + length for count, length in zip(counts, span.lengths, strict=True)]
    kept_counts = [layout.count(end) for end in span.end]
    total = max(key_counts)
    packed = None
    if cached:
        columns = torch.arange(span.width)
        packed = _column(counts) + columns
        packed = packed.where(columns < _column(span.lengths), total).to(span.device)
    kept = None
    if kept_counts != key_counts:
        slot, dropped = torch.arange(max(kept_counts)), _column(key_counts) - _column(kept_counts)
        kept = slot + torch.where(slot < layout.sinks, 0, dropped)
        kept = kept.where(slot < _column(kept_counts), 0).to(span.device)
    slot, firsts = torch.arange(total), _column([layout.first(begin) for begin in span.begin])
    # Sinks lie in front of the window once it has left them behind.
    slots = torch.where((firsts > 0) & (slot >= layout.sinks), slot + firsts - layout.sinks, slot)
    slots = slots.where(slot < _column(key_counts), -1).to(span.device)
    cuts = {0, span.width}
    for begin, end in zip(span.begin, span.end, strict=True):
        cuts |= {start - begin for start in layout.block_starts(begin, end)}
    blocks, bounds = [], sorted(cuts)
    for start, stop in pairwise(bounds):
        shifts = [
            layout.shift(begin + start) if start < length else 0
            for begin, length in zip(span.begin, span.lengths, strict=True)
        ]
        reaching = [row for row, length in enumerate(span.lengths) if start < length]
        offsets = [key_counts[row] - span.end[row] for row in reaching]  # from a position to its slot
        begins = [span.begin[row] + start for row in reaching]
        ends = [span.begin[row] + min(stop, span.lengths[row]) for row in reaching]
        last = max((end + offset for end, offset in zip(ends, offsets, strict=True)), default=1)
        oldest = 0
        if layout.window is not None and reaching:
            oldest = min(max(begin - layout.window + 1, 0) + o for begin, o in zip(begins, offsets, strict=True))
        sinks, first = _in_front(layout, max(oldest, 0), moved=any(shifts))
        seen = torch.cat([slots[:, :sinks], slots[:, first:last]], dim=1)
        mask = layout.visible(positions[:, start:stop], seen)[:, None]
        blocks.append(Block(start, stop, first, last, sinks, shifts, mask))
    return AttentionPlan(layout, cached, blocks, span.lengths, key_counts, packed, total, kept)


def _column(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers)[:, None]


def _by_slot(index: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Slots `[batch, n]` as an index along axis 2 of keys."""
    return index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
