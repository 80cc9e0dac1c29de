"""How many zeros each layer gets: the same share, one global threshold, ER and ERK, a knapsack under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsec.errors import SpecError
from sparsec.report import Report
from sparsec.sparsifiers.layers import Layer
from sparsec.sparsifiers.milliseconds import Timings, site_us, taken_us
from sparsec.sparsifiers.ranks import kth, ranks
from sparsec.sparsifiers.scores import Score

Scores = Callable[[Layer], torch.Tensor]


@dataclass(frozen=True)
class Allocator:
    """Base: `zeros` gives the number of zeros of every layer. `needs_scores` when it compares scores of layers."""

    @property
    def needs_scores(self) -> bool:
        return False

    def zeros(self, layers: Sequence[Layer], score: Scores, stats: Mapping[str, Any] | None = None) -> list[int]:
        raise NotImplementedError


@dataclass(frozen=True)
class EqualShare(Allocator):
    """The same share of zeros in every layer: round(sparsity * entries)."""

    sparsity: float

    def zeros(self, layers: Sequence[Layer], score: Scores, stats: Mapping[str, Any] | None = None) -> list[int]:
        return [round(self.sparsity * layer.weight.numel()) for layer in layers]


@dataclass(frozen=True)
class GlobalShare(Allocator):
    """One threshold for all layers: round(sparsity * all entries) zeros in total.

    With `by`, another score decides how many each layer gets: `GlobalShare(0.9, by=Saliency())` are the ratios of SNIP
    (Lee et al., 2019), `by=GradientFlow()` those of GraSP (Wang et al., 2020).
    """

    sparsity: float
    by: Score | None = None

    def __post_init__(self) -> None:
        check_sparsity(type(self).__name__, self.sparsity)

    @property
    def needs_scores(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        return self.by.needs if self.by is not None else ()

    def zeros(self, layers: Sequence[Layer], score: Scores, stats: Mapping[str, Any] | None = None) -> list[int]:
        known, by = stats or {}, self.by
        if by is not None:
            score = lambda layer: by(layer, known.get(layer.site))  # noqa: E731
        found = [ranks(score(layer), layer.weight) for layer in layers]
        total = round(self.sparsity * sum(r.size for r in found))
        threshold = kth(np.concatenate(found), total) if total else -math.inf
        counts = [int(np.count_nonzero(r < threshold)) for r in found]
        left = total - sum(counts)
        for i, r in enumerate(found):  # equal scores go in the order of the layers
            take = min(left, int(np.count_nonzero(r == threshold)))
            counts[i] += take
            left -= take
        return counts


@dataclass(frozen=True)
class ER(Allocator):
    """Erdos-Renyi densities (Mocanu et al., 2018): density ~ (n_in + n_out) / (n_in * n_out), capped at 1, scaled so
    that the layers together have round(sparsity * all entries) zeros, exactly."""

    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(type(self).__name__, self.sparsity)

    def _raw(self, layer: Layer) -> float:
        return sum(layer.weight.shape[:2]) / max(1, math.prod(layer.weight.shape[:2]))

    def zeros(self, layers: Sequence[Layer], score: Scores, stats: Mapping[str, Any] | None = None) -> list[int]:
        sizes = [layer.weight.numel() for layer in layers]
        kept = scaled_budget([self._raw(x) for x in layers], sizes, sum(sizes) - round(self.sparsity * sum(sizes)))
        return [size - k for size, k in zip(sizes, kept)]


@dataclass(frozen=True)
class ERK(ER):
    """ER with the kernel's sides (Evci et al., 2020): density ~ (n_in + n_out + kh + kw) / (n_in * n_out * kh * kw)."""

    def _raw(self, layer: Layer) -> float:
        return sum(layer.weight.shape) / max(1, layer.weight.numel())


