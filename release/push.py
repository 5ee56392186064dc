"""A release goes to the hub: the directory as it is, and no file of another's beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from .model_directory import CHECKSUMS


OF_THE_HUB = (".gitattributes",)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_can_push(api: Any = None) -> None:
    """
    Before anything else is done.

    Raises:
        ValueError: there is no token, or the hub is not to be reached.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError("`--push`: HF_HUB_OFFLINE is set. Unset it, or leave --push out: all else needs no network.")
    if api is None and get_token() is None:
        raise ValueError(f"`--push`: there is no token for the hub: {LOG_IN}.")


def push(directory: Path, repository: str, checksums: dict[str, str], private: bool = False, api: Any = None) -> str:
    """
    Upload a released directory in one commit, and compare what the hub then has with the checksums.

    Args:
        repository: owner/name; made where there is none.
        checksums: SHA-256 by file, of all files but their own list.
        private: of a repository that is made.
        api: a `huggingface_hub.HfApi`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the hub cannot be reached, refuses, has other files in the repository, or has not what was sent.
    """
    api = HfApi() if api is None else api
    sent = {*checksums, CHECKSUMS}
    try:
        if others := sorted(set(_there(api, repository)) - sent):
            raise ValueError(
                f"`--push`: {repository} has {others[0]}{f' and {len(others) - 1} more files' if len(others) > 1 else ''}, which this "
                f"release has not. Delete them there (`hf repos delete-files {repository} {others[0]}`), or give another "
                "repository."
            )
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=str(directory),
            commit_message="Release by hope release",
            allow_patterns=sorted(sent),
        )
        found = _there(api, repository)
    except RepositoryNotFoundError as error:
        raise ValueError(f"`--push`: {repository} is not there for you: {LOG_IN} to it.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        why = {401: f"the token is none, or not valid: {LOG_IN}", 403: f"the token may not write to it: {LOG_IN} to it"}
        raise ValueError(f"`--push`: {repository}: {why.get(status or 0, str(error).strip())}.") from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"`--push`: the hub cannot be reached ({type(error).__name__}). The release is in {directory}: push it by the same "
            "command where there is a network."
        ) from error
    wrong = sorted(name for name in sent if name not in found)
    wrong += sorted(name for name, digest in checksums.items() if found.get(name) not in (None, digest))
    if wrong:
        raise ValueError(f"`--push`: {repository} has not {wrong[0]} as it was sent. Push again.")
    return str(commit.commit_url)


def _there(api: Any, repository: str) -> dict[str, str | None]:
    """The files of a repository with the SHA-256 of those that the hub keeps one of; none where there is no repository."""
    try:
        tree = list(api.list_repo_tree(repository, recursive=True))
    except RepositoryNotFoundError:
        return {}
    files = [entry for entry in tree if hasattr(entry, "size") and entry.path not in OF_THE_HUB]
    return {entry.path: None if entry.lfs is None else entry.lfs.sha256 for entry in files}
