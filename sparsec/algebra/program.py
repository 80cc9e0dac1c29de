"""Turning trees into steps, with every sub-product that occurs twice computed once.

Two sub-networks are the same when a renaming of indices makes them equal; symmetric matrices may be turned around. The
key is the smallest encoding over the renamings that colour refinement leaves open.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsec.algebra import cost, order
from sparsec.algebra.cost import Sizes, Value
from sparsec.algebra.network import Leaf, Network, atoms_of, mask_of

RENAMINGS = 720
"""Most renamings that are tried for a key; beyond, equal products may be computed twice."""


@dataclass(frozen=True)
class Step:
    """One contraction: source values with the labels of their axes, and the labels of the result's."""

    mode: str  # sum | gemm | scale | spmm left | spmm right | fft left | fft right
    sources: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    result: tuple[int, ...]
    flops: Any
    entries: Any
    text: str  # "b i, i r -> b r"


@dataclass(frozen=True)
class Slot:
    """A value in the terms of one network: its number and the atoms of its axes."""

    number: int
    labels: tuple[int, ...]
    value: Value


Key = tuple[Any, ...]


class Canon:
    """Keys of the sub-networks of one network. `identities` gives every leaf the number that equal leaves share."""

    def __init__(self, network: Network, identities: Sequence[int]) -> None:
        self.network = network
        self.identities = tuple(identities)
        self._memo: dict[int, tuple[Key, tuple[int, ...]]] = {}

    def key(self, subset: int) -> tuple[Key, tuple[int, ...]]:
        """(key, open atoms in canonical order) of the product of the leaves in `subset`."""
        if subset not in self._memo:
            self._memo[subset] = self._key(subset)
        return self._memo[subset]

    def kept(self, subset: int) -> int:
        """Atoms that the product of `subset` keeps."""
        inside, outside = 0, self.network.kept
        for position, leaf in enumerate(self.network.leaves):
            if subset >> position & 1:
                inside |= leaf.mask
            else:
                outside |= leaf.mask
        return inside & outside

    def _key(self, subset: int) -> tuple[Key, tuple[int, ...]]:
        chosen = [(self.identities[i], leaf) for i, leaf in enumerate(self.network.leaves) if subset >> i & 1]
        keep = self.kept(subset)
        atoms = sorted({a for _, leaf in chosen for a in leaf.indices})
        groups = _colours(atoms, chosen, keep)
        count = math.prod(math.factorial(len(g)) for g in groups)
        choices = itertools.product(*(itertools.permutations(g) if count <= RENAMINGS else (tuple(g),) for g in groups))
        best: tuple[Any, tuple[int, ...]] | None = None
        for choice in choices:
            place = {a: i for i, a in enumerate(itertools.chain(*choice))}
            code = tuple(sorted(_encoded(identity, leaf, place) for identity, leaf in chosen))
            if best is None or code < best[0]:
                best = code, tuple(place)
        code, names = best if best is not None else ((), ())
        opened = tuple(i for i, a in enumerate(names) if keep >> a & 1)
        return (code, opened), tuple(a for a in names if keep >> a & 1)


def _encoded(identity: int, leaf: Leaf, place: dict[int, int]) -> tuple[Any, ...]:
    places = tuple(place[a] for a in leaf.indices)
    return identity, tuple(sorted(places)) if leaf.symmetric else places


def _colours(atoms: list[int], chosen: Sequence[tuple[int, Leaf]], keep: int) -> list[list[int]]:
    """Atoms in groups that no invariant tells apart: openness, where they occur, and what their neighbours are."""
    colour: dict[int, Any] = {a: (keep >> a & 1,) for a in atoms}
    for _ in range(3):
        seen: dict[int, list[Any]] = {a: [] for a in atoms}
        for identity, leaf in chosen:
            around = tuple(colour[a] for a in leaf.indices)
            for axis, atom in enumerate(leaf.indices):
                entry = (identity, 0, tuple(sorted(around))) if leaf.symmetric else (identity, axis, around)
                seen[atom].append(entry)
        raw = {a: (colour[a], tuple(sorted(seen[a]))) for a in atoms}
        ranks = {c: (i,) for i, c in enumerate(sorted(set(raw.values())))}
        colour = {a: ranks[raw[a]] for a in atoms}
    return [[a for a in atoms if colour[a] == c] for c in sorted(set(colour.values()))]


