"""Channels in a better order: rows with similar patterns side by side, so that blocks of them keep more magnitude."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsec.errors import PassError, SpecError
from sparsec.sparsifiers.structure_groups import Group, dependency_groups
from sparsec.sparsifiers.structure_shrink import Indices, difference, outputs, rebuild, tolerance

Score = Callable[[torch.Tensor], float]
"""From an (out, in) float64 matrix to a number that is larger the better its rows are ordered."""


@dataclass(frozen=True)
class KeptMagnitude:
    """The share of a matrix's magnitude in its strongest blocks of `block` consecutive rows by one column.

    `keep` is the fraction of blocks that stay. Rows left over at the end make a smaller block. This is the measure of
    SparseByteNN's rearrangement of channels.
    """

    block: int = 4
    keep: float = 0.5

    def __call__(self, matrix: torch.Tensor) -> float:
        sums = self.sums(matrix)
        total = float(sums.sum())
        count = max(1, round(self.keep * sums.numel()))
        return float(torch.topk(sums.reshape(-1), count, sorted=False).values.sum()) / total if total else 1.0

    def sums(self, matrix: torch.Tensor) -> torch.Tensor:
        """The magnitude of every block, (ceil(out / block), in)."""
        rows = matrix.abs()
        missing = -len(rows) % self.block
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
        return rows.reshape(-1, self.block, rows.shape[1]).sum(1)


def co_permute(
    model: nn.Module, example_inputs: Any, score: Score | None = None
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """A copy of `model` with channels reordered wherever that provably changes nothing, and the orders.

    Within each permutable group of `dependency_groups`, units change places in all their parameters at once, so that
    rows with similar patterns become neighbours. `score` judges one layer's (out, in) matrix, larger is better; the
    default is `KeptMagnitude(4, 0.5)`. An order is taken only if the mean score of the layers that produce the group
    rises and none of them falls. Blocks are as long as the score's `block` says, four where it says nothing. The orders
    are by group name: place i now holds the former unit `order[i]`.

    The copy is compared with the model on the example. Raises what `dependency_groups` raises, SpecError for a score
    that gives no finite number, PassError should the outputs differ.
    """
    if score is not None and not callable(score):
        raise SpecError(f"score must be a function of an (out, in) matrix, got {score!r}")
    judge: Score = score if score is not None else KeptMagnitude()
    groups = [g for g in dependency_groups(model, example_inputs) if g.permutable]
    matrices = _Matrices(model)
    orders = {g.name: order for g in groups if (order := _order(g, matrices, judge)) is not None}
    return permute(model, groups, orders), orders


def permute(model: nn.Module, groups: Sequence[Group], orders: dict[str, tuple[int, ...]]) -> nn.Module:
    """A copy of `model` in which place i of each named group holds its former unit `orders[name][i]`.

    Raises SpecError for unknown or fixed groups and for orders that are no permutation, PassError when the outputs on
    the analysed example change.
    """
    table = {g.name: g for g in groups}
    indices: Indices = {}
    sizes = {n: t.shape for n, t in [*model.named_parameters(), *model.named_buffers()]}
    slices = []
    for name, order in orders.items():
        group = table.get(name)
        if group is None or (order and not group.permutable) or sorted(order) != list(range(group.size)):
            state = "unknown" if group is None else group.fixed or f"has {group.size} units, which must each occur once"
            raise SpecError(f"cannot permute group {name!r}: {state}")
        for part in group.slices:
            index = indices.setdefault((part.parameter, part.dim), torch.arange(sizes[part.parameter][part.dim]))
            index[torch.tensor(part.indices)] = torch.tensor([part.indices[u] for u in order])
            slices.append(part)
    permuted = copy.deepcopy(model)
    rebuild(permuted, indices, slices)
    origin = next((g.origin for g in groups if g.origin is not None), None)
    if origin is not None and orders:
        want = outputs(copy.deepcopy(model), origin.example)
        off = difference(outputs(permuted, origin.example), want)
        if not off <= tolerance(want):
            raise PassError(f"the permuted model differs by {off:.2g} of its largest value; groups {', '.join(orders)}")
    return permuted


# The matrices that a group's units are rows of


class _Matrices:
    """The weights of linear and convolutional layers as (out, in) matrices, by parameter and output dimension."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[tuple[str, int], torch.Tensor] = {}
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter) or weight.dim() < 2:
                continue
            turned = type(module).__name__ == "Conv1D" or getattr(module, "transposed", False)
            rows = weight.detach().to("cpu", torch.float64)
            rows = rows.movedim(1, 0) if turned else rows
            self.found[f"{path}.weight" if path else "weight", int(turned)] = rows.reshape(len(rows), -1)

    def of(self, group: Group) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(matrix, rows of each unit as (units, k)) for every layer whose outputs the group's units are."""
        return [
            (self.found[s.parameter, s.dim], torch.tensor(s.indices))
            for s in group.slices
            if (s.parameter, s.dim) in self.found
        ]


