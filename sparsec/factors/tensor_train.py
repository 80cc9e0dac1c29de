"""TensorTrain: a chain of small cores, over all modes in a row or over pairs of an output and an input digit."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._linalg import split
from sparsec.factors._modes import RANK_LETTERS, Modes, check_digits, check_ranks, modes, refuse_modes
from sparsec.formats import Buffers


@dataclass(frozen=True)
class TensorTrain(Factor):
    """W[n_1, ..., n_d] = core_0[n_1, :] core_1[:, n_2, :] ... core_{d-1}[:, n_d]: cores (r_{l-1}, size_l, r_l).

    The carriages are the digits `outs` of the outputs, then the window of a convolution, then the digits `ins` of the
    inputs; a convolution becomes 1x1, one-dimensional windows, 1x1. `paired` puts o_l and i_l on one carriage of size
    o_l i_l (the TT-matrix of Novikov et al., NIPS 2015): fewer values, more products. `ranks` is one int, cut to what a
    bond can need, or one for each of the d - 1 bonds. The fit is TT-SVD (Oseledets, 2011, algorithm 1), whose error is
    at most sqrt(d - 1) times the best.
    """

    ranks: int | tuple[int, ...]
    outs: tuple[int, ...] | None = None
    ins: tuple[int, ...] | None = None
    paired: bool = False

    name: ClassVar[str] = "tensor_train"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", check_ranks("TensorTrain", self.ranks))
        for field, digits in check_digits("TensorTrain", outs=self.outs, ins=self.ins).items():
            object.__setattr__(self, field, digits)
        if not isinstance(self.paired, bool):
            raise SpecError(f"TensorTrain: paired={self.paired!r} must be True or False")

    def resolve(self, shape: Shape) -> TensorTrain:
        grid = modes(shape, self.outs, self.ins)
        ranks = self.ranks
        if isinstance(ranks, int):
            ranks = tuple(min(ranks, most) for most in bonds_of(self._cars(grid)))
        return TensorTrain(ranks or (1,), grid.outs, grid.ins, self.paired)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        grid = modes(shape, self.outs, self.ins)
        if (reason := refuse_modes(shape, grid)) is not None:
            return reason
        if self.paired and grid.kernel:
            return "paired cores are for matrices; a convolution has window positions without a partner"
        if self.paired and len(grid.outs) != len(grid.ins):
            return f"paired cores need as many outs {grid.outs} as ins {grid.ins}"
        most = bonds_of(self._cars(grid))
        if not most:
            return f"a train of one carriage {self._cars(grid)} has no bond; give more digits"
        if isinstance(self.ranks, tuple):
            if len(self.ranks) != len(most):
                return f"{len(self.ranks)} ranks for {len(most)} bonds between {self._cars(grid)}"
            for at, (rank, limit) in enumerate(zip(self.ranks, most)):
                if rank > limit:
                    return f"ranks[{at}]={rank} is more than the {limit} that its bond can need"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        grid, ranks = self._plan(shape)
        bonds = (1, *ranks, 1)
        cars = [(o, i) for o, i in zip(grid.outs, grid.ins)] if self.paired else [(n,) for n in self._cars(grid)]
        return {f"core_{at}": (bonds[at], *car, bonds[at + 1]) for at, car in enumerate(cars)}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        grid, ranks = self._plan(shape)
        bonds = RANK_LETTERS[: len(ranks)]
        sizes = self.shapes(shape)
        if self.paired:
            cars = [a + b for a, b in zip(grid.out_letters, grid.in_letters)]
        else:
            cars = list(grid.out_letters + grid.kernel_letters + grid.in_letters[: len(grid.ins)])
        operands = []
        for at, car in enumerate(cars):
            before, after = bonds[at - 1 : at] if at else "", bonds[at : at + 1]
            full = sizes[f"core_{at}"]
            inner = full[0 if before else 1 : len(full) if after else -1]
            operands.append(Operand((f"core_{at}",), before + car + after, inner))
        # from the inputs' end: each step leaves one bond instead of a digit
        return (
            Contraction(
                grid.in_letters,
                grid.out_letters,
                grid.ins + grid.kernel,
                grid.outs,
                tuple(reversed(operands)),
                grid.kernel_letters,
            ),
        )

    def solve(self, weight: torch.Tensor) -> Buffers:
        shape = tuple(weight.shape)
        grid, ranks = self._plan(shape)
        tensor = grid.tensor(weight)
        outs, ins = len(grid.outs), len(grid.ins)
        if self.paired:
            order = [m for at in range(outs) for m in (at, outs + at)]
        else:
            order = [*range(outs), *range(outs + ins, tensor.dim()), *range(outs, outs + ins)]
        cores = tt_svd(tensor.permute(order).reshape(self._cars(grid)), ranks)
        sizes = self.shapes(shape)
        return {f"core_{at}": core.reshape(sizes[f"core_{at}"]) for at, core in enumerate(cores)}

    def _cars(self, grid: Modes) -> Shape:
        if self.paired:
            return tuple(o * i for o, i in zip(grid.outs, grid.ins))
        return grid.outs + grid.kernel + grid.ins

    def _plan(self, shape: Shape) -> tuple[Modes, Shape]:
        chosen = self.resolve(shape)
        ranks = chosen.ranks
        return modes(shape, chosen.outs, chosen.ins), ranks if isinstance(ranks, tuple) else (ranks,)


def tt_svd(tensor: torch.Tensor, ranks: Shape) -> list[torch.Tensor]:
    """Cores (r_{l-1}, size_l, r_l) by SVDs from the left: all but the last have orthonormal columns."""
    rest = tensor.reshape(1, -1)
    cores = []
    for size, rank in zip(tensor.shape, ranks):
        flat = rest.reshape(rest.shape[0] * size, -1)
        u, rest = split(flat, rank)
        cores.append(u.reshape(-1, size, u.shape[1]))
    cores.append(rest.reshape(rest.shape[0], tensor.shape[-1], 1))
    return cores


def bonds_of(cars: Shape) -> Shape:
    """The largest rank that each bond can need."""
    return tuple(min(prod(cars[: at + 1]), prod(cars[at + 1 :])) for at in range(len(cars) - 1))
