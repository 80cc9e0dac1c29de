"""The sparsifiers that need no data: by magnitude, and at random as the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.errors import SpecError
from sparsec.formats import Format
from sparsec.sparsifiers.parts import (
    AbsValue,
    Allocator,
    Element,
    EqualShare,
    GlobalShare,
    Granularity,
    Score,
    Sparsifier,
    Uniform01,
    check_sparsity,
    groups,
)


@dataclass(frozen=True)
class Magnitude(Sparsifier):
    """Drop the entries of least magnitude (Han et al., Learning both Weights and Connections, NeurIPS 2015).

    `sparsity` is the share of zeros in [0, 1), counted exactly, or a pattern such as `NM(2, 4)`. `scope` is "layer" for
    the same share everywhere, or "global" for one threshold over all layers.
    """

    sparsity: float | Format
    scope: str = "layer"

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "global"):
            raise SpecError(f"Magnitude: scope={self.scope!r}; valid: 'layer', 'global'")
        if isinstance(self.sparsity, Format):
            groups("Magnitude", self.sparsity)
            if self.scope == "global":
                raise SpecError("Magnitude: a pattern fixes the zeros of every layer; scope='global' means nothing")
        else:
            check_sparsity("Magnitude", self.sparsity)

    @property
    def score(self) -> Score:
        return AbsValue()

    @property
    def granularity(self) -> Granularity:
        return groups("Magnitude", self.sparsity) if isinstance(self.sparsity, Format) else Element()

    @property
    def allocator(self) -> Allocator:
        share = 0.0 if isinstance(self.sparsity, Format) else float(self.sparsity)
        return GlobalShare(share) if self.scope == "global" else EqualShare(share)


@dataclass(frozen=True)
class Random(Sparsifier):
    """Drop entries at random, the same share in every layer; deterministic in `seed` and the layer's name."""

    sparsity: float | Format
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, Format):
            groups("Random", self.sparsity)
        else:
            check_sparsity("Random", self.sparsity)
        if type(self.seed) is not int:
            raise SpecError(f"Random: seed={self.seed!r} is not an integer")

    @property
    def score(self) -> Score:
        return Uniform01(self.seed)

    @property
    def granularity(self) -> Granularity:
        return groups("Random", self.sparsity) if isinstance(self.sparsity, Format) else Element()

    @property
    def allocator(self) -> Allocator:
        return EqualShare(0.0 if isinstance(self.sparsity, Format) else float(self.sparsity))
