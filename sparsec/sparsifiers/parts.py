"""What a sparsifier is made of: a score, a granularity that turns scores into a mask, an allocator of sparsity."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sparsec.errors import SpecError
from sparsec.formats import Format, nonzero
from sparsec.sparsifiers.layers import Layer


class Score(Protocol):
    """How much an entry is worth keeping: a real tensor shaped like the weight, larger is better."""

    def __call__(self, layer: Layer) -> torch.Tensor: ...


@dataclass(frozen=True)
class AbsValue:
    """|w|."""

    def __call__(self, layer: Layer) -> torch.Tensor:
        return layer.weight.detach().abs()


@dataclass(frozen=True)
class Uniform01:
    """A random number, the same for a layer of this name and size whatever else is pruned."""

    seed: int = 0

    def __call__(self, layer: Layer) -> torch.Tensor:
        seed = (self.seed * 0x9E3779B1 + zlib.crc32(layer.site.encode())) % 2**63
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64).to(layer.weight.device)


@dataclass(frozen=True)
class EqualShare:
    """The same share of zeros in every layer: round(sparsity * entries)."""

    sparsity: float

    def zeros(self, layers: Sequence[Layer], score: Score) -> list[int]:
        return [round(self.sparsity * layer.weight.numel()) for layer in layers]


@dataclass(frozen=True)
class GlobalShare:
    """One threshold for all layers: round(sparsity * all entries) zeros in total."""

    sparsity: float

    def zeros(self, layers: Sequence[Layer], score: Score) -> list[int]:
        ranks = [_ranks(score(layer), layer.weight) for layer in layers]
        total = round(self.sparsity * sum(r.size for r in ranks))
        threshold = _kth(np.concatenate(ranks), total) if total else -math.inf
        counts = [int(np.count_nonzero(r < threshold)) for r in ranks]
        left = total - sum(counts)
        for i, r in enumerate(ranks):  # equal scores go in the order of the layers
            take = min(left, int(np.count_nonzero(r == threshold)))
            counts[i] += take
            left -= take
        return counts


Allocator = EqualShare | GlobalShare


@dataclass(frozen=True)
class Element:
    """Single entries."""

    def keep(self, layer: Layer, scores: torch.Tensor, zeros: int) -> torch.Tensor:
        """The bool mask, shaped like the weight, that drops the `zeros` lowest scores; ties drop the lower index."""
        ranks = _ranks(scores, layer.weight)
        drop = np.zeros(ranks.size, bool)
        if zeros:
            threshold = _kth(ranks.copy(), zeros)
            np.less(ranks, threshold, out=drop)
            equal = np.flatnonzero(ranks == threshold)
            drop[equal[: zeros - np.count_nonzero(drop)]] = True
        return torch.from_numpy(~drop).reshape(layer.weight.shape).to(layer.weight.device)


@dataclass(frozen=True)
class GroupsOf:
    """The best n entries of each aligned group of m inputs; of convolutions along channels at a fixed offset."""

    n: int
    m: int

    def keep(self, layer: Layer, scores: torch.Tensor, zeros: int) -> torch.Tensor:
        rows = layer.rows(torch.where(layer.weight.detach() == 0, -math.inf, scores.double()))
        if rows.shape[1] % self.m:
            raise SpecError(
                f"layer {layer.site!r} has {rows.shape[1]} inputs, which groups of {self.m} do not divide; "
                "leave it out with where="
            )
        grouped = rows.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).reshape(-1, self.m)
        order = grouped.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order, True)
        return layer.from_rows(kept.reshape(rows.shape))


Granularity = Element | GroupsOf


@dataclass(frozen=True)
class Sparsifier:
    """Score x granularity x allocator. `masks` says what to keep; nothing is changed."""

    needs_data = False

    @property
    def score(self) -> Score:
        raise SpecError(f"{type(self).__name__} defines no score")

    @property
    def granularity(self) -> Granularity:
        return Element()

    @property
    def allocator(self) -> Allocator:
        raise SpecError(f"{type(self).__name__} defines no allocator")

    def masks(self, layers: Sequence[Layer], data: Any = None) -> list[torch.Tensor]:
        """One bool mask per layer, shaped like its weight, true where the entry stays. `data` is for calibration."""
        zeros = self.allocator.zeros(layers, self.score)
        return [self.granularity.keep(x, self.score(x), n) for x, n in zip(layers, zeros)]


def check_sparsity(owner: str, sparsity: object) -> float:
    """The sparsity as a float. Raises SpecError unless it is a number in [0, 1)."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0 <= float(sparsity) < 1:  # type: ignore[arg-type]
        hint = f"; did you mean {float(sparsity) / 100:g}?" if number and 1 < float(sparsity) < 100 else ""  # type: ignore[arg-type]
        raise SpecError(
            f"{owner}: sparsity={sparsity!r} is not a share of zeros in [0, 1) or a pattern such as NM(2, 4){hint}"
        )
    return float(sparsity)  # type: ignore[arg-type]


def groups(owner: str, pattern: Format) -> GroupsOf:
    """The granularity of a pattern. Raises SpecError for a format that is none."""
    fields = pattern.fields()
    if pattern.name != "nm":
        raise SpecError(f"{owner}: {pattern.text()} is no pattern to prune to; valid: a sparsity, or NM(n, m)")
    return GroupsOf(fields["n"], fields["m"])


def _ranks(scores: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """Flat scores to be dropped from the lowest on: zeros first, NaN last.

    In numpy, on one thread: for layers of common size that beats waking torch's pool for every step.
    """
    kind = torch.float64 if scores.dtype == torch.float64 else torch.float32
    ranks: np.ndarray = scores.detach().to("cpu", kind, copy=True).numpy().reshape(-1)
    ranks[np.isnan(ranks)] = math.inf
    ranks[zero_entries(weight)] = -math.inf
    return ranks


def zero_entries(weight: torch.Tensor) -> np.ndarray:
    """Flat bool: which entries are zero already."""
    return ~nonzero(weight.detach()).reshape(-1)


def _kth(ranks: np.ndarray, k: int) -> float:
    """The k-th lowest value, k >= 1. Reorders `ranks`."""
    ranks.partition(k - 1)
    return float(ranks[k - 1])
