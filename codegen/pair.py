"""The kernels of Sum: two kernels of the catalogue in a row, the second adding to what the first has stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from sparsec.codegen import catalog
from sparsec.codegen.backend import Backend
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec, Problem, Source, Step
from sparsec.errors import SpecError
from sparsec.formats import Format, Sum, parse
from sparsec.target import Target

_PARTS = ("bsr", "csr", "csr_groups", "bitmask", "nm", "fan_in", "block_nm")
"""Formats whose kernels take the ordinary plan and no tile, so that a part follows from the whole."""


def refuse(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Why no pair of kernels computes a Sum."""
    if not isinstance(fmt, Sum):
        return f"linear_sum reads sums of formats, not {fmt.text()}"
    if others := [part.name for part in (fmt.first, fmt.second) if part.name not in _PARTS]:
        return f"linear_sum adds {', '.join(_PARTS)}, not {others[0]}"
    if any(step.name == "add" for step in problem.epilogue[1:]):
        return "linear_sum adds a residual before other steps only"
    for part, half in zip((fmt.first, fmt.second), _halves(problem), strict=True):
        if reason := catalog.variant(f"linear_{part.name}").refuse(half, part, target):
            return reason
    return None


def _halves(problem: Problem) -> tuple[Problem, Problem]:
    head, tail = problem.epilogue[:1], problem.epilogue
    adds = bool(head) and head[0].name == "add"
    first = dataclasses.replace(problem, bias=False, epilogue=head if adds else ())
    return first, dataclasses.replace(problem, epilogue=(Step("add"), *(tail[1:] if adds else tail)))


def parts(spec: KernelSpec) -> tuple[KernelSpec, KernelSpec]:
    """The kernels of the two halves: W1 x (+ residual), then epilogue(W2 x + bias + that)."""
    fmt = parse(spec.format)
    if not isinstance(fmt, Sum):
        raise SpecError(f"KernelSpec {spec.variant!r} names format {spec.format!r}, which is no sum")
    whole = Problem(spec.op, spec.out_features, spec.in_features, spec.dtype, 0, spec.bias, spec.epilogue)
    first, second = (
        dataclasses.replace(
            spec, variant=f"linear_{part.name}", format=part.text(), bias=half.bias, epilogue=half.epilogue,
            fields=tuple(part.fields().items()),
        )
        for part, half in zip((fmt.first, fmt.second), _halves(whole), strict=True)
    )  # fmt: skip
    return first, second


class PairBackend(Backend):
    """Builds both halves with the C backend; a call runs one after the other, on the same y."""

    name = "pair"

    def available(self) -> str | None:
        return catalog.backend("c").available()

    def render(self, spec: KernelSpec) -> Source:
        c = catalog.backend("c")
        return Source(spec, self.name, "\n".join(c.render(half).text for half in parts(spec)))

    def build(self, source: Source, target: Target) -> Path:
        """Both libraries, through the cache; the path is that of the first."""
        c = catalog.backend("c")
        paths = [c.build(c.render(half), target) for half in parts(source.spec)]
        return paths[0]

    def load(self, path: Path, source: Source) -> Kernel:
        c, spec = catalog.backend("c"), source.spec
        sources = [c.render(half) for half in parts(spec)]
        first, second = (c.load(c.build(half, Target.probe()), half) for half in sources)
        fmt = parse(spec.format)
        count, adds = len(getattr(fmt, "first", fmt).buffers), bool(first.spec.epilogue)
        dtype = DTYPES[spec.dtype]

        def call(x: torch.Tensor, y: torch.Tensor, bias: Any, residual: Any, *buffers: torch.Tensor) -> None:
            if len(buffers) <= count or y.dtype is not dtype:
                raise ValueError(f"expected x, y, bias, residual, {count} buffers of the first part, and others")
            first.call(x, y, None, residual if adds else None, *buffers[:count])
            second.call(x, y, bias, y, *buffers[count:])

        return Kernel(spec, call, source.text, first.command, str(path))


BACKEND = PairBackend()
