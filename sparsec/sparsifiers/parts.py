"""What a sparsifier is made of: score x granularity x selector x allocator x apply, and the job of one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch

from sparsec.errors import SpecError
from sparsec.formats import Format, nonzero
from sparsec.sparsifiers.allocators import Allocator, EqualShare, GlobalShare, check_sparsity
from sparsec.sparsifiers.granularity import Element, Granularity, GroupsOf, groups
from sparsec.sparsifiers.layers import Layer
from sparsec.sparsifiers.scores import AbsValue, Score, Uniform01
from sparsec.sparsifiers.selectors import Selection, Selector, TopK
from sparsec.sparsifiers.stats import Stats

__all__ = [
    "AbsValue",
    "Allocator",
    "Apply",
    "Element",
    "EqualShare",
    "GlobalShare",
    "Granularity",
    "GroupsOf",
    "Hard",
    "Problem",
    "Score",
    "Selection",
    "Solution",
    "Sparsifier",
    "Target",
    "Uniform01",
    "check_sparsity",
    "groups",
    "zero_entries",
]


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer to prune: the layer, what calibration saw (None without data), and how many zeros it gets."""

    layer: Layer
    stats: Stats | None = None
    zeros: int = 0

    def seen(self, owner: str) -> Stats:
        """The statistics. Raises SpecError when there are none."""
        if self.stats is None:
            raise SpecError(f"{owner} calibrates; pass data=, an iterable of batches")
        return self.stats


@dataclass(frozen=True, eq=False)
class Solution:
    """What becomes of a layer: its new weight, which entries stay (the others are zero), a new bias, and remarks."""

    weight: torch.Tensor
    kept: torch.Tensor
    bias: torch.Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Apply:
    """How the selection becomes a weight. Subclasses define `__call__(problem, parts) -> Solution`."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def __call__(self, problem: Problem, parts: Sparsifier) -> Solution:
        raise NotImplementedError


@dataclass(frozen=True)
class Hard(Apply):
    """Zeros where nothing is kept, the rest as it was (times the selector's scale when it has one)."""

    def __call__(self, problem: Problem, parts: Sparsifier) -> Solution:
        selection = parts.select(problem)
        weight = problem.layer.weight.detach()
        if selection.scale is not None:
            weight = weight * selection.scale.to(weight.dtype)
        return Solution(weight.masked_fill(~selection.kept, 0), selection.kept)


Target = float | Format | Allocator
"""First argument of a sparsifier: a share of zeros, a pattern such as `NM(2, 4)`, or an allocator like `ERK(0.9)`."""


class Sparsifier:
    """Score x granularity x selector x allocator x apply, as properties; `solve` is the job of one layer.

    A method is a frozen dataclass that overrides some of them; one that works on the calibrated weight directly
    overrides `solve`. Nothing here changes a model: `sparsify` does.
    """

    @property
    def score(self) -> Score:
        raise SpecError(f"{type(self).__name__} defines no score")

    @property
    def granularity(self) -> Granularity:
        return Element()

    @property
    def selector(self) -> Selector:
        return TopK()

    @property
    def allocator(self) -> Allocator:
        raise SpecError(f"{type(self).__name__} defines no allocator")

    @property
    def apply(self) -> Apply:
        return Hard()

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that calibration must collect; empty for methods without data."""
        own = (*self.score.needs, *self.apply.needs)
        if self.allocator.needs_scores:
            own += getattr(self.allocator, "needs", ())
        return tuple(dict.fromkeys(own))

    @property
    def needs_data(self) -> bool:
        return bool(self.needs)

    def select(self, problem: Problem) -> Selection:
        """What stays of one layer."""
        scores = self.score(problem.layer, problem.stats)
        return self.selector.select(problem.layer, scores, self.granularity, problem.zeros)

    def solve(self, problem: Problem) -> Solution:
        """The pruned layer."""
        return self.apply(problem, self)

    def zeros(self, layers: Sequence[Layer], stats: dict[str, Stats | None] | None = None) -> list[int]:
        """How many zeros each layer gets."""
        known = stats or {}
        score: Callable[[Layer], torch.Tensor] = lambda layer: self.score(layer, known.get(layer.site))  # noqa: E731
        return self.allocator.zeros(layers, score, known)

    def masks(self, layers: Sequence[Layer], data: Any = None) -> list[torch.Tensor]:
        """One bool mask per layer, shaped like its weight, true where the entry stays. `data` maps sites to `Stats`."""
        stats = data or {}
        zeros = self.zeros(layers, stats)
        return [self.solve(Problem(x, stats.get(x.site), n)).kept for x, n in zip(layers, zeros)]

    def __repr__(self) -> str:
        """The first field and what differs from its default."""
        parts = []
        for i, f in enumerate(fields(self)):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if i == 0:
                parts.append(repr(value))
            elif value != default:
                parts.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def target_allocator(owner: str, target: Target) -> Allocator:
    """What the first argument says about the zeros of each layer. Raises SpecError when it says nothing."""
    if isinstance(target, Allocator):
        return target
    if isinstance(target, Format):
        groups(owner, target)
        return EqualShare(0.0)
    return EqualShare(check_sparsity(owner, target))


def target_granularity(owner: str, target: Target, given: Granularity) -> Granularity:
    """The pattern's granularity when the first argument is one, else `given`."""
    return groups(owner, target) if isinstance(target, Format) else given


def zero_entries(weight: torch.Tensor) -> np.ndarray:
    """Flat bool: which entries are zero already."""
    return ~nonzero(weight.detach()).reshape(-1)
