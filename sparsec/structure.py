"""Which structure a weight really has. A structure is claimed only if every entry obeys it; NaN counts as nonzero.

Every test starts with a cheap necessary condition on a few rows, so that an unstructured weight costs one sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from sparsec.formats import pattern
from sparsec.graph import Structure

MAX_M = 32  # largest n:m group that is looked for
MAX_BLOCK = 64  # largest block side that is claimed
MIN_FILL = 0.85  # n:m is claimed when its slots are at least this full: a random pattern obeys wide, useless n:m too
STRAY = 0.1  # most zeros that may lie inside occupied blocks, where some values happen to be zero
_SAMPLE = 64  # rows of the cheap necessary conditions
_LOOSE = ((32, 32), (16, 16), (8, 8), (4, 4), (32, 1), (1, 32), (16, 1), (1, 16), (8, 1), (1, 8), (4, 1), (1, 4))


def detect(dense: torch.Tensor, kernel: int = 1) -> tuple[Structure, ...]:
    """The structures of a 2-D (out, in) weight, the most specific first; `dense` alone when no entry is zero.

    `kernel` is the number of offsets of a convolution whose (out, in / groups, *kernel) weight was flattened in C
    order: n:m groups run along its input channels at a fixed offset.

    nm (n, m): at most n nonzeros in each aligned group of m inputs, and the slots are at least 85 % full; the tightest.
    block (r, c): aligned r x c blocks are full or empty, at most 64 on a side. Blocks with accidental zeros count when
    each is three quarters full and nine zeros in ten lie in empty blocks.
    fan_in (k,): each row has k nonzeros or none. banded (l, u): -l <= column - row <= u, in half of the columns or
    fewer. block_diagonal (r, c): equal diagonal blocks, or (r1, c1, r2, c2, ...) unequal ones. zero_rows (count,),
    zero_cols (count,): rows or columns without a nonzero. unstructured: has zeros.
    """
    return measure(dense, kernel)[1]


def measure(dense: torch.Tensor, kernel: int = 1) -> tuple[int, tuple[Structure, ...]]:
    """The nonzeros of a weight, and `detect` of it."""
    mask: np.ndarray = pattern(dense).cpu().numpy()
    per_row = np.count_nonzero(mask, axis=1) if mask.size else np.zeros(0, np.int64)
    nnz = int(per_row.sum())
    if nnz == mask.size:
        return nnz, (Structure("dense"),)
    if nnz == 0:
        rows, cols = mask.shape
        return 0, (Structure("zero_rows", (rows,)), Structure("zero_cols", (cols,)), Structure("unstructured"))
    return nnz, tuple(_structures(mask, per_row, nnz, kernel))


def _structures(mask: np.ndarray, per_row: np.ndarray, nnz: int, kernel: int) -> Iterator[Structure]:
    if block := _block(mask, nnz):
        yield Structure("block", block)
    if nm := _nm(mask, nnz, kernel):
        yield Structure("nm", nm)
    used = per_row[per_row > 0]
    if used[0] < mask.shape[1] and (used == used[0]).all():
        yield Structure("fan_in", (int(used[0]),))
    first, last = _extent(mask, per_row)
    if diagonal := _block_diagonal(first, last, mask.shape[1]):
        yield Structure("block_diagonal", diagonal)
    if band := _band(first, last, mask.shape[1]):
        yield Structure("banded", band)
    if empty := int((per_row == 0).sum()):
        yield Structure("zero_rows", (empty,))
    if empty := _zero_cols(mask):
        yield Structure("zero_cols", (empty,))
    yield Structure("unstructured")


def _block(mask: np.ndarray, nnz: int) -> tuple[int, int] | None:
    """The largest blocks that are full or empty: patterns change between rows (columns) at multiples of r (c) only."""
    rows, cols = mask.shape
    c = _period(mask[:_SAMPLE].T)
    if c != 1:
        c = math.gcd(c, _period(mask.T))
    r = _period(mask[:, :_SAMPLE])
    if r != 1:
        r = math.gcd(r, _period(mask))
    found = (_side(r, rows), _side(c, cols))
    return found if found != (1, 1) else _loose_block(mask, nnz)


def _period(mask: np.ndarray) -> int:
    """The greatest common divisor of the positions where a row differs from the one before it; 0 if none does."""
    if mask.shape[0] < 2:
        return 0
    changes = np.flatnonzero((mask[1:] != mask[:-1]).any(axis=1)) + 1
    return int(np.gcd.reduce(changes)) if changes.size else 0


def _side(period: int, size: int) -> int:
    """The block side to report for a period: itself up to the limit, else its largest divisor, powers of two first."""
    period = period or size
    if period <= MAX_BLOCK:
        return period
    power = math.gcd(period, MAX_BLOCK)
    if power >= 8:
        return power
    return max(d for d in range(1, MAX_BLOCK + 1) if period % d == 0)


def _loose_block(mask: np.ndarray, nnz: int) -> tuple[int, int] | None:
    """Blocks that are three quarters full or empty, for weights in which some stored values happen to be zero."""
    rows, cols = mask.shape
    if nnz > 0.9 * mask.size:
        return None
    for r, c in _LOOSE:
        if rows % r or cols % c or (rows // r) * (cols // c) < 4:
            continue
        if not _mostly_full(mask[: max(r, 16)], r, c):
            continue
        counts = _block_counts(mask, r, c)
        occupied = counts[counts > 0]
        inside = occupied.size * r * c - nnz
        if occupied.size < counts.size and occupied.min() * 4 >= r * c * 3 and inside <= STRAY * (mask.size - nnz):
            return r, c
    return None


def _mostly_full(mask: np.ndarray, r: int, c: int) -> bool:
    counts = _block_counts(mask[: mask.shape[0] // r * r], r, c)
    return bool(((counts == 0) | (counts * 4 >= r * c * 3)).all())


def _block_counts(mask: np.ndarray, r: int, c: int) -> np.ndarray:
    rows, cols = mask.shape
    columns = mask.reshape(rows // r, r, cols).sum(axis=1, dtype=np.uint8)
    counts: np.ndarray = columns.reshape(rows // r, cols // c, c).sum(axis=2, dtype=np.int32)
    return counts


def _nm(mask: np.ndarray, nnz: int, kernel: int) -> tuple[int, int] | None:
    """The fullest (n, m) that every group obeys, the smallest m among equals."""
    rows, cols = mask.shape
    inputs = cols // kernel
    best: tuple[float, tuple[int, int]] | None = None
    for m in range(2, min(MAX_M, inputs) + 1):
        if inputs % m:
            continue
        limit = nnz / mask.size * m / max(MIN_FILL, best[0] * 1.001 if best else 0.0)  # a larger n is of no use
        n = 0  # a few rows refute most claims
        for first, last in zip((0, 4, _SAMPLE), (4, _SAMPLE, rows), strict=True):
            if first < rows and n <= limit:
                n = max(n, _largest_group(mask[first:last], m, kernel))
        if n < m and n <= limit:
            best = (nnz / mask.size * m / n, (n, m))
    return best[1] if best else None


def _largest_group(mask: np.ndarray, m: int, kernel: int) -> int:
    rows, cols = mask.shape
    grouped = mask.reshape(rows, cols // (m * kernel), m, kernel)
    return int(grouped.sum(axis=2, dtype=np.uint8).max(initial=0))


def _extent(mask: np.ndarray, per_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last nonzero column of every row; an empty row has first = columns and last = -1."""
    cols = mask.shape[1]
    first = np.where(per_row > 0, mask.argmax(axis=1), cols)
    last = np.where(per_row > 0, cols - 1 - mask[:, ::-1].argmax(axis=1), -1)
    return first, last


