"""`sparsec::linear_prepacked`: the dense product on a weight that oneDNN has reordered for itself, once.

The op's argument is the plain dense weight, so that state dicts, deepcopy, export and saved files know nothing of the
reordering. The reordered copy lives in a table of this process beside the weight, is made at the first call, and goes
when the weight goes: a prepacked site costs its weight twice. It is made again when the weight was written in place or
its storage was swapped (`.to()`, `load_state_dict`); only a write through `.data`, which torch does not count, needs
`forget()`.
"""

from __future__ import annotations

import weakref
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen.kernel import DTYPES, KernelSpec, Step
from sparsec.errors import InputError
from sparsec.ops.linear import GRADIENT, autocast

VARIANT = "linear_prepacked"
"""The variant of a prepacked KernelSpec. It is no line of the catalogue: there is nothing to generate."""

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")
_LIBRARY.define("linear_prepacked(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str kernel) -> Tensor")

_POINTWISE = torch.ops.mkldnn._linear_pointwise
_FUSED: dict[str, tuple[str, str]] = {  # step -> what oneDNN calls it: name, algorithm
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
    "hardswish": ("hardswish", ""),
    "clamp": ("hardtanh", ""),
}


class _Plan(NamedTuple):
    """What a call needs from its text: oneDNN's own tail, and the steps that torch applies behind it."""

    dtype: torch.dtype
    batch: int
    tail: tuple[str, tuple[float, ...], str]
    adds: bool
    rest: tuple[Step, ...]


class _Packed(NamedTuple):
    """A reordered weight. `source` holds on to the storage that was read, so that its address stays its own."""

    owner: weakref.ref[torch.Tensor]
    source: torch.Tensor
    version: int
    plans: dict[tuple[int, torch.dtype], torch.Tensor]


_PACKED: dict[int, _Packed] = {}


def available(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN and oneDNN has this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return _reorders(dtype)


@lru_cache(maxsize=8)
def _reorders(dtype: torch.dtype) -> bool:
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), 16)
    except (RuntimeError, AttributeError):
        return False
    return True


def forget() -> None:
    """Drop every reordered weight of this process; they are made again when they are next needed."""
    _PACKED.clear()


def nbytes() -> int:
    """Bytes of the reordered weights that this process holds, beside the weights themselves."""
    return sum(p.source.numel() * p.source.element_size() * len(p.plans) for p in list(_PACKED.values()))


@lru_cache(maxsize=4096)
def _plan(text: str) -> _Plan:
    spec = KernelSpec.parse(text)
    steps, adds = spec.epilogue, False
    tail: tuple[str, tuple[float, ...], str] = ("none", (), "")
    if steps and steps[0].name in _FUSED:
        name, algorithm = _FUSED[steps[0].name]
        tail, steps = (name, steps[0].params, algorithm), steps[1:]
    elif steps and steps[0].name == "add":
        adds, steps = True, steps[1:]
    batch = dict(spec.tile).get("batch", 1)
    return _Plan(DTYPES[spec.dtype], batch, tail, adds, steps)


def _packed(weight: torch.Tensor, plan: _Plan) -> torch.Tensor:
    key = id(weight)
    version = 0 if weight.is_inference() else weight._version
    entry = _PACKED.get(key)
    if (
        entry is None
        or entry.owner() is not weight
        or entry.version != version
        or entry.source.data_ptr() != weight.data_ptr()
    ):
        owner = weakref.ref(weight, lambda _: _PACKED.pop(key, None))
        entry = _PACKED[key] = _Packed(owner, weight.detach(), version, {})
    found = entry.plans.get((plan.batch, weight.dtype))
    if found is None:
        with torch.no_grad():
            found = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), plan.batch)
        entry.plans[plan.batch, weight.dtype] = found
    return found


def _prepacked(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    plan = _plan(kernel)
    if x.dtype is not plan.dtype or weight.dtype is not plan.dtype or x.shape[-1:] != weight.shape[1:]:
        raise InputError(_explain(x, weight, plan.dtype))
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(GRADIENT)
    if x.numel() == 0:
        return verify.apply_steps(_epilogue(kernel), F.linear(x, weight, bias), residual)
    if plan.adds:
        if residual is None or residual.shape != (*x.shape[:-1], weight.shape[0]):
            shape = None if residual is None else tuple(residual.shape)
            raise InputError(f"residual has shape {shape}, the output {(*x.shape[:-1], weight.shape[0])}")
        y = _POINTWISE.binary(x, residual, _packed(weight, plan), bias, "add")
    else:
        name, scalars, algorithm = plan.tail
        y = _POINTWISE.default(x, _packed(weight, plan), bias, name, list(scalars), algorithm)
    return verify.apply_steps(plan.rest, y, residual) if plan.rest else y


def _explain(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> str:
    if x.dtype is not dtype or weight.dtype is not dtype:
        return (
            f"input is {x.dtype} and the weight {weight.dtype}; this site was compiled for {dtype}: "
            "cast the model before sparsec.compile, and the inputs to match"
        )
    return f"input has shape {tuple(x.shape)}; this site was compiled for (..., {weight.shape[-1]})"


@lru_cache(maxsize=4096)
def _epilogue(kernel: str) -> tuple[Step, ...]:
    return KernelSpec.parse(kernel).epilogue


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("linear_prepacked", _prepacked, "CPU")
torch.library.register_fake("sparsec::linear_prepacked", _fake, lib=_LIBRARY)

PREPACKED: Any = torch.ops.sparsec.linear_prepacked.default

for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("linear_prepacked", partial(autocast, PREPACKED), _key)
