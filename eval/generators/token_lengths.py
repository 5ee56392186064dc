"""Text of a given length, by a model's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from .haystack import read_text


AT_ONCE = 64  # sentences that are tokenized together
LENGTHS = tuple(1024 * 2**doubled for doubled in range(7))  # 1K to 64K, as the paper has them


def samples_of_lengths(
    make: Callable[..., Iterable[dict[str, Any]]],
    kind: str,
    lengths: Sequence[int] | None = None,
    samples: int = 100,
    seed: int = 0,
    haystack: str | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """
    Samples of every length in turn, so that any first part of them (lm-eval's `--limit`) is like the whole.

    Args:
        make: `needle_samples` or `fact_samples`, and the kind that it is to make.
        lengths: tokens, of prompt and answer together; none: those of `LENGTHS` that the model reads at once.
        samples: of each length.
        haystack: a text file to hide things in; none: sentences that are composed.
        arguments: the rest of a task's metadata, which names the tokenizer or the model.

    Raises:
        ValueError: of what is given something is not as it should be; it is named.
    """
    if lengths is None:
        lengths = lengths_read(arguments)
    if not isinstance(lengths, list | tuple) or not lengths or not all(type(length) is int for length in lengths):
        raise ValueError(f"`lengths` must be a list of numbers of tokens, e.g. [1024, 4096], got {lengths!r}.")
    tokenizer, text = tokenizer_of(arguments), None if haystack is None else read_text(haystack)
    made = [make(kind, tokenizer, length, samples, seed, text) for length in lengths]
    return [sample for each in zip(*made, strict=True) for sample in each]


def lengths_read(arguments: dict[str, Any]) -> list[int]:
    """
    Those of `LENGTHS` that the model of a task's metadata reads at once: `max_length` of its arguments says how much that is,
    else its config. Of a model that cannot be asked, up to 4K.

    Raises:
        ValueError: it reads none.
    """
    longest = arguments.get("max_length") or _positions(arguments.get("pretrained"), arguments) or LENGTHS[2]
    found = [length for length in LENGTHS if length <= int(longest)]
    if not found:
        raise ValueError(
            f"`lengths`: the model reads {longest} tokens at once, and {LENGTHS[0]} is the shortest length that is asked for "
            "unless others are given. Give --metadata '{\"lengths\": [...]}', or max_length=... in --model_args."
        )
    return found


def _positions(model: Any, arguments: dict[str, Any]) -> int | None:
    """Tokens that a model's config says it reads, by the names that lm-eval knows for it."""
    from transformers import PretrainedConfig

    if model is None:
        return None
    config = model.config.to_dict() if hasattr(model, "config") else None
    if config is None:
        config, _ = PretrainedConfig.get_config_dict(model, **_passed(arguments, "gguf_file", "revision", "subfolder"))
    config = config.get("text_config") or config
    known = (config.get(name) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    return next((value for value in known if value), None)


def _passed(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: arguments[name] for name in names if name in arguments}


@lru_cache(maxsize=2)
def load_tokenizer(name: str, **options: Any) -> Any:
    """A tokenizer, from a directory or a name on the hub."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, **options)


def tokenizer_of(arguments: dict[str, Any]) -> Any:
    """
    The tokenizer that a task's metadata, or a model's arguments, speak of.

    Raises:
        ValueError: they name none.
    """
    named = [arguments[key] for key in ("tokenizer", "pretrained", "model") if arguments.get(key)]
    if not named:
        raise ValueError(
            "`tokenizer`: lengths are counted in a model's tokens, and no model was named. Give --model_args "
            'pretrained=DIR, or --metadata \'{"tokenizer": "DIR"}\'.'
        )
    if not isinstance(named[0], str):
        return named[0]
    return load_tokenizer(named[0], **_passed(arguments, "gguf_file", "revision", "trust_remote_code"))


def tokens_in(tokenizer: Any, text: str) -> int:
    """Tokens of a text, those that the tokenizer adds included."""
    return len(tokenizer(text, verbose=False).input_ids)


def fill(tokenizer: Any, sentences: Iterator[str], room: int) -> tuple[list[str], list[int]]:
    """
    As many sentences as fit into so many tokens, and the tokens of each.

    Raises:
        ValueError: there are too few.
    """
    taken: list[str] = []
    lengths: list[int] = []
    while batch := list(islice(sentences, AT_ONCE)):
        # A sentence stands after a space, which counts where a tokenizer has one in its tokens.
        found = tokenizer([f" {sentence}" for sentence in batch], add_special_tokens=False, verbose=False).input_ids
        for sentence, ids in zip(batch, found, strict=True):
            if len(ids) > room:
                return taken, lengths
            room -= len(ids)
            taken.append(sentence)
            lengths.append(len(ids))
    raise ValueError(
        f"`haystack`: the text is {room} tokens too short for this length. Give a longer one, or lower `lengths`."
    )
