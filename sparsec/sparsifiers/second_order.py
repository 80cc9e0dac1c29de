"""SparseGPT and the OBS update: drop by second-order saliency and let the survivors make up for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsec.errors import SpecError
from sparsec.sparsifiers.allocators import Allocator
from sparsec.sparsifiers.granularity import ELEMENT, Granularity
from sparsec.sparsifiers.hessian import damped, sweep, upper_inverse
from sparsec.sparsifiers.least_squares import refit
from sparsec.sparsifiers.parts import (
    Apply,
    Problem,
    Solution,
    Sparsifier,
    Target,
    target_allocator,
    target_granularity,
)
from sparsec.sparsifiers.quantise import Grid
from sparsec.sparsifiers.scores import OBS, Score


@dataclass(frozen=True, repr=False)
class OBSUpdate(Apply):
    """Column sweep with compensation (Frantar and Alistarh, 2023), in blocks of `block` columns.

    When the sparsifier's score is OBS and its granularity works on columns, each block is selected with the weights as
    compensated so far; otherwise the selection of the original weights is kept. `grid` rounds the survivors as well.
    A sweep cannot correct what lies to its left; `refit` therefore fits the survivors by least squares at the end.
    """

    block: int = 128
    damp: float = 0.01
    grid: Grid | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        if self.block < 1 or self.damp < 0:
            raise SpecError(
                f"OBSUpdate(block={self.block!r}, damp={self.damp!r}): block is positive, damp not negative"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",)

    def __call__(self, problem: Problem, parts: Sparsifier) -> Solution:
        layer, seen = problem.layer, problem.seen(type(parts).__name__)
        adaptive = isinstance(parts.score, OBS) and parts.granularity.columns is not None
        parts.granularity.check(layer)
        grams = seen.get("gram")
        weights = layer.matrix(layer.weight.detach()).to(grams.dtype).chunk(len(grams))
        static = None if adaptive else layer.matrix(parts.select(problem).kept).cpu().chunk(len(grams))
        found, notes = [], []
        share = [problem.zeros * (i + 1) // len(grams) - problem.zeros * i // len(grams) for i in range(len(grams))]
        for i, gram in enumerate(grams):
            hessian = damped(gram, seen.rows, self.damp)
            if hessian.damp > self.damp:
                notes.append(f"the Hessian is singular: damping raised from {self.damp:g} to {hessian.damp:g}")
            upper = upper_inverse(hessian)
            matrix = weights[i].cpu()
            fixed: dict[str, torch.Tensor | Granularity] = (
                {"granularity": parts.granularity} if static is None else {"kept": static[i]}
            )
            rounding = self.grid.fit(matrix, upper) if self.grid is not None else (None, None)
            pruned, kept = sweep(
                matrix, upper, share[i], block=self.block, quantise=rounding[0], outlier=rounding[1],
                dead=hessian.dead, **fixed,  # type: ignore[arg-type]
            )  # fmt: skip
            if self.refit and self.grid is None:
                pruned = refit(matrix, pruned, kept, gram / seen.rows, hessian.damp)
            found.append((pruned, kept))
        weight = layer.from_matrix(torch.cat([w for w, _ in found])).to(layer.weight)
        kept = layer.from_matrix(torch.cat([k for _, k in found])).to(layer.weight.device)
        return Solution(weight, kept, notes=tuple(dict.fromkeys(notes)))


@dataclass(frozen=True, repr=False)
class SparseGPT(Sparsifier):
    """Drop the entries of least w^2 / U_jj^2 and update the rest (Frantar and Alistarh, SparseGPT, ICML 2023).

    H^-1 = U^T U with H = x x^T / rows, damped by `damp` times its mean diagonal. Columns go in blocks of `block`;
    each block gets its share of zeros among all its entries (`unit=Element("row")`: among each row's). The survivors
    are fitted by least squares, which the paper leaves out (`refit=False`: the sweep alone). The
    first argument is a sparsity, a pattern such as `NM(2, 4)`, or an allocator. `grid=Grid(4)` quantises jointly.
    """

    sparsity: Target
    block: int = 128
    damp: float = 0.01
    unit: Granularity = ELEMENT
    grid: Grid | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        target_allocator("SparseGPT", self.sparsity)
        OBSUpdate(self.block, self.damp)

    @property
    def score(self) -> Score:
        return OBS(2, self.damp)

    @property
    def granularity(self) -> Granularity:
        return target_granularity("SparseGPT", self.sparsity, self.unit)

    @property
    def allocator(self) -> Allocator:
        return target_allocator("SparseGPT", self.sparsity)

    @property
    def apply(self) -> Apply:
        return OBSUpdate(self.block, self.damp, self.grid, self.refit)
