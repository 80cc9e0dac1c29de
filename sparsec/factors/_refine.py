"""Alternating least squares for any multilinear factor, in any norm: conjugate gradients with exact line search."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sparsec.formats import Buffers

if TYPE_CHECKING:
    from sparsec.factors._base import Factor

_SWEEPS = 12
_STEPS = 10
_STALLED = 1e-6  # a sweep that lowers the squared error by less than this part of it is the last


def refine(
    factor: Factor,
    buffers: Buffers,
    weight: torch.Tensor,
    gram: torch.Tensor | None = None,
    sweeps: int = _SWEEPS,
    steps: int = _STEPS,
) -> Buffers:
    """Lower tr((W - R) G (W - R)^H) over one buffer after the other; never raises it.

    The reconstruction R is linear in each buffer by itself, so each turn is a least squares problem, solved in part by
    `steps` conjugate gradient steps. `factor` is resolved; `weight` (out, in, ...) and the buffers are float64.
    """
    terms = factor.contract(tuple(weight.shape))

    def rebuild(buffers: Buffers) -> torch.Tensor:
        parts = [c.reconstruct(buffers) for c in terms]
        return sum(parts[1:], parts[0])

    weight = weight.flatten(1)
    current = {name: t.detach().clone() for name, t in buffers.items()}
    before = _squared(weight - rebuild(current), gram)
    floor = torch.finfo(weight.dtype).eps ** 2 * float(_squared(weight, gram))
    for _ in range(sweeps):
        for name, tensor in current.items():
            if tensor.is_floating_point() or tensor.is_complex():
                current[name] = _turn(rebuild, current, name, weight, gram, steps)
        after = _squared(weight - rebuild(current), gram)
        if before - after <= _STALLED * before or after <= floor:
            break
        before = after
    return current


def _turn(
    rebuild: Callable[[Buffers], torch.Tensor],
    buffers: Buffers,
    name: str,
    weight: torch.Tensor,
    gram: torch.Tensor | None,
    steps: int,
) -> torch.Tensor:
    """The buffer `name` after some conjugate gradient steps, the others held."""
    value = buffers[name]
    with torch.enable_grad():
        variable = value.detach().clone().requires_grad_(True)
        built = rebuild({**buffers, name: variable})
    residual = weight - built.detach()
    direction: torch.Tensor | None = None
    last = 0.0
    for _ in range(steps):
        # R is linear in the variable, so one graph serves every step: the gradient is its adjoint at E G.
        (slope,) = torch.autograd.grad(built, variable, _times(residual, gram), retain_graph=True)
        size = float(slope.abs().square().sum())
        if size == 0.0:
            break
        direction = slope if direction is None else slope + (size / last) * direction
        last = size
        moved = rebuild({**buffers, name: direction})
        curvature = _squared(moved, gram)
        if curvature <= 0.0:
            break
        step = size / curvature
        value = value + step * direction
        residual = residual - step * moved
    return value.detach()


def _times(tensor: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    return tensor if gram is None else tensor @ gram


def _squared(tensor: torch.Tensor, gram: torch.Tensor | None) -> float:
    return float((_times(tensor, gram) * tensor.conj()).sum().real)
