"""Which elements of a tensor go together: labels that follow a graph, and the relations that operators put on them.

Every prunable index of a parameter is an *atom*. The value of a node carries an integer tensor of its own shape: the
atom that each element disappears with, 0 for elements that always stay. Operators that only move elements move the
labels; the others unite atoms, or block them with a reason. What is united at the end is one unit of a group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from sparsec.graph import owner

PRUNE, MOVE = "prune", "move"
"""What a block forbids: PRUNE removing units only (their number matters), MOVE also permuting them."""


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a node's tensor.

    `labels` is None when every element stays. Along the `wild` dimensions a fixed tensor repeats itself, so it may get
    any size there. `zero` says that pruned elements are exactly 0 once their unit's parameters are.
    """

    labels: torch.Tensor | None = None
    wild: frozenset[int] = frozenset()
    zero: bool = False


FIXED = Value()


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter, or a permutation of its dimensions: the atoms of each dimension, None where its size is 1."""

    name: str
    atoms: tuple[torch.Tensor | None, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Axis:
    """The atoms first .. first + size - 1 stand for the indices of one dimension of a parameter."""

    parameter: str
    tied: tuple[str, ...]
    dim: int
    first: int
    size: int


@dataclass(frozen=True, eq=False)
class Block:
    """Atoms that may not be pruned (or not even moved), why, and at which node."""

    atoms: np.ndarray[Any, Any]
    level: str
    reason: str


class Relations:
    """Atoms, the pairs of them that must go together, and the blocked ones."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.count = 1
        self.blocks: list[Block] = []
        self.windows: dict[int, None] = {}  # first atoms of axes that are positions in a convolution's window
        self.produced: dict[int, None] = {}  # first atoms of axes that are the outputs of a layer
        self._pairs: list[np.ndarray[Any, Any]] = []
        self.node: fx.Node | None = None

    def weight(self, name: str, tied: tuple[str, ...], shape: Sequence[int]) -> Weight:
        """New atoms for every dimension of a parameter that has more than one index."""
        atoms: list[torch.Tensor | None] = []
        for dim, size in enumerate(shape):
            if size < 2:
                atoms.append(None)
                continue
            atoms.append(torch.arange(self.count, self.count + size))
            self.axes.append(Axis(name, tied, dim, self.count, size))
            self.count += size
        return Weight(name, tuple(atoms), tuple(shape))

    def unify(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Elements at one position go together; those that meet an element that stays are blocked."""
        a, b = torch.broadcast_tensors(a, b)
        for dim in range(a.dim()):
            if a.stride(dim) == 0 and b.stride(dim) == 0:
                a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        pairs = np.stack([a.reshape(-1).numpy(), b.reshape(-1).numpy()])
        free = (pairs == 0).any(0)
        if free.any():
            self.block(torch.from_numpy(pairs[:, free].max(0)), MOVE, "is combined with elements that are fixed")
        pairs = pairs[:, ~free & (pairs[0] != pairs[1])]
        if pairs.size:
            self._pairs.append(np.unique(pairs, axis=1))

    def collapse(self, labels: torch.Tensor, dims: Iterable[int]) -> torch.Tensor:
        """Make the labels constant along `dims`: what differs there goes together."""
        for dim in dims:
            first = labels.narrow(dim, 0, 1).expand(labels.shape)
            self.unify(first, labels)
            labels = first
        return compress(labels)

    def carrier(self, labels: torch.Tensor) -> torch.Tensor:
        """Make the labels vary along the outermost dimension only."""
        dims = varying(labels)
        return self.collapse(labels, dims[1:]) if len(dims) > 1 else labels

    def block(self, labels: torch.Tensor | None, level: str, reason: str) -> None:
        """Forbid pruning (or moving) these atoms, because of the current node."""
        if labels is None:
            return
        atoms = np.unique(core(labels).numpy())
        atoms = atoms[atoms > 0]
        if atoms.size:
            self.blocks.append(Block(atoms, level, f"{reason} at {place(self.node)}" if self.node else reason))

    def units(self) -> np.ndarray[Any, Any]:
        """Atom -> the number of its unit; atom 0 is unit 0. Numbers follow the first atom of each unit."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(self._pairs, axis=1) if self._pairs else np.zeros((2, 0), dtype=np.int64)
        graph = coo_array((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1])), shape=(self.count,) * 2)
        found = connected_components(graph, directed=False)[1]
        _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))
        return order[inverse.reshape(-1)]  # type: ignore[no-any-return]

    def blocked(self, units: np.ndarray[Any, Any], level: str) -> dict[int, str]:
        """Unit -> why it may not be pruned (level PRUNE: for either reason) or moved (level MOVE)."""
        reasons: dict[int, str] = {}
        for block in self.blocks:
            if level == PRUNE or block.level == MOVE:
                for unit in np.unique(units[block.atoms]).tolist():
                    reasons.setdefault(unit, block.reason)
        return reasons


def compress(labels: torch.Tensor) -> torch.Tensor:
    """The same labels with stride 0 along every dimension in which they do not vary."""
    shape = labels.shape
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) != 0:
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first
        elif labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels.expand(shape)


def varying(labels: torch.Tensor) -> list[int]:
    """The dimensions along which compressed labels differ."""
    return [d for d in range(labels.dim()) if labels.shape[d] > 1 and labels.stride(d) != 0]


def core(labels: torch.Tensor) -> torch.Tensor:
    """The labels without repetition along dimensions of stride 0, flat."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels.reshape(-1)


def along(labels: torch.Tensor, dim: int) -> torch.Tensor:
    """The labels at index 0 of every other dimension."""
    for other in range(labels.dim()):
        if other != dim % labels.dim():
            labels = labels.narrow(other, 0, 1)
    return labels.reshape(-1)


def spread(labels: torch.Tensor, dim: int, shape: Sequence[int]) -> torch.Tensor:
    """Labels of one dimension, repeated over the others of `shape`."""
    view = [1] * len(shape)
    view[dim % len(shape)] = labels.numel()
    return labels.view(view).expand(tuple(shape))


_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def place(node: fx.Node) -> str:
    """Where a node comes from: its name, its module, and the line of the model's code."""
    path, kind = owner(node)
    parts = [f"node {node.name!r}"]
    if path or kind:
        parts.append(f"in {path or '<root>'} ({kind})")
    lines = _LINE.findall(node.meta.get("stack_trace") or "")
    own = [line for line in lines if "/torch/" not in line[0]] or lines
    if own:
        parts.append(f"{own[-1][0]}:{own[-1][1]}")
    return ", ".join(parts)
