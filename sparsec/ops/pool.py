"""`sparsec::max_pool`: what `aten::max_pool2d` computes, from a generated kernel where there is one.

The op takes the arguments of torch's, so that a graph means the same on every machine: the kernel follows from them and
from the shape of x. NaN is larger than all, as in torch, and the result is the same to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sparsec.codegen import pool
from sparsec.codegen.build import get_kernel
from sparsec.codegen.kernel import DTYPES, Conv, KernelSpec
from sparsec.errors import SpecError, ToolchainError

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")
_LIBRARY.define("max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Kernel = tuple[Callable[..., Any], tuple[int, ...]]


def _max_pool(
    x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> torch.Tensor:
    if x.dim() == 4 and x.is_contiguous() and not (x.requires_grad and torch.is_grad_enabled()):
        shape = tuple(x.shape[1:])
        found = find(shape, _NAMES.get(x.dtype, ""), tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
        if found is not None:
            y = torch.empty((x.shape[0], *found[1]), dtype=x.dtype, device=x.device)
            found[0](x, y, None, None)
            return y
    return F.max_pool2d(x, kernel, stride, padding, dilation)


@functools.lru_cache(maxsize=1024)
def find(
    shape: tuple[int, ...], dtype: str, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Kernel | None:  # fmt: skip
    """(call, shape of an output image) of the kernel for images of `shape`, built on first use; None without one."""
    spec = _spec(shape, dtype, kernel, stride, padding, dilation)
    try:
        return (get_kernel(spec.text()).call, spec.output_shape) if spec is not None else None
    except (SpecError, ToolchainError):
        return None


def spec_of(shape: tuple[int, ...], dtype: str, *numbers: Any) -> KernelSpec | None:
    """The kernel that the op runs on images of this shape, with its other arguments as they stand in a graph."""
    if len(shape) != 3 or not all(isinstance(n, int) for n in shape) or len(numbers) != 4:
        return None
    return _spec(shape, dtype, *(tuple(n) for n in numbers))


def _spec(
    shape: tuple[int, ...], dtype: str, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> KernelSpec | None:  # fmt: skip
    if dtype not in pool.VARIANT.dtypes or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return None
    channels, *size = shape
    try:
        return pool.spec(channels, Conv(tuple(size), kernel, stride, padding, padding, dilation, channels), dtype)
    except (SpecError, ToolchainError):
        return None


def _fake(
    x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> torch.Tensor:
    return F.max_pool2d(x, kernel, stride, padding, dilation)


_LIBRARY.impl("max_pool", _max_pool, "CPU")
torch.library.register_fake("sparsec::max_pool", _fake, lib=_LIBRARY)

OVERLOAD = torch.ops.sparsec.max_pool.default
