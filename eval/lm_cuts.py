"""Contexts that lm-eval cuts, to the last tokens that a model reads: how many, and which must not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from lm_eval.api.instance import Instance


def count_cuts(sizes: Iterable[tuple[Instance, int]], limit: int, remedy: str) -> dict[str, int]:
    """
    How many requests of each task are cut.

    Args:
        sizes: requests, and the tokens of each, those of its answer included.
        limit: tokens that the model reads.
        remedy: what can be done where a request must not be cut.

    Raises:
        ValueError: one is cut whose document states, as `max_length`, a length that the model does not read: what was
            hidden in it would be lost unseen.
    """
    cuts: Counter[str] = Counter()
    for request, size in sizes:
        cuts[str(request.task_name)] += size > limit
        if size <= limit:
            continue
        stated = request.doc.get("max_length") if isinstance(request.doc, Mapping) else None
        if isinstance(stated, int) and stated > limit:
            raise ValueError(
                f"Task {request.task_name}, document {request.doc_id} is {stated:,} tokens long, and the model reads "
                f"max_length={limit:,}: lm-eval would cut off its beginning. {remedy}"
            )
    return dict(cuts)
