"""Batches of factored matrices: torch's own batched products, or a generated chain for one matrix after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters

import torch

from sparsec.codegen import catalog
from sparsec.codegen.backend import Backend
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec, Problem, Source
from sparsec.factors._contraction import Contraction
from sparsec.factors.batch_chain import FactoredBatch
from sparsec.formats import Buffers, Format
from sparsec.target import Target


def needs(problem: Problem, fmt: Format, target: Target) -> str | None:
    """As torch's chains: the factor's own buffers, all of them dense."""
    if not isinstance(fmt, FactoredBatch) or fmt.tiled:
        return "torch's products read the operands as the factor has them"
    if any(operand.format is not None for term in fmt.each.terms() for operand in term.operands):
        return "torch has no fast product with a sparse operand"
    return None


def _parse(spec: KernelSpec) -> FactoredBatch:
    return FactoredBatch.parse(spec.format)


def joined(term: Contraction) -> list[tuple[str, ...]]:
    """The (left, right, result) of each step, with a letter for the matrices in front."""
    used = "".join(term.sizes)
    letter = next(c for c in ascii_letters if c not in used and c != "z")
    return [tuple(letter + part for part in step) for step in term.steps()]


def text(spec: KernelSpec) -> str:
    """The calls that are made, as a listing."""
    fmt = _parse(spec)
    lines = [
        f"# {spec.variant}: y[b] = x[b] W[b] for {fmt.weight[0]} matrices of {fmt.weight[1:]}",
        f"# W[b]^T = {fmt.factor.text()}, {spec.dtype}",
        f"def {spec.symbol}(x, y, bias, residual, {', '.join(f'b_{name}' for name in fmt.buffers)}):",
    ]
    for at, term in enumerate(fmt.each.terms()):
        running = "x"
        for operand, (left, right, result) in zip(term.operands, joined(term), strict=True):
            lines.append(f'    t = einsum("{left},{right}->{result}", {running}, b_{operand.names[0]})')
            running = "t"
        lines.append(f"    {'y = ' if at == 0 else 'y += '}t")
    return "\n".join(lines) + "\n"


Call = Callable[..., None]


def call_of(spec: KernelSpec) -> Call:
    """The kernel by torch's products, with the calling convention of generated ones."""
    fmt = _parse(spec)
    terms = fmt.each.terms()
    steps = [joined(term) for term in terms]

    def run(x: torch.Tensor, y: torch.Tensor, buffers: Buffers) -> None:
        batch, n = x.shape[:2]
        for at, (term, equations) in enumerate(zip(terms, steps, strict=True)):
            running = x.reshape(batch, n, *term.x)
            for operand, (left, right, result) in zip(term.operands, equations, strict=True):
                own = buffers[operand.names[0]].reshape(batch, *operand.shape)
                if len(left) == len(right) == 3 and (right[2], result) == (left[2], left[:2] + right[1]):
                    running = torch.bmm(running, own.mT)
                else:
                    running = torch.einsum(f"{left},{right}->{result}", running, own)
            found = running.reshape(batch, n, -1)
            if at:
                y += found
            else:
                y.copy_(found)

    return _checked(spec, fmt, lambda x, y, buffers: run(x, y, dict(zip(fmt.buffers, buffers, strict=True))))


def _checked(spec: KernelSpec, fmt: FactoredBatch, run: Callable[..., None]) -> Call:
    dtype, names, (batch, width, out) = DTYPES[spec.dtype], fmt.buffers, fmt.weight

    def call(
        x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
        *buffers: torch.Tensor,
    ) -> None:  # fmt: skip
        if x.dim() != 3 or (x.shape[0], x.shape[2]) != (batch, width) or x.dtype is not dtype or x.device.type != "cpu":
            raise ValueError(f"x must be a CPU tensor ({batch}, n, {width}) of {spec.dtype}")
        if tuple(y.shape) != (batch, x.shape[1], out) or bias is not None or residual is not None:
            raise ValueError(f"y must be ({batch}, {x.shape[1]}, {out}), and there is neither bias nor residual")
        if len(buffers) != len(names) or buffers[0].dtype is not dtype:
            raise ValueError(f"expected the buffers {', '.join(names)} of {spec.dtype}")
        if x.shape[1]:
            run(x, y, buffers)

    return call


def part(spec: KernelSpec) -> KernelSpec:
    """The kernel of one matrix."""
    each = _parse(spec).each
    variant = "chain" if spec.dtype == "float32" else "chain_bf16"
    return dataclasses.replace(spec, op="chain", variant=variant, format=each.text(), fields=catalog.fields_of(each))


class BatchBackend(Backend):
    """Builds the kernel of one matrix with the C backend; a call runs it for each."""

    name = "batch"

    def available(self) -> str | None:
        return catalog.backend("c").available()

    def render(self, spec: KernelSpec) -> Source:
        return Source(spec, self.name, catalog.backend("c").render(part(spec)).text)

    def build(self, source: Source, target: Target) -> Path:
        c = catalog.backend("c")
        return c.build(c.render(part(source.spec)), target)

    def load(self, path: Path, source: Source) -> Kernel:
        c, spec = catalog.backend("c"), source.spec
        inner = c.load(path, c.render(part(spec)))

        def run(x: torch.Tensor, y: torch.Tensor, buffers: tuple[torch.Tensor, ...]) -> None:
            x = x.contiguous()
            for at in range(x.shape[0]):
                inner.call(x[at], y[at], None, None, *(t[at] for t in buffers))

        return Kernel(spec, _checked(spec, _parse(spec), run), source.text, inner.command, str(path))


BACKEND = BatchBackend()
