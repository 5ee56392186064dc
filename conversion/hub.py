"""Checkpoints on the Hugging Face hub: first what describes one, then its weights and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .checkpoint_files import read_index


DESCRIPTION = [
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    SAFE_WEIGHTS_INDEX_NAME,
    WEIGHTS_INDEX_NAME,
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
]


def is_hub_name(text: str) -> bool:
    """Whether a text has the form owner/name, and not that of a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def download_description(name: str, revision: str | None) -> Path:
    """
    The directory with a repository's config, tokenizer, chat template, generation config and index.

    Args:
        name: owner/name.
        revision: a branch, a tag or a commit; `None` for the main branch.

    Raises:
        ValueError: there is no such repository or revision, it may not be read, or the hub cannot be reached and the cache
            does not have it.
    """
    return _download(name, revision, DESCRIPTION)


def download_weights(name: str, description: Path, allow_pickle: bool) -> None:
    """
    The weight files of a repository, next to its description.

    Args:
        description: what `download_description` returned. Its name is the commit that both come from.
        allow_pickle: take `pytorch_model.bin` where there is no safetensors.

    Raises:
        ValueError: as in `download_description`.
    """
    formats = [(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    if allow_pickle:
        formats.append((WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
    for single, index in formats:
        path = description / index
        files = sorted(set(read_index(path).values())) if path.is_file() else [single]
        _download(name, description.name, files)
        if any((description / file).is_file() for file in files):
            return


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        reason = f"is gated: accept its terms at https://huggingface.co/{name}, and log in with `hf auth login`"
        raise ValueError(f"`source` {name} {reason}.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"`source` {name} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        reason = "is neither a path here nor a repository on the hub. A private one needs `hf auth login`"
        raise ValueError(f"`source` {name} {reason}.") from error
    except (EntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"`source` {name}{at} is no path here, is not (or not whole) in the hub's cache, and the hub cannot be reached: "
            f"check the name, the network, and HF_HUB_OFFLINE."
        ) from error
    except (HfHubHTTPError, HTTPError) as error:
        raise ValueError(f"`source` {name}{at} could not be downloaded from the hub: {error}") from error
