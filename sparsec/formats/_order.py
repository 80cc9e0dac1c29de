"""Orders of rows that bring like patterns together; deterministic functions of the pattern alone."""

from __future__ import annotations

import numpy as np

ORDERS = ("none", "jaccard", "rcm", "length")
"""Names by number, as format texts spell them."""

NEAR = 0.5  # Jaccard distance below which a row joins a cluster, as in SMaT


def order_of(name: str, bits: np.ndarray, width: int = 1) -> np.ndarray:
    """The int64 order of the rows of a bool pattern: entry i is the row that comes i-th.

    `width` columns are looked at together, since a format of blocks stores them together.
    """
    rows, cols = bits.shape
    if name == "none" or rows < 2 or cols == 0:
        return np.arange(rows)
    starts = np.arange(0, cols, width)
    seen = np.logical_or.reduceat(bits, starts, axis=1) if width > 1 else bits
    if name == "length":
        return np.argsort(-seen.sum(axis=1), kind="stable")
    return _cuthill_mckee(seen) if name == "rcm" else _jaccard(seen)


def _jaccard(seen: np.ndarray) -> np.ndarray:
    """Greedy clusters: the first free row, then all that are near to the union so far, nearest first, until none is.

    Okanovic et al., High Performance Unstructured SpMM Computation Using Tensor Cores (SC 2024), section on reordering.
    """
    dense = np.ascontiguousarray(seen, np.float32)
    length = dense.sum(axis=1)
    free = np.ones(len(dense), bool)
    order: list[int] = []
    for seed in range(len(dense)):
        if not free[seed]:
            continue
        free[seed] = False
        order.append(seed)
        union = dense[seed].copy()
        while free.any():
            left = np.flatnonzero(free)
            shared = dense[left] @ union
            joint = length[left] + union.sum() - shared
            distance = 1 - np.where(joint > 0, shared / np.maximum(joint, 1), 1.0)
            near = distance < NEAR
            if not near.any():
                break
            joined = left[near][np.argsort(distance[near], kind="stable")]
            order.extend(joined.tolist())
            free[joined] = False
            union = np.maximum(union, dense[joined].max(axis=0))
    return np.array(order, np.int64)


def _cuthill_mckee(seen: np.ndarray) -> np.ndarray:
    """Reverse Cuthill-McKee of the graph in which rows that share a column are neighbours."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    pattern = csr_matrix(seen.astype(np.int32))
    return np.asarray(reverse_cuthill_mckee((pattern @ pattern.T).tocsr(), symmetric_mode=True), np.int64)
