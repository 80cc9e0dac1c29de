"""Linear algebra that several fits share; all in float64 or complex128."""

from __future__ import annotations

import torch

_RIDGE = 1e-10  # part of the mean eigenvalue that keeps the root of a singular Gram matrix invertible
_EXACT = 512  # up to this smaller dimension the SVD is computed whole
_POWER = 6
_SEED = 0x5EED


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (m, rank) and right (rank, n) whose product is the best approximation; singular values shared evenly.

    Batched over leading dimensions. A large matrix at a rank below an eighth of its size goes through a randomised
    range finder with power iterations (Halko, Martinsson and Tropp, 2011, algorithm 4.4), seeded.
    """
    least = min(matrix.shape[-2:])
    if least > _EXACT and rank * 8 <= least:
        basis = _range(matrix, min(least, rank + max(16, rank // 2)))
        u, s, vh = torch.linalg.svd(basis.mH @ matrix, full_matrices=False)
        u = basis @ u
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    share = s[..., :rank].sqrt().to(matrix.dtype)
    return u[..., :, :rank] * share[..., None, :], share[..., :, None] * vh[..., :rank, :]


def split(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal u (m, r) of leading left singular vectors and u^H matrix (r, n), r = min(rank, m, n)."""
    m, n = matrix.shape
    rank = min(rank, m, n)
    if min(m, n) > _EXACT and rank * 8 <= min(m, n):
        basis = _range(matrix, min(m, n, rank + max(16, rank // 2)))
        u = basis @ torch.linalg.svd(basis.mH @ matrix, full_matrices=False).U[:, :rank]
        return u, u.mH @ matrix
    square = torch.linalg.qr(matrix.mH, mode="r").R.mH if n > 2 * m else matrix  # the same left vectors, fewer columns
    u = torch.linalg.svd(square, full_matrices=False).U[:, :rank]
    return u, u.mH @ matrix


def _range(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """Orthonormal columns that span nearly all of the leading part of `matrix`'s range."""
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(matrix.shape[-1], width, generator=generator, dtype=torch.float64)
    basis: torch.Tensor = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_POWER):
        basis = torch.linalg.qr(matrix.mH @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis


def whitening(gram: torch.Tensor) -> torch.Tensor | None:
    """Lower triangular L with G = L L^H, a small ridge added to a singular G; None for a zero G, which weighs nothing.

    Then ||(W - R) L||_F is the error of the layer's output, and L is invertible.
    """
    mean = float(gram.diagonal().real.mean())
    if mean <= 0.0:
        return None
    ridge = _RIDGE * mean
    root: torch.Tensor
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    while True:
        root, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
        if not int(failed):
            return root
        ridge *= 10
