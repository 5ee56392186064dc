"""Names of tensors and what became of each, in lines that say layers which are alike once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from os.path import commonprefix


COLUMNS = 100
LAYER = re.compile(r"\.(\d+)\.")
ANY_LAYER = ".{}."


def lines(fates: Iterable[tuple[str, list[str]]], arrow: str = "") -> str:
    """
    Names and what became of each, once for all layers where it is the same, in lines of `COLUMNS` where that is possible.

    Args:
        fates: a name, and the names or the words for what became of it.
        arrow: what stands between them.
    """
    rows = []
    for (head, told_head, held_by), parts in _blocks(fates).items():
        if not head:
            rows += [(left, arrow + right) for left, right in parts]
            continue
        one = len(held_by) == 1
        target = f"{arrow}{told_head}.{held_by[0] if one else '{}'}" if told_head else ""
        rows.append((f"{head}.{_ranges(held_by)}", target if one else f"{target}  x{len(held_by)}"))
        rows += [(f"  {left}", f"{arrow}{'  ' if told_head else ''}{right}") for left, right in parts]
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(
        f"{left:<{width}}  {right}".rstrip() if width + 2 + len(right) <= COLUMNS else f"{left}\n      {right}"
        for left, right in rows
    )


def _blocks(
    fates: Iterable[tuple[str, list[str]]],
) -> dict[tuple[str, str, tuple[str, ...]], list[tuple[str, str]]]:
    """
    What is to be said of the same layers, together.

    Returns:
        What holds the layers on the left and on the right, and their numbers, to the rest of the names on both sides; all
        empty but the rest for names outside layers.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for name, targets in fates:
        layer = match[1] if (match := LAYER.search(name)) else ""
        alike = _any_layer(name, layer), _joined([_any_layer(target, layer) for target in targets])
        layers.setdefault(alike, []).append(layer)
    blocks: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, str]]] = {}
    for (name, told), held in layers.items():
        (head, left), (told_head, right) = _parted(name), _parted(told)
        blocks.setdefault((head, told_head, tuple(held)), []).append((left, right))
    return blocks


def _any_layer(name: str, layer: str) -> str:
    """A name in this layer, said of any; one in another stays as it is."""
    match = LAYER.search(name)
    return name.replace(match[0], ANY_LAYER, 1) if match and match[1] == layer else name


def _parted(name: str) -> tuple[str, str]:
    """`"model.layers.{}.input_layernorm.weight"` to what holds the layers, and what of a layer it is, from its dot."""
    head, layer, rest = name.partition(ANY_LAYER)
    return (head, f".{rest}") if layer else ("", name)


def _joined(names: list[str]) -> str:
    """Several names as one: what they begin and end with is said once."""
    if len(names) == 1:
        return names[0]
    start = commonprefix(names)  # noqa: RUF071 (no paths)
    start = start[: start.rfind(".") + 1]
    end = commonprefix([name[len(start) :][::-1] for name in names])[::-1]  # noqa: RUF071
    return f"{start}{{{','.join(name[len(start) : len(name) - len(end)] for name in names)}}}{end}"


def _ranges(layers: Sequence[str]) -> str:
    """`"0", "1", "2", "5"` to `"{0-2,5}"`; one alone as it is."""
    if len(layers) == 1:
        return layers[0]
    ordered = enumerate(sorted(map(int, layers)))
    runs = [[number for _, number in run] for _, run in groupby(ordered, lambda pair: pair[1] - pair[0])]
    return f"{{{','.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)}}}"
