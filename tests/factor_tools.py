"""What the tests of factors share: random weights, Gram matrices, byte counts, and the battery's list."""

from __future__ import annotations

from functools import cache

import torch

from sparsec.factors import (
    CP,
    BlockDiagonal,
    BlockTerm,
    Butterfly,
    Circulant,
    Dictionary,
    Factor,
    Fit,
    Kronecker,
    LowRank,
    Monarch,
    Product,
    Separable,
    Sparse,
    SparseProduct,
    TensorRing,
    TensorTrain,
    Tucker,
)  # fmt: skip
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
    (BlockDiagonal(6), (24, 36)),
    (BlockDiagonal(2), (6, 4, 3, 3)),
    (Butterfly(), (8, 8)),
    (Butterfly(), (24, 36)),
    (Butterfly((3, 5), (2, 4)), (15, 8)),
    (Circulant(4), (8, 12)),
    (Circulant(3), (6, 4, 3)),
    (Dictionary(6, 2), (24, 10)),
    (Dictionary(4, 2), (9, 3, 3)),
    (Product(Sparse(0.6), LowRank(4)), (8, 12)),
    (Product(Monarch(3, 2), LowRank(4), inner=12), (9, 10)),
    (Product(LowRank(3), Circulant(4), BlockDiagonal(2), inner=8), (12, 6)),
    (SparseProduct((3, 2)), (12, 20)),
    (SparseProduct((2, 2, 2), inner=8), (8, 8)),
    (CP(3), (12, 15)),
    (CP(4), (6, 4, 3, 3)),
    (CP(2, outs=(7,), ins=(11,)), (7, 11)),
    (Tucker((4, 3)), (24, 36)),
    (Tucker(2), (7, 11)),
    (Tucker((4, 3)), (6, 4, 3, 3)),
    (Tucker(3), (6, 4, 3, 3)),
    (BlockTerm(2, 2), (12, 15)),
    (BlockTerm(2, (3, 2)), (6, 4, 3)),
    (TensorTrain(3), (24, 36)),
    (TensorTrain(4, paired=True), (24, 36)),
    (TensorTrain((2, 3, 3)), (6, 4, 3, 3)),
    (TensorRing(2), (12, 15)),
    (TensorRing((2, 3, 2, 2)), (6, 4, 3, 3)),
    (Separable(2), (6, 4, 3, 3)),
    (Separable(2), (2, 3, 3, 2, 3)),
    (Sparse(0.9), (24, 36)),
    (Sparse(0.5, Bitmask()), (7, 11)),
    (Sparse(format=NM(2, 4)), (24, 35)),
    (Sparse(format=FanIn(3)), (7, 11)),
    (LowRank(4) + Sparse(0.8), (24, 36)),
    (Sparse(0.7, CSR(32)) + Kronecker((4, 6)) + Monarch(6), (12, 18)),
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
    (BlockDiagonal(1), (7, 11)),
    (Circulant(1), (7, 11)),
    (Dictionary(11, 11), (7, 11)),
    (Butterfly((4, 6), (1, 36)), (24, 36)),
    (CP(144), (24, 36)),
    (CP(24), (6, 4, 3, 3)),
    (Tucker(36), (24, 36)),
    (Tucker((6, 4)), (6, 4, 3, 3)),
    (BlockTerm(1, 36), (24, 36)),
    (TensorTrain(36), (24, 36)),
    (TensorTrain(24, paired=True), (24, 36)),
    (TensorTrain(12), (6, 4, 3, 3)),
    (TensorRing(24), (24, 36)),
    (TensorRing(12), (6, 4, 3, 3)),
    (Separable(3), (6, 4, 3, 3)),
    (Separable(6), (2, 3, 3, 2, 3)),
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


@cache
def fitted(factor: Factor, shape: Shape, whitened: bool = False, dtype: torch.dtype = torch.float64) -> Fit:
    """The factor's fit of `weight(shape, dtype)`, made once."""
    dense = weight(shape, dtype)
    return factor.fit(dense, gram(dense[0].numel()) if whitened else None)


def nbytes(buffers: Buffers) -> int:
    return sum(t.numel() * t.element_size() for t in buffers.values())


def case(entry: tuple[Factor, Shape]) -> str:
    return f"{entry[0].text()}-{'x'.join(map(str, entry[1]))}"
