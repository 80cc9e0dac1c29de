"""What the tests of factors share: random weights, Gram matrices, byte counts, and the battery's list."""

from __future__ import annotations

import torch

from sparsec.factors import Factor, Kronecker, LowRank, Monarch, Sparse
from sparsec.formats import CSR, NM, Bitmask, Buffers, FanIn

Shape = tuple[int, ...]

BATTERY: list[tuple[Factor, Shape]] = [
    (LowRank(2), (7, 11)),
    (LowRank(5), (24, 36)),
    (LowRank(3), (6, 4, 3, 3)),
    (Monarch(), (24, 36)),
    (Monarch(6, 2), (24, 36)),
    (Monarch(1, 2), (7, 11)),
    (Kronecker((4, 6)), (24, 36)),
    (Kronecker((6, 2), terms=5), (24, 36)),
    (Kronecker((2, 2), terms=3), (6, 4, 3)),
    (Sparse(0.9), (24, 36)),
    (Sparse(0.5, Bitmask()), (7, 11)),
    (Sparse(format=NM(2, 4)), (24, 35)),
    (Sparse(format=FanIn(3)), (7, 11)),
    (LowRank(4) + Sparse(0.8), (24, 36)),
    (Sparse(0.7, CSR(32)) + Kronecker((4, 6)) + Monarch(6), (24, 36)),
    (LowRank(3) + NM(1, 4), (6, 4, 3, 3)),
]
"""Factors of every class with a weight shape each: sizes around nothing round, sums, convolutions."""

FULL: list[tuple[Factor, Shape]] = [
    (LowRank(24), (24, 36)),
    (LowRank(6), (6, 4, 3, 3)),
    (Monarch(6, 4), (24, 36)),
    (Monarch(1, 7), (7, 11)),
    (Kronecker((4, 6), terms=24), (24, 36)),
    (Sparse(0.0), (24, 36)),
    (LowRank(7) + Sparse(0.5), (7, 11)),
]
"""Factors that can hold any weight of their shape."""


def weight(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram(width: int, rows: int = 0, seed: int = 1) -> torch.Tensor:
    """X^T X of inputs whose features differ in size thirtyfold and are correlated; singular when rows < width."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 4 * width, width, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.1, 3.0, width, dtype=torch.float64)
    x[:, 1:] += 0.5 * x[:, :-1]
    return x.T @ x


def nbytes(buffers: Buffers) -> int:
    return sum(t.numel() * t.element_size() for t in buffers.values())


def case(entry: tuple[Factor, Shape]) -> str:
    return f"{entry[0].text()}-{'x'.join(map(str, entry[1]))}"
