"""What a card says of a model that can be read off it: kept as `release.json`, so that a card needs no weights."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from modeling_hope.chat_turns import ChatTurns
from modeling_hope.conversion.checkpoint_files import CheckpointFiles
from modeling_hope.conversion.plan import on_meta
from modeling_hope.conversion.report import REPORT_FILE, ConversionReport, fast_weight_bytes

from .check import Check
from .model_directory import DESCRIPTION, ModelDirectory


FORMAT_VERSION = 1
OF_EARLIER_RELEASES = ("own card", "own results", "checksums")


@dataclasses.dataclass(frozen=True)
class Description:
    """
    Attributes:
        checkpoint: see `conversion.identity`.
        parameters: numbers in the model, shared ones once.
        weight_bytes: of the files of weights.
        dtype: of the weights.
        context: tokens that the model was trained to have in view.
        mixers: how many layers have each kind.
        windows: of sliding attention, its tokens and sinks.
        levels: of the continuum memory: `period`, `learning_rate` and in how many `layers`.
        rule: variant and inner optimizer.
        memory_bytes: of a sequence, when all levels have changed: `saved` and at most `in_use`.
        chat: whether the tokenizer has a chat template that can be rendered turn by turn.
        conversion: what `hope convert` reported, where the model was converted: `source`, `family`, `strategy` and
            `comparison`.
        versions: of what it was checked with.
        checks: name and finding of each that tells of the model, and not of an earlier release.
    """

    checkpoint: dict[str, str]
    parameters: int
    weight_bytes: int
    dtype: str
    context: int
    mixers: dict[str, int]
    windows: list[dict[str, int]]
    levels: list[dict[str, Any]]
    rule: dict[str, str]
    memory_bytes: dict[str, int]
    chat: bool
    conversion: dict[str, Any] | None
    versions: dict[str, str]
    checks: list[dict[str, str]] = dataclasses.field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def with_checks(self, checks: list[Check]) -> Description:
        told = [{"name": check.name, "found": check.found} for check in checks if check.name not in OF_EARLIER_RELEASES]
        return dataclasses.replace(self, checks=told)

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, card: Path) -> Description:
        """
        Of a card's directory.

        Raises:
            ValueError: it is missing, of another version, or none.
        """
        path = card / DESCRIPTION
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"its format version is {fields['format_version']}, and this code reads {FORMAT_VERSION}"
                )
            return cls(**fields)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: `hope release MODEL --card {card}` makes it of the model.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be read: {error}. `hope release MODEL --card {card}` makes it anew."
            ) from None


def describe(directory: ModelDirectory) -> Description:
    """
    Raises:
        ValueError: the conversion report in the directory is none, or of another model.
    """
    config, files = directory.config, CheckpointFiles(directory.path)
    model = on_meta(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = fast_weight_bytes(model, getattr(torch, str(config.dtype).removeprefix("torch.")))
    mixers, windows = Counter(config.layer_types), []
    for window, sinks in dict.fromkeys(zip(config.layer_windows, config.layer_sinks, strict=True)):
        if window is not None:
            windows.append({"tokens": window, "sinks": sinks})
    held = Counter(level for levels in config.cms_levels_per_layer or [] for level in set(levels))
    rates = config.level_learning_rates
    return Description(
        checkpoint=directory.checkpoint,
        parameters=parameters,
        weight_bytes=sum(file.path.stat().st_size for file in files.files),
        dtype=str(config.dtype).removeprefix("torch."),
        context=config.max_position_embeddings,
        mixers=dict(mixers),
        windows=windows,
        levels=[
            {"period": period, "learning_rate": rates[level], "layers": held[level]}
            for level, period in enumerate(config.cms_periods)
        ],
        rule={
            "variant": config.cms_variant,
            "optimizer": config.cms_optimizer,
            "fast_weights": config.cms_fast_weights,
        },
        memory_bytes={kind: memory[kind] for kind in ("saved", "in_use")},
        chat=_chats(directory),
        conversion=_conversion(directory, parameters),
        versions={name: version(name) for name in ("hope-transformers", "transformers", "torch")}
        | {"python": platform.python_version()},
    )


def _chats(directory: ModelDirectory) -> bool:
    tokenizer = AutoTokenizer.from_pretrained(directory.path, trust_remote_code=False)
    try:
        ChatTurns(tokenizer).first([{"role": "user", "content": "Hello"}])
    except ValueError:
        return False
    return True


def _conversion(directory: ModelDirectory, parameters: int) -> dict[str, Any] | None:
    if REPORT_FILE not in directory.files:
        return None
    report = ConversionReport.load(directory.path)
    if report.parameters != parameters or report.checkpoint not in (None, directory.checkpoint):
        raise ValueError(
            f"{REPORT_FILE} is of another model: its figures are not this one's. Delete it, or release what it is of."
        )
    comparison = None if report.comparison is None else dataclasses.asdict(report.comparison)
    return {"source": report.source, "family": report.family, "strategy": report.strategy, "comparison": comparison}
