"""What can be known of a model directory without running its code, each check by its name."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers.dynamic_module_utils import get_relative_imports

from modeling_hope import HopeConfig, HopeForCausalLM
from modeling_hope.conversion.checkpoint_files import CheckpointFiles
from modeling_hope.conversion.tokenizer_files import FILES, check_vocabulary, read_tokenizer
from modeling_hope.memory_files import DESCRIPTION_FILE, TENSORS_FILE

from .absolute_paths import absolute_paths, strings
from .check import CheckError, some
from .facts import CardFacts
from .model_directory import CARD, CHECKSUMS, DESCRIPTION, RESULTS, ModelDirectory


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
OTHER_WEIGHTS = (".gguf", ".h5", ".keras", ".msgpack", ".onnx", ".pb", ".tflite", ".mlmodel")
PICKLE_PROTOCOLS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
# What training and tools leave behind: directories, and how files end.
STRAY_FOLDERS = ("__pycache__", "runs", "logs", "wandb")
STRAY_SUFFIXES = (".part", ".tmp", ".lock", ".log", ".pyc")
STRAY_FILES = ("trainer_state.json", "optimizer.safetensors")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
# Of licences by the hub's names for them: words that their texts have.
LICENCE_WORDS = {
    "apache-2.0": "Apache License",
    "mit": "Permission is hereby granted, free of charge",
    "bsd-3-clause": "Redistribution and use in source and binary forms",
    "gpl-3.0": "GNU GENERAL PUBLIC LICENSE",
    "agpl-3.0": "GNU AFFERO GENERAL PUBLIC LICENSE",
    "cc0-1.0": "CC0 1.0 Universal",
    "cc-by-4.0": "Attribution 4.0 International",
    "cc-by-sa-4.0": "Attribution-ShareAlike 4.0 International",
}
LARGEST_FILE = 50 * 10**9  # bytes, as the hub advises
WITH_CODE = (
    "save it with its code: `hope convert ... --remote-code`, or in Python `HopeConfig.register_for_auto_class()` before "
    "`model.save_pretrained(...)` of the loaded model"
)
RENDERED = "<!-- Rendered by `hope release`"  # in the card, by which one is known that may be written over


def directory_checks(
    directory: ModelDirectory, facts: CardFacts, card: Path, results: Mapping[str, str]
) -> dict[str, Callable[[], str]]:
    """
    By name; each gives what it found in words, or raises `CheckError`.

    Args:
        card: its directory.
        results: that are to be written: checksum by file.
    """
    return {
        "files": lambda: only_what_belongs(directory),
        "safetensors only": lambda: safetensors_only(directory),
        "no memory": lambda: no_memory(directory),
        "no absolute paths": lambda: no_absolute_paths(directory),
        "config": lambda: causal_lm(directory),
        "remote code": lambda: remote_code(directory),
        "weights": lambda: whole_weights(directory),
        "tokenizer": lambda: fitting_tokenizer(directory),
        "licence": lambda: licence(directory, facts),
        "own card": lambda: no_other_card(directory.path / CARD, card / CARD),
        "own results": lambda: no_other_results(directory, results),
        "checksums": lambda: same_checksums(directory),
    }


def only_what_belongs(directory: ModelDirectory) -> str:
    stray = [name for name in directory.files if _is_stray(PurePosixPath(name))]
    if stray:
        raise CheckError(f"{some(stray)} of no use to whoever loads the model", "delete what is not the model's")
    if links := [name for name in directory.files if not (directory.path / name).is_file()]:
        raise CheckError(f"{some(links)} cannot be read: links that lead nowhere", "copy the files themselves")
    own = [name for name in directory.files if name not in directory.written_here]
    sizes = {name: (directory.path / name).stat().st_size for name in own}
    if large := [name for name, size in sizes.items() if size > LARGEST_FILE]:
        raise CheckError(
            f"{some(large)}: over {LARGEST_FILE / 1e9:.0f} GB", "save the model again with `max_shard_size='5GB'`"
        )
    return f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB"


def _is_stray(name: PurePosixPath) -> bool:
    folders = name.parts[:-1]
    return (
        any(part.startswith(".") for part in name.parts if part != ".gitattributes")
        or any(folder in STRAY_FOLDERS or folder.startswith("checkpoint-") for folder in folders)
        or name.suffix in STRAY_SUFFIXES
        or name.name in STRAY_FILES
        or name.name.startswith("events.out.tfevents")
    )


def safetensors_only(directory: ModelDirectory) -> str:
    pickles = [name for name in directory.files if _is_pickle(directory.path / name)]
    if pickles:
        raise CheckError(
            f"{some(pickles)}: pickles, and loading a pickle runs whatever code it holds",
            "delete them; weights that are nowhere else: load the model and `save_pretrained` it, which writes safetensors",
        )
    others = [name for name in directory.files if name.endswith(OTHER_WEIGHTS)]
    if others:
        raise CheckError(f"{some(others)}: weights in other forms", "release them in a repository of their own")
    shards = [name for name in directory.files if name.endswith(".safetensors")]
    return f"{len(shards)} file{'s' * (len(shards) != 1)} of safetensors, no pickle"


def _is_pickle(path: Path) -> bool:
    """By its name, or by how it begins."""
    if path.name.endswith(PICKLES):
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        begins = file.read(2)
    if begins in PICKLE_PROTOCOLS:
        return True
    if begins != b"PK" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:  # as torch.save writes
        return any(name.endswith(".pkl") for name in archive.namelist())


def no_memory(directory: ModelDirectory) -> str:
    kept = [
        name
        for name in directory.files
        if (last := PurePosixPath(name).name) == DESCRIPTION_FILE or TENSORS_FILE.fullmatch(last)
    ]
    if kept:
        raise CheckError(
            f"{some(kept)}: a memory, which holds every token that was read into it",
            "move it away; what everybody may know of it can be written into the weights by `consolidate`",
        )
    return "no memory of anybody's text"


def no_absolute_paths(directory: ModelDirectory) -> str:
    texts = [name for name in directory.files if name.endswith((".json", ".jsonl", ".yaml", ".yml", ".jinja"))]
    texts = [name for name in texts if name not in directory.written_here]
    found = []
    for name in texts:
        try:
            parts = [(place, text) for content in _contents(directory, name) for place, text in strings(content)]
        except (ValueError, yaml.YAMLError) as error:
            raise CheckError(f"{name} cannot be read: {error}", "mend it, or save the model again") from None
        found += [(name, place, path) for place, text in parts for path in absolute_paths(text)]
    for name in (file for file in directory.files if file.endswith(".safetensors")):
        try:
            with safe_open(directory.path / name, framework="pt") as file:
                said = file.metadata() or {}
        except Exception as error:  # safetensors raises what it likes
            raise CheckError(f"{name} cannot be read: {error}", "copy or save it again, whole") from None
        found += [(name, key, path) for key, text in said.items() for path in absolute_paths(text)]
    if found:
        name, place, path = found[0]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise CheckError(
            f"{name} says {path} at `{place}`{more}",
            "write a name or a relative path there: it tells of your machine, and is nowhere on another",
        )
    return f"in none of {len(texts)} files"


def _contents(directory: ModelDirectory, name: str) -> Iterator[Any]:
    """What a file says, but for vocabularies: their pieces are no paths."""
    path = directory.path / name
    text = path.read_text(encoding="utf-8")
    if path.name in ("vocab.json", "merges.json"):
        return
    if name.endswith(".jsonl"):
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
    elif name.endswith(".json"):
        content = json.loads(text)
        if path.name == "tokenizer.json" and isinstance(content, dict):
            content = {key: value for key, value in content.items() if key not in ("model", "added_tokens")}
        yield content
    else:
        yield text if name.endswith(".jinja") else yaml.safe_load(text)


def causal_lm(directory: ModelDirectory) -> str:
    try:
        config = directory.config
    except Exception as error:  # of the strict validation, too
        said = str(error).strip().splitlines()[-1].strip()
        raise CheckError(f"config.json: {said}", "save the model again from one that works") from None
    kinds = config.architectures or []
    if kinds != [HopeForCausalLM.__name__]:
        raise CheckError(
            f"config.json says {kinds}",
            f"release a language model, whose `architectures` are [{HopeForCausalLM.__name__!r}]",
        )
    periods = ", ".join("never" if period is None else f"{period:,}" for period in config.cms_periods)
    return f"{config.num_hidden_layers} layers, levels of {periods} tokens"


def remote_code(directory: ModelDirectory) -> str:
    named = directory.json("config.json").get("auto_map") or {}
    named = {name: place for name, place in named.items() if isinstance(place, str)}
    missing = [name for name in ("AutoConfig", "AutoModelForCausalLM") if name not in named]
    if missing:
        raise CheckError(f"`auto_map` in config.json does not say what {' and '.join(missing)} load", WITH_CODE)
    needed: set[str] = set()
    waiting = {f"{place.split('--')[-1].split('.')[0]}.py" for place in named.values()}
    while waiting:
        name = waiting.pop()
        needed.add(name)
        if (directory.path / name).is_file():
            waiting |= {f"{module}.py" for module in get_relative_imports(directory.path / name)} - needed
    lacking = sorted(name for name in needed if not (directory.path / name).is_file())
    if lacking:
        raise CheckError(f"{some(lacking)} missing, which `auto_map` needs", WITH_CODE)
    return f"{len(needed)} files of code, all that `auto_map` needs"


def whole_weights(directory: ModelDirectory) -> str:
    try:
        files = CheckpointFiles(directory.path)
        infos = files.infos()
        unused = {Path(name).name for name in directory.files if name.endswith(".safetensors")}
        unused -= {file.path.name for file in files.files}
        odd = next((name for name, tensor in files.tensors() if not bool(torch.isfinite(tensor).all())), None)
    except ValueError as error:
        raise CheckError(str(error).rstrip("."), "save or copy the model again, whole") from None
    if unused:
        raise CheckError(f"{some(sorted(unused))}: no index names them", "delete them, or save the model again")
    if odd:
        raise CheckError(f"{odd} holds numbers that are not finite", "train from a checkpoint before that")
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()})
    numbers = sum(info.numel for info in infos.values())
    return f"{numbers:,} numbers in {len(infos)} tensors of {' and '.join(dtypes)}, all finite"


def fitting_tokenizer(directory: ModelDirectory) -> str:
    fix = "save the one that the model was trained with: `tokenizer.save_pretrained(...)`"
    try:
        tokenizer = read_tokenizer(directory.path)
        check_vocabulary(tokenizer, HopeConfig.from_pretrained(directory.path))
    except ValueError as error:
        raise CheckError(str(error).rstrip("."), fix) from None
    if tokenizer is None:
        raise CheckError(f"none: there is neither of {some(FILES, len(FILES))}", fix)
    chat = "a chat template" if tokenizer.chat_template else "no chat template"
    return f"{len(tokenizer):,} tokens, {chat}"


def licence(directory: ModelDirectory, facts: CardFacts) -> str:
    there = [name for name in LICENCES if name in directory.files]
    fix = f"put the text of the licence of these weights into {directory.path}/LICENSE"
    if not there:
        raise CheckError("there is no LICENSE", fix)
    text = (directory.path / there[0]).read_text(encoding="utf-8", errors="replace")
    words = LICENCE_WORDS.get(facts.license, "")
    if not text.strip() or " ".join(words.lower().split()) not in " ".join(text.lower().split()):
        raise CheckError(
            f"{there[0]} is not the text of {facts.license}, which the card names",
            f"{fix}, or mend `license` in the facts",
        )
    return f"{there[0]}, {facts.license}"


def no_other_card(*places: Path) -> str:
    for path in places:
        if path.is_file() and RENDERED not in path.read_text(encoding="utf-8", errors="replace"):
            raise CheckError(
                f"{path} was not written by `hope release`, which would write over it",
                "move it away, and what is to be kept of it into `summary`, `training_data` or `limitations` of the facts",
            )
    return "none but what earlier releases wrote"


def no_other_results(directory: ModelDirectory, results: Mapping[str, str]) -> str:
    others = [
        name
        for name in directory.files
        if name.startswith(f"{RESULTS}/")
        and name not in directory.written_here
        and results.get(name) != directory.sha256(name)
    ]
    if others:
        raise CheckError(
            f"{some(others)}: not of this release", "move them away; results of this checkpoint are given by --results"
        )
    return f"{len(results)} to be written" if results else "none"


def same_checksums(directory: ModelDirectory) -> str:
    if CHECKSUMS not in directory.files:
        return "none of an earlier release"
    if not directory.recorded:
        raise CheckError(f"{CHECKSUMS} holds no checksums", f"delete {CHECKSUMS}")
    fix = f"bring back the file, or delete {CHECKSUMS} where the change is meant"
    own = (CARD, DESCRIPTION)
    recorded = {
        n: digest for n, digest in directory.recorded.items() if n not in own and not n.startswith(f"{RESULTS}/")
    }
    changed = [n for n, digest in recorded.items() if n in directory.files and directory.sha256(n) != digest]
    gone = [name for name in recorded if not (directory.path / name).is_file()]
    if changed or gone:
        raise CheckError(f"{some([*changed, *gone])}: not as {CHECKSUMS} has it", fix)
    return f"{len(recorded)} files as {CHECKSUMS} has them"


__all__ = ["RENDERED", "directory_checks", "no_other_card"]
