"""The tokenizer that comes with a model, and whether the two agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Names of the tokens that stand for what is not text: a model of text alone has no row for them (Gemma 3 1B).
PLACEHOLDERS = ("image_token", "video_token", "audio_token")


def read_tokenizer(place: str | Path) -> Any:
    """
    The tokenizer in a directory, `None` where it has none, or the hub's by its name.

    Raises:
        ValueError: it does not load.
    """
    directory = Path(place)
    if directory.is_dir() and not any((directory / file).is_file() for file in FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(
            f"The tokenizer in {place} does not load: {error}. Give another as `tokenizer`, or mend its files."
        ) from error


def load_tokenizer(source: str | Path) -> Any:
    """
    The tokenizer of a checkpoint that `convert` takes: of a directory, a GGUF file, or a name on the hub.

    Raises:
        ValueError: there is none, or it does not load.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = read_tokenizer(source)
    if tokenizer is None:
        raise ValueError(
            f"{source} holds no tokenizer: none of {', '.join(FILES)} is there. Save one beside the model."
        )
    return tokenizer


def check_vocabulary(tokenizer: Any, config: Any) -> None:
    """
    Nothing to check where there is no tokenizer, or the config has no `vocab_size`.

    Raises:
        ValueError: a token of text has an id that the model has no embedding for.
    """
    vocab_size = getattr(config, "vocab_size", None)
    if tokenizer is None or vocab_size is None:
        return
    placeholders = {getattr(tokenizer, name, None) for name in PLACEHOLDERS}
    outside = {
        token: index
        for token, index in tokenizer.get_vocab().items()
        if index >= vocab_size and token not in placeholders
    }
    if outside:
        token, index = max(outside.items(), key=lambda item: item[1])
        raise ValueError(
            f"The tokenizer of `source` disagrees with the model's `vocab_size`: {len(outside)} of its tokens have no "
            f"embedding, {token!r} with id {index} where ids end at {vocab_size - 1}. Take the tokenizer the model was "
            f"trained with, or give the model rows for them (`resize_token_embeddings`)."
        )
