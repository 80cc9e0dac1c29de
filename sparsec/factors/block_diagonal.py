"""BlockDiagonal: independent blocks, as in a grouped convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.formats import Buffers


@dataclass(frozen=True)
class BlockDiagonal(Factor):
    """W = diag(blocks[0], ..., blocks[b - 1]) with blocks (b, out / b, in / b). The best fit is the blocks as they are;

    with a Gram matrix each block is the least squares solution that lets its inputs stand in for the others.
    """

    blocks: int

    name: ClassVar[str] = "block_diagonal"

    def __post_init__(self) -> None:
        positive("BlockDiagonal", blocks=self.blocks)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        for what, size in zip(("outputs", "inputs"), matrix_shape(shape)):
            if size % self.blocks:
                return f"its {size} {what} do not divide into {self.blocks} blocks"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        out, width = matrix_shape(shape)
        return {"blocks": (self.blocks, out // self.blocks, width // self.blocks)}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        b, p, s = self.shapes(shape)["blocks"]
        return (Contraction("bs", "bp", (b, s), (b, p), (Operand(("blocks",), "bps", (b, p, s)),)),)

    def solve(self, weight: torch.Tensor) -> Buffers:
        b, p, s = self.shapes(tuple(weight.shape))["blocks"]
        return {"blocks": weight.reshape(b, p, b, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1)}

    def solve_gram(self, weight: torch.Tensor, gram: torch.Tensor) -> Buffers:
        """Rows p of block b minimise tr(e G e^T) over their inputs S: w_S = (W G)_S (G_SS)^+."""
        b, p, s = self.shapes(tuple(weight.shape))["blocks"]
        target = (weight.flatten(1) @ gram).reshape(b, p, b, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        own = gram.reshape(b, s, b, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return {"blocks": target @ torch.linalg.pinv(own, hermitian=True)}
