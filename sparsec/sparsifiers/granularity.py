"""What is kept or dropped as one: entries, n:m groups, blocks, kernels, filters; and among which it competes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from sparsec.errors import SpecError
from sparsec.formats import Format
from sparsec.sparsifiers.layers import Layer
from sparsec.sparsifiers.ranks import lowest, lowest_of_rows, rank_tensor, ranks


@dataclass(frozen=True)
class Granularity:
    """Base. `columns` is the number of neighbouring matrix columns decided together, or None when a decision needs the
    whole layer; those with columns also define `keep_matrix`, which OBS sweeps call on a slice of columns."""

    @property
    def columns(self) -> int | None:
        return None

    def check(self, layer: Layer) -> None:
        """Raise SpecError when the layer has no such units."""

    def keep(self, layer: Layer, scores: torch.Tensor, zeros: int) -> torch.Tensor:
        """The bool mask, shaped like the weight, that drops the lowest scores; ties drop the lower index."""
        self.check(layer)
        matrix = layer.matrix(rank_tensor(scores, layer.weight))
        return layer.from_matrix(self.keep_matrix(matrix, zeros)).to(layer.weight.device)

    def keep_matrix(self, found: torch.Tensor, zeros: int) -> torch.Tensor:
        """The bool mask for ranks [outputs, columns], of which -inf marks zeros and goes first."""
        raise SpecError(f"{self!r} decides for whole layers only")

    def ids(self, layer: Layer) -> np.ndarray:
        """Number of the unit that each entry of `Layer.matrix` belongs to, from 0 on."""
        raise SpecError(f"{self!r} is no set of disjoint units; valid: Element, Block, Kernel, Filter")


@dataclass(frozen=True)
class Element(Granularity):
    """Single entries, compared in the whole layer or in each output row (`per="row"`: all rows get the same number
    of zeros, up to one)."""

    per: str = "layer"

    def __post_init__(self) -> None:
        if self.per not in ("layer", "row"):
            raise SpecError(f"Element: per={self.per!r}; valid: 'layer', 'row'")

    @property
    def columns(self) -> int | None:
        return 1

    def keep(self, layer: Layer, scores: torch.Tensor, zeros: int) -> torch.Tensor:
        if self.per == "row":
            return super().keep(layer, scores, zeros)
        drop = lowest(ranks(scores, layer.weight).reshape(-1), zeros)
        return torch.from_numpy(~drop).reshape(layer.weight.shape).to(layer.weight.device)

    def keep_matrix(self, found: torch.Tensor, zeros: int) -> torch.Tensor:
        array = found.numpy()
        drop = lowest_of_rows(array, zeros) if self.per == "row" else lowest(array.reshape(-1), zeros)
        return torch.from_numpy(~drop).reshape(found.shape)

    def ids(self, layer: Layer) -> np.ndarray:
        return np.arange(layer.weight.numel()).reshape(layer.outputs, -1)


@dataclass(frozen=True)
class FanIn(Granularity):
    """Single entries, the very same number in every output row: zeros are rounded to a multiple of the rows."""

    @property
    def columns(self) -> int | None:
        return None

    def keep_matrix(self, found: torch.Tensor, zeros: int) -> torch.Tensor:
        rows = max(1, found.shape[0])
        return torch.from_numpy(~lowest_of_rows(found.numpy(), round(zeros / rows) * rows))


@dataclass(frozen=True)
class GroupsOf(Granularity):
    """The best n entries of each aligned group of m inputs; of convolutions along channels at a fixed offset."""

    n: int
    m: int

    @property
    def columns(self) -> int | None:
        return self.m

    def check(self, layer: Layer) -> None:
        inputs = layer.weight.shape[0] if layer.transposed else layer.weight.shape[1]
        if inputs % self.m:
            raise SpecError(
                f"layer {layer.site!r} has {inputs} inputs, which groups of {self.m} do not divide; "
                "leave it out with where="
            )

    def keep_matrix(self, found: torch.Tensor, zeros: int) -> torch.Tensor:
        grouped = found.reshape(-1, self.m)
        order = grouped.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order, True)
        return kept.reshape(found.shape)


@dataclass(frozen=True)
class GroupedNM(Granularity):
    """n:m:g (Ivanov et al., STen, 2023): of C(m, n) * g consecutive n:m groups of a row each of the C(m, n) patterns
    takes exactly g. Greedy: the (group, pattern) pairs by kept score, best first, while the pattern is not used up."""

    n: int
    m: int
    g: int

    @property
    def patterns(self) -> np.ndarray:
        """All patterns as bool [C(m, n), m]."""
        found = np.zeros((math.comb(self.m, self.n), self.m), bool)
        for row, places in zip(found, itertools.combinations(range(self.m), self.n)):
            row[list(places)] = True
        return found

    def check(self, layer: Layer) -> None:
        inputs = layer.weight.shape[0] if layer.transposed else layer.weight.shape[1]
        chunk = math.comb(self.m, self.n) * self.g * self.m
        if inputs % chunk:
            raise SpecError(
                f"layer {layer.site!r} has {inputs} inputs, which chunks of {chunk} ({self!r}) do not divide"
            )

    def keep_matrix(self, found: torch.Tensor, zeros: int) -> torch.Tensor:
        patterns = self.patterns
        scores = np.nan_to_num(found.double().numpy(), neginf=0.0, posinf=1e300)
        chunks = scores.reshape(-1, len(patterns) * self.g, self.m)
        gains = chunks @ patterns.T  # [chunks, groups, patterns]
        order = np.argsort(-gains.reshape(len(chunks), -1), axis=1, kind="stable")
        choice = np.full(chunks.shape[:2], -1)
        left = np.full((len(chunks), len(patterns)), self.g)
        lines = np.arange(len(chunks))
        for pair in order.T:  # one pair of every chunk at a time
            group, pattern = pair // len(patterns), pair % len(patterns)
            free = (choice[lines, group] < 0) & (left[lines, pattern] > 0)
            choice[lines[free], group[free]] = pattern[free]
            left[lines[free], pattern[free]] -= 1
        return torch.from_numpy(patterns[choice].reshape(found.shape))


@dataclass(frozen=True)
class Pooled(Granularity):
    """Units that are dropped whole, by the mean score of their entries, until the zeros are as near as whole units
    allow. Subclasses define `ids`."""

    def keep(self, layer: Layer, scores: torch.Tensor, zeros: int) -> torch.Tensor:
        self.check(layer)
        return self.spread(layer, ~self.lowest_units(*self.pool(layer, scores), zeros))

    def pool(self, layer: Layer, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(mean score, size) of every unit; units of zeros alone rank lowest."""
        found = layer.matrix(rank_tensor(scores, layer.weight))
        return self._means(self.ids(layer).reshape(-1), found.double().numpy().reshape(-1))

    @staticmethod
    def _means(ids: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes = np.bincount(ids)
        alive = np.bincount(ids, weights=found != -math.inf)
        with np.errstate(invalid="ignore"):
            means = np.bincount(ids, weights=np.where(found == -math.inf, 0.0, found)) / np.maximum(sizes, 1)
        means[alive == 0] = -math.inf
        return means, sizes

    @staticmethod
    def lowest_units(means: np.ndarray, sizes: np.ndarray, zeros: int) -> np.ndarray:
        order = np.argsort(means, kind="stable")
        reached = np.concatenate([[0], np.cumsum(sizes[order])])
        drop = np.zeros(len(means), bool)
        drop[order[: int(np.argmin(np.abs(reached - zeros)))]] = True
        return drop

    def spread(self, layer: Layer, units: np.ndarray) -> torch.Tensor:
        """Values of units as values of entries, shaped like the weight."""
        return layer.from_matrix(torch.from_numpy(units[self.ids(layer)])).to(layer.weight.device)


@dataclass(frozen=True)
class Block(Pooled):
    """Aligned blocks of r outputs x c inputs; Block(1, 16) and Block(16, 1) are runs along a row and along a column.
    Blocks at the edges may be smaller."""

    r: int
    c: int

    def __post_init__(self) -> None:
        if min(self.r, self.c) < 1:
            raise SpecError(f"Block({self.r}, {self.c}): both sides are at least 1")

    @property
    def columns(self) -> int | None:
        return self.c

    def keep_matrix(self, found: torch.Tensor, zeros: int) -> torch.Tensor:
        ids = self._ids(*found.shape)
        units = self._means(ids.reshape(-1), found.double().numpy().reshape(-1))
        return torch.from_numpy(~self.lowest_units(*units, zeros)[ids])

    def ids(self, layer: Layer) -> np.ndarray:
        return self._ids(*layer.matrix(layer.weight).shape)

    def _ids(self, rows: int, cols: int) -> np.ndarray:
        across = -(-cols // self.c)
        found: np.ndarray = (np.arange(rows) // self.r)[:, None] * across + np.arange(cols) // self.c
        return found


@dataclass(frozen=True)
class Kernel(Pooled):
    """The kernel of one output and one input channel of a convolution."""

    def check(self, layer: Layer) -> None:
        if layer.weight.dim() < 3:
            raise SpecError(f"layer {layer.site!r} is no convolution and has no kernels; leave it out with where=")

    def ids(self, layer: Layer) -> np.ndarray:
        self.check(layer)
        outputs, inputs = layer.weight.shape[:2]
        offsets = layer.weight[0, 0].numel()
        return np.arange(outputs)[:, None] * inputs + np.tile(np.arange(inputs), offsets)[None, :]


@dataclass(frozen=True)
class Filter(Pooled):
    """All weights of one output: a row of a linear layer, a filter of a convolution."""

    def ids(self, layer: Layer) -> np.ndarray:
        shape = layer.matrix(layer.weight).shape
        return np.broadcast_to(np.arange(shape[0])[:, None], shape)


ELEMENT = Element()
ROW = Element("row")


def groups(owner: str, pattern: Format) -> GroupsOf:
    """The granularity of a pattern. Raises SpecError for a format that is none."""
    fields = pattern.fields()
    if pattern.name != "nm":
        raise SpecError(f"{owner}: {pattern.text()} is no pattern to prune to; valid: a sparsity, or NM(n, m)")
    return GroupsOf(fields["n"], fields["m"])
