"""Rulebooks: which input cell meets which output cell under which offset of the kernel, for any set of cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from sparsec.errors import InputError
from sparsec.ops.gather import Pairs
from sparsec.points.tensor import TABLE, Index

Sizes = tuple[int, ...]


def submanifold(index: Index, kernel: Sizes, dilation: Sizes) -> tuple[Pairs, Index]:
    """Outputs are the inputs (Graham and van der Maaten, Submanifold Sparse Convolutional Networks, 2017)."""
    key = ("submanifold", kernel, dilation)
    if key not in index.rulebooks:
        index.rulebooks[key] = _centred(index, index, kernel, dilation), index
    return index.rulebooks[key]


def regular(index: Index, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> tuple[Pairs, Index]:
    """Outputs are the cells that at least one input reaches."""
    key = ("regular", kernel, stride, padding, dilation)
    if key not in index.rulebooks:
        index.rulebooks[key] = _reached(index, kernel, stride, padding, dilation)
    return index.rulebooks[key]


def dilated(index: Index, chosen: torch.Tensor, kernel: Sizes, dilation: Sizes) -> tuple[Pairs, Index]:
    """Outputs are the inputs and, behind them, the cells at the chosen offsets: `chosen` is bool (points, offsets).

    Depends on values, so it is not kept.
    """
    halo = _reach(kernel, dilation)
    point, offset = chosen.nonzero().unbind(1)
    steps = torch.tensor(_centred_offsets(kernel, dilation), device=point.device)
    coords = index.coords[point]
    coords = torch.cat([coords[:, :1], coords[:, 1:] + steps[offset]], 1)
    inside = (coords[:, 1:] >= 0).all(1) & (coords[:, 1:] < torch.tensor(index.shape, device=coords.device)).all(1)
    keys = index.keys(coords[inside], halo)
    fresh = torch.unique(keys[index.find(keys, halo) < 0])
    if not fresh.numel():
        return submanifold(index, kernel, dilation)
    outputs = Index(torch.cat([index.coords, _cells(fresh, index, halo)]), index.shape, index.batch)
    return _centred(index, outputs, kernel, dilation), outputs


def _reach(kernel: Sizes, dilation: Sizes) -> Sizes:
    """How far a centred kernel looks, at least one cell: most layers then share one table."""
    return tuple(max(1, k // 2 * d) for k, d in zip(kernel, dilation))


def _centred_offsets(kernel: Sizes, dilation: Sizes) -> list[Sizes]:
    """Offsets of the kernel's positions from its centre, in C order."""
    if any(k % 2 == 0 for k in kernel):
        raise InputError(f"a kernel of {kernel} has no centre; submanifold convolution needs odd sizes")
    axes = [[(i - k // 2) * d for i in range(k)] for k, d in zip(kernel, dilation)]
    return list(itertools.product(*axes))


def _centred(inputs: Index, outputs: Index, kernel: Sizes, dilation: Sizes) -> Pairs:
    """Pairs of a kernel that is centred on each output."""
    halo = _reach(kernel, dilation)
    offsets = _centred_offsets(kernel, dilation)
    base = inputs.keys(outputs.coords, halo)
    steps = torch.tensor(offsets, device=base.device) @ torch.tensor(inputs.strides(halo)[1:], device=base.device)
    if inputs is outputs:  # i meets j under an offset as j meets i under its mirror image
        half = len(offsets) // 2
        found = inputs.find(base + steps[:half, None], halo)
        offset, target = (found >= 0).nonzero().unbind(1)
        source = found[offset, target]
        own = torch.arange(len(inputs), device=base.device)
        offset = torch.cat([offset, torch.full_like(own, half), len(offsets) - 1 - offset])
        source, target = torch.cat([source, own, target]), torch.cat([target, own, source])
    else:
        found = inputs.find(base + steps[:, None], halo)
        offset, target = (found >= 0).nonzero().unbind(1)
        source = found[offset, target]
    return Pairs.build(offset, source, target, len(offsets), len(inputs), len(outputs))


def _reached(index: Index, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> tuple[Pairs, Index]:
    """Input i meets output o under kernel position k where o * stride - padding + k * dilation = i."""
    shape = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(index.shape, kernel, stride, padding, dilation, strict=True)
    )
    if any(n < 1 for n in shape):
        raise InputError(f"a kernel of {kernel} with dilation {dilation} does not fit a grid of {index.shape}")
    outputs = Index(index.coords[:0], shape, index.batch)
    none = (0,) * len(shape)
    steps = outputs.strides(none)
    axes = []  # per dimension and kernel position: (whether an input meets an output, that output's part of the key)
    for d in range(len(shape)):
        moved = [index.coords[:, d + 1] + padding[d] - i * dilation[d] for i in range(kernel[d])]
        at = [torch.div(m, stride[d], rounding_mode="floor") for m in moved]
        axes.append([((m % stride[d] == 0) & (a >= 0) & (a < shape[d]), a * steps[d + 1]) for m, a in zip(moved, at)])
    sources, keys = [], []
    for parts in itertools.product(*axes):
        source = torch.stack([ok for ok, _ in parts]).all(0).nonzero().reshape(-1)
        sources.append(source)
        keys.append((index.coords[:, 0] * steps[0] + sum(part for _, part in parts))[source])
    counts = torch.tensor([len(s) for s in sources])
    offset = torch.repeat_interleave(torch.arange(len(sources)), counts).to(index.coords.device)
    cells, target = _numbered(torch.cat(keys), index.batch * steps[0])
    outputs = Index(_cells(cells, outputs, none), shape, index.batch)
    return Pairs.build(offset, torch.cat(sources), target, len(sources), len(index), len(outputs)), outputs


def _numbered(keys: torch.Tensor, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The different keys in ascending order, and which of them each key is."""
    if cells > TABLE:
        return torch.unique(keys, return_inverse=True)  # type: ignore[no-any-return]
    hit = torch.zeros(cells, dtype=torch.bool, device=keys.device)
    hit[keys] = True
    return hit.nonzero().reshape(-1), (hit.cumsum(0) - 1)[keys]


def _cells(keys: torch.Tensor, index: Index, halo: Sequence[int]) -> torch.Tensor:
    """Coordinates (cells, 1 + d) of keys."""
    columns = []
    for step in index.strides(halo):
        columns.append(torch.div(keys, step, rounding_mode="floor"))
        keys = keys - columns[-1] * step
    border = torch.tensor((0, *halo), device=keys.device)
    return torch.stack(columns, 1) - border
