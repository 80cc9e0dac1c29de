"""The best values for a given mask: rows by least squares, all at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

STEPS = 10
SETTLED = 2e-3
"""A step that lowers the error of all rows together by a smaller share is the last one."""


def refit(
    goal: torch.Tensor,
    start: torch.Tensor,
    kept: torch.Tensor,
    hessian: torch.Tensor,
    damp: float = 0.0,
    steps: int = STEPS,
    tolerance: float = SETTLED,
) -> torch.Tensor:
    """Rows v supported on `kept` that minimise (v - goal) H (v - goal)^T, from `start` on; [outputs, features].

    Conjugate gradients on all rows, preconditioned by `spectral`. `damp` times H's mean diagonal pulls towards `start`.
    """
    diagonal = hessian.diagonal() + damp * hessian.diagonal().mean()
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)  # features that are always zero
    extra = diagonal - hessian.diagonal()
    mask = kept.to(goal)
    x = start * mask  # a copy
    gap = goal - x
    residual = gap @ hessian
    error = float((gap * residual).sum())
    del gap
    residual *= mask
    if not error > 0:
        return x
    precondition = spectral(hessian, diagonal, mask)
    direction = precondition(residual)
    rho = (residual * direction).sum(1, keepdim=True)
    for step in range(steps):
        image = (direction @ hessian).addcmul_(direction, extra).mul_(mask)
        curvature = (direction * image).sum(1, keepdim=True)
        alpha = torch.where((curvature > 0) & (rho > 0), rho / curvature.clamp(min=1e-300), 0.0)
        x.addcmul_(alpha, direction)
        gain = float((alpha * rho).sum())
        error -= gain
        if step == steps - 1 or not gain > tolerance * max(error, 0.0):
            break
        residual.addcmul_(alpha, image, value=-1)
        z = precondition(residual)
        new = (residual * z).sum(1, keepdim=True)
        direction.mul_(torch.where(rho > 0, new / rho.clamp(min=1e-300), 0.0)).add_(z)
        rho = new
    return x


def spectral(
    hessian: torch.Tensor, diagonal: torch.Tensor, mask: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """An approximate inverse of H restricted to each row of `mask`, for rows [outputs, features].

    H with `diagonal` on its diagonal, scaled to ones there, is close to D + V diag(e) V^T with its largest eigenpairs:
    activations share a few strong directions. All rows share V; by the identity of Woodbury a row's mask enters through
    a small matrix alone, diag(1 / e) + V^T M D^-1 V. About 1.25 sqrt(features) pairs cost like one product with H.
    """
    scale = diagonal.rsqrt()
    rank = min(len(hessian) // 4, round(1.25 * len(hessian) ** 0.5))
    values, vectors = largest(hessian, diagonal, rank) if rank else (scale[:0], hessian[:, :0])
    rest = (1 - vectors.square() @ values).clamp_(min=0.02)
    divided = vectors / rest[:, None]
    small = mask.new_zeros(len(mask), len(values), len(values))
    for i in range(len(values)):
        small[:, i:, i] = mask @ (divided[:, i:] * vectors[:, i : i + 1])
    corner = small.diagonal(dim1=1, dim2=2)
    corner += 1 / values + 1e-5 * corner.mean(1, keepdim=True)  # the second term keeps float32 positive definite
    factor = torch.linalg.cholesky(small)  # reads the lower triangle
    del small
    inward, outward = divided * scale[:, None], (divided * scale[:, None]).mT
    plain = scale.square() / rest

    def apply(rows: torch.Tensor) -> torch.Tensor:
        parts = torch.cholesky_solve((rows @ inward)[..., None], factor)[..., 0]
        return (rows * plain).addmm_(parts, outward, alpha=-1).mul_(mask)

    return apply


def largest(hessian: torch.Tensor, diagonal: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `rank` largest eigenvalues, and their vectors as columns, of H with `diagonal`, scaled to a unit diagonal:
    subspace iteration from a fixed start, accurate enough to precondition with."""
    scale = diagonal.rsqrt()[:, None]
    extra = (diagonal - hessian.diagonal())[:, None]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(hessian), rank + 8, generator=generator, dtype=torch.float64).to(hessian)

    def image(columns: torch.Tensor) -> torch.Tensor:
        scaled = columns * scale
        return (hessian @ scaled).addcmul_(scaled, extra).mul_(scale)

    for _ in range(4):
        basis = torch.linalg.qr(image(basis)).Q
    values, turn = torch.linalg.eigh(basis.mT @ image(basis))
    values, vectors = values[-rank:], (basis @ turn)[:, -rank:]
    good = values > 1e-3 * values[-1]  # the inverses of the others mean nothing
    return values[good], vectors[:, good]
