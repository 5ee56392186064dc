"""The config.json of a checkpoint directory, read without running any code that came with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils import CONFIG_NAME


ADAPTER_CONFIG_FILE = "adapter_config.json"


def read_config(directory: Path, name: str) -> Any:
    """
    The Transformers config in a directory.

    Args:
        name: what the user called the directory.

    Raises:
        ValueError: there is none, it is an adapter's, or it is of no model that Transformers itself knows.
    """
    if (directory / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"`source` {name} is an adapter ({ADAPTER_CONFIG_FILE}), a change to another model: "
            f"merge it into that model (PEFT's `merge_and_unload`), save the result and convert that."
        )
    path = directory / CONFIG_NAME
    if not path.is_file():
        inside = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f": give one of the files in it, as {inside[0]}" if inside else ""
        raise ValueError(f"`source` {name} is neither a directory with a {CONFIG_NAME} nor a .gguf file{hint}.")
    try:
        model_type = json.loads(path.read_bytes()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"`source` {name} has a {CONFIG_NAME} that is not a JSON object: {error}.") from error
    if model_type is None:
        raise ValueError(f"`source` {name} has a {CONFIG_NAME} without `model_type`: it does not say what model it is.")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`source` {name} has `model_type` {model_type!r}, which Transformers {transformers.__version__} does not know. "
            f"Code that came with a checkpoint (`auto_map`) is not run."
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"`source` {name} has a {CONFIG_NAME} that is not of a {model_type!r} model: {reason}"
        ) from error
