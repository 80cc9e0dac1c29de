"""Choosing the lowest of many scores: zeros first, NaN last, ties by index. In numpy, on one thread: for layers of
common size that beats waking torch's pool for every step."""

from __future__ import annotations

import math

import numpy as np
import torch

from sparsec.formats import nonzero


def ranks(scores: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """Flat scores to be dropped from the lowest on; entries of `weight` that are zero already come first."""
    kind = torch.float64 if scores.dtype == torch.float64 else torch.float32
    found: np.ndarray = scores.detach().to("cpu", kind, copy=True).contiguous().numpy().reshape(-1)
    found[np.isnan(found)] = math.inf
    found[~nonzero(weight.detach()).reshape(-1)] = -math.inf
    return found


def rank_tensor(scores: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`ranks`, shaped like the weight."""
    return torch.from_numpy(ranks(scores, weight)).reshape(weight.shape)


def kth(found: np.ndarray, k: int) -> float:
    """The k-th lowest value, k >= 1. Reorders its argument."""
    found.partition(k - 1)
    return float(found[k - 1])


def lowest(found: np.ndarray, count: int) -> np.ndarray:
    """Flat bool of the `count` lowest of a flat array; ties go by index."""
    drop = np.zeros(found.size, bool)
    if count:
        threshold = kth(found.copy(), count)
        np.less(found, threshold, out=drop)
        equal = np.flatnonzero(found == threshold)
        drop[equal[: count - np.count_nonzero(drop)]] = True
    return drop


def lowest_of_rows(found: np.ndarray, count: int) -> np.ndarray:
    """[rows, cols] bool of the lowest of each row: `count` in all, spread so that rows differ by one at most."""
    rows = found.shape[0]
    ends = np.arange(rows + 1) * count // rows
    order = np.argsort(found, axis=1, kind="stable")
    drop = np.zeros(found.shape, bool)
    np.put_along_axis(drop, order, np.arange(found.shape[1]) < np.diff(ends)[:, None], axis=1)
    return drop
