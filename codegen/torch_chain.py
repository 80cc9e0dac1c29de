"""Factored weights by torch's own matrix products: the contender of generated chains, and the better one at one row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen import batched, torch_conv, torch_rows
from sparsec.codegen.backend import Backend
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec, Source
from sparsec.errors import SpecError
from sparsec.factors.chain import Factored
from sparsec.formats import Buffers
from sparsec.target import Target

Run = Callable[[torch.Tensor, Buffers, "torch.Tensor | None", torch.Tensor], None]
"""(x (batch, in), the factor's buffers, bias, y (batch, out)): fills y with the product and the bias."""


_OTHERS: dict[str, tuple[Callable[[KernelSpec], str], Callable[[KernelSpec], Callable[..., None]]]] = {
    "conv": (torch_conv.text, torch_conv.call_of),
    "embedding": (torch_rows.text, torch_rows.call_of),
    "bmm": (batched.text, batched.call_of),
}
"""Ops besides chains of linears: how their listings and their calls are made."""


class TorchChainBackend(Backend):
    """Nothing is compiled: the text says which calls are made, and the kernel makes them."""

    name = "torch"

    def render(self, spec: KernelSpec) -> Source:
        if spec.op in _OTHERS:
            return Source(spec, self.name, _OTHERS[spec.op][0](spec))
        fmt = _format(spec)
        lines = [
            f"# {spec.variant}: y[batch, {fmt.out}] = epilogue(x[batch, {fmt.inp}] W^T{' + bias' * spec.bias})",
            f"# W = {fmt.factor.text()}, {spec.dtype}",
            f"def {spec.symbol}(x, y, bias, residual, {', '.join(map(_identifier, fmt.buffers))}):",
        ]
        for at, term in enumerate(fmt.terms()):
            running = f"x.view(-1, {', '.join(map(str, term.x))})"
            for operand, (left, right, result) in zip(term.operands, term.steps(), strict=True):
                shaped = f"{_identifier(operand.names[0])}.view({', '.join(map(str, operand.shape))})"
                lines.append(f'    t = einsum("{left},{right}->{result}", {running}, {shaped})')
                running = "t"
            lines.append(f"    {'y = ' if at == 0 else 'y += '}t.reshape(-1, {fmt.out})")
        if spec.bias:
            lines.append("    y += bias")
        lines += [f"    y = {step.text()}(y{', residual' if step.name == 'add' else ''})" for step in spec.epilogue]
        return Source(spec, self.name, "\n".join(lines) + "\n")

    def build(self, source: Source, target: Target) -> Path:
        return Path()

    def load(self, path: Path, source: Source) -> Kernel:
        spec = source.spec
        call = _OTHERS[spec.op][1](spec) if spec.op in _OTHERS else _call(spec, _format(spec))
        return Kernel(spec, call, source.text, ())


def _identifier(buffer: str) -> str:
    """`0_right`, the buffer of a sum's first term, as a name."""
    return f"term{buffer}" if buffer[0].isdigit() else buffer


def _format(spec: KernelSpec) -> Factored:
    fmt = Factored.parse(spec.format)
    if fmt.tiled:
        raise SpecError(f"{spec.variant} reads the buffers of the factor, not the tiles of {spec.format}")
    return fmt


def _call(spec: KernelSpec, fmt: Factored) -> Callable[..., None]:
    names, dtype, steps = fmt.buffers, DTYPES[spec.dtype], spec.epilogue
    run = _linears(fmt) or _einsums(fmt)

    def call(
        x: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        *buffers: torch.Tensor,
    ) -> None:
        """The calling convention of generated kernels: ValueError for operands that do not fit."""
        if x.shape[-1:] != (fmt.inp,) or x.dtype is not dtype or x.device.type != "cpu":
            raise ValueError(f"x must be a CPU tensor of {spec.dtype} with rows of {fmt.inp} elements")
        if len(buffers) != len(names) or buffers[0].dtype is not dtype:
            raise ValueError(f"expected the buffers {', '.join(names)} of {spec.dtype}")
        if (bias is None) is spec.bias or (bias is not None and bias.shape != (fmt.out,)):
            raise ValueError(f"bias must be {f'a tensor of {fmt.out}' if spec.bias else 'None'}")
        flat = y.view(-1, fmt.out)
        if not flat.shape[0]:
            return
        run(x.reshape(-1, fmt.inp), dict(zip(names, buffers, strict=True)), bias, flat)
        if steps:
            rest = residual.reshape(flat.shape) if residual is not None else None
            flat.copy_(verify.apply_steps(steps, flat, rest))

    return call


def _linears(fmt: Factored) -> Run | None:
    """Factors whose every step is a plain matrix product: linear after linear, the last one into y."""
    (term, *more) = fmt.terms()
    names: list[str] = []
    for operand, (left, right, result) in zip(term.operands, term.steps(), strict=True):
        plain = len(left) == len(right) == 2 and right[1] == left[1] and result == left[0] + right[0]
        if more or not plain or operand.format is not None:
            return None
        names.append(operand.names[0])

    def run(x: torch.Tensor, buffers: Buffers, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        for name in names[:-1]:
            x = F.linear(x, buffers[name])
        last = buffers[names[-1]].t()
        if bias is None:
            torch.mm(x, last, out=y)
        else:
            torch.addmm(bias, x, last, out=y)

    return run


def _einsums(fmt: Factored) -> Run:
    terms = fmt.terms()

    def run(x: torch.Tensor, buffers: Buffers, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        y.copy_(terms[0].apply(x, buffers))
        for term in terms[1:]:
            y += term.apply(x, buffers)
        if bias is not None:
            y += bias

    return run


BACKEND = TorchChainBackend()
