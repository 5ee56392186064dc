"""Newton-Schulz orthogonalisation, as in `torch.optim.Muon`, whose own is private and of one matrix at a time."""

from __future__ import annotations

import torch


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def newton_schulz(matrix: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """
    Roughly `U V^T` of `matrix = U S V^T`: singular values near 1 (between 0.7 and 1.2 after 5 steps).

    `X <- a X + b A X + c A^2 X`, `A = X X^T`, from X = matrix / |matrix|, on the side with fewer rows.

    Args:
        matrix: `[..., rows, cols]`, two or three dimensions.
        dtype: what it is computed in; bfloat16 is what Muon does.

    Returns:
        `[..., rows, cols]` in `dtype`.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.to(dtype)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
