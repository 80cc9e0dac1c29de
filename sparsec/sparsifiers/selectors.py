"""From scores to what stays: the best, those over a threshold, an unbiased sample, or a proximal step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparsec.errors import SpecError
from sparsec.sparsifiers.granularity import Element, Granularity, Pooled
from sparsec.sparsifiers.layers import Layer
from sparsec.sparsifiers.ranks import rank_tensor
from sparsec.sparsifiers.scores import site_generator


@dataclass(frozen=True, eq=False)
class Selection:
    """Bool mask of what stays, and a factor for the entries that do (None for 1); both shaped like the weight."""

    kept: torch.Tensor
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Selector:
    """Base: `select` turns scores into a Selection with about `zeros` zeros."""

    def select(self, layer: Layer, scores: torch.Tensor, granularity: Granularity, zeros: int) -> Selection:
        raise NotImplementedError


@dataclass(frozen=True)
class TopK(Selector):
    """The best entries or units stay."""

    def select(self, layer: Layer, scores: torch.Tensor, granularity: Granularity, zeros: int) -> Selection:
        return Selection(granularity.keep(layer, scores, zeros))


@dataclass(frozen=True)
class Threshold(Selector):
    """Entries stay whose score is at least `value`, whatever the allocator says; units by their mean score."""

    value: float

    def select(self, layer: Layer, scores: torch.Tensor, granularity: Granularity, zeros: int) -> Selection:
        means, _ = _units(layer, scores, granularity)
        return Selection(_spread(layer, granularity, means >= self.value))


@dataclass(frozen=True)
class Sample(Selector):
    """A random sample of exactly the budget, drawn with probabilities in proportion to the scores and scaled by 1 / p:
    the pruned product has the full one as its expectation. Systematic sampling over a random order, capped at p = 1.
    """

    seed: int = 0
    rescale: bool = True

    def select(self, layer: Layer, scores: torch.Tensor, granularity: Granularity, zeros: int) -> Selection:
        means, sizes = _units(layer, scores, granularity)
        if len(set(sizes.tolist())) > 1:
            raise SpecError(f"Sample needs units of one size; {granularity!r} has several in layer {layer.site!r}")
        keep = len(means) - round(zeros / int(sizes[0])) if len(sizes) else 0
        chances = inclusion(np.where(np.isfinite(means), np.maximum(means, 0), 0.0), keep)
        taken = systematic(chances, site_generator(self.seed, layer.site))
        scale = np.where(taken & self.rescale, 1 / np.maximum(chances, 1e-300), 1.0)
        return Selection(_spread(layer, granularity, taken), _spread(layer, granularity, scale))


def inclusion(scores: np.ndarray, count: int) -> np.ndarray:
    """Probabilities min(1, c * score) that sum to `count`, or to the number of positive scores when that is less."""
    chances = np.zeros(len(scores))
    scores = scores / (scores.max(initial=0.0) or 1.0)
    positive = scores > 1e-12
    full = np.zeros(len(scores), bool)
    count = min(count, int(positive.sum()))
    while True:
        rest = positive & ~full
        total = scores[rest].sum()
        chances = np.where(full, 1.0, scores * ((count - full.sum()) / total if total else 0.0))
        over = rest & (chances >= 1)
        if not over.any():
            return np.where(positive, chances, 0.0)
        full |= over


def systematic(chances: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Bool sample of round(sum of chances) members, each with its own probability (Madow, 1949)."""
    order = torch.randperm(len(chances), generator=generator).numpy()
    ends = np.cumsum(chances[order])
    count = round(float(ends[-1])) if len(ends) else 0
    if not count:
        return np.zeros(len(chances), bool)
    ends *= count / ends[-1]
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    places = np.searchsorted(ends, start + np.arange(count), side="right")
    taken = np.zeros(len(chances), bool)
    taken[order[np.minimum(places, len(chances) - 1)]] = True
    return taken


