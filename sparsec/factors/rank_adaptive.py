"""Training a Tucker weight on its low rank manifold, with ranks that follow the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsec.errors import SpecError
from sparsec.factors.tucker import multiply


@dataclass(frozen=True)
class Low:
    """core (r_0, ..., r_{d-1}) and orthonormal bases (size_m, r_m): W = core x_0 bases[0] x_1 bases[1] ..."""

    core: torch.Tensor
    bases: tuple[torch.Tensor, ...]

    def dense(self) -> torch.Tensor:
        """The weight."""
        built = self.core
        for m, basis in enumerate(self.bases):
            built = multiply(built, basis, m)
        return built

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_0, ..., r_{d-1}."""
        return tuple(self.core.shape)


def step(
    low: Low, gradient: Callable[[torch.Tensor], torch.Tensor], rate: float, tolerance: float | None = None
) -> Low:
    """One step of descent at learning rate `rate` that never stores more than an augmented Tucker weight.

    (Zangrando, Schotthofer, Ceruti, Kusch and Tudisco, Rank-adaptive spectral pruning of convolutional layers during
    training, 2024.) K-step: every basis is widened, by QR, with the directions of the gradient in its mode. S-step: the
    core takes a gradient step in the widened bases. Truncation: singular values of the core's unfoldings that are
    below `tolerance` of its norm in all are cut; None keeps the ranks that the step started with.

    `gradient` maps a weight to the gradient of the loss there. Raises SpecError for a rate or tolerance below 0.
    """
    if rate <= 0 or (tolerance is not None and tolerance < 0):
        raise SpecError(f"rate={rate!r} must be positive and tolerance={tolerance!r} None or at least 0")
    slope = gradient(low.dense())
    wide = []
    for m, basis in enumerate(low.bases):
        others = slope
        for at, other in enumerate(low.bases):
            if at != m:
                others = multiply(others, other.mT, at)
        right = torch.linalg.qr(torch.movedim(low.core, m, 0).flatten(1).mT).Q  # the rows that K = U S Q^T moves in
        moved = torch.movedim(others, m, 0).flatten(1) @ right
        joined = torch.cat([basis, moved], dim=1)
        wide.append(torch.linalg.qr(joined).Q[:, : min(joined.shape)])
    core = low.core
    for m, (old, new) in enumerate(zip(low.bases, wide)):
        core = multiply(core, new.mT @ old, m)
    start = Low(core, tuple(wide))
    projected = gradient(start.dense())
    for m, basis in enumerate(wide):
        projected = multiply(projected, basis.mT, m)
    return _truncated(Low(core - rate * projected, tuple(wide)), low.ranks if tolerance is None else None, tolerance)


def _truncated(low: Low, ranks: tuple[int, ...] | None, tolerance: float | None) -> Low:
    """The higher-order SVD of the core, cut at the ranks, or where the energy cut stays below the tolerance."""
    limit = 0.0 if tolerance is None else (tolerance * float(low.core.norm())) ** 2 / low.core.dim()
    core, bases = low.core, []
    for m, basis in enumerate(low.bases):
        flat = torch.movedim(low.core, m, 0).flatten(1)
        u, s, _ = torch.linalg.svd(flat, full_matrices=False)
        if ranks is not None:
            keep = min(ranks[m], s.numel())
        else:
            tails = s.square().flip(0).cumsum(0).flip(0)  # energy from each value on
            keep = max(1, int((tails > limit).sum()))
        turn = u[:, :keep]
        core = multiply(core, turn.mT, m)
        bases.append(basis @ turn)
    return Low(core, tuple(bases))
