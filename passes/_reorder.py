"""Which orders of rows and columns are worth timing for a weight without an evident structure."""

from __future__ import annotations

import numpy as np
import torch

from sparsec.codegen.kernel import Problem
from sparsec.driver import Context
from sparsec.formats import BSR, CSRGroups, Format, Permuted
from sparsec.formats._base import pattern
from sparsec.formats._order import NEAR, ORDERS, order_of
from sparsec.formats._pack import numpy_view

SAMPLE = 32  # rows whose nearest neighbours say whether clusters exist at all
FILL = 0.6  # of the positions of the blocks that a reordered weight stores, this share must be nonzero
BETTER = 1.3  # and it must be this many times what the blocks hold in the given order
BAND = 0.02  # above this density the graph of rows that share a column is as good as complete


def formats(weight: torch.Tensor, problem: Problem, ctx: Context) -> list[Format]:
    """Permuted formats to try beside the plain ones, few or none; the clock decides, as for any other.

    Clusters of like rows become blocks of rows (SMaT); a hidden band becomes square blocks along the diagonal.
    """
    if problem.op != "linear" or ctx.options.tune == "off" or min(weight.shape) < SAMPLE:
        return []
    bits = numpy_view(pattern(weight))
    if ctx.target.kind == "cuda":
        return [Permuted(BSR(16, 16))] if _clustered(bits) and _gains(bits, Permuted(BSR(16, 16))) else []
    found: list[Format] = []
    if _clustered(bits):
        found += [Permuted(BSR(r, 1)) for r in (16, 8, 4) if _gains(bits, Permuted(BSR(r, 1)))][:1]
        found.append(Permuted(CSRGroups()))
    if problem.density < BAND and _gains(bits, Permuted(BSR(16, 16), "rcm", "rcm")):
        found.append(Permuted(BSR(16, 16), "rcm", "rcm"))
    return found


def _clustered(bits: np.ndarray) -> bool:
    """Whether most of a sample of rows have another row near them."""
    dense = bits.astype(np.float32)
    picked = np.linspace(0, len(bits) - 1, SAMPLE).astype(np.int64)
    shared = dense[picked] @ dense.T
    length = dense.sum(axis=1)
    joint = length[picked][:, None] + length[None] - shared
    alike = np.where(joint > 0, shared / np.maximum(joint, 1), 0.0)
    alike[np.arange(SAMPLE), picked] = 0.0
    return float((alike.max(axis=1) > 1 - NEAR).mean()) >= 0.5


def _gains(bits: np.ndarray, wanted: Permuted) -> bool:
    block = wanted.format
    r, c = int(block.fields()["r"]), int(block.fields()["c"])
    rows = order_of(ORDERS[wanted.row_order], bits, c)
    cols = order_of(ORDERS[wanted.col_order], bits[rows].T, r)
    before, after = fill(bits, r, c), fill(bits[rows][:, cols], r, c)
    return after >= FILL and after >= BETTER * before


def fill(bits: np.ndarray, r: int, c: int) -> float:
    """Nonzeros over the positions of the r x c blocks that hold any."""
    tall = np.logical_or.reduceat(bits, np.arange(0, bits.shape[0], r), axis=0)
    blocks = int(np.logical_or.reduceat(tall, np.arange(0, bits.shape[1], c), axis=1).sum())
    return float(bits.sum()) / max(1, blocks * r * c)
