"""Separable: every filter of a convolution as a sum of products of one-way filters."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._modes import KERNEL_LETTERS
from sparsec.factors._refine import refine
from sparsec.formats import Buffers


@dataclass(frozen=True)
class Separable(Factor):
    """W[o, i, u, v] = sum_t way_0[t, o, i, u] way_1[t, o, i, v], and so on for three window dimensions.

    `terms` = 1 is the one-way filter of a-priori compressed networks; min(kernel) terms hold any two-dimensional window
    and prod(kernel) / max(kernel) any three-dimensional one. The fit is an SVD of each filter: the best for two
    dimensions, a tree of SVDs improved by alternating least squares for three. Terms are ordered: fewer are a slice.
    """

    terms: int = 1

    name: ClassVar[str] = "separable"

    def __post_init__(self) -> None:
        positive("Separable", terms=self.terms)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        if not 2 <= len(shape) - 2 <= len(KERNEL_LETTERS):
            return f"a window of {len(shape) - 2} dimension(s) has no one-way filters; two or three are needed"
        kernel = shape[2:]
        most = prod(kernel) // max(kernel)
        if self.terms > most:
            return f"terms={self.terms} is more than the {most} that hold any window {kernel}"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        return {f"way_{d}": (self.terms, shape[0], shape[1], n) for d, n in enumerate(shape[2:])}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        kernel = KERNEL_LETTERS[: len(shape) - 2]
        operands = tuple(
            Operand((name,), "tAa" + letter, size)
            for letter, (name, size) in zip(kernel, self.shapes(shape).items(), strict=True)
        )
        return (Contraction("a" + kernel, "A", tuple(shape[1:]), (shape[0],), operands, kernel),)

    def solve(self, weight: torch.Tensor) -> Buffers:
        out, width, *kernel = weight.shape
        ways = _tree(weight.reshape(out * width, *kernel), self.terms)
        found = {f"way_{d}": w.permute(1, 0, 2).reshape(self.terms, out, width, -1) for d, w in enumerate(ways)}
        rest = weight - self.reconstruct(found, tuple(weight.shape))
        if len(kernel) == 2 or float(rest.norm()) <= 1e-12 * float(weight.norm()):
            return found
        return refine(self, found, weight)

    def slice(self, buffers: Buffers, rank: int) -> tuple[Factor, Buffers]:
        if type(rank) is not int or not 1 <= rank <= self.terms:
            raise SpecError(f"{rank!r} terms cannot be sliced out of {self.text()}; valid: 1 to {self.terms}")
        return Separable(rank), {k: t[:rank].contiguous() for k, t in buffers.items()}


def _tree(filters: torch.Tensor, terms: int | None) -> list[torch.Tensor]:
    """(filters, n_1, ..., n_d) as d tensors (filters, terms, n): SVDs one dimension after the other, largest first."""
    count, first, *rest = filters.shape
    if not rest:
        return [filters[:, None, :]]
    u, s, vh = torch.linalg.svd(filters.reshape(count, first, -1), full_matrices=False)
    rank = s.shape[1]
    head = (u * s[:, None, :].to(u.dtype)).mT  # (filters, rank, n_1)
    tails = _tree(vh.reshape(count * rank, *rest), None)
    inner = tails[0].shape[1]
    ways = [head[:, :, None, :].expand(count, rank, inner, first).reshape(count, rank * inner, first)]
    ways += [t.reshape(count, rank * inner, -1) for t in tails]
    size = torch.stack([w.norm(dim=2) for w in ways]).prod(dim=0)  # (filters, rank * inner)
    order = torch.argsort(size, dim=1, descending=True, stable=True)[:, : terms or rank * inner]
    share = size.clamp_min(1e-300).pow(1.0 / len(ways))
    even = [w * (share / w.norm(dim=2).clamp_min(1e-300)).to(w.dtype)[..., None] for w in ways]
    return [w.gather(1, order[..., None].expand(-1, -1, w.shape[2])) for w in even]
