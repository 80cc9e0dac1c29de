"""Rounding grids for joint pruning and quantisation. The result stays a floating weight that lies on the grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsec.errors import SpecError


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits with a scale and zero point per output row and `group` inputs (None: the whole row).

    `outliers` is SpQR's threshold tau (Dettmers et al., 2023): entries whose squared sweep error exceeds tau times
    mean(var(W) / U_jj^2) are not rounded. Entries without which the rest of their group would be rounded better by that
    much do not shape the group's grid either. A whole row's grid is fitted before the sweep, a group's when the sweep
    comes to it, to the weights as compensated by then.
    """

    bits: int = 4
    group: int | None = None
    outliers: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or (self.group is not None and self.group < 1):
            raise SpecError(f"Grid(bits={self.bits!r}, group={self.group!r}): 2 to 8 bits, a positive group")

    def fit(
        self, weight: torch.Tensor, upper: torch.Tensor | None = None
    ) -> tuple[Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor], float | None]:
        """(rounding of a column, outlier threshold) for a weight [outputs, columns]; the threshold needs `upper`."""
        size = self.group or weight.shape[1]
        scale, zero = self._range(weight)
        limit: float | None = None
        if self.outliers is not None and upper is not None:
            limit = float(self.outliers * (weight.var() / upper.diagonal().square()).mean())

        def rounded(column: torch.Tensor, j: int, rest: torch.Tensor) -> torch.Tensor:
            nonlocal scale, zero
            if self.group is not None and j % size == 0:
                part = rest[:, :size]
                if limit is not None and upper is not None:
                    part = self._usual(part, upper.diagonal()[j : j + part.shape[1]], limit)
                scale, zero = self._range(part)
            return self._round(column, scale, zero)

        return rounded, limit

    def _usual(self, part: torch.Tensor, upper: torch.Tensor, limit: float) -> torch.Tensor:
        """The entries of a group, [outputs, group], with zeros for likely outliers: those without which the others'
        squared rounding errors, over U_jj^2, sum to less by more than `limit`."""
        weights, out = upper.square().reciprocal(), torch.zeros_like(part, dtype=torch.bool)
        whole = self._errors(part) * weights
        for j in range(part.shape[1]):
            others = part.clone()
            others[:, j] = 0  # on every grid: costs nothing
            gain = whole.sum(1) - whole[:, j] - (self._errors(others) * weights).sum(1)
            out[:, j] = gain > limit
        return part.masked_fill(out, 0)

    def _errors(self, part: torch.Tensor) -> torch.Tensor:
        scale, zero = self._range(part)
        return (self._round(part, scale[:, None], zero[:, None]) - part).square()

    def _round(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        levels: torch.Tensor = (values / scale).round().add(zero).clamp(0, 2**self.bits - 1)
        return scale * (levels - zero)

    def _range(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero point) per row; zero is always on the grid."""
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        scale = ((high - low) / (2**self.bits - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
        return scale, (-low / scale).round()

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Round to nearest, without any compensation."""
        rounded, _ = self.fit(weight)
        return torch.stack([rounded(weight[:, j], j, weight[:, j:]) for j in range(weight.shape[1])], 1)
