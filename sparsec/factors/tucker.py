"""Tucker: a small core and a matrix for each mode; Tucker-2 keeps the window whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._linalg import split
from sparsec.factors._modes import RANK_LETTERS, Modes, check_digits, check_ranks, modes, refuse_modes
from sparsec.formats import Buffers

_SWEEPS = 20
_STALLED = 1e-7


@dataclass(frozen=True)
class Tucker(Factor):
    """W = core x_1 mode_0 x_2 mode_1 ...: `core` (r_0, r_1, ...), `mode_m` (size_m, r_m).

    The modes are the digits `outs` of the outputs, `ins` of the inputs, and the window of a convolution; digits None
    split a matrix into balanced pairs. `ranks` is one int, cut to each mode's size, or one for each of the first modes;
    modes without a rank stay whole, inside the core. So `Tucker((32, 16))` on a convolution is Tucker-2: 1x1, window,
    1x1 (Kim et al., ICLR 2016). The fit is a truncated higher-order SVD improved by orthogonal iteration (De Lathauwer,
    De Moor and Vandewalle, 2000). Leading slices of the core and of the mode matrices are the smaller ranks.
    """

    ranks: int | tuple[int, ...]
    outs: tuple[int, ...] | None = None
    ins: tuple[int, ...] | None = None

    name: ClassVar[str] = "tucker"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", check_ranks("Tucker", self.ranks))
        for field, digits in check_digits("Tucker", outs=self.outs, ins=self.ins).items():
            object.__setattr__(self, field, digits)

    def resolve(self, shape: Shape) -> Tucker:
        grid = modes(shape, self.outs, self.ins)
        ranks = self.ranks
        if isinstance(ranks, int):
            ranks = tuple(min(ranks, size) for size in grid.sizes)
        return Tucker(ranks, grid.outs, grid.ins)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        grid = modes(shape, self.outs, self.ins)
        if (reason := refuse_modes(shape, grid)) is not None:
            return reason
        if isinstance(self.ranks, tuple):
            if len(self.ranks) > len(grid.sizes):
                return f"{len(self.ranks)} ranks for {len(grid.sizes)} modes {grid.sizes}"
            for at, (rank, size) in enumerate(zip(self.ranks, grid.sizes)):
                if rank > size:
                    return f"ranks[{at}]={rank} is more than the {size} of its mode"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        grid, ranks = self._plan(shape)
        core = ranks + grid.sizes[len(ranks) :]
        return {"core": core, **{f"mode_{m}": (grid.sizes[m], r) for m, r in enumerate(ranks)}}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        grid, ranks = self._plan(shape)
        letters = grid.letters
        inner = RANK_LETTERS[: len(ranks)] + letters[len(ranks) :]
        sizes = self.shapes(shape)
        ends = {m: Operand((f"mode_{m}",), letters[m] + inner[m], sizes[f"mode_{m}"]) for m in range(len(ranks))}
        first = sorted((m for m in ends if m >= len(grid.outs)), key=lambda m: (ranks[m] / grid.sizes[m], m))
        last = sorted((m for m in ends if m < len(grid.outs)), key=lambda m: (-ranks[m] / grid.sizes[m], m))
        core = Operand(("core",), inner, sizes["core"])
        operands = (*(ends[m] for m in first), core, *(ends[m] for m in last))
        return (
            Contraction(
                grid.in_letters, grid.out_letters, grid.ins + grid.kernel, grid.outs, operands, grid.kernel_letters
            ),
        )

    def solve(self, weight: torch.Tensor) -> Buffers:
        grid, ranks = self._plan(tuple(weight.shape))
        core, bases = hooi(grid.tensor(weight), ranks)
        return {"core": core, **{f"mode_{m}": basis for m, basis in enumerate(bases)}}

    def slice(self, buffers: Buffers, rank: Any) -> tuple[Factor, Buffers]:
        own = tuple(buffers[f"mode_{m}"].shape[1] for m in range(len(buffers) - 1))
        wanted = tuple(min(rank, r) for r in own) if type(rank) is int else rank
        fits = isinstance(wanted, tuple) and len(wanted) == len(own)
        if not fits or any(type(w) is not int or not 1 <= w <= r for w, r in zip(wanted, own)):
            raise SpecError(f"ranks {rank!r} cannot be sliced out of {self.text()}; valid: up to {own}")
        core = buffers["core"][tuple(slice(w) for w in wanted)]
        ends = {f"mode_{m}": buffers[f"mode_{m}"][:, :w].contiguous() for m, w in enumerate(wanted)}
        return Tucker(wanted, self.outs, self.ins), {"core": core.contiguous(), **ends}

    def _plan(self, shape: Shape) -> tuple[Modes, Shape]:
        chosen = self.resolve(shape)
        ranks = chosen.ranks
        return modes(shape, chosen.outs, chosen.ins), ranks if isinstance(ranks, tuple) else (ranks,)


def hooi(tensor: torch.Tensor, ranks: Shape) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The core and orthonormal bases (size, rank) of the first len(ranks) modes; columns by falling energy."""
    bases = [_leading(tensor, m, r) for m, r in enumerate(ranks)]
    energy = 0.0
    for _ in range(_SWEEPS):
        for m, r in enumerate(ranks):
            part = tensor
            for other, basis in enumerate(bases):
                if other != m:
                    part = multiply(part, basis.mH, other)
            bases[m] = _leading(part, m, r)
        core = tensor
        for m, basis in enumerate(bases):
            core = multiply(core, basis.mH, m)
        before, energy = energy, float(core.abs().square().sum())
        if energy - before <= _STALLED * energy:
            break
    for m in range(len(ranks)):  # each basis turned so that slices of the core hold the most energy first
        turn = _leading(core, m, ranks[m])
        bases[m] = bases[m] @ turn
        core = multiply(core, turn.mH, m)
    return core, bases


def multiply(tensor: torch.Tensor, matrix: torch.Tensor, mode: int) -> torch.Tensor:
    """The mode product: `matrix` (new, size) applied along `mode`."""
    return torch.movedim(torch.tensordot(matrix, tensor, dims=([1], [mode])), 0, mode)


def _leading(tensor: torch.Tensor, mode: int, rank: int) -> torch.Tensor:
    """Leading left singular vectors of the unfolding along `mode`, (size, rank)."""
    flat = torch.movedim(tensor, mode, 0).reshape(tensor.shape[mode], -1)
    vectors, _ = split(flat, rank)
    if vectors.shape[1] < rank:  # the other modes are cut so far that they cannot span this one
        vectors = torch.linalg.qr(torch.cat([vectors, torch.eye(flat.shape[0]).to(flat)], dim=1)).Q[:, :rank]
    return vectors
