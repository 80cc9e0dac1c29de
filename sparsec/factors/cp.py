"""CP: a sum of rank-one tensors, with components kept from growing against each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._cp_fit import balance, cp_als, exact_cp, stabilise
from sparsec.factors._modes import Modes, check_digits, modes, refuse_modes
from sparsec.formats import Buffers


@dataclass(frozen=True)
class CP(Factor):
    """W[n_1, ..., n_d] = sum_r mode_0[n_1, r] ... mode_{d-1}[n_d, r].

    The modes are the digits `outs` of the outputs, `ins` of the inputs (None: balanced pairs for a matrix), and the
    window of a convolution as one: 1x1 to `rank` channels, a depthwise window, 1x1. The fit is alternating least
    squares from several starts, then the error-preserving correction (Phan et al., Stable Low-rank Tensor
    Decomposition, ECCV 2020): of all factors with the same error, those of small sensitivity, since plain ALS may give
    huge components that cancel. Components are ordered by size; leading ones are a smaller rank.
    """

    rank: int
    outs: tuple[int, ...] | None = None
    ins: tuple[int, ...] | None = None

    name: ClassVar[str] = "cp"

    def __post_init__(self) -> None:
        positive("CP", rank=self.rank)
        for field, digits in check_digits("CP", outs=self.outs, ins=self.ins).items():
            object.__setattr__(self, field, digits)

    def resolve(self, shape: Shape) -> CP:
        grid = modes(shape, self.outs, self.ins)
        return CP(self.rank, grid.outs, grid.ins)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        grid = modes(shape, self.outs, self.ins)
        if (reason := refuse_modes(shape, grid)) is not None:
            return reason
        sizes = _sizes(grid)
        most = prod(sizes) // max(sizes)
        if self.rank > most:
            return f"rank={self.rank} is more than the {most} that suffice for any {sizes} tensor"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        grid = modes(shape, self.outs, self.ins)
        return {f"mode_{m}": (size, self.rank) for m, size in enumerate(_sizes(grid))}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        grid = modes(shape, self.outs, self.ins)
        outs, ins = len(grid.outs), len(grid.ins)
        digits = [
            Operand((f"mode_{m}",), grid.letters[m] + "r", (grid.sizes[m], self.rank)) for m in range(outs + ins)
        ]
        window = []
        if grid.kernel:
            window = [Operand((f"mode_{outs + ins}",), grid.kernel_letters + "r", (*grid.kernel, self.rank))]
        operands = (*digits[outs:], *window, *digits[:outs])
        return (
            Contraction(
                grid.in_letters, grid.out_letters, grid.ins + grid.kernel, grid.outs, operands, grid.kernel_letters
            ),
        )

    def solve(self, weight: torch.Tensor) -> Buffers:
        tensor = weight.reshape(_sizes(modes(tuple(weight.shape), self.outs, self.ins)))
        factors = exact_cp(tensor, self.rank)
        if factors is None:
            factors = cp_als(tensor, self.rank)
            if not tensor.is_complex():
                factors = stabilise(tensor, factors)
        return {f"mode_{m}": f for m, f in enumerate(_ordered(factors))}

    def slice(self, buffers: Buffers, rank: int) -> tuple[Factor, Buffers]:
        if type(rank) is not int or not 1 <= rank <= self.rank:
            raise SpecError(f"rank {rank!r} cannot be sliced out of {self.text()}; valid: 1 to {self.rank}")
        return CP(rank, self.outs, self.ins), {k: t[:, :rank].contiguous() for k, t in buffers.items()}


def _sizes(grid: Modes) -> Shape:
    """Sizes of the modes, the window as one."""
    return grid.outs + grid.ins + ((prod(grid.kernel),) if grid.kernel else ())


def _ordered(factors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Components by falling size, each factor with an even share of it."""
    whole = torch.stack([f.norm(dim=0) for f in factors]).prod(dim=0)
    order = torch.argsort(whole, descending=True, stable=True)
    return [f[:, order] for f in balance(factors)]
