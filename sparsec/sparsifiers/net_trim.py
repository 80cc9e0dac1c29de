"""Net-Trim: the sparsest layer, in the l1 sense, that keeps the layer's response, by ADMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsec.errors import SpecError
from sparsec.sparsifiers.allocators import Allocator, EqualShare
from sparsec.sparsifiers.least_squares import refit
from sparsec.sparsifiers.parts import Problem, Solution, Sparsifier, check_sparsity
from sparsec.sparsifiers.ranks import lowest
from sparsec.sparsifiers.scores import AbsValue, Score


@dataclass(frozen=True, repr=False)
class NetTrim(Sparsifier):
    """Convex layer-wise pruning (Aghasi et al., Fast Convex Pruning of Deep Neural Networks, SIAM 2020).

    min ||U||_1 subject to ||U X - Y||_F <= epsilon ||Y||_F; with `relu`, for a layer that a ReLU follows, only on the
    entries with Y > 0, and U X <= 0 on the others. X is a sample of calibration inputs; the bias is part of Y and stays
    as it is. Without `sparsity` the l1 solution says what is zero; with it, the largest entries of the
    solution stay and are fitted to the response by least squares.
    """

    sparsity: float | None = None
    epsilon: float = 0.02
    relu: bool = False
    steps: int = 500
    rho: float = 1.0

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity("NetTrim", self.sparsity)
        if not self.epsilon >= 0 or self.steps < 1 or not self.rho > 0:
            raise SpecError(f"{self!r}: epsilon is not negative, steps and rho are positive")

    @property
    def score(self) -> Score:
        return AbsValue()

    @property
    def allocator(self) -> Allocator:
        return EqualShare(self.sparsity or 0.0)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("inputs",)

    def solve(self, problem: Problem) -> Solution:
        layer, inputs = problem.layer, problem.seen("NetTrim").get("inputs").double()
        weights = layer.matrix(layer.weight.detach()).double().cpu().chunk(inputs.shape[1])
        bias = torch.zeros(layer.outputs) if layer.bias is None else layer.bias.detach().cpu()
        found, offsets = [], bias.double().chunk(inputs.shape[1])
        for weight, offset, x in zip(weights, offsets, inputs.unbind(1)):
            found.append(net_trim(weight, x, offset, self.epsilon, self.relu, self.steps, self.rho))
        trimmed = torch.cat(found).masked_fill_(layer.matrix(layer.weight.detach()).cpu() == 0, 0)
        if self.sparsity is not None:
            drop = torch.from_numpy(lowest(trimmed.abs().reshape(-1).numpy(), problem.zeros)).reshape(trimmed.shape)
            kept = (~drop).chunk(len(weights))
            pairs = zip(weights, trimmed.chunk(len(weights)), kept, inputs.unbind(1))
            trimmed = torch.cat([refit(w, t, k, x.T @ x / len(x), 1e-6) for w, t, k, x in pairs])
            trimmed = trimmed.masked_fill_(drop, 0)
        weight = layer.from_matrix(trimmed).to(layer.weight)
        return Solution(weight, weight != 0)


def net_trim(
    weight: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    relu: bool = False,
    steps: int = 500,
    rho: float = 1.0,
) -> torch.Tensor:
    """U of least l1 norm whose response on `x` [samples, features] keeps that of `weight` [outputs, features].

    The response is x W^T + bias; see `NetTrim` for the constraints. ADMM on U = A, U x^T = B with the factored
    I + x^T x; the entries that the l1 prox sets to zero are exactly zero. Scaled so that `rho` = 1 suits any layer.
    """
    scale = float(x.square().sum(1).mean().sqrt()) or 1.0
    x = x / scale
    size = float(weight.abs().mean()) or 1.0
    weight, offset = weight / size, bias[:, None] / (size * scale)
    goal = weight @ x.T + offset  # [outputs, samples]
    on = goal > 0 if relu else torch.ones_like(goal, dtype=torch.bool)
    radius = epsilon * float((goal * on).norm())
    factor = torch.linalg.cholesky(torch.eye(x.shape[1], dtype=x.dtype) + x.T @ x)
    sparse, response = weight.clone(), weight @ x.T
    dual_u, dual_r = torch.zeros_like(sparse), torch.zeros_like(response)
    for _ in range(steps):
        right = (sparse - dual_u) + (response - dual_r) @ x
        u = torch.cholesky_solve(right.T, factor).T
        image = u @ x.T
        shifted = u + dual_u
        sparse = shifted.sign() * (shifted.abs() - 1 / rho).clamp(min=0)
        response = _feasible(image + dual_r + offset, goal, on, radius) - offset
        dual_u += u - sparse
        dual_r += image - response
    return sparse * size


def _feasible(found: torch.Tensor, goal: torch.Tensor, on: torch.Tensor, radius: float) -> torch.Tensor:
    """The nearest response that the constraints allow."""
    gap = (found - goal) * on
    length = float(gap.norm())
    near = goal + gap * (min(1.0, radius / length) if length else 1.0)
    return torch.where(on, near, found.clamp(max=0))
