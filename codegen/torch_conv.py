"""Factored convolutions by torch's own: 1x1 convolutions and windows in a row (Tucker-2, CP, trains, low rank)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen.kernel import DTYPES, Conv, KernelSpec, Problem
from sparsec.errors import SpecError
from sparsec.factors.conv_chain import FactoredConv
from sparsec.factors.conv_steps import run_chains
from sparsec.formats import Format
from sparsec.target import Target


class Walk(NamedTuple):
    """Stride, padding and dilation of a geometry whose padding is the same at both ends."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def walk_of(conv: Conv) -> Walk:
    """How the chain walks; uneven zeros are added before, by `padded`."""
    even = conv.low == conv.high
    return Walk(conv.stride, conv.low if even else (0,) * len(conv.low), conv.dilation)


def padded(x: torch.Tensor, conv: Conv) -> torch.Tensor:
    """x with the zeros that torch's convolution cannot add by itself."""
    if conv.low == conv.high:
        return x
    return F.pad(x, [n for pair in zip(reversed(conv.low), reversed(conv.high), strict=True) for n in pair])


def needs(problem: Problem, fmt: Format, target: Target) -> str | None:
    """A factored weight, one group of channels, and a factor that is a chain of convolutions on dense operands."""
    if not isinstance(fmt, FactoredConv):
        return "it runs factored convolutions"
    if problem.conv is None or problem.conv.groups != 1:
        return "factored weights are those of convolutions with one group of channels"
    try:
        chains = fmt.chains
    except SpecError as error:
        return str(error)
    if any(step.operand.format is not None for chain in chains for step in chain.steps):
        return "torch has no convolution with a sparse operand"
    return None


def text(spec: KernelSpec) -> str:
    """The calls that are made, as a listing."""
    fmt = FactoredConv.parse(spec.format)
    tail = " + bias" * spec.bias
    lines = [
        f"# {spec.variant}: y[batch, {spec.out_features}, ...] = epilogue(conv(x, W){tail})",
        f"# W = {fmt.factor.text()}, {spec.dtype}",
        f"def {spec.symbol}(x, y, bias, residual, {', '.join(f'b_{name}' for name in fmt.buffers)}):",
    ]
    for at, chain in enumerate(fmt.chains):
        running = "x"
        for step in chain.steps:
            kernel = "x".join(map(str, step.kernel))
            lines.append(
                f"    t = conv({running}, b_{step.operand.names[0]})  # {step.channels} to {step.out} channels, "
                f"{kernel}{f', {step.groups} groups' if step.groups > 1 else ''}"
            )
            running = "t"
        lines.append(f"    {'y = ' if at == 0 else 'y += '}t")
    lines += ["    y += bias"] * spec.bias
    lines += [f"    y = {step.text()}(y{', residual' if step.name == 'add' else ''})" for step in spec.epilogue]
    return "\n".join(lines) + "\n"


def call_of(spec: KernelSpec) -> Callable[..., None]:
    """The kernel, with the calling convention of generated ones: ValueError for operands that do not fit."""
    fmt, conv, dtype, steps = FactoredConv.parse(spec.format), spec.conv, DTYPES[spec.dtype], spec.epilogue
    if conv is None:
        raise SpecError(f"{spec.variant} needs the geometry of a convolution")
    names, chains, walk = fmt.buffers, fmt.chains, walk_of(conv)
    image, result = (fmt.weight[1], *conv.size), (spec.out_features, *conv.out)

    def call(
        x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
        *buffers: torch.Tensor,
    ) -> None:  # fmt: skip
        if x.shape[-len(image) :] != image or x.dtype is not dtype or x.device.type != "cpu":
            raise ValueError(f"x must be a CPU tensor of {spec.dtype} with images of {image}")
        if len(buffers) != len(names) or buffers[0].dtype is not dtype:
            raise ValueError(f"expected the buffers {', '.join(names)} of {spec.dtype}")
        if (bias is None) is spec.bias or (bias is not None and bias.shape != result[:1]):
            raise ValueError(f"bias must be {f'a tensor of {result[0]}' if spec.bias else 'None'}")
        flat = y.view(-1, *result)
        if not flat.shape[0]:
            return
        given = padded(x.reshape(-1, *image), conv)
        done = run_chains(chains, given, dict(zip(names, buffers, strict=True)), walk)
        if bias is not None:
            done = done + bias.view(-1, *(1 for _ in conv.size))
        if steps:
            done = verify.apply_steps(steps, done, residual.reshape(flat.shape) if residual is not None else None)
        flat.copy_(done)

    return call
