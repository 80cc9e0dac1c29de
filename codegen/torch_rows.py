"""Tables held as factors, by torch's own gathers and products: rows are computed as they are looked up."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsec.codegen.kernel import DTYPES, KernelSpec, Problem
from sparsec.factors.rows_chain import FactoredRows, check_index
from sparsec.formats import Format
from sparsec.target import Target


def needs(problem: Problem, fmt: Format, target: Target) -> str | None:
    """A factored table whose operands are all dense; of narrow dtypes one whose rows take one product."""
    if not isinstance(fmt, FactoredRows):
        return "it looks rows of factored tables up"
    if any(operand.format is not None for plan in fmt.plans for operand in plan.operands):
        return "rows of a sparse operand cannot be looked up fast"
    if problem.dtype != "float32" and (len(fmt.plans) > 1 or any(len(plan.equations) > 2 for plan in fmt.plans)):
        return f"{problem.dtype} would be rounded between the products"
    return None


def text(spec: KernelSpec) -> str:
    """The calls that are made, as a listing."""
    fmt = FactoredRows.parse(spec.format)
    lines = [
        f"# {spec.variant}: y[n, {spec.in_features}] = W[x], x indices below {spec.out_features}",
        f"# W = {fmt.factor.text()}, {spec.dtype}",
        f"def {spec.symbol}(x, y, bias, residual, {', '.join(f'b_{name}' for name in fmt.buffers)}):",
    ]
    for at, plan in enumerate(fmt.plans):
        names = []
        for operand, held in zip(plan.operands, plan.held, strict=True):
            digits = ", ".join(f"digit {d} of x" if len(plan.y) > 1 else "x" for d in held)
            names.append(f"b_{operand.names[0]}[{digits}]" if held else f"b_{operand.names[0]}")
        names += [f"one_hot(digit {place} of x)" for place, _ in plan.deltas]
        running = names[0]
        for name, (left, right, result) in zip(names[1:], plan.equations, strict=False):
            lines.append(f'    t = einsum("{left},{right}->{result}", {running}, {name})')
            running = "t"
        lines.append(f"    {'y = ' if at == 0 else 'y += '}{running}")
    return "\n".join(lines) + "\n"


def call_of(spec: KernelSpec) -> Callable[..., None]:
    """The kernel, with the calling convention of generated ones: ValueError for operands that do not fit."""
    fmt, dtype = FactoredRows.parse(spec.format), DTYPES[spec.dtype]
    names, plans, (rows, width) = fmt.buffers, fmt.plans, fmt.weight

    def call(
        x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
        *buffers: torch.Tensor,
    ) -> None:  # fmt: skip
        if x.dtype not in (torch.int64, torch.int32) or x.device.type != "cpu" or y.dtype is not dtype:
            raise ValueError(f"x must be a CPU tensor of indices and y one of {spec.dtype}")
        if len(buffers) != len(names) or buffers[0].dtype is not dtype or bias is not None or residual is not None:
            raise ValueError(f"expected the buffers {', '.join(names)} of {spec.dtype} and nothing else")
        index, flat = x.reshape(-1).long(), y.view(-1, width)
        check_index(index, rows)
        given = dict(zip(names, buffers, strict=True))
        for at, plan in enumerate(plans):
            found = plan(index, [o.dense(given) for o in plan.operands])
            if at:
                flat += found
            else:
                flat.copy_(found)

    return call
