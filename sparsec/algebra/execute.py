"""Running the steps of a plan: views of operands, products of two tensors, and the result's shape."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsec.algebra.network import Leaf
from sparsec.algebra.operands import Operand, Shift, Sparse

Labels = tuple[int, ...]
CHUNK = 1 << 22
"""Most products that the gather form of a sparse contraction holds at once."""


@dataclass
class Coordinates:
    """A sparse tensor over atoms: coords (rank, nnz), values (nnz,), sizes per axis; compressed forms are kept."""

    coords: torch.Tensor
    values: torch.Tensor
    sizes: tuple[int, ...]
    forms: dict[Any, torch.Tensor] = field(default_factory=dict)

    def dense(self) -> torch.Tensor:
        made = torch.zeros(self.sizes, dtype=self.values.dtype)
        made[tuple(self.coords)] = self.values
        return made

    def linear(self, axes: Sequence[int]) -> torch.Tensor:
        """The position of every entry in the axes given, counted in C order."""
        made = torch.zeros_like(self.coords[0]) if len(self.coords) else torch.zeros(self.values.numel()).long()
        for axis in axes:
            made = made * self.sizes[axis] + self.coords[axis]
        return made

    def compressed(self, rows: tuple[int, ...], cols: tuple[int, ...]) -> torch.Tensor:
        """The CSR matrix with these axes as rows and columns, made once."""
        if (rows, cols) not in self.forms:
            shape = tuple(math.prod(self.sizes[a] for a in axes) for axes in (rows, cols))
            coo = torch.sparse_coo_tensor(torch.stack([self.linear(rows), self.linear(cols)]), self.values, shape,
                                          check_invariants=False)  # fmt: skip
            with warnings.catch_warnings():  # torch announces once per process that CSR is a beta feature
                warnings.simplefilter("ignore", UserWarning)
                self.forms[rows, cols] = coo.coalesce().to_sparse_csr()
        return self.forms[rows, cols]


Runtime = Any  # torch.Tensor, Coordinates or Shift


def read(operand: Operand, leaf: Leaf) -> Runtime:
    """The tensor of a leaf with one axis per atom; an axis of size 1 has none."""
    part = operand
    for position in leaf.path:
        part = part.parts[position]
    shape: list[int] = []
    flat = [a for axis in leaf.axes for a in axis]
    for axis, digits, size in zip(leaf.axes, leaf.digits, part.shape, strict=True):
        shape += [int(size)] if len(axis) == 1 else digits
    if leaf.kind == "shift":
        return part
    if leaf.kind == "sparse" and isinstance(part, Sparse):
        return _split(part, leaf, tuple(shape), flat)
    tensor = part.dense().reshape(shape)
    if len(leaf.indices) == len(flat):
        return tensor
    names = {a: chr(ord("a") + i) for i, a in enumerate(leaf.indices)}
    return torch.einsum(f"{''.join(names[a] for a in flat)}->{''.join(names.values())}", tensor)


def _split(part: Sparse, leaf: Leaf, shape: tuple[int, ...], flat: list[int]) -> Coordinates:
    """Coordinates per atom; entries off a diagonal that a repeated atom asks for are dropped."""
    table = part.__dict__.setdefault("_split", {})
    pattern = tuple(leaf.indices.index(a) for a in flat)
    if (shape, pattern) not in table:
        rows: list[torch.Tensor] = []
        for axis, atoms in enumerate(leaf.axes):
            digits: list[torch.Tensor] = []
            rest = part.coords[axis]
            start = sum(len(a) for a in leaf.axes[:axis])
            for size in reversed(shape[start : start + len(atoms)]):
                digits.append(rest % size)
                rest = rest // size
            rows += reversed(digits)
        keep = torch.ones_like(part.values, dtype=torch.bool)
        first: dict[int, int] = {}
        for position, which in enumerate(pattern):
            if which in first:
                keep &= rows[position] == rows[first[which]]
            first.setdefault(which, position)
        kept = [rows[first[i]][keep] for i in range(len(leaf.indices))]
        coords = torch.stack(kept) if kept else torch.zeros(0, int(keep.sum()), dtype=torch.long)
        table[shape, pattern] = Coordinates(coords, part.values[keep], tuple(shape[first[i]] for i in range(len(kept))))
    return table[shape, pattern]  # type: ignore[no-any-return]


def plain(value: Runtime) -> torch.Tensor:
    """A runtime value as a tensor."""
    return value if isinstance(value, torch.Tensor) else value.dense()  # type: ignore[no-any-return]


def reduce(value: Runtime, labels: Labels, result: Labels) -> torch.Tensor:
    """Sum the axes whose labels are not in `result`."""
    if isinstance(value, Coordinates):
        axes = [labels.index(a) for a in result]
        shape = tuple(value.sizes[a] for a in axes)
        made = torch.zeros(math.prod(shape), dtype=value.values.dtype)
        return made.index_add_(0, value.linear(axes), value.values).reshape(shape)
    dense = plain(value)
    kept = [a for a in labels if a in result]
    dims = [i for i, a in enumerate(labels) if a not in result]
    return dense.sum(dims).permute([kept.index(a) for a in result])


def contract(mode: str, a: Runtime, la: Labels, b: Runtime, lb: Labels, result: Labels) -> torch.Tensor:
    """The product of two values, summed over the labels that are not in `result`."""
    kind, _, side = mode.partition(" ")
    if side == "right":
        a, la, b, lb = b, lb, a, la
    if kind == "spmm":
        return _sparse(a, la, plain(b), lb, result)
    if kind == "fft":
        return _shift(a, la, plain(b), lb, result)
    return _dense(plain(a), la, plain(b), lb, result)


def _dense(a: torch.Tensor, la: Labels, b: torch.Tensor, lb: Labels, result: Labels) -> torch.Tensor:
    names = {atom: chr(ord("a") + i) for i, atom in enumerate(dict.fromkeys((*la, *lb)))}
    left, right, out = ("".join(names[x] for x in labels) for labels in (la, lb, result))
    if a.is_complex() != b.is_complex():  # a real matrix times pairs: half the work of a complex product
        wide = torch.promote_types(a.dtype, b.dtype)
        real = torch.float64 if wide is torch.complex128 else torch.float32
        if a.is_complex():
            pairs = torch.einsum(f"{left}Z,{right}->{out}Z", torch.view_as_real(a.to(wide).resolve_conj()), b.to(real))
        else:
            pairs = torch.einsum(f"{left},{right}Z->{out}Z", a.to(real), torch.view_as_real(b.to(wide).resolve_conj()))
        return torch.view_as_complex(pairs.contiguous())
    if a.dtype != b.dtype:
        wide = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(wide), b.to(wide)
    return torch.einsum(f"{left},{right}->{out}", a, b)


def _sparse(a: Runtime, la: Labels, b: torch.Tensor, lb: Labels, result: Labels) -> torch.Tensor:
    """Stored entries times rows of `b`: a CSR product, or gather and scatter when an index is kept that both have."""
    shared = tuple(x for x in la if x in lb)
    own = tuple(x for x in la if x in result)
    rest = tuple(x for x in lb if x not in la)
    where = [lb.index(x) for x in (*shared, *rest)]
    sizes = {**dict(zip(la, a.sizes)), **dict(zip(lb, b.shape))}
    wide = torch.promote_types(a.values.dtype, b.dtype)
    columns = b.permute(where).reshape(math.prod(sizes[x] for x in shared), -1).to(wide)
    if not set(shared) & set(result) and wide.is_floating_point and a.values.dtype is wide:
        matrix = a.compressed(tuple(la.index(x) for x in own), tuple(la.index(x) for x in shared))
        made = matrix @ columns
    else:
        made = _scattered(a, la, own, shared, columns, math.prod(sizes[x] for x in own))
    made = made.reshape([sizes[x] for x in (*own, *rest)])
    order = (*own, *rest)
    return made.permute([order.index(x) for x in result])  # type: ignore[no-any-return]


def _scattered(
    a: Coordinates, la: Labels, own: Labels, shared: Labels, columns: torch.Tensor, count: int
) -> torch.Tensor:
    source, target = (a.linear([la.index(x) for x in labels]) for labels in (shared, own))
    made = torch.zeros(count, columns.shape[1], dtype=columns.dtype)
    step = max(1, CHUNK // max(1, columns.shape[1]))
    for begin in range(0, int(a.values.numel()), step):
        part = slice(begin, begin + step)
        made.index_add_(0, target[part], columns[source[part]] * a.values[part, None].to(columns.dtype))
    return made


def _shift(a: Shift, la: Labels, b: torch.Tensor, lb: Labels, result: Labels) -> torch.Tensor:
    row, col = la
    transposed = row in lb
    inner, outer = (row, col) if transposed else (col, row)
    moved = b.movedim(lb.index(inner), -1)
    made = a.apply(moved, transposed)
    order = (*(x for x in lb if x != inner), outer)
    return made.permute([order.index(x) for x in result])


def assemble(
    value: torch.Tensor, labels: Labels, output: tuple[Labels, ...], free: Labels, sizes: dict[int, int]
) -> torch.Tensor:
    """The result as the caller wrote it: diagonals written into zeros, missing labels repeated, digits joined."""
    scale = math.prod(sizes[a] for a in free)
    if scale != 1:
        value = value * scale
    flat = tuple(a for axis in output for a in axis)
    distinct = tuple(dict.fromkeys(flat))
    missing = [a for a in distinct if a not in labels]
    if missing:
        value = value.reshape(*value.shape, *(1 for _ in missing))
        value = value.expand(*value.shape[: len(labels)], *(sizes[a] for a in missing))
        labels = (*labels, *missing)
    value = value.permute([labels.index(a) for a in distinct])
    if len(distinct) != len(flat):
        grid = {a: torch.arange(sizes[a]).reshape([-1 if b == a else 1 for b in distinct]) for a in distinct}
        made = torch.zeros([sizes[a] for a in flat], dtype=value.dtype)
        made[tuple(grid[a] for a in flat)] = value
        value = made
    return value.reshape([math.prod(sizes[a] for a in axis) for axis in output])
