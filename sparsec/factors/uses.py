"""Factored weights beyond the linear layer: convolutions, embedding tables, batched products, state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from sparsec.errors import FormatError, InputError
from sparsec.factors._base import Factor, Fit, Shape
from sparsec.factors.conv_steps import CONVOLUTIONS, chain_of, run_chains, windowed
from sparsec.factors.rows_chain import rows as rows
from sparsec.formats import Buffers


@dataclass(frozen=True)
class Window:
    """Stride, padding and dilation of a convolution, one number a dimension."""

    stride: Shape
    padding: Shape
    dilation: Shape

    @classmethod
    def of(cls, dims: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Window:
        """Numbers repeated for every dimension, as torch has it. Raises InputError for the wrong count."""
        found = []
        for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
            full = (value,) * dims if isinstance(value, int) else tuple(value)
            if len(full) != dims or any(type(v) is not int for v in full):
                raise InputError(f"{name}={value!r} must be an int or {dims} of them")
            found.append(full)
        return cls(*found)

    def output(self, size: int, kernel: int, dim: int) -> int:
        """Positions along `dim` that an input of `size` leaves."""
        span = self.dilation[dim] * (kernel - 1) + 1
        return (size + 2 * self.padding[dim] - span) // self.stride[dim] + 1


def convolve(
    factor: Factor,
    x: torch.Tensor,
    buffers: Buffers,
    shape: Shape,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> torch.Tensor:
    """x (batch, in, *size) convolved with the factored weight (out, in, *kernel), without forming the weight.

    Window letters of the factor's einsum become small convolutions and the rest 1x1 ones, so a Tucker-2 weight is 1x1,
    window, 1x1, a CP weight 1x1, depthwise, 1x1 and a low rank one window, 1x1. Factors that mix the window with
    channels (Monarch, Kronecker) are reconstructed. Raises InputError for an x of another shape.
    """
    dims = len(shape) - 2
    if dims < 1 or x.dim() != dims + 2 or x.shape[1] != shape[1]:
        raise InputError(f"x has shape {tuple(x.shape)}, expected (batch, {shape[1]}, ...) for a {shape} weight")
    window = Window.of(dims, stride, padding, dilation)
    total: torch.Tensor | None = None
    for c in factor.resolve(shape).contract(shape):
        opened = windowed(c, shape)
        if opened is not None:
            term = run_chains((chain_of(opened),), x, buffers, window)
        else:
            dense = c.reconstruct(buffers).reshape(shape)
            term = CONVOLUTIONS[dims - 1](x, dense, None, window.stride, window.padding, window.dilation)
        total = term if total is None else total + term
    return x.new_zeros(()) if total is None else total


def conv_flops(
    factor: Factor, shape: Shape, batch: int, size: Shape, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> int:
    """Floating point operations of `convolve` on `batch` images of `size`: two a product."""
    dims = len(shape) - 2
    window = Window.of(dims, stride, padding, dilation)
    places = [window.output(n, k, d) for d, (n, k) in enumerate(zip(size, shape[2:]))]
    total = 0
    for c in factor.resolve(shape).contract(shape):
        opened = windowed(c, shape)
        if opened is None:
            total += 2 * batch * prod(places) * prod(shape)
            continue
        running = list(size)
        for step in chain_of(opened).steps:
            running = [at if used else now for now, at, used in zip(running, places, step.window, strict=True)]
            total += step.flops(batch, prod(running))
    return total


def fit_batch(factor: Factor, dense: torch.Tensor, gram: torch.Tensor | None = None) -> Fit:
    """A factor for every matrix of `dense` (batch, out, in): buffers with a leading batch axis, one error for all.

    `gram` (batch, in, in) or (in, in). Raises FormatError for anything but three dimensions.
    """
    if dense.dim() != 3:
        raise FormatError(f"a batch of matrices is (batch, out, in), got {tuple(dense.shape)}")
    grams = [None] * len(dense) if gram is None else (gram if gram.dim() == 3 else [gram] * len(dense))
    fits = [factor.fit(w, g) for w, g in zip(dense, grams, strict=True)]
    energy = [float(w.double().norm()) ** 2 for w in dense]
    if gram is not None:
        pairs = zip(dense.double(), grams, strict=True)
        energy = [float(((w @ g.double()) * w).sum()) for w, g in pairs if g is not None]
    whole = sum(energy)
    error = (sum(f.error**2 * e for f, e in zip(fits, energy)) / whole) ** 0.5 if whole > 0 else 0.0
    return Fit({k: torch.stack([f.buffers[k] for f in fits]) for k in fits[0].buffers}, error)


def apply_batch(factor: Factor, x: torch.Tensor, buffers: Buffers, shape: Shape) -> torch.Tensor:
    """x (batch, n, in) times the matrices (out, in) = `shape` behind the buffers of `fit_batch`: (batch, n, out)."""
    own = [{k: t[at] for k, t in buffers.items()} for at in range(len(x))]
    return torch.stack([factor.apply(part, b, shape) for part, b in zip(x, own, strict=True)])


def to_factored(state: Mapping[str, torch.Tensor], factors: Mapping[str, Factor]) -> dict[str, torch.Tensor]:
    """A state dict with the weights named in `factors` replaced by their buffers, as `name.buffer`; fits them."""
    if missing := [name for name in factors if name not in state]:
        raise InputError(f"the state dict has no weight {missing[0]!r}")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name in factors:
            found.update({f"{name}.{k}": t for k, t in factors[name].fit(tensor).buffers.items()})
        else:
            found[name] = tensor
    return found


def to_dense(
    state: Mapping[str, torch.Tensor], factors: Mapping[str, Factor], shapes: Mapping[str, Shape]
) -> dict[str, torch.Tensor]:
    """The inverse of `to_factored`: reconstructions under the weights' own names, validated before."""
    found = dict(state)
    for name, factor in factors.items():
        own = {k: found.pop(f"{name}.{k}") for k in factor.resolve(shapes[name]).shapes(shapes[name])}
        factor.validate(own, shapes[name])
        found[name] = factor.reconstruct(own, shapes[name])
    return {k: found[k] for k in [*(k for k in state if k in found), *factors]}
