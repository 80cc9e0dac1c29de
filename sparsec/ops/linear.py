"""`sparsec::linear`: y = epilogue(x @ W^T + bias) on packed buffers of W, dispatched to a generated kernel.

The kernel argument is the canonical text of a KernelSpec, so that a graph means the same in any process: whoever runs
it first renders, builds and loads the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen.build import get_kernel
from sparsec.codegen.kernel import DTYPES, KernelSpec, Step
from sparsec.errors import InputError

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor[] weight, Tensor? bias, Tensor? residual, str kernel) -> Tensor")
_LIBRARY.define(
    "linear_buckets(Tensor x, Tensor[] weight, Tensor dense, Tensor? bias, Tensor? residual, str kernel, "
    "int[] dense_ranges) -> Tensor"
)


class _Handle:
    """What a call needs from a kernel, looked up once per text."""

    __slots__ = ("call", "cuda", "dtype", "in_features", "out_features")

    def __init__(self, spec: KernelSpec, call: Callable[..., Any]) -> None:
        self.call = call
        self.cuda = spec.device == "cuda"
        self.dtype = DTYPES[spec.dtype]
        self.in_features = spec.in_features
        self.out_features = spec.out_features


_HANDLES: dict[str, _Handle] = {}


def _handle(text: str) -> _Handle:
    kernel = get_kernel(text)
    handle = _HANDLES[text] = _Handle(kernel.spec, kernel.call)
    return handle


def _linear(
    x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    handle = _HANDLES.get(kernel) or _handle(kernel)
    shape = x.shape
    if x.dtype is not handle.dtype or weight[0].dtype is not handle.dtype or shape[-1] != handle.in_features:
        raise InputError(_explain(x, weight, handle))
    if x.is_cuda is not handle.cuda:
        raise InputError(_explain(x, weight, handle))
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "a gradient is wanted through a model compiled for inference; compile with training=True, "
            "or call it under torch.no_grad()"
        )
    if not x.is_contiguous():
        x = x.contiguous()
    y = x.new_empty((*shape[:-1], handle.out_features))
    if residual is not None:
        residual = _like(residual, y)
    handle.call(x, y, bias, residual, *weight)
    return y


def _linear_buckets(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    dense: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kernel: str,
    dense_ranges: list[int],
) -> torch.Tensor:
    """`linear`, but on the dense weight for batches in the (low, high) pairs of `dense_ranges`; high 0: no limit."""
    batch = x.numel() // max(1, x.shape[-1])
    for low, high in zip(dense_ranges[::2], dense_ranges[1::2], strict=True):
        if low <= batch and (high == 0 or batch <= high):
            return verify.apply_steps(_epilogue(kernel), F.linear(x, dense, bias), residual)
    return _linear(x, weight, bias, residual, kernel)


def _like(residual: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if residual.dtype is not y.dtype or residual.shape != y.shape:
        raise InputError(
            f"residual is {residual.dtype} {tuple(residual.shape)}, the output is {y.dtype} {tuple(y.shape)}"
        )
    return residual if residual.is_contiguous() else residual.contiguous()


def _explain(x: torch.Tensor, weight: list[torch.Tensor], handle: _Handle) -> str:
    if x.shape[-1:] != (handle.in_features,):
        return f"input has shape {tuple(x.shape)}; this site was compiled for (..., {handle.in_features})"
    if x.is_cuda is not handle.cuda:
        there = "a CUDA device" if handle.cuda else "the CPU"
        return f"input is on {x.device} and the kernel of this site runs on {there}; move the model and its inputs together"
    return (
        f"input is {x.dtype} and the packed weight {weight[0].dtype}; this site was compiled for {handle.dtype}: "
        "cast the model before sparsec.compile, and the inputs to match"
    )


@lru_cache(maxsize=4096)
def _out_features(kernel: str) -> int:
    return KernelSpec.parse(kernel).out_features


@lru_cache(maxsize=4096)
def _epilogue(kernel: str) -> tuple[Step, ...]:
    return KernelSpec.parse(kernel).epilogue


def _fake(
    x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _out_features(kernel)))


def _fake_buckets(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    dense: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kernel: str,
    dense_ranges: list[int],
) -> torch.Tensor:
    return _fake(x, weight, bias, residual, kernel)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("linear", _linear, _key)
    _LIBRARY.impl("linear_buckets", _linear_buckets, _key)
torch.library.register_fake("sparsec::linear", _fake, lib=_LIBRARY)
torch.library.register_fake("sparsec::linear_buckets", _fake_buckets, lib=_LIBRARY)

OVERLOAD = torch.ops.sparsec.linear.default
BUCKETS = torch.ops.sparsec.linear_buckets.default
