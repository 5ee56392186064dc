"""What a conversion did: every tensor's fate, and how far the logits are from the source's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


REPORT_FILE = "conversion_report.json"


@dataclass
class ConversionReport:
    """
    Attributes:
        source: what was converted.
        family: its `model_type`.
        strategy: how its MLPs became levels.
        tensors: source tensor to its name in the Hope model.
        added: tensors of the Hope model that no source tensor became, and what they start as.
        parameters: of the Hope model.
        memory_bytes_per_row: of what one row can learn, when every learning level has changed.
        logits: `max_difference`, `range` and their `relative` on a probe, where they were compared.
    """

    source: str
    family: str
    strategy: str
    tensors: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    memory_bytes_per_row: int = 0
    logits: dict[str, float] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        (directory / REPORT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def table(self) -> str:
        """The report in lines, for a terminal."""
        rows = [
            ("source", f"{self.source} ({self.family})"),
            ("strategy", self.strategy),
            ("tensors", f"{len(self.tensors)} mapped, {len(self.added)} added as no-ops, 0 left over"),
            ("parameters", f"{self.parameters:,}"),
            ("memory of a row", f"{self.memory_bytes_per_row / 2**20:,.0f} MiB when all levels have learned"),
        ]
        if self.logits:
            rows.append(
                (
                    "logits",
                    f"max difference {self.logits['max_difference']:.1e}, {self.logits['relative']:.1e} of their range",
                )
            )
        return "\n".join(f"{name:<16} {value}" for name, value in rows)
