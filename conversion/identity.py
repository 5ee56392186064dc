"""Which checkpoint a figure is of: digests of its weights and of its config, which results carry with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from modeling_hope.memory_files import tensor_digest

from .checkpoint_files import CheckpointFiles


# Fields of a config that say where a model is from and how it is kept, and not what it computes.
NOT_COMPUTED = ("architectures", "auto_map", "converted_from", "dtype", "transformers_version", "_name_or_path")


def identify(directory: str | Path, config: Any = None) -> dict[str, str]:
    """
    A checkpoint's identity, the same however its tensors lie in files and whoever saved it.

    Args:
        directory: with the weights, as safetensors.
        config: that the weights are used with; unset, the directory's own.

    Returns:
        `weights`: SHA-256 of every tensor's name, dtype, shape and numbers; `config`: of the fields that are not the
        defaults and have a part in what is computed.

    Raises:
        ValueError: the directory has no weights as safetensors, or they are damaged.
        OSError: there is no config.
    """
    config = AutoConfig.from_pretrained(directory) if config is None else config
    digests = {name: tensor_digest(tensor) for name, tensor in CheckpointFiles(Path(directory)).tensors()}
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in NOT_COMPUTED}
    said = json.dumps(fields, sort_keys=True, default=str)
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("weights", lines), ("config", said))}


def identify_directory(place: Any, config: Any = None) -> dict[str, str] | None:
    """As `identify`; `None` for what is no directory of safetensors: a name on the hub, a model in memory."""
    if not isinstance(place, str | Path) or not Path(place).is_dir():
        return None
    try:
        return identify(place, config)
    except (ValueError, OSError):
        return None