def scaled_budget(raw: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Integers k_i <= sizes_i, k_i ~ raw_i * sizes_i, that sum to `total`; layers that would overflow are full."""
    full = [False] * len(sizes)
    while True:
        left = total - sum(s for s, f in zip(sizes, full) if f)
        weight = sum(r * s for r, s, f in zip(raw, sizes, full) if not f)
        scale = left / weight if weight else 0.0
        over = [not f and r * scale > 1 for r, f in zip(raw, full)]
        if not any(over):
            break
        full = [f or o for f, o in zip(full, over)]
    exact = [float(s) if f else r * s * scale for r, s, f in zip(raw, sizes, full)]
    kept = [min(math.floor(e), s) for e, s in zip(exact, sizes)]
    order = sorted(range(len(sizes)), key=lambda i: (kept[i] - exact[i], i))  # largest remainder first
    while (missing := total - sum(kept)) > 0:
        for i in [i for i in order if kept[i] < sizes[i]][:missing]:
            kept[i] += 1
    return kept


UNITS = ("weights", "flops", "ms")


@dataclass(frozen=True)
class Sensitivity(Allocator):
    """The levels, one per layer, that lose least of the score within a budget: a knapsack over layers.

    `budget` counts nonzero weights, FLOPs (2 per weight and use; `uses` maps a site to its uses per call, e.g. output
    pixels, 1 by default), or measured milliseconds. For "ms", `timings` maps each sparsity level to the Report, or the
    Reports, that `sparsec.analyze` gave for the model pruned to it; the level 0 is the median dense time of all, and a
    module that is used several times costs all its uses. What the budget bounds is `report(compiled).totals().us`: the
    layers, not what the model does besides. `meet_budget` closes the loop by measurements, also of the whole model.

    A layer's loss at a level is the share of its scores that falls below the level's threshold. Solved by dynamic
    programming on costs rounded up to 1/2000 of the budget, so the budget is kept.

    Raises SpecError when even the sparsest levels exceed the budget.
    """

    budget: float
    unit: str = "weights"
    levels: tuple[float, ...] = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    timings: Timings | None = None
    uses: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise SpecError(f"Sensitivity: unit={self.unit!r}; valid: {', '.join(map(repr, UNITS))}")
        if self.unit == "ms" and not self.timings:
            raise SpecError("Sensitivity: unit='ms' needs timings={level: sparsec.analyze(pruned to that level, ...)}")
        for level in self.all_levels:
            check_sparsity("Sensitivity level", level)

    @property
    def needs_scores(self) -> bool:
        return True

    @property
    def all_levels(self) -> tuple[float, ...]:
        return tuple(sorted({0.0, *self.timings})) if self.unit == "ms" and self.timings else self.levels

    def cost(self, layer: Layer, level: float) -> float:
        """What a layer costs at a level, in the unit of the budget."""
        if self.unit == "ms":
            return site_us(self.timings or {}, layer.site, level) / 1e3
        kept = layer.weight.numel() - round(level * layer.weight.numel())
        if self.unit == "weights":
            return kept
        return 2.0 * kept * (self.uses or {}).get(layer.site, 1)

    def taken(self, report: Report) -> float:
        """Milliseconds of the layers in a report of `compile`, at the machine's speed in `timings`; a layer that it did
        not time stayed dense and counts as that."""
        return taken_us(self.timings or {}, report) / 1e3

    def zeros(self, layers: Sequence[Layer], score: Scores, stats: Mapping[str, Any] | None = None) -> list[int]:
        levels = self.all_levels
        costs = np.array([[self.cost(x, s) for s in levels] for x in layers])
        losses = np.array([_losses(ranks(score(x), x.weight), levels) for x in layers])
        if costs.min(1).sum() > self.budget:
            least = costs.min(1).sum()
            raise SpecError(f"Sensitivity: budget {self.budget:g} {self.unit}; the sparsest levels need {least:g}")
        chosen = knapsack(costs, losses, self.budget)
        return [round(levels[c] * x.weight.numel()) for c, x in zip(chosen, layers)]


def _losses(found: np.ndarray, levels: Sequence[float]) -> list[float]:
    """Share of the sum of scores that lies below each level's threshold."""
    ordered = np.sort(np.where(np.isfinite(found), np.maximum(found, 0.0), 0.0).astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    return [float(sums[round(level * found.size)] / (sums[-1] or 1.0)) for level in levels]


def knapsack(costs: np.ndarray, losses: np.ndarray, budget: float, steps: int = 2000) -> list[int]:
    """One choice per row with the least total loss and a total cost within the budget (costs rounded up to a step)."""
    spare = costs - costs.min(1, keepdims=True)
    room = budget - costs.min(1).sum()
    units = np.ceil(spare / room * steps - 1e-9).astype(int) if room > 0 else np.where(spare > 0, steps + 1, 0)
    best = np.zeros(steps + 1)
    picks = []
    for unit, loss in zip(units, losses):
        table = np.full((len(unit), steps + 1), math.inf)
        for i, (u, cost) in enumerate(zip(unit, loss)):
            if u <= steps:
                table[i, u:] = best[: steps + 1 - u] + cost
        picks.append(table.argmin(0))
        best = table.min(0)
    at, chosen = steps, []
    for unit, pick in zip(units[::-1], picks[::-1]):
        chosen.append(int(pick[at]))
        at -= int(unit[chosen[-1]])
    return chosen[::-1]


def check_sparsity(owner: str, sparsity: object) -> float:
    """The sparsity as a float. Raises SpecError unless it is a number in [0, 1)."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0 <= float(sparsity) < 1:  # type: ignore[arg-type]
        hint = f"; did you mean {float(sparsity) / 100:g}?" if number and 1 < float(sparsity) < 100 else ""  # type: ignore[arg-type]
        raise SpecError(
            f"{owner}: sparsity={sparsity!r} is not a share of zeros in [0, 1) or a pattern such as NM(2, 4){hint}"
        )
    return float(sparsity)  # type: ignore[arg-type]
