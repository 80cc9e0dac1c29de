"""BlockTerm: a sum of Tucker decompositions of equal ranks, between CP (cores of size one) and Tucker (one term)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape, positive
from sparsec.factors._contraction import Contraction
from sparsec.factors._refine import refine
from sparsec.factors.tucker import Tucker
from sparsec.formats import Buffers


@dataclass(frozen=True)
class BlockTerm(Factor):
    """W = sum_t core_t x_1 mode_t0 x_2 mode_t1 ...: the buffers of `Tucker(ranks, outs, ins)` behind an axis of terms.

    (De Lathauwer, 2008.) The fit takes Tucker terms off the residual one after the other and improves all of them by
    alternating least squares. Terms are ordered, so fewer are a slice.
    """

    terms: int
    ranks: int | tuple[int, ...]
    outs: tuple[int, ...] | None = None
    ins: tuple[int, ...] | None = None

    name: ClassVar[str] = "block_term"

    def __post_init__(self) -> None:
        positive("BlockTerm", terms=self.terms)
        one = self.term
        for field in ("ranks", "outs", "ins"):
            object.__setattr__(self, field, getattr(one, field))

    @property
    def term(self) -> Tucker:
        """One of the terms."""
        return Tucker(self.ranks, self.outs, self.ins)

    def resolve(self, shape: Shape) -> BlockTerm:
        one = self.term.resolve(shape)
        return BlockTerm(self.terms, one.ranks, one.outs, one.ins)

    def refuse(self, shape: Shape) -> str | None:
        return self.term.refuse(shape)

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        return {k: (self.terms, *s) for k, s in self.term.shapes(shape).items()}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        (one,) = self.term.contract(shape)
        operands = tuple(replace(o, letters="t" + o.letters, shape=(self.terms, *o.shape)) for o in one.operands)
        return (replace(one, operands=operands),)

    def solve(self, weight: torch.Tensor) -> Buffers:
        shape = tuple(weight.shape)
        rest = weight
        parts: list[Buffers] = []
        for _ in range(self.terms):
            own = self.term.solve(rest)
            parts.append(own)
            rest = rest - self.term.reconstruct(own, shape)
        found = {k: torch.stack([p[k] for p in parts]) for k in parts[0]}
        if self.terms == 1 or float(rest.norm()) <= 1e-12 * float(weight.norm()):
            return found
        return refine(self, found, weight)

    def slice(self, buffers: Buffers, rank: int) -> tuple[Factor, Buffers]:
        if type(rank) is not int or not 1 <= rank <= self.terms:
            raise SpecError(f"{rank!r} terms cannot be sliced out of {self.text()}; valid: 1 to {self.terms}")
        cut = {k: t[:rank].contiguous() for k, t in buffers.items()}
        return BlockTerm(rank, self.ranks, self.outs, self.ins), cut
