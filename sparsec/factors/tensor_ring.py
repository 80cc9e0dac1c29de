"""TensorRing: a train whose ends are joined, so that no mode is special."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.factors._base import Factor, Shape
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._modes import OUT_LETTERS, RANK_LETTERS, Modes, check_digits, check_ranks, modes, refuse_modes
from sparsec.factors.tensor_network import als, build
from sparsec.factors.tensor_train import bonds_of, tt_svd
from sparsec.formats import Buffers

_EXACT = 1e-24
_SWEEPS = 60
_RANDOM_STARTS = 2


@dataclass(frozen=True)
class TensorRing(Factor):
    """W[n_1, ..., n_d] = trace(core_0[:, n_1, :] ... core_{d-1}[:, n_d, :]): cores (r_l, size_l, r_{l+1}), r_d = r_0.

    The modes are the digits `outs`, the window of a convolution, and the digits `ins`. `ranks` is one int, cut to what
    a bond can need, or r_0 ... r_{d-1}. The fit starts from an SVD that splits its rank over the joint and the first
    bond (TR-SVD, Zhao et al., 2016) and from random cores, improved by alternating least squares; a train that is exact
    and for which the ranks have room is taken as it is.
    """

    ranks: int | tuple[int, ...]
    outs: tuple[int, ...] | None = None
    ins: tuple[int, ...] | None = None

    name: ClassVar[str] = "tensor_ring"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", check_ranks("TensorRing", self.ranks))
        for field, digits in check_digits("TensorRing", outs=self.outs, ins=self.ins).items():
            object.__setattr__(self, field, digits)

    def resolve(self, shape: Shape) -> TensorRing:
        grid = modes(shape, self.outs, self.ins)
        ranks = self.ranks
        if isinstance(ranks, int):
            ranks = tuple(min(ranks, most) for most in _limits(_cars(grid)))
        return TensorRing(ranks, grid.outs, grid.ins)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        grid = modes(shape, self.outs, self.ins)
        if (reason := refuse_modes(shape, grid)) is not None:
            return reason
        limits = _limits(_cars(grid))
        if isinstance(self.ranks, tuple):
            if len(self.ranks) != len(limits):
                return f"{len(self.ranks)} ranks for a ring of {len(limits)} modes {_cars(grid)}"
            for at, (rank, limit) in enumerate(zip(self.ranks, limits)):
                if rank > limit:
                    return f"ranks[{at}]={rank} is more than the {limit} that its bond can need"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        grid, ranks = self._plan(shape)
        joined = (*ranks, ranks[0])
        return {f"core_{at}": (joined[at], size, joined[at + 1]) for at, size in enumerate(_cars(grid))}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        grid, _ = self._plan(shape)
        letters = grid.out_letters + grid.kernel_letters + grid.in_letters[: len(grid.ins)]
        bonds = RANK_LETTERS[: len(letters)]
        bonds += bonds[0]
        operands = [
            Operand((name,), bonds[at] + letters[at] + bonds[at + 1], size)
            for at, (name, size) in enumerate(self.shapes(shape).items())
        ]
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
        outs, ins = len(grid.outs), len(grid.ins)
        tensor = grid.tensor(weight)
        tensor = tensor.permute([*range(outs), *range(outs + ins, tensor.dim()), *range(outs, outs + ins)]).contiguous()
        train = _padded(tt_svd(tensor, ranks[1:]), ranks)
        whole = float(weight.abs().square().sum())
        count = tensor.dim()
        letters = [OUT_LETTERS[m] + RANK_LETTERS[m] + RANK_LETTERS[(m + 1) % count] for m in range(count)]
        # als has the mode's axis first
        runs = [([c.permute(1, 0, 2) for c in train], 0.0)]
        runs[0] = (runs[0][0], float((tensor - build(runs[0][0], letters)).abs().square().sum()))
        if runs[0][1] > _EXACT * whole:
            starts = [_tr_svd(tensor, ranks), *(_random(train, seed) for seed in range(_RANDOM_STARTS))]
            runs += [als(tensor, [c.permute(1, 0, 2) for c in start], letters, _SWEEPS) for start in starts]
        best = min(runs, key=lambda r: r[1])[0]
        return {f"core_{at}": core.permute(1, 0, 2) for at, core in enumerate(best)}

    def _plan(self, shape: Shape) -> tuple[Modes, Shape]:
        chosen = self.resolve(shape)
        ranks = chosen.ranks
        return modes(shape, chosen.outs, chosen.ins), ranks if isinstance(ranks, tuple) else (ranks,)


def _cars(grid: Modes) -> Shape:
    return grid.outs + grid.kernel + grid.ins


def _limits(cars: Shape) -> Shape:
    """The largest useful rank of the joint, then of each bond."""
    return (min(cars[0], cars[-1]), *bonds_of(cars))


def _padded(cores: list[torch.Tensor], ranks: Shape) -> list[torch.Tensor]:
    """A train as a ring: cores filled up with zeros, or cut where a bond of the ring is smaller."""
    joined = (*ranks, ranks[0])
    return [
        torch.nn.functional.pad(c, (0, joined[at + 1] - c.shape[2], 0, 0, 0, joined[at] - c.shape[0]))
        for at, c in enumerate(cores)
    ]


def _random(like: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0x7129 + seed)
    return [torch.randn(c.shape, generator=generator, dtype=torch.float64).to(c) for c in like]


def _tr_svd(tensor: torch.Tensor, ranks: Shape) -> list[torch.Tensor]:
    """Cores by SVDs from the left, the first of which serves the joint r_0 and the bond r_1 at once."""
    sizes = tuple(tensor.shape)
    joint, first = ranks[0], ranks[1]
    u, s, vh = torch.linalg.svd(tensor.reshape(sizes[0], -1), full_matrices=False)
    kept = min(joint * first, s.numel())
    pad = joint * first - kept
    u = torch.nn.functional.pad(u[:, :kept], (0, pad)).reshape(sizes[0], joint, first)
    rest = torch.nn.functional.pad(s[:kept, None].to(vh.dtype) * vh[:kept], (0, 0, 0, pad))
    rest = rest.reshape(joint, first, -1).permute(1, 2, 0).reshape(first, *sizes[1:], joint)
    flat = rest.reshape(first * sizes[1], *sizes[2:-1], sizes[-1] * joint) if len(sizes) > 2 else rest
    if len(sizes) == 2:
        return [u.permute(1, 0, 2), rest.reshape(first, sizes[1], joint)]
    train = tt_svd(flat, ranks[2:])
    train[0] = train[0].reshape(first, sizes[1], -1)
    train[-1] = train[-1].reshape(-1, sizes[-1], joint)
    cores = [u.permute(1, 0, 2), *train]
    joined = (*ranks, joint)
    return [
        torch.nn.functional.pad(c, (0, joined[at + 1] - c.shape[2], 0, 0, 0, joined[at] - c.shape[0]))
        for at, c in enumerate(cores)
    ]
