"""`sparsec::linear`: y = epilogue(x @ W^T + bias) on packed buffers of W, dispatched to a generated kernel.

What is here answers on every device; on the CPU `codegen.dispatch` puts a library in front of it, which knows only the
plain case and calls the `_careful` ops for the rest.

The kernel argument is the canonical text of a KernelSpec, so that a graph means the same in any process: whoever runs
it first renders, builds and loads the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen import dispatch
from sparsec.codegen.build import get_kernel
from sparsec.codegen.kernel import DTYPES, KernelSpec, Step
from sparsec.errors import InputError, SparsecError, remember

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")
ONE = "(Tensor x, Tensor[] weight, Tensor? bias, Tensor? residual, str kernel) -> Tensor"
RANGES = ONE.replace("weight, ", "weight, Tensor dense, ").replace("kernel)", "kernel, int[] dense_ranges)")


def define(library: torch.library.Library, name: str, schema: str, function: Callable[..., Any]) -> None:
    """The op `name`, and `name_careful` that a faster implementation of it falls back on, on every device.

    The second takes the kernel's number in `codegen.dispatch`. torch's stable ABI turns any exception into a message,
    so that the one an op ended with is remembered.
    """
    at = next(i for i, argument in enumerate(schema.split(", ")) if argument.startswith("str "))

    def careful(*arguments: Any) -> Any:
        try:
            return function(*arguments[:at], dispatch.text(arguments[at]), *arguments[at + 1 :])
        except SparsecError as error:
            remember(error)
            raise

    library.define(name + schema)
    library.define(f"{name}_careful" + schema.replace(", str ", ", int "))
    library.impl(name, function, "CompositeExplicitAutograd")
    library.impl(f"{name}_careful", careful, "CompositeExplicitAutograd")


GRADIENT = (
    "a gradient is wanted through a model compiled for inference; compile with training=True, "
    "or call it under torch.no_grad()"
)


class _Handle(NamedTuple):
    """What a call needs from a kernel, looked up once per text."""

    call: Callable[..., Any]
    out: int  # features
    spec: KernelSpec


_HANDLES: dict[str, _Handle] = {}


def _handle(text: str) -> _Handle:
    kernel = get_kernel(text)
    handle = _HANDLES[text] = _Handle(kernel.call, kernel.spec.out_features, kernel.spec)
    return handle


def _linear(
    x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    """The kernel's own entry compares dtypes, devices, layout and sizes with what it was compiled for; Python looks
    again only when it refuses."""
    handle = _HANDLES.get(kernel) or _handle(kernel)
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(GRADIENT)
    y = _output(x, handle)
    if residual is not None and residual.shape != y.shape:
        raise InputError(f"residual has shape {tuple(residual.shape)}, the output {tuple(y.shape)}")
    try:
        handle.call(x, y, bias, residual, *weight)
    except ValueError as refusal:
        retry(handle.call, refusal, x, y, bias, residual, weight, lambda why: _explain(x, weight, handle.spec, why))
    return y


def _output(x: torch.Tensor, handle: _Handle) -> torch.Tensor:
    """An empty (..., out) tensor beside x; `empty_strided` with all spelled out is the cheapest way to get one."""
    shape, out = x.shape, handle.out
    if len(shape) == 3:
        size, strides = (shape[0], shape[1], out), (shape[1] * out, out, 1)
        return torch.empty_strided(size, strides, dtype=x.dtype, device=x.device)
    if len(shape) == 2:
        return torch.empty_strided((shape[0], out), (out, 1), dtype=x.dtype, device=x.device)
    return x.new_empty((*shape[:-1], out))


def retry(
    call: Callable[..., Any],
    refusal: ValueError,
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: list[torch.Tensor],
    explain: Callable[[str], str],
) -> None:
    """Once more with x and residual in C order (channels_last is another one too); when that was not the reason, an
    InputError with what `explain` makes of the kernel's refusal."""
    strided = not x.is_contiguous() or (residual is not None and not residual.is_contiguous())
    try:
        if not strided:
            raise refusal
        call(x.contiguous(), y, bias, residual.contiguous() if residual is not None else None, *weight)
    except ValueError as error:
        raise InputError(explain(str(error))) from error


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


def _explain(x: torch.Tensor, weight: list[torch.Tensor], spec: KernelSpec, refusal: str) -> str:
    dtype = DTYPES[spec.dtype]
    if x.shape[-1:] != (spec.in_features,):
        return f"input has shape {tuple(x.shape)}; this site was compiled for (..., {spec.in_features})"
    if x.device.type != spec.device:
        return f"input is on {x.device} and this site runs on {spec.device}; move the model and its inputs together"
    if x.dtype is not dtype or weight[0].dtype is not dtype:
        return (
            f"input is {x.dtype} and the packed weight {weight[0].dtype}; this site was compiled for {dtype}: "
            "cast the model before sparsec.compile, and the inputs to match"
        )
    return f"the kernel of this site refuses its operands: {refusal}"


@lru_cache(maxsize=4096)
def _out_features(kernel: str) -> int:
    return KernelSpec.parse(kernel).out_features


@lru_cache(maxsize=4096)
def _epilogue(kernel: str) -> tuple[Step, ...]:
    return KernelSpec.parse(kernel).epilogue


def _cast(kernel: str, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    dtype = DTYPES[KernelSpec.parse(kernel).dtype]
    return [t.to(dtype) if t is not None else None for t in tensors]


def autocast(op: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Under autocast the activations come in another dtype than the weight was packed in: cast them, not the weight.

    `rest` ends with ..., bias, residual, kernel and, for buckets, the ranges; the operands before are weights.
    """
    at = next(i for i, value in enumerate(rest) if isinstance(value, str))
    x, bias, residual = _cast(rest[at], x, rest[at - 2], rest[at - 1])  # type: ignore[assignment]
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return op(x, *rest[: at - 2], bias, residual, *rest[at:])


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


define(_LIBRARY, "linear", ONE, _linear)
define(_LIBRARY, "linear_buckets", RANGES, _linear_buckets)
torch.library.register_fake("sparsec::linear", _fake, lib=_LIBRARY)
torch.library.register_fake("sparsec::linear_buckets", _fake_buckets, lib=_LIBRARY)

OVERLOAD = torch.ops.sparsec.linear.default
BUCKETS = torch.ops.sparsec.linear_buckets.default

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("linear", partial(autocast, OVERLOAD), _key)
    _LIBRARY.impl("linear_buckets", partial(autocast, BUCKETS), _key)
