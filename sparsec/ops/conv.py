"""`sparsec::conv`: y = epilogue(conv(x, W) + bias) on packed buffers of W, dispatched to a generated kernel.

W is packed as the matrix (out, in / groups * taps) in C order; x is (batch, channels, *size), or one image without the
batch, of the size the kernel was compiled for. The kernel argument is the text of a KernelSpec, as for `linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen.build import get_kernel
from sparsec.codegen.kernel import DTYPES, Conv, KernelSpec
from sparsec.errors import InputError, SpecError
from sparsec.ops.linear import GRADIENT, ONE, RANGES, define, retry

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")


class _Handle(NamedTuple):
    """What a call needs from a kernel, looked up once per text."""

    call: Callable[..., Any]
    image: tuple[int, ...]  # (channels, *size) of an input
    out: tuple[int, ...]  # (channels, *size) of an output
    spec: KernelSpec


_HANDLES: dict[str, _Handle] = {}


@lru_cache(maxsize=4096)
def _shapes(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(channels, *size) of an input image and of an output image."""
    spec = KernelSpec.parse(text)
    if spec.conv is None:
        raise SpecError(f"kernel {text[:120]!r} is no convolution: it has no geometry")
    return spec.input_shape, spec.output_shape


def _handle(text: str) -> _Handle:
    kernel = get_kernel(text)
    handle = _HANDLES[text] = _Handle(kernel.call, *_shapes(text), kernel.spec)
    return handle


def _conv(
    x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    handle = _HANDLES.get(kernel) or _handle(kernel)
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(GRADIENT)
    if x.shape[-len(handle.image) :] != handle.image or x.dim() - len(handle.image) not in (0, 1):
        raise InputError(_shape_error(x, handle))
    y = torch.empty((*x.shape[: x.dim() - len(handle.image)], *handle.out), dtype=x.dtype, device=x.device)
    if residual is not None and residual.shape != y.shape:
        raise InputError(f"residual has shape {tuple(residual.shape)}, the output {tuple(y.shape)}")
    try:
        handle.call(x, y, bias, residual, *weight)
    except ValueError as refusal:
        retry(handle.call, refusal, x, y, bias, residual, weight, lambda why: _explain(x, weight, handle, why))
    return y


def _shape_error(x: torch.Tensor, handle: _Handle) -> str:
    sizes = ", ".join(map(str, handle.image))
    return f"input has shape {tuple(x.shape)}; this site was compiled for (batch, {sizes})"


def _explain(x: torch.Tensor, weight: list[torch.Tensor], handle: _Handle, refusal: str) -> str:
    dtype = DTYPES[handle.spec.dtype]
    if x.device.type != handle.spec.device:
        return f"input is on {x.device} and this site runs on {handle.spec.device}; move model and inputs together"
    if x.dtype is not dtype or weight[0].dtype is not dtype:
        return (
            f"input is {x.dtype} and the packed weight {weight[0].dtype}; this site was compiled for {dtype}: "
            "cast the model before sparsec.compile, and the inputs to match"
        )
    return f"the kernel of this site refuses its operands: {refusal}"


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: Conv) -> torch.Tensor:
    """torch's own convolution of this geometry: x (batch, channels, *size), weight (out, in / groups, *kernel)."""
    low, high = conv.low, conv.high
    if low != high:  # torch pads both ends alike
        x = F.pad(x, [n for pair in zip(reversed(low), reversed(high), strict=True) for n in pair])
        low = (0,) * len(low)
    call: Callable[..., torch.Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(conv.size) - 1]
    return call(x, weight, bias, conv.stride, low, conv.dilation, conv.groups)


def _conv_buckets(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    plain: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kernel: str,
    dense_ranges: list[int],
) -> torch.Tensor:
    """`conv`, but on the dense weight for batches in the (low, high) pairs of `dense_ranges`; high 0: no limit."""
    handle = _HANDLES.get(kernel) or _handle(kernel)
    batch = 1 if x.dim() == len(handle.image) else x.shape[0]
    for low, high in zip(dense_ranges[::2], dense_ranges[1::2], strict=True):
        if low <= batch and (high == 0 or batch <= high) and handle.spec.conv is not None:
            return verify.apply_steps(handle.spec.epilogue, dense(x, plain, bias, handle.spec.conv), residual)
    return _conv(x, weight, bias, residual, kernel)


def _fake(
    x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    image, out = _shapes(kernel)
    return x.new_empty((*x.shape[: x.dim() - len(image)], *out))


def _fake_buckets(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    plain: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kernel: str,
    dense_ranges: list[int],
) -> torch.Tensor:
    return _fake(x, weight, bias, residual, kernel)


def _autocast(op: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Under autocast the activations come in another dtype than the weight was packed in: cast them, not the weight."""
    at = next(i for i, value in enumerate(rest) if isinstance(value, str))
    dtype = DTYPES[KernelSpec.parse(rest[at]).dtype]
    bias, residual = (t.to(dtype) if t is not None else None for t in rest[at - 2 : at])
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return op(x.to(dtype), *rest[: at - 2], bias, residual, *rest[at:])


define(_LIBRARY, "conv", ONE, _conv)
define(_LIBRARY, "conv_buckets", RANGES, _conv_buckets)
torch.library.register_fake("sparsec::conv", _fake, lib=_LIBRARY)
torch.library.register_fake("sparsec::conv_buckets", _fake_buckets, lib=_LIBRARY)

OVERLOAD = torch.ops.sparsec.conv.default
BUCKETS = torch.ops.sparsec.conv_buckets.default

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_LIBRARY.impl("conv", partial(_autocast, OVERLOAD), "AutocastCPU")
_LIBRARY.impl("conv_buckets", partial(_autocast, BUCKETS), "AutocastCPU")
