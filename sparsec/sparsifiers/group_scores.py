"""Scores of groups that are removed together, from all their slices: what HESSO ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsec.errors import InputError

PARTS = ("magnitude", "average", "cosine", "taylor1", "taylor2")


def hesso_scores(
    groups: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], weights: Sequence[float] = (0.2,) * 5
) -> torch.Tensor:
    """Importance of groups (Chen et al., HESSO, 2024): the weighted mean of five scores, each scaled to [0, 1] over the
    groups: ||w||, ||w|| / sqrt(entries), 1 - cos(w, -g), |w . g|, and |w . g + (w . g)^2 / 2|, g being the gradient.

    A group is its slices, pairs (weight, gradient) of one shape. Returns float64 [groups].
    """
    if not groups or len(weights) != len(PARTS):
        raise InputError(f"hesso_scores needs groups and {len(PARTS)} weights, for {', '.join(PARTS)}")
    rows = []
    for group in groups:
        w = torch.cat([a.detach().reshape(-1) for a, _ in group]).double()
        g = torch.cat([b.detach().reshape(-1) for _, b in group]).double()
        if w.shape != g.shape:
            raise InputError("hesso_scores: a slice and its gradient differ in shape")
        dot, size = w @ g, w.norm()
        cosine = 1 + dot / (size * g.norm()).clamp(min=1e-300)
        rows.append(torch.stack([size, size / len(w) ** 0.5, cosine, dot.abs(), (dot + dot.square() / 2).abs()]))
    table = torch.stack(rows)
    low, high = table.amin(0), table.amax(0)
    scaled = (table - low) / (high - low).clamp(min=1e-300)
    return scaled @ torch.tensor(weights, dtype=torch.float64)
