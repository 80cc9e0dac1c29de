"""From an einsum over structured operands to a plain tensor network: labels split into atoms, deltas unified away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsec.algebra.equation import Equation, Size
from sparsec.algebra.operands import Dense, Operand, Shift, Sparse
from sparsec.errors import InputError


@dataclass(frozen=True)
class Leaf:
    """One tensor of the network: a part of an operand and the atoms of its axes.

    `kind` is dense, sparse, or shift (applied by FFT). `axes` has the atoms of every axis, an axis that a Kronecker
    product split has several; `indices` are the distinct atoms in order, repeated ones being a diagonal.
    """

    operand: int
    path: tuple[int, ...]
    kind: str
    axes: tuple[tuple[int, ...], ...]
    indices: tuple[int, ...]
    complex: bool = False
    symmetric: bool = False
    nnz: int | None = None
    shift_flops: tuple[int, int] = (0, 0)  # per real vector, and once
    digits: tuple[tuple[int, ...], ...] = ()  # sizes of the atoms of every split axis, () for a whole one

    @property
    def mask(self) -> int:
        return mask_of(self.indices)


@dataclass(frozen=True)
class Network:
    """Leaves over atoms. `output` has the atoms of every output label; `free` atoms are summed but on no leaf."""

    equation: Equation
    sizes: tuple[Size, ...]
    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    output: tuple[tuple[int, ...], ...]
    free: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    shapes: tuple[tuple[Size, ...], ...] = ()
    kinds: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Atoms of the result that some leaf has."""
        present = 0
        for leaf in self.leaves:
            present |= leaf.mask
        return mask_of(a for axis in self.output for a in axis) & present


def mask_of(atoms: Any) -> int:
    """A set of atoms as the bits of an int."""
    made = 0
    for atom in atoms:
        made |= 1 << atom
    return made


def atoms_of(mask: int) -> tuple[int, ...]:
    """The atoms of a mask, ascending."""
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


# A range is a contiguous group of digits of a label's mixed-radix value: (label, stride, extent).
Range = tuple[str, Any, Any]


@dataclass
class _Item:
    path: tuple[int, ...]
    part: Operand
    ranges: tuple[Range, ...]


@dataclass
class _Flat:
    """An operand taken apart: its tensors, and the pairs of ranges that are equal."""

    items: list[_Item] = field(default_factory=list)
    equal: list[tuple[Range, Range]] = field(default_factory=list)


def _flatten(part: Operand, path: tuple[int, ...], ranges: tuple[Range, ...], out: _Flat) -> None:
    if part.kind == "delta":
        out.equal += [(ranges[0], other) for other in ranges[1:]]
    elif part.kind == "diagonal":
        out.equal.append((ranges[0], ranges[1]))
        _flatten(part.parts[0], (*path, 0), ranges[:1], out)
    elif part.kind in ("kron", "khatri_rao"):
        strides = [r[1] for r in ranges]
        split = len(ranges) if part.kind == "kron" else 1
        for position in reversed(range(len(part.parts))):
            factor = part.parts[position]
            if not all(isinstance(s, int) for s in factor.shape[:split]):
                raise InputError(f"the factors of a {type(part).__name__} need sizes that are ints: {factor.shape}")
            inner = tuple((r[0], strides[k], factor.shape[k]) for k, r in enumerate(ranges[:split]))
            _flatten(factor, (*path, position), (*inner, *ranges[split:]), out)
            strides = [s * factor.shape[k] if k < split else s for k, s in enumerate(strides)]
    else:
        out.items.append(_Item(path, part, ranges))


def build(equation: Equation, operands: Sequence[Operand]) -> Network:
    """The network of an einsum. A product whose split of a label fits no other split of it is written out densely."""
    sizes = equation.sizes([op.shape for op in operands])
    flats: list[_Flat] = []
    notes: list[str] = []
    cuts: dict[str, set[Any]] = {label: {1, sizes[label]} for label in equation.labels}
    for position, (term, op) in enumerate(zip(equation.inputs, operands)):
        whole = tuple((label, 1, sizes[label]) for label in term)
        flat = _Flat()
        _flatten(op, (), whole, flat)
        tried = _refine(cuts, [*flats, flat])
        if tried is None:
            flat = _Flat([_Item((), op, whole)])
            notes.append(f"operand {position} ({type(op).__name__}) is written out: its factors cut a label across "
                         "the factors of another operand")  # fmt: skip
            tried = _refine(cuts, [*flats, flat])
        if tried is not None:
            cuts = tried
        flats.append(flat)
    return _assemble(equation, operands, sizes, cuts, flats, notes)


