"""LowRank: W = left right. The best fit is the truncated SVD, on whitened inputs when they are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._linalg import truncated_svd, whitening
from sparsec.factors._modes import KERNEL_LETTERS
from sparsec.formats import Buffers


@dataclass(frozen=True)
class LowRank(Factor):
    """W (out, in) = left (out, rank) right (rank, in): y = (x right^T) left^T.

    The fit is optimal (Eckart and Young, 1936); with a Gram matrix G = L L^T it is the truncated SVD of W L, which is
    optimal for the output (SVD-LLM, Wang et al., 2024). Components are ordered, so smaller ranks are slices.
    """

    rank: int

    name: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        positive("LowRank", rank=self.rank)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        if len(shape) > 2 + len(KERNEL_LETTERS):
            return f"{shape} has more than {len(KERNEL_LETTERS)} window dimensions"
        most = min(matrix_shape(shape))
        return f"rank={self.rank} is more than its full rank of {most}" if self.rank > most else None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        out, width = matrix_shape(shape)
        return {"right": (self.rank, width), "left": (out, self.rank)}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        kernel = KERNEL_LETTERS[: len(shape) - 2]
        right = Operand(("right",), "ri" + kernel, (self.rank, *shape[1:]))
        left = Operand(("left",), "or", (shape[0], self.rank))
        return (Contraction("i" + kernel, "o", tuple(shape[1:]), (shape[0],), (right, left), kernel),)

    def solve(self, weight: torch.Tensor) -> Buffers:
        left, right = truncated_svd(weight.flatten(1), self.rank)
        return {"right": right, "left": left}

    def solve_gram(self, weight: torch.Tensor, gram: torch.Tensor) -> Buffers:
        root = whitening(gram)
        if root is None:
            return self.solve(weight)
        left, right = truncated_svd(weight.flatten(1) @ root, self.rank)
        # right root^-1, as a triangular solve
        return {"right": torch.linalg.solve_triangular(root, right, upper=False, left=False), "left": left}

    def slice(self, buffers: Buffers, rank: int) -> tuple[Factor, Buffers]:
        if type(rank) is not int or not 1 <= rank <= self.rank:
            raise SpecError(f"rank {rank!r} cannot be sliced out of {self.text()}; valid: 1 to {self.rank}")
        cut = {"right": buffers["right"][:rank].contiguous(), "left": buffers["left"][:, :rank].contiguous()}
        return LowRank(rank), cut