@dataclass
class Program:
    """Steps under construction. `sample` sizes choose, `sizes` count; they differ when sizes are symbols."""

    reads: list[Leaf] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _made: dict[Key, tuple[Any, tuple[int, ...], bool]] = field(default_factory=dict)  # key -> step, ranks, complex
    _read: dict[Any, int] = field(default_factory=dict)

    @property
    def flops(self) -> Any:
        return sum(step.flops for step in self.steps)

    def knows(self, canon: Canon, subset: int) -> bool:
        """Whether the product of `subset` is computed already."""
        return canon.key(subset)[0] in self._made

    def emit(self, canon: Canon, tree: order.Tree, sample: Sizes, sizes: Sizes) -> Slot:
        """Add the steps of a tree and return the value of the whole network."""
        return self._node(canon, tree, sample, sizes)[0]

    def emit_subset(self, canon: Canon, tree: order.Tree, sizes: Sizes) -> None:
        """Add the steps of a tree over some of the leaves, so that `knows` finds its products."""
        self._node(canon, tree, sizes, sizes)

    def _node(self, canon: Canon, tree: order.Tree, sample: Sizes, sizes: Sizes) -> tuple[Slot, int]:
        if isinstance(tree, int):
            return self._leaf(canon, tree, sizes), 1 << tree
        if isinstance(tree, order.Known):
            found = self._reuse(canon, tree.subset)
            if found is not None:
                return found, tree.subset
            return self._node(canon, self._order(canon, tree.subset, sample), sample, sizes)
        subset = subset_of(tree)
        found = self._reuse(canon, subset)
        if found is not None:
            return found, subset
        a, _ = self._node(canon, tree[0], sample, sizes)
        b, _ = self._node(canon, tree[1], sample, sizes)
        keep = canon.kept(subset)
        mode = cost.pair(a.value, b.value, keep, sample)[1]
        flops = cost.modes(a.value, b.value, keep, sizes)[mode]
        labels = _ordered(canon.network, keep, subset, (*a.labels, *b.labels))
        text = f"{_spell(canon, a.labels)}, {_spell(canon, b.labels)} -> {_spell(canon, labels)}"
        step = Step(mode, (a.number, b.number), (a.labels, b.labels), labels, flops, sizes(keep), text)
        return self._add(canon, subset, step, a.value.complex or b.value.complex), subset

    def _order(self, canon: Canon, subset: int, sample: Sizes) -> order.Tree:
        """A tree for a subset whose value was known when the order was found and is not any more."""
        members = atoms_of(subset)
        values = [start_value(canon, i) for i in members]
        found = order.optimal(values, canon.kept(subset), sample)
        return _renamed(found.tree if found is not None else 0, members)

    def _leaf(self, canon: Canon, position: int, sizes: Sizes) -> Slot:
        leaf = canon.network.leaves[position]
        identity = (canon.identities[position], leaf.symmetric)
        number = self._read.get(identity)
        if number is None:
            number = self._read[identity] = -len(self.reads) - 1  # reads come first; renumbered by `finish`
            self.reads.append(leaf)
        slot = Slot(number, leaf.indices, Value(leaf.mask, leaf.complex, leaf))
        keep = canon.kept(1 << position)
        if keep == leaf.mask:
            return slot
        found = self._reuse(canon, 1 << position)
        if found is not None:
            return found
        labels = _ordered(canon.network, keep, 1 << position, leaf.indices)
        flops = cost.reduce_flops(slot.value, keep, sizes)
        text = f"{_spell(canon, leaf.indices)} -> {_spell(canon, labels)}"
        step = Step("sum", (number,), (leaf.indices,), labels, flops, sizes(keep), text)
        return self._add(canon, 1 << position, step, leaf.complex)

    def _reuse(self, canon: Canon, subset: int) -> Slot | None:
        key, opened = canon.key(subset)
        if key not in self._made:
            return None
        number, ranks, is_complex = self._made[key]
        labels = tuple(opened[r] for r in ranks)
        return Slot(number, labels, Value(mask_of(labels), is_complex))

    def _add(self, canon: Canon, subset: int, step: Step, is_complex: bool) -> Slot:
        self.steps.append(step)
        number = len(self.steps) - 1
        key, opened = canon.key(subset)
        self._made[key] = number, tuple(opened.index(a) for a in step.result), is_complex
        return Slot(number, step.result, Value(mask_of(step.result), is_complex))

    def finish(self) -> tuple[tuple[Leaf, ...], tuple[Step, ...]]:
        """Reads and steps with values numbered from 0: the reads first, then the steps in order."""
        return tuple(self.reads), tuple(
            Step(s.mode, tuple(map(self.number, s.sources)), s.labels, s.result, s.flops, s.entries, s.text)
            for s in self.steps
        )

    def number(self, raw: int) -> int:
        """The final number of a value."""
        return -raw - 1 if raw < 0 else raw + len(self.reads)


def subset_of(tree: order.Tree) -> int:
    """The positions in a tree, as a mask."""
    if isinstance(tree, int):
        return 1 << tree
    if isinstance(tree, order.Known):
        return tree.subset
    return subset_of(tree[0]) | subset_of(tree[1])


def start_value(canon: Canon, position: int) -> Value:
    """A leaf as the search sees it: after the indices that only it has are summed."""
    leaf = canon.network.leaves[position]
    keep = canon.kept(1 << position)
    return Value(keep, leaf.complex, leaf if keep == leaf.mask else None)


def _renamed(tree: order.Tree, members: tuple[int, ...]) -> order.Tree:
    return members[tree] if isinstance(tree, int) else tuple(_renamed(t, members) for t in tree)


def _ordered(network: Network, keep: int, subset: int, labels: tuple[int, ...]) -> tuple[int, ...]:
    """Kept labels: in the order of the result for the last product, else in order of appearance."""
    kept = tuple(dict.fromkeys(a for a in labels if keep >> a & 1))
    if subset == (1 << len(network.leaves)) - 1:
        wanted = tuple(dict.fromkeys(a for axis in network.output for a in axis))
        return tuple(a for a in wanted if a in kept)
    return kept


def _spell(canon: Canon, labels: tuple[int, ...]) -> str:
    return " ".join(canon.network.names[a] for a in labels) or "1"
