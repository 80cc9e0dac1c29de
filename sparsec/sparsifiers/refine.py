"""Refinements of another sparsifier's result: survivors by least squares, biases corrected, masks without training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sparsec.errors import SpecError
from sparsec.formats import Format
from sparsec.sparsifiers.allocators import Allocator
from sparsec.sparsifiers.basic import Wanda
from sparsec.sparsifiers.granularity import Element, Granularity, GroupsOf
from sparsec.sparsifiers.least_squares import SETTLED, STEPS, refit
from sparsec.sparsifiers.parts import Apply, Problem, Solution, Sparsifier
from sparsec.sparsifiers.scores import Score
from sparsec.sparsifiers.selectors import Selector


@dataclass(frozen=True, repr=False)
class Refinement(Sparsifier):
    """Base: everything but `solve` is the inner sparsifier's. A sparsity or pattern stands for Wanda with it."""

    inner: Sparsifier | float | Format | Allocator

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Sparsifier):
            object.__setattr__(self, "inner", Wanda(self.inner))

    @property
    def base(self) -> Sparsifier:
        """The inner sparsifier."""
        if not isinstance(self.inner, Sparsifier):
            raise SpecError(f"{type(self).__name__} refines a sparsifier, got {self.inner!r}")
        return self.inner

    @property
    def score(self) -> Score:
        return self.base.score

    @property
    def granularity(self) -> Granularity:
        return self.base.granularity

    @property
    def selector(self) -> Selector:
        return self.base.selector

    @property
    def allocator(self) -> Allocator:
        return self.base.allocator

    @property
    def apply(self) -> Apply:
        return self.base.apply

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.base.needs, *self.extra_needs)))

    @property
    def extra_needs(self) -> tuple[str, ...]:
        return ("mean",)


@dataclass(frozen=True, repr=False)
class Refit(Refinement):
    """Give the survivors of each row the values that minimise ||(w - w') X||^2 for the mask that `inner` chose.

    Preconditioned conjugate gradients from the inner solution on, all rows at once; every step lowers the error. Stops
    after `steps`, or when a step lowers the layer's error by a share below `tolerance`. `damp` is as in SparseGPT.
    """

    steps: int = STEPS
    tolerance: float = SETTLED
    damp: float = 1e-2

    @property
    def extra_needs(self) -> tuple[str, ...]:
        return ("gram",)

    def solve(self, problem: Problem) -> Solution:
        found, layer, seen = self.base.solve(problem), problem.layer, problem.seen("Refit")
        grams = seen.get("gram")
        goal = layer.matrix(layer.weight.detach()).to(grams.dtype).cpu().chunk(len(grams))
        start = layer.matrix(found.weight).to(grams.dtype).cpu().chunk(len(grams))
        kept = layer.matrix(found.kept).cpu().chunk(len(grams))
        parts = [
            refit(g, s, k, gram / seen.rows, self.damp, self.steps, self.tolerance)
            for g, s, k, gram in zip(goal, start, kept, grams)
        ]
        return replace(found, weight=layer.from_matrix(torch.cat(parts)).to(layer.weight))


@dataclass(frozen=True, repr=False)
class BiasCorrection(Refinement):
    """Add what pruning takes from the mean output back to the bias: b + (w - w') E[x]. Layers without one stay."""

    def solve(self, problem: Problem) -> Solution:
        found, layer = self.base.solve(problem), problem.layer
        if layer.bias is None:
            return replace(found, notes=(*found.notes, "no bias to correct"))
        mean = problem.seen("BiasCorrection").per_output("mean", layer.outputs)
        gone = layer.matrix(layer.weight.detach() - found.weight.to(layer.weight)).double().cpu()
        bias = layer.bias.detach() if found.bias is None else found.bias
        return replace(found, bias=bias + (gone * mean).sum(1).to(bias))


@dataclass(frozen=True, repr=False)
class DSnoT(Refinement):
    """Refine a mask by swaps, without changing weights (Zhang et al., Dynamic Sparse No Training, ICLR 2024).

    Per row, while the expected output that pruning takes away, err = sum over the dropped of w_j E[x_j], exceeds
    `threshold` times its first value: the dropped entry that lowers |err| most, by |w_j E[x_j]| / Var[x_j]^power, comes
    back, and the kept one of the opposite sign with the least |w_j| ||x_j|| goes, inside the same group for n:m
    patterns. A row stops when a swap would not lower |err| or would turn its sign. `inner` gives the first mask (a
    sparsity or pattern: Wanda's); the weights are the unpruned ones, so wrap it in `Refit` to fit them.
    """

    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = self.base.granularity
        if not isinstance(unit, (GroupsOf, Element)):
            raise SpecError(f"DSnoT swaps single entries or inside n:m groups; {unit!r} is neither")

    @property
    def extra_needs(self) -> tuple[str, ...]:
        return ("mean", "var", "norm")

    def solve(self, problem: Problem) -> Solution:
        found, layer, seen = self.base.solve(problem), problem.layer, problem.seen("DSnoT")
        weight = layer.matrix(layer.weight.detach()).double().cpu()
        mean, var, norm = (seen.per_output(n, layer.outputs) for n in ("mean", "var", "norm"))
        group = self.granularity.m if isinstance(self.granularity, GroupsOf) else None
        kept = layer.matrix(found.kept).cpu()
        kept = swap(weight, kept, mean, var, norm, self.cycles, self.threshold, self.power, group)
        mask = layer.from_matrix(kept).to(layer.weight.device)
        return replace(found, weight=layer.weight.detach().masked_fill(~mask, 0), kept=mask)


def swap(
    weight: torch.Tensor,
    kept: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    norm: torch.Tensor,
    cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
    group: int | None = None,
) -> torch.Tensor:
    """The mask of `kept` after DSnoT's swaps; all arguments are [outputs, features]. Nonzeros per row stay the same."""
    kept, lines = kept.clone(), torch.arange(len(weight))
    share = weight * mean
    gain = share.abs() / var.clamp(min=torch.finfo(torch.float64).tiny) ** power
    wanda = weight.abs() * norm
    err = share.masked_fill(kept, 0).sum(1)
    goal, active = threshold * err.abs(), torch.ones(len(weight), dtype=torch.bool)
    never, places = torch.inf, torch.arange(weight.shape[1])
    for _ in range(cycles):
        sign = err.sign()[:, None]
        grow_score = gain.masked_fill(kept | (share.sign() != sign) | (weight == 0), -never)
        best, grow = grow_score.max(1)
        drop_score = wanda.masked_fill(~kept | (share.sign() != -sign), never)
        if group is not None:
            drop_score = drop_score.masked_fill(places // group != (grow // group)[:, None], never)
        least, drop = drop_score.min(1)
        new = err - share[lines, grow] + share[lines, drop]
        active &= (err.abs() > goal) & (best > -never) & (least < never)
        active &= (new.sign() == err.sign()) & (new.abs() < err.abs())
        if not bool(active.any()):
            break
        rows = lines[active]
        kept[rows, grow[rows]], kept[rows, drop[rows]] = True, False
        err = torch.where(active, new, err)
    return kept
