"""What one step of a plan costs, and in which way it is best run.

A real multiply or add is one FLOP; complex numbers count 6 for a product of two, 2 for a product with a real number and
2 for an addition. The sizes may be sympy symbols: modes are then chosen at a sample and only counted symbolically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.algebra.equation import Size
from sparsec.algebra.network import Leaf, atoms_of


@dataclass(frozen=True)
class Value:
    """A tensor of a plan: the mask of its atoms, whether it is complex, and the leaf it is read from, if it is one."""

    mask: int
    complex: bool = False
    leaf: Leaf | None = None


class Sizes:
    """Sizes of atoms, and products over masks of them."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.of = tuple(sizes)
        self._products: dict[int, Any] = {0: 1}

    def __call__(self, mask: int) -> Any:
        """Number of entries of a tensor with the atoms of `mask`."""
        found = self._products.get(mask)
        if found is None:
            low = mask & -mask
            found = self(mask ^ low) * self.of[low.bit_length() - 1]
            self._products[mask] = found
        return found


def arithmetic(first: bool, second: bool) -> tuple[int, int]:
    """FLOPs of (a product, an addition of products) of numbers that are complex or not."""
    if first and second:
        return 6, 2
    return (2, 2) if first or second else (1, 1)


def modes(a: Value, b: Value, keep: int, sizes: Sizes) -> dict[str, Any]:
    """Mode -> FLOPs of contracting two values so that the atoms of `keep` stay.

    `gemm` multiplies and sums; `scale` only multiplies; `spmm` visits the stored entries of one sparse side; `fft`
    applies a shift-invariant matrix.
    """
    union = a.mask | b.mask
    times, plus = arithmetic(a.complex, b.complex)
    summed = union & ~keep
    per = times + (plus if summed else 0)
    found: dict[str, Any] = {"gemm" if summed else "scale": sizes(union) * per}
    for side, other, name in ((a, b, "left"), (b, a, "right")):
        leaf = side.leaf
        if leaf is None:
            continue
        if leaf.kind == "sparse" and leaf.nnz is not None:
            found[f"spmm {name}"] = leaf.nnz * sizes(other.mask & ~side.mask) * per
        elif leaf.kind == "shift" and _applies(leaf, other.mask, keep):
            vectors = sizes(other.mask & ~side.mask) * (2 if leaf.complex or other.complex else 1)
            found[f"fft {name}"] = vectors * leaf.shift_flops[0] + leaf.shift_flops[1]
    return found


def _applies(leaf: Leaf, other: int, keep: int) -> bool:
    """A matrix is applied when exactly one of its indices is on the other side, and that one is summed."""
    first, second = (1 << a for a in leaf.indices)
    shared = leaf.mask & other
    return shared in (first, second) and not shared & keep and bool(leaf.mask & ~shared & keep)


WEIGHT = {"spmm": 4, "fft": 4}
"""How much longer a FLOP of a mode takes than one of a matrix product; orders are chosen by weighted FLOPs."""


def pair(a: Value, b: Value, keep: int, sizes: Sizes) -> tuple[Any, str]:
    """(weighted FLOPs, mode) of the cheapest way; the first of `modes` on a tie."""
    found = {m: flops * WEIGHT.get(m.partition(" ")[0], 1) for m, flops in modes(a, b, keep, sizes).items()}
    mode = min(found, key=found.__getitem__)
    return found[mode], mode


def reduce_flops(value: Value, keep: int, sizes: Sizes) -> Any:
    """FLOPs of summing the atoms of one value that are not in `keep`."""
    if not value.mask & ~keep:
        return 0
    entries = sizes(value.mask)
    if value.leaf is not None and value.leaf.kind == "sparse" and value.leaf.nnz is not None:
        entries = value.leaf.nnz
    return entries * (2 if value.complex else 1)


def naive_flops(masks: Sequence[int], complexes: Sequence[bool], keep: int, sizes: Sizes) -> Any:
    """FLOPs of one loop nest over every atom: a product of all operands and a sum, as numpy counts it."""
    union = 0
    for mask in masks:
        union |= mask
    times, plus = arithmetic(any(complexes), any(complexes))
    return sizes(union) * (times * (len(masks) - 1) + (plus if union & ~keep else 0))


def spelled(mask: int, names: Sequence[str]) -> str:
    """The labels of a mask, for people."""
    return " ".join(names[a] for a in atoms_of(mask)) or "-"
