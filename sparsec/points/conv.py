"""Convolution over points: submanifold, regular, and focal, as functions and as modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsec.errors import InputError
from sparsec.ops.gather import Pairs, product
from sparsec.points import rulebook
from sparsec.points.tensor import Index, SparseTensor, at_index


def submanifold_conv(
    x: SparseTensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dilation: int | Sequence[int] = 1
) -> SparseTensor:
    """Convolution whose outputs are the occupied cells: dense convolution with `same` padding, read off at the points.

    weight: (out, in, *kernel) as in torch, of odd sizes. Raises InputError for what does not fit.
    """
    kernel, steps = _kernel(x, weight, bias), _sizes(x, dilation, "dilation", 1)
    return _applied(x, weight, bias, rulebook.submanifold(x.index, kernel, steps))


def sparse_conv(
    x: SparseTensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> SparseTensor:
    """Convolution whose outputs are all cells that an occupied one reaches; the others are zero, not the bias.

    The grid shrinks as in torch. weight: (out, in, *kernel). Raises InputError for what does not fit.
    """
    kernel = _kernel(x, weight, bias)
    sizes = (
        _sizes(x, v, n, low)
        for v, n, low in ((stride, "stride", 1), (padding, "padding", 0), (dilation, "dilation", 1))
    )
    return _applied(x, weight, bias, rulebook.regular(x.index, kernel, *sizes))


def focal_conv(
    x: SparseTensor,
    weight: torch.Tensor,
    importance: torch.Tensor,
    threshold: float = 0.5,
    bias: torch.Tensor | None = None,
    dilation: int | Sequence[int] = 1,
    weigh: bool = True,
) -> SparseTensor:
    """Focal sparse convolution (Chen et al., Focal Sparse Convolutional Networks, CVPR 2022).

    `importance` (points, offsets of the kernel) lies in [0, 1], offsets in C order. A point whose importance at the
    centre exceeds `threshold` also gets outputs at the offsets where its importance reaches `threshold`; all others
    behave as in submanifold convolution. At threshold 1 nothing grows; at 0 every positive importance does, as in
    regular convolution. With `weigh` the features are multiplied by the importance at the centre, which is how a
    gradient reaches it. Raises InputError for what does not fit.
    """
    kernel, steps = _kernel(x, weight, bias), _sizes(x, dilation, "dilation", 1)
    offsets = math.prod(kernel)
    if importance.shape != (len(x.index), offsets):
        raise InputError(
            f"importance must be (points, offsets) = {(len(x.index), offsets)}, got {tuple(importance.shape)}"
        )
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise InputError(f"threshold must be a number from 0 to 1, got {threshold!r}")
    if bool(((importance < 0) | (importance > 1) | importance.isnan()).any()):
        raise InputError("importance must lie in [0, 1]; apply a sigmoid to scores")
    centre = importance[:, offsets // 2]
    chosen = (importance >= threshold) & (centre > threshold)[:, None]
    features = x.features * centre[:, None] if weigh else x.features
    return _applied(x.with_features(features), weight, bias, rulebook.dilated(x.index, chosen, kernel, steps))


def _applied(
    x: SparseTensor, weight: torch.Tensor, bias: torch.Tensor | None, book: tuple[Pairs, Index]
) -> SparseTensor:
    pairs, outputs = book
    return at_index(outputs, product(x.features, weight.flatten(2), bias, pairs))


def _kernel(x: SparseTensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, ...]:
    """The kernel's sizes, with everything about x, weight and bias checked."""
    if not isinstance(x, SparseTensor):
        raise InputError(f"expected a SparseTensor, got {type(x).__name__}; SparseTensor.from_dense makes one")
    d = len(x.index.shape)
    if weight.dim() != d + 2 or weight.shape[1] != x.features.shape[1] or 0 in weight.shape[2:]:
        raise InputError(
            f"the weight must be (out, {x.features.shape[1]}, *kernel) with {d} kernel sizes, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"the bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype, other.device) != (x.features.dtype, x.features.device):
            raise InputError(
                f"features are {x.features.dtype} on {x.features.device}, the {name} {other.dtype} on {other.device}"
            )
    return tuple(weight.shape[2:])


def _sizes(x: SparseTensor, value: int | Sequence[int], name: str, least: int) -> tuple[int, ...]:
    d = len(x.index.shape)
    sizes = (value,) * d if isinstance(value, int) else tuple(value)
    if len(sizes) != d or any(type(s) is not int or s < least for s in sizes):
        raise InputError(f"{name} must be an integer or {d} of them, at least {least}; got {value!r}")
    return sizes


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | Sequence[int], dims: int, bias: bool) -> None:
        super().__init__()
        if dims not in (2, 3):
            raise InputError(f"dims must be 2 or 3, got {dims!r}")
        sizes = (kernel,) * dims if isinstance(kernel, int) else tuple(kernel)
        if len(sizes) != dims or any(type(n) is not int or n < 1 for n in (inputs, outputs, *sizes)):
            raise InputError(
                f"channels and {dims} kernel sizes must be positive integers, got {inputs}, {outputs}, {kernel!r}"
            )
        made: Any = nn.Conv2d if dims == 2 else nn.Conv3d  # for torch's names and initial values
        like = made(inputs, outputs, sizes, bias=bias)
        self.weight, self.bias = like.weight, like.bias


class SubmanifoldConv(_Conv):
    """`submanifold_conv` with parameters named and shaped as in nn.Conv2d (dims=2) or nn.Conv3d."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | Sequence[int] = 3, *, dims: int = 3,
        dilation: int | Sequence[int] = 1, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, kernel, dims, bias)
        self.dilation = dilation

    def forward(self, x: SparseTensor) -> SparseTensor:
        return submanifold_conv(x, self.weight, self.bias, self.dilation)


class SparseConv(_Conv):
    """`sparse_conv` with parameters named and shaped as in nn.Conv2d (dims=2) or nn.Conv3d."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | Sequence[int] = 3, *, dims: int = 3,
        stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, kernel, dims, bias)
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def forward(self, x: SparseTensor) -> SparseTensor:
        return sparse_conv(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class FocalConv(_Conv):
    """`focal_conv` whose importance comes from a submanifold convolution of its own, `scores`, through a sigmoid."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | Sequence[int] = 3, *, dims: int = 3, threshold: float = 0.5,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, kernel, dims, bias)
        self.threshold = threshold
        self.scores = SubmanifoldConv(inputs, math.prod(self.weight.shape[2:]), kernel, dims=dims)

    def forward(self, x: SparseTensor) -> SparseTensor:
        importance = self.scores(x).features.sigmoid()
        return focal_conv(x, self.weight, importance, self.threshold, self.bias)
