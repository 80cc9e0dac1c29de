"""The values at the heart of code generation: Step, Problem, KernelSpec, Source and Kernel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsec.codegen.conv import Conv as Conv
from sparsec.errors import SpecError

VERSION = 1  # goes into every key: raise it when a template or the calling convention changes meaning

STEPS: dict[str, int] = {
    "relu": 0,
    "gelu": 0,  # erf form
    "gelu_tanh": 0,
    "silu": 0,
    "tanh": 0,
    "hardswish": 0,
    "clamp": 2,  # low, high
    "scale": 1,
    "add": 0,  # adds the residual operand, shaped like the output
}
"""Epilogue steps and how many float parameters each one takes."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Step:
    """One elementwise step applied to the accumulator, after the bias: `Step("clamp", (0.0, 6.0))`."""

    name: str
    params: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in STEPS or len(self.params) != STEPS[self.name]:
            raise SpecError(f"epilogue step {self.name!r} with {len(self.params)} parameters; known: {STEPS}")

    def text(self) -> str:
        return self.name if not self.params else f"{self.name}({','.join(float(p).hex() for p in self.params)})"


@dataclass(frozen=True)
class Problem:
    """What a site asks of the catalogue, before any choice: the op, its sizes, and where it will run."""

    op: str
    out_features: int
    in_features: int
    dtype: str
    nnz: int
    bias: bool = False
    epilogue: tuple[Step, ...] = ()
    batches: tuple[int, ...] = (1,)  # rows of x that will be timed
    threads: int = 1
    conv: Conv | None = None  # the geometry, where the op is a convolution

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.out_features * self.in_features)


Plan = tuple[tuple[int, str, int], ...]
"""Batch dispatch inside one kernel: (largest batch or 0 for no limit, routine, columns per panel), ascending."""


@dataclass(frozen=True)
class KernelSpec:
    """Everything a template sees, and nothing else: equal specs give the same bytes in any process.

    `format` is the canonical text of a resolved format, whose fields are repeated in `fields` for the template.
    """

    op: str
    variant: str
    format: str
    dtype: str
    out_features: int
    in_features: int
    isa: str
    bias: bool = False
    epilogue: tuple[Step, ...] = ()
    plan: Plan = ()
    fields: tuple[tuple[str, int], ...] = ()
    tile: tuple[tuple[str, int], ...] = ()
    version: int = VERSION
    conv: Conv | None = None

    def text(self) -> str:
        """Canonical text: the argument of the op in the graph, the cache key, and all that is needed to re-render."""
        return json.dumps(
            [
                self.version, self.op, self.variant, self.format, self.dtype, self.out_features, self.in_features,
                self.isa,
                int(self.bias), [[s.name, [p.hex() for p in s.params]] for s in self.epilogue],
                [list(p) for p in self.plan], [list(p) for p in self.fields], [list(p) for p in self.tile],
                *([] if self.conv is None else [self.conv.numbers()]),
            ],
            separators=(",", ":"),
        )  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> KernelSpec:
        """The inverse of `text`. Raises SpecError for text that no KernelSpec printed."""
        try:
            (
                version, op, variant, fmt, dtype, out, inp, isa, bias, epilogue, plan, fields, tile, *conv
            ) = json.loads(text)  # fmt: skip
            spec = cls(
                op=_str(op), variant=_str(variant), format=_str(fmt), dtype=_str(dtype),
                out_features=_int(out), in_features=_int(inp), isa=_str(isa), bias=bool(_int(bias)),
                epilogue=tuple(Step(_str(n), tuple(float.fromhex(p) for p in ps)) for n, ps in epilogue),
                plan=tuple((_int(m), _str(r), _int(c)) for m, r, c in plan),
                fields=tuple((_str(n), _int(v)) for n, v in fields),
                tile=tuple((_str(n), _int(v)) for n, v in tile),
                version=_int(version),
                conv=Conv.parse(*conv) if conv else None,
            )  # fmt: skip
        except (ValueError, TypeError, AttributeError) as error:
            raise SpecError(f"not the text of a KernelSpec: {text[:120]!r} ({error})") from error
        if spec.dtype not in DTYPES:
            raise SpecError(f"KernelSpec names dtype {spec.dtype!r}; known: {', '.join(DTYPES)}")
        return spec

    @property
    def device(self) -> str:
        """The kind of torch device that the kernel's tensors live on."""
        return "cuda" if self.isa.startswith("sm_") else "cpu"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Sizes of x behind its batch dimensions: (features,), or (channels, *image) of a convolution."""
        if self.conv is None:
            return (self.in_features,)
        return (self.in_features // self.conv.taps * self.conv.groups, *self.conv.size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Sizes of y behind its batch dimensions."""
        return (self.out_features, *(() if self.conv is None else self.conv.out))

    @property
    def symbol(self) -> str:
        """The C identifier of the kernel; derived from the text, never from a module name."""
        return "k_" + hashlib.sha256(self.text().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Generated text with what is needed to build it."""

    spec: KernelSpec
    language: str
    text: str


@dataclass
class Kernel:
    """A loaded kernel: `call(x, y, bias, residual, *buffers)` fills `y`; shapes are checked by the op above it."""

    spec: KernelSpec
    call: Callable[..., Any]
    source: str
    command: tuple[str, ...]
    path: str = ""
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = DTYPES[self.spec.dtype]


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _str(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} is not a string")
    return value