def _order(group: Group, matrices: _Matrices, score: Score) -> tuple[int, ...] | None:
    """The best order found, None when none is better than the present one."""
    layers = matrices.of(group)
    if not layers:
        return None
    start = _scores(layers, list(range(group.size)), score)
    block = getattr(score, "block", 4)
    block = block if type(block) is int and block > 0 else 4
    best: tuple[float, list[int]] | None = None
    for gram in (_gram(layers, _magnitudes), _gram(layers, _patterns)):
        order = _swapped(gram, _clustered(gram, block), block)
        gain = _gain(_scores(layers, order, score), start)
        if gain > 0 and (best is None or gain > best[0]):
            best = gain, order
    if best is None:
        best = _searched(layers, group.size, score, start)
    return None if best is None else tuple(best[1])


def _scores(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], order: Sequence[int], score: Score
) -> np.ndarray[Any, Any]:
    values = []
    for matrix, rows in layers:
        index = torch.arange(len(matrix))
        index[rows] = rows[torch.tensor(order)]
        values.append(float(score(matrix[index])))
    if not np.isfinite(values).all():
        raise SpecError(f"the score of a matrix must be a finite number, got {values}")
    return np.array(values)


def _gain(now: np.ndarray[Any, Any], start: np.ndarray[Any, Any]) -> float:
    """How much an order gains: nothing when one of the layers loses."""
    return float((now - start).mean()) if bool((now >= start).all()) else 0.0


# Finding an order. With the Gram matrix G of the units' rows, the squared norm of a block's sum is the sum of G inside
# it, so that strong blocks are clusters of G.


def _magnitudes(rows: torch.Tensor) -> torch.Tensor:
    return rows.abs()


def _patterns(rows: torch.Tensor) -> torch.Tensor:
    """Which half of its entries each row would keep, normalised: products then order pairs as Jaccard does."""
    sizes = rows.abs()
    kept = (sizes >= sizes.median(1, keepdim=True).values) & (sizes > 0)
    return kept.double() / kept.sum(1, keepdim=True).clamp(min=1).sqrt()


def _gram(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], features: Callable[..., torch.Tensor]
) -> np.ndarray[Any, Any]:
    total = np.zeros((len(layers[0][1]),) * 2)
    for matrix, rows in layers:
        unit = features(matrix[rows].reshape(len(rows), -1))
        gram = unit @ unit.t()
        total += (gram / gram.diagonal().sum().clamp(min=1e-300)).numpy()
    return total


def _clustered(gram: np.ndarray[Any, Any], block: int) -> list[int]:
    """Greedy blocks: the strongest unit that is left, then those that share most with the block so far."""
    left = np.ones(len(gram), dtype=bool)
    order: list[int] = []
    while left.any():
        first = int(np.argmax(np.where(left, np.diag(gram), -np.inf)))
        shared = gram[first].copy()
        order.append(first)
        left[first] = False
        for _ in range(min(block - 1, int(left.sum()))):
            unit = int(np.argmax(np.where(left, shared, -np.inf)))
            shared += gram[unit]
            order.append(unit)
            left[unit] = False
    return order


def _swapped(gram: np.ndarray[Any, Any], order: list[int], block: int, rounds: int = 20) -> list[int]:
    """Swap the pairs of units that gain most, while some gain: gains from one product, exact for disjoint blocks."""
    count = len(order)
    if count > 1024:  # the table of all pairs would cost more than the greedy blocks leave to gain
        return order
    places = np.arange(count) // block
    member = (places[:, None] == np.arange(places[-1] + 1)).astype(float)
    now = np.array(order)
    for _ in range(rounds):
        arranged = gram[np.ix_(now, now)]
        inside = arranged @ member  # what each unit shares with each block
        moved = inside[:, places] + (np.diag(arranged) - inside[np.arange(count), places])[:, None]
        gains = moved + moved.T - 2 * arranged
        gains[places[:, None] == places[None, :]] = 0
        partner = gains.argmax(1)
        gain = gains[np.arange(count), partner]
        touched = np.zeros(places[-1] + 1, dtype=bool)
        for first in np.argsort(-gain, kind="stable"):
            second = partner[first]
            if gain[first] <= 1e-12 * np.trace(arranged) or touched[places[first]] or touched[places[second]]:
                continue
            now[[first, second]] = now[[second, first]]
            touched[[places[first], places[second]]] = True
        if not touched.any():
            break
    return [int(u) for u in now]


def _searched(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], size: int, score: Score, start: np.ndarray[Any, Any]
) -> tuple[float, list[int]] | None:
    """Swaps of random pairs, kept while no layer falls: for groups whose layers want different orders."""
    rng = np.random.default_rng(0)
    order, gain = list(range(size)), 0.0
    for _ in range(200):
        first, second = (int(u) for u in rng.integers(size, size=2))
        tried = order.copy()
        tried[first], tried[second] = tried[second], tried[first]
        found = _gain(_scores(layers, tried, score), start)
        if found > gain:
            order, gain = tried, found
    return (gain, order) if gain > 0 else None