@dataclass(frozen=True)
class GroupEnvelope(Selector):
    """WGSEF's proximal selection (Beck and Refael, 2022): units by the prox of the k-group envelope, whose strength
    grows from `lam` on until exactly the budget's k units survive, and then by their rank where norms tie. `shrink`
    keeps the prox's factor u / (u + lam) at the given strength; without it survivors keep their values."""

    lam: float = 1.0
    shrink: bool = False

    def __post_init__(self) -> None:
        if not self.lam > 0:
            raise SpecError(f"GroupEnvelope: lam={self.lam!r} is not positive")

    def select(self, layer: Layer, scores: torch.Tensor, granularity: Granularity, zeros: int) -> Selection:
        means, sizes = _units(layer, scores, granularity)
        k = len(means) - round(zeros / max(1.0, float(sizes.mean()))) if len(sizes) else 0
        norms = np.where(np.isfinite(means), np.maximum(means, 0.0), 0.0)
        lam = self.lam
        for _ in range(60):
            survivors = envelope_weights(norms, k, lam) > 0
            if survivors.sum() <= k:
                break
            lam *= 2
        if survivors.sum() != k:
            survivors = np.zeros(len(norms), bool)
            survivors[np.argsort(-norms, kind="stable")[:k]] = True
        shares = envelope_weights(norms, k, self.lam)
        factor = np.where(survivors, shares / (shares + self.lam), 1.0) if self.shrink else np.ones(len(norms))
        return Selection(_spread(layer, granularity, survivors), _spread(layer, granularity, factor))


def envelope_weights(norms: np.ndarray, k: float, lam: float, weights: np.ndarray | None = None) -> np.ndarray:
    """The u in [0, 1]^m of the prox of lam * s_k, s_k(w) = min over u with sum d_g u_g <= k of sum ||w_g||^2 / u_g / 2.

    u_g = clip(eta * ||v_g|| / sqrt(d_g) - lam, 0, 1) with eta such that sum d_g u_g = k, found by bisection; d are the
    `weights`, 1 by default. The prox is v_g u_g / (u_g + lam).
    """
    cost = np.ones(len(norms)) if weights is None else np.asarray(weights, float)
    slopes = norms / np.sqrt(cost)
    positive = slopes[slopes > 0]
    if not len(positive) or k <= 0:
        return np.zeros(len(norms))
    if k >= cost[slopes > 0].sum():
        return np.where(slopes > 0, 1.0, 0.0)
    low, high = 0.0, (1 + lam) / float(positive.min())
    for _ in range(200):
        middle = 0.5 * (low + high)
        if (cost * np.clip(middle * slopes - lam, 0, 1)).sum() > k:
            high = middle
        else:
            low = middle
    found: np.ndarray = np.clip(low * slopes - lam, 0, 1)
    return found


def envelope_prox(v: torch.Tensor, k: int, lam: float, dims: int = 1) -> torch.Tensor:
    """The prox of lam * s_k at `v`, whose groups are the slices along its first dimension (the rest, flattened)."""
    flat = v.reshape(v.shape[0], -1) if dims else v.reshape(-1, 1)
    shares = torch.from_numpy(envelope_weights(flat.double().norm(dim=1).numpy(), k, lam))
    return (flat * (shares / (shares + lam)).to(flat)[:, None]).reshape(v.shape)


def _units(layer: Layer, scores: torch.Tensor, granularity: Granularity) -> tuple[np.ndarray, np.ndarray]:
    """(mean score, size) of every unit; entries are units of one, in the order of `Layer.matrix`."""
    granularity.check(layer)
    if isinstance(granularity, Pooled):
        return granularity.pool(layer, scores)
    if not isinstance(granularity, Element):
        raise SpecError(f"{granularity!r} is no set of disjoint units; valid: Element, Block, Kernel, Filter")
    found = layer.matrix(rank_tensor(scores, layer.weight)).double().numpy().reshape(-1)
    return found, np.ones(len(found), int)


def _spread(layer: Layer, granularity: Granularity, units: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(units[granularity.ids(layer)])
    return layer.from_matrix(values).to(layer.weight.device)


__all__ = [
    "GroupEnvelope",
    "Sample",
    "Selection",
    "Selector",
    "Threshold",
    "TopK",
    "envelope_prox",
    "envelope_weights",
    "inclusion",
    "systematic",
]