def _band(first: np.ndarray, last: np.ndarray, cols: int) -> tuple[int, int] | None:
    row = np.flatnonzero(last >= 0)
    lower, upper = max(0, int((row - first[row]).max())), max(0, int((last[row] - row).max()))
    return (lower, upper) if 2 * (lower + upper + 1) <= cols else None


def _block_diagonal(first: np.ndarray, last: np.ndarray, cols: int) -> tuple[int, ...] | None:
    """Equal diagonal blocks, as many as there are; otherwise the unequal blocks that cover every nonzero."""
    rows = first.size
    row = np.arange(rows)
    common = math.gcd(rows, cols)
    for count in (d for d in range(common, 1, -1) if common % d == 0):
        r, c = rows // count, cols // count
        block = row // r
        if ((first >= block * c) & (last < (block + 1) * c)).all():
            return r, c
    return _unequal_blocks(first, last, cols)


def _unequal_blocks(first: np.ndarray, last: np.ndarray, cols: int) -> tuple[int, ...] | None:
    """Cut before row i where everything above ends left of everything from i on, with nonzeros on both sides."""
    reach = np.maximum.accumulate(last)
    begin = np.minimum.accumulate(first[::-1])[::-1]
    cuts = np.flatnonzero((reach[:-1] >= 0) & (begin[1:] < cols) & (reach[:-1] < begin[1:]) & (last[1:] >= 0)) + 1
    if not 1 <= cuts.size < MAX_BLOCK:
        return None
    top = [0, *cuts.tolist(), first.size]
    left = [0, *begin[cuts].tolist(), cols]
    sizes = [(top[i + 1] - top[i], left[i + 1] - left[i]) for i in range(len(top) - 1)]
    return tuple(side for size in sizes for side in size)


def _zero_cols(mask: np.ndarray) -> int:
    used = mask[:_SAMPLE].any(axis=0)
    for start in range(_SAMPLE, mask.shape[0], 4 * _SAMPLE):
        if used.all():
            return 0
        used |= mask[start : start + 4 * _SAMPLE].any(axis=0)
    return int(used.size - np.count_nonzero(used))