def _refine(cuts: dict[str, set[Any]], flats: list[_Flat]) -> dict[str, set[Any]] | None:
    """The cuts of every label (strides where a digit ends) with those of `flats`; None when they do not nest."""
    made = {label: set(found) for label, found in cuts.items()}
    for flat in flats:
        for label, stride, extent in _ranges(flat):
            made[label] |= {stride, stride * extent}
    changed = True
    while changed:
        changed = False
        for flat in flats:
            for first, second in flat.equal:
                for a, b in ((first, second), (second, first)):
                    moved = {c // a[1] * b[1] for c in made[a[0]] if _inside(c, a)}
                    if not moved <= made[b[0]]:
                        made[b[0]] |= moved
                        changed = True
    for found in made.values():
        if all(isinstance(c, int) for c in found):
            chain = sorted(found)
            if any(high % low for low, high in itertools.pairwise(chain) if low):
                return None
        elif len(found) > 2:
            return None
    return made


def _ranges(flat: _Flat) -> Iterator[Range]:
    for item in flat.items:
        yield from item.ranges
    for first, second in flat.equal:
        yield first
        yield second


def _inside(cut: Any, r: Range) -> bool:
    if not isinstance(cut, int) or not isinstance(r[2], int):
        return bool(cut == r[1] or cut == r[1] * r[2])
    return bool(r[1] <= cut <= r[1] * r[2] and cut % r[1] == 0)


def _assemble(
    equation: Equation,
    operands: Sequence[Operand],
    label_sizes: dict[str, Size],
    cuts: dict[str, set[Any]],
    flats: list[_Flat],
    notes: list[str],
) -> Network:
    sizes: list[Size] = []
    names: list[str] = []
    digits: dict[str, list[tuple[Any, int]]] = {}  # label -> (stride, atom), most significant digit first
    for label in equation.labels:
        chain = _chain(cuts[label], label_sizes[label])
        digits[label] = []
        for place, (low, high) in enumerate(reversed(list(itertools.pairwise(chain)))):
            digits[label].append((low, len(sizes)))
            names.append(label if len(chain) == 2 else f"{label}{place}")
            sizes.append(high // low if isinstance(high, int) else high)
    parent = list(range(len(sizes)))

    def find(atom: int) -> int:
        while parent[atom] != atom:
            atom = parent[atom]
        return atom

    def atoms(r: Range) -> tuple[int, ...]:
        label, stride, extent = r
        if extent == 1:
            return ()
        if not isinstance(extent, int):
            return tuple(find(a) for _, a in digits[label])
        return tuple(find(a) for low, a in digits[label] if stride <= low < stride * extent)

    for flat in flats:
        for first, second in flat.equal:
            for a, b in zip(atoms(first), atoms(second), strict=True):
                parent[max(find(a), find(b))] = min(find(a), find(b))
    leaves = []
    for position, flat in enumerate(flats):
        for item in sorted(flat.items, key=lambda i: i.path):
            axes = tuple(atoms(r) for r in item.ranges)
            split = tuple(tuple(sizes[a] for a in axis) if len(axis) > 1 else () for axis in axes)
            leaves.append(_leaf(position, item, axes, split, notes))
    output = tuple(atoms((label, 1, label_sizes[label])) for label in equation.output)
    used = {a for leaf in leaves for a in leaf.indices} | {a for axis in output for a in axis}
    everything = {find(a) for a in range(len(sizes))}
    return Network(
        equation, tuple(sizes), tuple(names), tuple(leaves), output, tuple(sorted(everything - used)), tuple(notes),
        tuple(op.shape for op in operands), tuple(type(op).__name__ for op in operands),
    )  # fmt: skip


def _chain(found: set[Any], size: Size) -> list[Any]:
    """Strides from 1 to the label's size; a label of size 1 has no digit, one of unknown size has one."""
    if all(isinstance(c, int) for c in found):
        return sorted(found)
    return [1, size]


def _leaf(
    position: int, item: _Item, axes: tuple[tuple[int, ...], ...], digits: tuple[tuple[int, ...], ...], notes: list[str]
) -> Leaf:
    part = item.part
    indices = tuple(dict.fromkeys(a for axis in axes for a in axis))
    kind, flops, nnz = "dense", (0, 0), None
    if isinstance(part, Sparse):
        kind, nnz = "sparse", part.nnz
    elif isinstance(part, Shift):
        if len(indices) == 2 and all(len(axis) == 1 for axis in axes):
            kind, flops = "shift", (part.flops(), part.setup_flops())
        else:
            name = type(part).__name__
            notes.append(f"the {name} of operand {position} is written out: its index is split or shared")
    symmetric = part.symmetric and isinstance(part, Dense)
    return Leaf(position, item.path, kind, axes, indices, part.dtype.is_complex, symmetric, nnz, flops, digits)
