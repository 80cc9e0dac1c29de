"""The best values for a given mask: rows by least squares, all at once."""

from __future__ import annotations

import torch


def refit(
    goal: torch.Tensor,
    start: torch.Tensor,
    kept: torch.Tensor,
    hessian: torch.Tensor,
    damp: float = 0.0,
    steps: int = 20,
    tolerance: float = 1e-3,
) -> torch.Tensor:
    """Rows v supported on `kept` that minimise (v - goal) H (v - goal)^T, from `start` on; [outputs, features]."""
    diagonal = hessian.diagonal() + damp * hessian.diagonal().mean()
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)  # features that are always zero
    extra = diagonal - hessian.diagonal()
    mask = kept.to(goal)

    def product(v: torch.Tensor) -> torch.Tensor:
        return (v @ hessian + v * extra) * mask

    x = start * mask  # a copy
    residual = ((goal - x) @ hessian) * mask  # the damping pulls towards the start, not towards zero
    z = residual / diagonal
    direction, rho = z.clone(), (residual * z).sum(1, keepdim=True)
    stop = tolerance**2 * rho.clamp(min=0)
    for _ in range(steps):
        if bool((rho <= stop).all()):
            break
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        alpha = torch.where((curvature > 0) & (rho > stop), rho / curvature.clamp(min=1e-300), 0.0)
        x += alpha * direction
        residual -= alpha * image
        z = residual / diagonal
        new = (residual * z).sum(1, keepdim=True)
        direction = z + direction * torch.where(rho > 0, new / rho.clamp(min=1e-300), 0.0)
        rho = new
    return x
