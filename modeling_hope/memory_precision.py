"""A memory's tensors for its file: exactly, in a narrower dtype, or as low-rank factors, with what that loses measured."""

from __future__ import annotations

from typing import NamedTuple

import torch


# What has low rank when little was learned; sums of gradients and states of mixers have not.
FACTORED = (".change.", ".initial.")
LEFT, RIGHT = ".left", ".right"


class LowRank(NamedTuple):
    """A matrix as the product of `left`, `[out_features, rank]`, and `right`, `[rank, in_features]`."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    def to(self, device: torch.device, dtype: torch.dtype, copy: bool = True) -> torch.Tensor:
        """The product, a tensor of its own, made on the CPU in double precision: settings of a device's products do not reach it."""
        return (self.left.double() @ self.right.double()).to(device, dtype)


def encode(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype | None, low_rank_error: float | None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """
    Tensors to write, on the CPU, and by name what each will have lost when it is read: |read - held| / |held|.

    A tensor that comes under several names comes so again. Nothing is copied that can be written as it is.

    Args:
        tensors: of a memory, by name.
        dtype: floating-point tensors that are wider are written in it, but for those with numbers beyond its range.
        low_rank_error: changes are written as factors of the least rank with at most this error, where those are smaller.
            The rounding of the factors to `dtype` comes on top.
    """
    stored: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    done: dict[int, tuple[dict[str, torch.Tensor], float]] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in done:
            held = _plain(tensor)
            factors = None
            if low_rank_error is not None and any(kind in name for kind in FACTORED):
                factors = factorise(held, low_rank_error)
            if factors is not None:
                written = LowRank(*(_narrowed(part, dtype) for part in factors))
                done[id(tensor)] = {LEFT: written.left, RIGHT: written.right}, relative_error(written, held)
            else:
                whole = _narrowed(held, dtype)
                done[id(tensor)] = {"": whole}, 0.0 if whole is held else relative_error(whole, held)
        parts, error = done[id(tensor)]
        stored |= {name + suffix: part for suffix, part in parts.items()}
        if tensor.is_floating_point():
            errors[name] = error
    return stored, errors


def decode(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | LowRank]:
    """The tensors that `encode` was given, factors not multiplied yet; `ValueError` where factors do not fit."""
    tensors: dict[str, torch.Tensor | LowRank] = {}
    made: dict[tuple[int, int], LowRank] = {}
    for name, tensor in stored.items():
        base, factored = name.removesuffix(LEFT), any(kind in name for kind in FACTORED)
        if not factored or not name.endswith((LEFT, RIGHT)):
            tensors[name] = tensor
        elif name.endswith(LEFT):
            right = stored.get(base + RIGHT)
            if right is None or tensor.dim() != 2 or right.dim() != 2 or tensor.shape[1] != right.shape[0]:
                raise ValueError(f"{name} and {base + RIGHT} are no two factors of a matrix")
            if tensor.dtype != right.dtype:
                raise ValueError(f"{name} is {tensor.dtype} and {base + RIGHT} {right.dtype}")
            tensors[base] = made.setdefault((id(tensor), id(right)), LowRank(tensor, right))
        elif name.removesuffix(RIGHT) + LEFT not in stored:
            raise ValueError(f"{name} is there without {name.removesuffix(RIGHT) + LEFT}")
    return tensors


def factorise(matrix: torch.Tensor, error: float) -> LowRank | None:
    """
    Factors of the least rank with which |left right - matrix| <= error |matrix| (Frobenius), in the matrix's dtype.

    `None` where they are not smaller than the matrix.
    """
    if not bool(matrix.isfinite().all()):
        return None
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    squares = values.double().square()
    left_out = squares.flip(0).cumsum(0).flip(0).sqrt()  # by rank
    least = int((left_out > error * left_out[0]).sum())
    # Rounding may take the factors of the least rank a hair above the bound.
    for rank in range(least, least + 2):
        if rank * sum(matrix.shape) >= matrix.numel():
            return None
        root = values[:rank].sqrt()
        factors = LowRank((u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous())
        if relative_error(factors, matrix) <= error:
            return factors
    return None


def relative_error(written: torch.Tensor | LowRank, held: torch.Tensor) -> float:
    """|read back - held| / |held|, 0 where nothing is held."""
    read = written.to(held.device, held.dtype)
    norm = float(held.double().norm())
    return float((read.double() - held.double()).norm()) / norm if norm else 0.0


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, and alone in its storage, as files take it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point() or tensor.dtype.itemsize <= dtype.itemsize:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if bool(narrow.isfinite().all()) else tensor
