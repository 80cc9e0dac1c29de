"""Low rank adapters beside a frozen weight: merging them into it, freezing them by score, dropping ranks at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsec.errors import InputError, SpecError
from sparsec.factors._base import Factor, Shape
from sparsec.formats import Buffers


@dataclass(frozen=True)
class Adapter:
    """y = x W^T + ((x down^T) * scale_down) up^T * scale_up: an adapter with scaling vectors beside W (out, in).

    down (rank, in), up (out, rank), scale_down (rank), scale_up (out); the vectors of ones are an ordinary LoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale_down: torch.Tensor
    scale_up: torch.Tensor

    def __post_init__(self) -> None:
        rank, out = self.down.shape[0], self.up.shape[0]
        expected = {"up": (out, rank), "scale_down": (rank,), "scale_up": (out,)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                found = tuple(getattr(self, name).shape)
                raise InputError(f"Adapter: {name} has shape {found}, expected {shape} beside down {rank, '...'}")

    def buffers(self) -> Buffers:
        """The adapter as the buffers of LowRank(rank), the vectors absorbed."""
        return {"right": self.down * self.scale_down[:, None], "left": self.up * self.scale_up[:, None]}

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x (..., in) through the weight and the adapter, unmerged."""
        return x @ weight.T + ((x @ self.down.T) * self.scale_down) @ self.up.T * self.scale_up

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """W + diag(scale_up) up diag(scale_down) down: one dense weight that does what both did."""
        own = self.buffers()
        return weight + own["left"] @ own["right"]


class FreezeScore:
    """How much a matrix still matters to training: mean of smoothed sensitivity times smoothed uncertainty.

    With I = |gradient * value|: I_t = beta1 I_{t-1} + (1 - beta1) I, U_t = beta2 U_{t-1} + (1 - beta2) |I - I_t|, and
    the score is mean(I_t U_t) (AdaLoRA, Zhang et al., 2023; used to freeze by AFLoRA, Liu et al., 2024).
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise SpecError(f"FreezeScore: betas {beta1!r} and {beta2!r} must be from 0 to below 1")
        self.beta1, self.beta2 = beta1, beta2
        self._sensitivity: torch.Tensor | None = None
        self._uncertainty: torch.Tensor | None = None

    def update(self, value: torch.Tensor, gradient: torch.Tensor) -> float:
        """The score after one more step."""
        now = (value.detach() * gradient.detach()).abs()
        last = torch.zeros_like(now) if self._sensitivity is None else self._sensitivity
        spread = torch.zeros_like(now) if self._uncertainty is None else self._uncertainty
        self._sensitivity = self.beta1 * last + (1 - self.beta1) * now
        self._uncertainty = self.beta2 * spread + (1 - self.beta2) * (now - self._sensitivity).abs()
        return float((self._sensitivity * self._uncertainty).mean())


def trainable_share(step: int, start: int, end: int) -> float:
    """Share of adapter matrices that still train: 1 until `start`, 0 from `end`, a falling cubic between."""
    if not 0 <= start < end:
        raise SpecError(f"freezing from step {start} to {end} is no interval; start must be below end")
    if step <= start:
        return 1.0
    return 0.0 if step >= end else (1.0 - (step - start) / (end - start)) ** 3


def to_freeze(scores: dict[str, float], step: int, start: int, end: int) -> list[str]:
    """Names of the matrices that no longer train at `step`: the lowest scores, ties by name."""
    count = len(scores) - round(trainable_share(step, start, end) * len(scores))
    return sorted(scores, key=lambda n: (scores[n], n))[:count]


def rank_dropout(
    factor: Factor, buffers: Buffers, shape: Shape, keep: float, generator: torch.Generator | None = None
) -> Buffers:
    """Each rank kept with probability `keep` and divided by it, so that the expected weight is the weight itself.

    Tensor dropout (Kolbeinsson et al., 2021): a Bernoulli mask on the one index that all operands of the factor share;
    LowRank, CP and Kronecker have one. Raises SpecError for other factors and for `keep` outside (0, 1].
    """
    if not 0.0 < keep <= 1.0:
        raise SpecError(f"keep={keep!r} must be above 0 and at most 1")
    (term, *more) = factor.resolve(shape).contract(shape)
    shared = set(term.operands[0].letters).intersection(*(o.letters for o in term.operands))
    shared -= set(term.inputs + term.outputs)
    if more or len(shared) != 1 or any(o.format is not None for o in term.operands):
        raise SpecError(f"{factor.text()} has no rank index that all its tensors share; drop ranks of LowRank or CP")
    letter = shared.pop()
    rank = term.sizes[letter]
    first = term.operands[0]
    mask = (torch.rand(rank, generator=generator) < keep).to(buffers[first.names[0]]) / keep
    return masked_ranks(factor, buffers, shape, mask)


def masked_ranks(factor: Factor, buffers: Buffers, shape: Shape, mask: torch.Tensor) -> Buffers:
    """The buffers with rank r of the first operand multiplied by mask[r]."""
    (term,) = factor.resolve(shape).contract(shape)
    first = term.operands[0]
    shared = set(first.letters).intersection(*(o.letters for o in term.operands)) - set(term.inputs + term.outputs)
    place = first.letters.index(shared.pop())
    name = first.names[0]
    tensor = buffers[name].reshape(first.shape)
    scale = mask.reshape([-1 if at == place else 1 for at in range(tensor.dim())])
    return {**buffers, name: (tensor * scale).reshape(buffers[name].shape)}
