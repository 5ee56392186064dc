"""What a conversion did: every tensor's fate and origin, what a memory takes, and how far the logits are from the source's."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from modeling_hope import HopeForCausalLM

from .comparison import Comparison
from .layer_lines import COLUMNS, lines


REPORT_FILE = "conversion_report.json"
NOT_NEEDED = "not needed"
NEW = "new"


@dataclass
class ConversionReport:
    """
    Attributes:
        source: what was converted.
        family: its `model_type`.
        strategy: how its MLPs became levels.
        fates: every source tensor to what became of it: a Hope tensor's name, several with `", "` between, or
            `"not needed: "` and why.
        origins: every Hope tensor to the source tensors, or the part of one, that it is made of, or `"new: "` and what it
            starts as.
        notes: what the source's config says and Hope's does not.
        source_parameters: numbers in the source's tensors.
        parameters: numbers in the Hope model's.
        memory_bytes: what one sequence can learn, from `fast_weight_bytes`.
        comparison: with the source, where they were compared.
        checkpoint: the model's identity as it was written (`identity.identify`).
    """

    source: str
    family: str
    strategy: str
    fates: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source_parameters: int = 0
    parameters: int = 0
    memory_bytes: dict[str, Any] = field(default_factory=dict)
    comparison: Comparison | None = None
    checkpoint: dict[str, str] | None = None

    def save(self, directory: Path) -> None:
        (directory / REPORT_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ConversionReport:
        """
        The report of a converted model's directory, or from a file.

        Raises:
            ValueError: it is none.
            OSError: it cannot be read.
        """
        file = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
        try:
            fields = json.loads(file.read_text("utf-8"))
            comparison = fields.pop("comparison")
            return cls(**fields, comparison=None if comparison is None else Comparison(**comparison))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is no conversion report: {error}.") from error

    def summary(self) -> str:
        """The figures in lines, for a terminal."""
        unneeded = sum(fate.startswith(NOT_NEEDED) for fate in self.fates.values())
        new = sum(origin.startswith(NEW) for origin in self.origins.values())
        rows = [
            ("source", f"{self.source} ({self.family})"),
            ("strategy", self.strategy),
            ("tensors", f"{len(self.fates) - unneeded} mapped, {unneeded} not needed, {new} new, none left over"),
            ("parameters", f"{self.parameters:,}, the source's {self.source_parameters:,}"),
            *_memory_rows(self.memory_bytes),
            *([("logits", "not compared")] if self.comparison is None else self.comparison.rows()),
        ]
        return "\n".join(f"{name:<16} {value}" for name, value in rows)

    def table(self) -> str:
        """The figures, what became of every tensor, layers that are alike on one line, and the notes."""
        mapped = ((name, fate.split(", ")) for name, fate in self.fates.items() if not fate.startswith(NOT_NEEDED))
        others = (
            (n, [t]) for n, t in chain(self.fates.items(), self.origins.items()) if t.startswith((NOT_NEEDED, NEW))
        )
        parts = [self.summary(), lines(mapped, "-> "), lines(others)]
        parts.append("\n".join(textwrap.fill(note, COLUMNS, subsequent_indent="  ") for note in self.notes))
        return "\n\n".join(part for part in parts if part)


def fast_weight_bytes(model: HopeForCausalLM, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """
    What the levels' memory of one sequence takes, when all that can learn have learned.

    `saved`: changes, with what the inner optimizer and the variant keep beside them. `in_use`: at most, while the model
    reads on: with the sums of weight and change that weights of float32 are read with, and the gradients that wait for
    levels slower than a segment. Keys, values and the mixers' states are not counted.

    Args:
        model: may be on the meta device.
        dtype: of the weights it will be used with; unset, its own.

    Returns:
        `saved` and `in_use` in bytes, and `levels`: of each that learns its `level`, its `period` in tokens, `saved` and
        `in_use`.
    """
    config, levels = model.config, []
    for level in config.learning_levels:
        weights = [
            getattr(layer.cms.level(level), name).weight
            for layer in model.model.layers
            if level in layer.cms.held
            for name in config.learned_maps
        ]
        period = config.cms_periods[level]
        momentum = config.cms_optimizer == "momentum"
        initial = config.cms_variant == "nested" and level != config.learning_levels[-1]
        waiting = period != config.segment_length
        saved = in_use = 0
        for weight in weights:
            kept = dtype or weight.dtype
            merged = kept in (torch.float32, torch.float64)
            tensor = weight.numel() * torch.promote_types(kept, torch.float32).itemsize
            saved += tensor * (1 + momentum + initial)
            in_use += tensor * (1 + momentum + initial + waiting + merged)
        levels.append({"level": level, "period": period, "saved": saved, "in_use": in_use})
    return {**{kind: sum(level[kind] for level in levels) for kind in ("saved", "in_use")}, "levels": levels}


def _memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    if not memory:
        return []
    found = [("memory", f"of a sequence, all levels changed: {_memory(memory)}")]
    for level in memory["levels"]:
        found.append((f"  level {level['level']}", f"each {level['period']:,} tokens: {_memory(level)}"))
    return found


def _memory(sizes: dict[str, Any]) -> str:
    return f"{_size(sizes['saved'])} saved, up to {_size(sizes['in_use'])} in use"


def _size(number: int) -> str:
    if number < 1024:
        return f"{number} bytes"
    power = min(int(math.log2(number)) // 10, 4)
    size = number / 1024**power
    return f"{size:,.{1 if size < 100 else 0}f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
