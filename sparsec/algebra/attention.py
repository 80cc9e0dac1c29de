"""Attention on a grid against the means of its rows and columns: another function than full attention, much cheaper."""

from __future__ import annotations

import torch

from sparsec.errors import InputError


def grid_means(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """x (..., height width, c) to (..., height + width, c): the mean of every row of the grid, then of every column."""
    if height < 1 or width < 1 or x.dim() < 2 or x.shape[-2] != height * width:
        raise InputError(
            f"a grid of {height} x {width} needs x of shape (..., {height * width}, features), got {tuple(x.shape)}"
        )
    grid = x.unflatten(-2, (height, width))
    return torch.cat([grid.mean(-2), grid.mean(-3)], dim=-2)


def kronecker_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, height: int, width: int, queries: bool = True
) -> torch.Tensor:
    """Attention whose keys and values are the means of the rows and columns of a grid (Gao, Wang and Ji, 2020).

    q, k, v (..., height width, features) give (..., height width, features of v). With `queries` every position asks
    (KAO_KV): height + width keys instead of height width, so the cost falls by height width / (height + width).
    Without, the means ask too (KAO_QKV), and position (i, j) gets the sum of what row i and column j received.
    Projections before it may act on all positions or on the means, which commute. This replaces a layer before
    training; it is no rewrite of a trained one, and no pass does it.
    """
    if not q.shape[:-1] == k.shape[:-1] == v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise InputError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree but for v's features"
        )
    keys, values = grid_means(k, height, width), grid_means(v, height, width)
    if queries:
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    found = torch.nn.functional.scaled_dot_product_attention(grid_means(q, height, width), keys, values)
    rows, columns = found.split([height, width], dim=-2)
    summed: torch.Tensor = rows[..., :, None, :] + columns[..., None, :, :]
    return summed.flatten(-3, -2)


def attention_flops(height: int, width: int, features: int, *, full: bool) -> int:
    """Of the two products of attention on a grid: every position against every other, or against the means."""
    positions = height * width
    return 2 * 2 * positions * features * (positions if full else height + width)
