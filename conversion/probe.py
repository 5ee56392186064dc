"""What two models read to be compared: a text where there is a tokenizer that knows it, else random ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel


TEXTS = (
    "The lighthouse keeper wrote down every ship that passed, with its name, its flag and the hour, though nobody had "
    'asked for the list in eleven years. "One day," she said, "somebody will want to know." It came to 4,312 ships.\n\n'
    "def rolling_mean(values, window):\n"
    '    """Mean of the last `window` values, at each position."""\n'
    "    total, means = 0.0, []\n"
    "    for index, value in enumerate(values):\n"
    "        total += value - (values[index - window] if index >= window else 0)\n"
    "        means.append(total / min(index + 1, window))\n"
    "    return means\n",
    "Am Abend stellte der Uhrmacher alle Zeiger auf zwölf und wartete.\n\n今日は雨が降っています。明日は晴れるでしょう。\n\n"
    "Nichts geschah, außer dass der Hund kurz den Kopf hob. „Also gut“, murmelte er, „dann morgen noch einmal.“ Draußen "
    "begann es zu regnen, und die Straße roch nach Staub und Linden.",
)


class Probe(NamedTuple):
    """What both models read: `ids` and `mask` (1 for tokens, 0 for padding), `[2, width]` int64; `kind` as reported."""

    kind: str
    ids: torch.Tensor
    mask: torch.Tensor


def make_probe(model: PreTrainedModel, tokenizer: Any, width: int) -> Probe:
    """
    Two rows, one of `width` tokens and one of about two thirds, padded on the left.

    Args:
        model: whose ids they are.
        tokenizer: of it; `None` where there is none.

    Raises:
        ValueError: the tokenizer has ids that the model has no embeddings for.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    lengths = (width, max(width * 2 // 3, 1))
    rows = _text_rows(tokenizer, lengths)
    kind = "text" if rows else "random ids"
    rows = rows or _random_rows(model, vocabulary, lengths)
    largest = max(max(row) for row in rows)
    if largest >= vocabulary:
        raise ValueError(f"The tokenizer has the id {largest}, and the source has embeddings for {vocabulary} only.")
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return Probe(kind, ids, mask)


def _text_rows(tokenizer: Any, lengths: Sequence[int]) -> list[list[int]]:
    """The texts' first tokens; none when the tokenizer knows less than half of them."""
    if tokenizer is None:
        return []
    rows = [tokenizer(text, verbose=False).input_ids[:length] for text, length in zip(TEXTS, lengths, strict=True)]
    read = [token for row in rows for token in row]
    known = [token for token in read if token != tokenizer.unk_token_id]
    return rows if all(rows) and 2 * len(known) >= len(read) else []


def _random_rows(model: PreTrainedModel, vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    """The same for every model of a vocabulary, without the ids that its configs call special."""
    special: set[Any] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(config, name, None)
            special |= set(found) if isinstance(found, list) else {found}
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    return [ordinary[torch.randint(len(ordinary), (length,), generator=generator)].tolist() for length in lengths]
