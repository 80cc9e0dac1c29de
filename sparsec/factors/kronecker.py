"""Kronecker: a sum of Kronecker products, fitted by the SVD of the rearranged weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._linalg import truncated_svd
from sparsec.formats import Buffers


@dataclass(frozen=True)
class Kronecker(Factor):
    """W = sum_t A_t (x) B_t with A (terms, out1, in1), B (terms, out2, in2), out = out1 * out2 and in = in1 * in2.

    y[o1, o2] = sum_t A_t[o1, i1] x[i1, i2] B_t[o2, i2], the cheaper side first. The fit is optimal: the rearranged
    weight (out1 in1, out2 in2) has rank `terms` (Van Loan and Pitsianis, 1993). Terms are ordered: fewer are a slice.
    """

    first: tuple[int, int]
    terms: int = 1

    name: ClassVar[str] = "kronecker"

    def __post_init__(self) -> None:
        if not isinstance(self.first, (tuple, list)) or len(self.first) != 2:
            raise SpecError(f"Kronecker: first={self.first!r} must be the pair (out1, in1)")
        object.__setattr__(self, "first", tuple(self.first))
        positive("Kronecker", out1=self.first[0], in1=self.first[1], terms=self.terms)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        for what, size, part in zip(("outputs", "inputs"), matrix_shape(shape), self.first):
            if size % part:
                return f"its {size} {what} do not divide by {part}"
        out1, in1, out2, in2 = self._sizes(shape)
        most = min(out1 * in1, out2 * in2)
        return f"terms={self.terms} is more than the {most} that suffice for any weight" if self.terms > most else None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        out1, in1, out2, in2 = self._sizes(shape)
        return {"a": (self.terms, out1, in1), "b": (self.terms, out2, in2)}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        out1, in1, out2, in2 = self._sizes(shape)
        a = Operand(("a",), "tpi", (self.terms, out1, in1))
        b = Operand(("b",), "tqj", (self.terms, out2, in2))
        # a first takes in1 in2 out1 + out1 in2 out2 products a term, b first in1 in2 out2 + in1 out1 out2
        a_first = in2 * (in1 * out1 + out1 * out2) <= in1 * (in2 * out2 + out1 * out2)
        return (Contraction("ij", "pq", (in1, in2), (out1, out2), (a, b) if a_first else (b, a)),)

    def solve(self, weight: torch.Tensor) -> Buffers:
        out1, in1, out2, in2 = self._sizes(tuple(weight.shape))
        rearranged = weight.reshape(out1, out2, in1, in2).permute(0, 2, 1, 3).reshape(out1 * in1, out2 * in2)
        left, right = truncated_svd(rearranged, self.terms)
        return {"a": left.mT.reshape(self.terms, out1, in1), "b": right.reshape(self.terms, out2, in2)}

    def slice(self, buffers: Buffers, rank: int) -> tuple[Factor, Buffers]:
        if type(rank) is not int or not 1 <= rank <= self.terms:
            raise SpecError(f"{rank!r} terms cannot be sliced out of {self.text()}; valid: 1 to {self.terms}")
        return Kronecker(self.first, rank), {k: t[:rank].contiguous() for k, t in buffers.items()}

    def _sizes(self, shape: Shape) -> tuple[int, int, int, int]:
        """(out1, in1, out2, in2)."""
        out, width = matrix_shape(shape)
        out1, in1 = self.first
        return out1, in1, out // out1, width // in1
