"""`sparsec::masked_conv`: a convolution that computes some pixels of its output and leaves zeros in the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from sparsec.ops.gather import fits, kernel_call, run

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")
_LIBRARY.define(
    "masked_conv(Tensor x, Tensor weight, Tensor? bias, Tensor keep, Tensor[] pairs, int[] sizes) -> Tensor"
)


def _masked_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor,
    pairs: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> torch.Tensor:
    """x (images, in, *space), weight (offsets, groups, in / groups, out / groups) --> (images, out, *keep.shape).

    The rulebook pairs pixels of one image. Rows are taken from channels_last images as they are.
    """
    offsets, groups, depth, width = weight.shape
    images, inputs, outputs = x.shape[0], math.prod(x.shape[2:]), keep.numel()
    last = x.dim() in (4, 5) and x.is_contiguous(memory_format=_last(x.dim())) and not x.is_contiguous()
    y = x.new_empty((images, groups * width, *keep.shape))
    if last:
        y = y.contiguous(memory_format=_last(x.dim()))
    call = kernel_call() if fits(x, weight, bias) else None
    if call is not None and y.numel() and weight.numel():
        x, flat = x if last else x.contiguous(), keep.reshape(-1)
        rows = None if last else torch.empty_like(x)
        x, shown = (_rows(x), _rows(y)) if last else (x, y)
        tail = images, inputs, outputs, offsets, sizes[1], groups, depth, width
        run(call, x, weight, bias, flat, *pairs, shown, rows, *tail)
        return y
    return y.copy_(_masked_by_hand(x, weight, bias, keep, pairs, sizes))


def _masked_by_hand(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor,
    pairs: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> torch.Tensor:
    _, groups, depth, width = weight.shape
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    rows = x.flatten(2).permute(2, 0, 1).unflatten(2, (groups, depth))  # (pixels, images, groups, depth)
    sums = x.new_zeros((keep.numel(), x.shape[0], groups, width), dtype=wide)
    if bias is not None:
        sums[keep.reshape(-1)] = bias.to(wide).view(groups, width)
    bounds = sizes[2:]
    for k, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end > begin:
            product: torch.Tensor = torch.einsum("pngi,gio->pngo", rows.index_select(0, pairs[0][begin:end]), weight[k])
            sums.index_add_(0, pairs[1][begin:end], product.to(wide))
    y: torch.Tensor = sums.flatten(2).permute(1, 2, 0).unflatten(2, keep.shape)
    return y.to(x.dtype)


def _last(rank: int) -> torch.memory_format:
    return torch.channels_last if rank == 4 else torch.channels_last_3d


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor (images, *space, channels) behind a channels_last one."""
    return x.permute(0, *range(2, x.dim()), 1)


def _fake_masked(x: Any, weight: Any, bias: Any, keep: Any, pairs: Any, sizes: Any) -> Any:
    y = x.new_empty((x.shape[0], weight.shape[1] * weight.shape[3], *keep.shape))
    last = x.dim() in (4, 5) and x.is_contiguous(memory_format=_last(x.dim())) and not x.is_contiguous()
    return y.contiguous(memory_format=_last(x.dim())) if last else y


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("masked_conv", _masked_conv, _key)
torch.library.register_fake("sparsec::masked_conv", _fake_masked, lib=_LIBRARY)

MASKED_CONV = torch.ops.sparsec.masked_conv.default
