"""Which positions an attention layer's cached keys hold, what a query sees of them, and how they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class KeyLayout:
    """
    The keys that one kind of attention keeps of a row, as a function of how many tokens the row has read.

    Full attention keeps positions `0 .. seen - 1`. Sliding attention keeps the sinks and what the *open segment* can
    still see, for a segment is read again, from its start, when it is learned:
    `0 .. sinks - 1` and `first(seen) .. seen - 1`. Keys lie left-packed in that order.

    Attributes:
        window: tokens in view of a query, itself included; `None` for all.
        sinks: first tokens of the stream that stay in view of a window.
        segment: tokens in a segment; `None` when nothing is ever read again.
    """

    window: int | None
    sinks: int
    segment: int | None

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

    def positions(self, seen: int) -> torch.Tensor:
        """The positions kept, `[count(seen)]` int64, on the CPU."""
        first = self.first(seen)
        if not first:
            return torch.arange(seen)
        return torch.cat([torch.arange(self.sinks), torch.arange(first, seen)])

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
class Reading:
    """
    One run of the model: every row reads a stretch of its stream, packed to the left.

    Attributes:
        begin: position of each row's first token in this run. What a row had cached from there on is replaced.
        lengths: tokens of each row in this run, at most `width`; a row may have none.
        width: columns of the run.
        device: where positions and masks live.
    """

    begin: list[int]
    lengths: list[int]
    width: int
    device: torch.device
    _plans: dict[KeyLayout, AttentionPlan] = field(default_factory=dict)

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

    def plan(self, layout: KeyLayout) -> AttentionPlan:
        """The plan of a kind of attention, made once and shared by its layers."""
        if layout not in self._plans:
            self._plans[layout] = AttentionPlan.make(self, layout)
        return self._plans[layout]


@dataclass(frozen=True)
class AttentionPlan:
    """
    How the layers of one kind attend in one run, and what they keep of its keys.

    Attributes:
        layout: the kind of attention.
        cached: cached key slots that take part, the most of any row.
        mask: `[batch or 1, 1, width, cached + width]` bool, true where a query sees a key; `None` for plain causal
            attention over no cached keys, or for one query that sees every key.
        key_counts: keys of each row, cached and new.
        query_counts: queries of each row.
        valid_keys: `[batch, cached + width]` bool, the slots that hold a key; `None` when all do.
        kept: indices `[batch, kept]` into the `cached + width` slots; `None` for all of them, in order.
        dropped: for a uniform run, how many slots right after the sinks are dropped.
    """

    layout: KeyLayout
    cached: int
    mask: torch.Tensor | None
    query_counts: list[int]
    key_counts: list[int]
    valid_keys: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    dropped: int = 0

    @classmethod
    def make(cls, reading: Reading, layout: KeyLayout) -> AttentionPlan:
        counts = [layout.count(begin) for begin in reading.begin]
        cached = max(counts, default=0)
        key_counts = [count + length for count, length in zip(counts, reading.lengths, strict=True)]
        if reading.uniform:
            begin, end = reading.begin[0], reading.end[0]
            mask = None
            if not _plainly_causal(layout, begin, reading.width):
                keys = torch.cat([layout.positions(begin).to(reading.device), reading.positions()[0]])
                mask = layout.visible(reading.positions(), keys[None])[:, None]
            dropped = cached + reading.width - layout.count(end)
            return cls(layout, cached, mask, reading.lengths, key_counts, dropped=dropped)

        slots = torch.full((len(counts), cached), -1)
        for row, (begin, count) in enumerate(zip(reading.begin, counts, strict=True)):
            slots[row, :count] = layout.positions(begin)
        positions = reading.positions()
        keys = torch.cat([slots.to(reading.device), positions], dim=1)
        kept = [layout.count(end) for end in reading.end]
        index = torch.zeros(len(counts), max(kept), dtype=torch.int64)
        for row, (count, length, keep) in enumerate(zip(counts, reading.lengths, kept, strict=True)):
            filled = torch.cat([torch.arange(count), torch.arange(cached, cached + length)])
            sinks = min(layout.sinks, keep) if len(filled) > keep else 0
            index[row, :keep] = torch.cat([filled[:sinks], filled[len(filled) - keep + sinks :]])
        return cls(
            layout,
            cached,
            layout.visible(positions, keys)[:, None],
            reading.lengths,
            key_counts,
            valid_keys=keys >= 0,
            kept=index.to(reading.device),
        )

    def keep(self, keys: torch.Tensor) -> torch.Tensor:
        """What a cache keeps, `[batch, heads, kept, head_dim]`, of `[batch, heads, cached + width, head_dim]`."""
        if self.kept is not None:
            return keys.gather(2, self.kept[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))
        if self.dropped:
            sinks = self.layout.sinks
            return torch.cat([keys[:, :, :sinks], keys[:, :, sinks + self.dropped :]], dim=2)
        return keys


def _plainly_causal(layout: KeyLayout, begin: int, width: int) -> bool:
    """No mask is needed: causal order alone decides, and attention implementations know it."""
    nothing_cached, one_query = begin == 0, width == 1
    if not (nothing_cached or one_query):
        return False
    if layout.window is None:
        return True
    oldest = layout.first(begin) or layout.sinks
    return begin + width - 1 - oldest < layout.window
