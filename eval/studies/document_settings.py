"""What studies that read documents are told, and the models and texts that they mean by it."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoTokenizer

from modeling_hope import HopeConfig, HopeForCausalLM
from modeling_hope.conversion import convert
from modeling_hope.eval.long_documents import find_documents
from modeling_hope.eval.small_model import generated_document, small_transformer
from modeling_hope.training.options import option

from .study import DeviceSettings


SMALL, GENERATED = "small:", "generated:"  # and a seed: a model, a text that is only to be seen to be read


@strict
@dataclasses.dataclass
class DocumentSettings(DeviceSettings):
    """What a study that reads documents is told."""

    documents: list[str] = option(
        list,
        "documents",
        "to read: names, files, directories, patterns of .txt, .md and .jsonl; none: the study's own (README.md, eval/long_documents.py)",
    )
    corpus: str = option("corpus", "documents", "directory of the corpus, whose test split some are in")
    packages: str = option("documents/wheels", "documents", "directory for the packages that others are in")
    tokens: int = option(8192, "documents", "of each document, at most", least=64)


@strict
@dataclasses.dataclass
class ReaderSettings(DocumentSettings):
    """And by which models."""

    models: dict[str, str] = option(dict, "models", "Hope checkpoints by name; the others are compared with the first")


def check_documents(settings: DocumentSettings) -> None:
    """
    Raises:
        ValueError: a document is not there.
    """
    documents_of(settings)


def check_readers(settings: ReaderSettings) -> None:
    """
    Raises:
        ValueError: no model is given, or one or a document is not there.
    """
    if not settings.models:
        raise ValueError(
            "`models` is empty: give Hope checkpoints by name, e.g. --models converted=converted, which `hope convert "
            "CHECKPOINT converted --periods 256 --window 1024` makes."
        )
    for name, place in settings.models.items():
        if place.startswith(SMALL):
            seed_of(place, SMALL, "models")
        elif not (Path(place) / "config.json").is_file():
            raise ValueError(f"`models`: {name}={place} is no directory with a checkpoint: config.json is missing.")
    check_documents(settings)


def seed_of(place: str, kind: str, setting: str) -> int:
    """
    Of what is called `small:SEED` or `generated:SEED`.

    Raises:
        ValueError: it is no number.
    """
    if not (seed := place.removeprefix(kind)).isdecimal():
        raise ValueError(f"`{setting}`: {place!r} has no seed: give a whole number after the colon, e.g. {kind}0.")
    return int(seed)


def documents_of(settings: DocumentSettings) -> dict[str, Callable[[], str]]:
    """Documents by name, each with what reads it."""
    generated = [place for place in settings.documents if place.startswith(GENERATED)]
    found: dict[str, Callable[[], str]] = {
        place.replace(":", "-"): partial(generated_document, seed_of(place, GENERATED, "documents"))
        for place in generated
    }
    others = [place for place in settings.documents if place not in generated]
    if others or not generated:
        found |= find_documents(others, settings.corpus, settings.packages)
    return found


@lru_cache(maxsize=1)
def load_reader(place: str, device: str) -> tuple[HopeForCausalLM, Any]:
    """A Hope checkpoint in float32, and its tokenizer."""
    if place.startswith(SMALL):
        source, tokenizer = small_transformer(seed_of(place, SMALL, "models"))
        return convert(source, periods=[32], window=128, check=False).to(device), tokenizer
    model = HopeForCausalLM.from_pretrained(place, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(place)


def config_of(place: str) -> HopeConfig:
    """Of a Hope checkpoint."""
    return load_reader(place, "cpu")[0].config if place.startswith(SMALL) else HopeConfig.from_pretrained(place)


def ids_of(name: str, text: str, tokenizer: Any, tokens: int, least: int = 64) -> torch.Tensor:
    """
    The first tokens of a document, `[tokens]` int64.

    Raises:
        ValueError: there are fewer than `least`.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, :tokens]
    if len(ids) < least:
        raise ValueError(f"`documents`: {name} has {len(ids)} tokens, and {least} are needed. Leave it out.")
    return ids
