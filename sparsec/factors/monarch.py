"""Monarch: a product of two block-diagonal matrices around a grid transpose, with a closed-form projection."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._linalg import truncated_svd
from sparsec.formats import Buffers


@dataclass(frozen=True)
class Monarch(Factor):
    """W[(p, k), (r, s)] = sum_q left[k, p, r, q] right[r, k, q, s]: 2 n^1.5 products for a square n of sqrt(n) blocks.

    x is viewed as (blocks r, s), multiplied by the r blocks `right[r]` (k * rank, s), the grid (r, k) is transposed,
    and the k blocks `left[k]` (p, r * rank) give y as (p, k). With r and k fixed the weight is a matrix of rank `rank`,
    so the best fit is an SVD of each (Dao et al., Monarch, ICML 2022, theorem 1); `rank` above 1 generalises it.
    `blocks` None takes the common divisor of out and in that is nearest to the root of the larger.
    """

    blocks: int | None = None
    rank: int = 1

    name: ClassVar[str] = "monarch"

    def __post_init__(self) -> None:
        positive("Monarch", rank=self.rank, **({} if self.blocks is None else {"blocks": self.blocks}))

    def resolve(self, shape: Shape) -> Monarch:
        if self.blocks is not None:
            return self
        out, width = matrix_shape(shape)
        common = gcd(out, width)
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        root = max(out, width) ** 0.5
        return Monarch(min(divisors, key=lambda d: (max(d / root, root / d), d)), self.rank)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        out, width = matrix_shape(shape)
        blocks = self.resolve(shape).blocks
        assert blocks is not None
        for what, size in (("outputs", out), ("inputs", width)):
            if size % blocks:
                return f"its {size} {what} do not divide into {blocks} blocks"
        most = min(out // blocks, width // blocks)
        if self.rank > most:
            return f"rank={self.rank} is more than the {most} that a block of {blocks} can have"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        b, p, s = self._sizes(shape)
        return {"right": (b, b, self.rank, s), "left": (b, p, b, self.rank)}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        b, p, s = self._sizes(shape)
        right = Operand(("right",), "rkqs", (b, b, self.rank, s))
        left = Operand(("left",), "kprq", (b, p, b, self.rank))
        return (Contraction("rs", "pk", (b, s), (p, b), (right, left)),)

    def solve(self, weight: torch.Tensor) -> Buffers:
        b, p, s = self._sizes(tuple(weight.shape))
        slices = weight.reshape(p, b, b, s).permute(1, 2, 0, 3)  # (k, r, p, s): each of rank `rank` in a Monarch matrix
        left, right = truncated_svd(slices, self.rank)  # (k, r, p, q), (k, r, q, s)
        return {"right": right.permute(1, 0, 2, 3), "left": left.permute(0, 2, 1, 3)}

    def slice(self, buffers: Buffers, rank: int) -> tuple[Factor, Buffers]:
        if type(rank) is not int or not 1 <= rank <= self.rank:
            raise SpecError(f"rank {rank!r} cannot be sliced out of {self.text()}; valid: 1 to {self.rank}")
        right, left = buffers["right"][:, :, :rank], buffers["left"][..., :rank]
        return Monarch(self.blocks, rank), {"right": right.contiguous(), "left": left.contiguous()}

    def _sizes(self, shape: Shape) -> tuple[int, int, int]:
        """(blocks, p, s)."""
        out, width = matrix_shape(shape)
        blocks = self.resolve(shape).blocks
        assert blocks is not None
        return blocks, out // blocks, width // blocks
