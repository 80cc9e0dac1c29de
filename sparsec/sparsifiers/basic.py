"""One-shot sparsifiers that keep the weights as they are: by magnitude, at random, Wanda, and any composition."""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.errors import SpecError
from sparsec.formats import Format
from sparsec.sparsifiers.allocators import Allocator, GlobalShare
from sparsec.sparsifiers.granularity import ELEMENT, ROW, Element, Granularity
from sparsec.sparsifiers.parts import (
    Apply,
    Hard,
    Sparsifier,
    Target,
    check_sparsity,
    target_allocator,
    target_granularity,
)
from sparsec.sparsifiers.scores import AbsValue, Score, TimesNorm, Uniform01
from sparsec.sparsifiers.selectors import Selector, TopK


@dataclass(frozen=True)
class Magnitude(Sparsifier):
    """Drop the entries of least magnitude (Han et al., Learning both Weights and Connections, NeurIPS 2015).

    `sparsity` is the share of zeros in [0, 1), counted exactly, a pattern such as `NM(2, 4)`, or an allocator such as
    `ERK(0.9)`. `scope` is "layer" for the same share everywhere, or "global" for one threshold over all layers.
    """

    sparsity: Target
    scope: str = "layer"

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "global"):
            raise SpecError(f"Magnitude: scope={self.scope!r}; valid: 'layer', 'global'")
        target_allocator("Magnitude", self.sparsity)
        if self.scope == "global" and isinstance(self.sparsity, Format):
            raise SpecError("Magnitude: a pattern fixes the zeros of every layer; scope='global' means nothing")
        if self.scope == "global" and isinstance(self.sparsity, Allocator):
            raise SpecError("Magnitude: an allocator fixes the zeros of every layer; scope='global' means nothing")

    @property
    def score(self) -> Score:
        return AbsValue()

    @property
    def granularity(self) -> Granularity:
        return target_granularity("Magnitude", self.sparsity, Element())

    @property
    def allocator(self) -> Allocator:
        if self.scope == "global":
            return GlobalShare(check_sparsity("Magnitude", self.sparsity))
        return target_allocator("Magnitude", self.sparsity)


@dataclass(frozen=True)
class Random(Sparsifier):
    """Drop entries at random, the same share in every layer; deterministic in `seed` and the layer's name.

    `Random(ERK(0.9))` is the baseline of Liu et al. (The Unreasonable Effectiveness of Random Pruning, ICLR 2022).
    """

    sparsity: Target
    seed: int = 0

    def __post_init__(self) -> None:
        target_allocator("Random", self.sparsity)
        if type(self.seed) is not int:
            raise SpecError(f"Random: seed={self.seed!r} is not an integer")

    @property
    def score(self) -> Score:
        return Uniform01(self.seed)

    @property
    def granularity(self) -> Granularity:
        return target_granularity("Random", self.sparsity, Element())

    @property
    def allocator(self) -> Allocator:
        return target_allocator("Random", self.sparsity)


@dataclass(frozen=True, repr=False)
class Wanda(Sparsifier):
    """Drop the least |w_ij| * ||x_j|| of each output row (Sun et al., A Simple and Effective Pruning Approach for Large
    Language Models, ICLR 2024). `unit=Element()` compares in the whole layer instead."""

    sparsity: Target
    unit: Granularity = ROW

    def __post_init__(self) -> None:
        target_allocator("Wanda", self.sparsity)

    @property
    def score(self) -> Score:
        return TimesNorm()

    @property
    def granularity(self) -> Granularity:
        return target_granularity("Wanda", self.sparsity, self.unit)

    @property
    def allocator(self) -> Allocator:
        return target_allocator("Wanda", self.sparsity)


ABS_VALUE, TOP_K, HARD = AbsValue(), TopK(), Hard()


@dataclass(frozen=True, repr=False)
class Compose(Sparsifier):
    """Any score x granularity x selector x allocator x apply: `Compose(0.5, rank=Fisher(), unit=Block(1, 16))`.

    The first argument is a sparsity, a pattern, or an allocator.
    """

    sparsity: Target
    rank: Score = ABS_VALUE
    unit: Granularity = ELEMENT
    choose: Selector = TOP_K
    update: Apply = HARD

    def __post_init__(self) -> None:
        target_allocator("Compose", self.sparsity)
        kinds = (("rank", Score), ("unit", Granularity), ("choose", Selector), ("update", Apply))
        for name, kind in kinds:
            if not isinstance(getattr(self, name), kind):
                raise SpecError(f"Compose: {name}={getattr(self, name)!r} is no {kind.__name__}")

    @property
    def score(self) -> Score:
        return self.rank

    @property
    def granularity(self) -> Granularity:
        return target_granularity("Compose", self.sparsity, self.unit)

    @property
    def selector(self) -> Selector:
        return self.choose

    @property
    def allocator(self) -> Allocator:
        return target_allocator("Compose", self.sparsity)

    @property
    def apply(self) -> Apply:
        return self.update
