"""TensorNetwork: a core for each mode and a bond for each pair that needs one; the bonds can be searched for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import prod
from string import ascii_letters
from typing import Any, ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape, positive
from sparsec.factors._contraction import BATCH, Contraction, Operand
from sparsec.factors._modes import IN_LETTERS, KERNEL_LETTERS, OUT_LETTERS, Modes, check_digits, modes, refuse_modes
from sparsec.factors.tucker import Tucker
from sparsec.formats import Buffers

_SEED = 0x7E5
_RANDOM_STARTS = 3
_SWEEPS = 100
_TRIAL_SWEEPS = 4
_STEP_SWEEPS = 10
_STALLED = 1e-9
_BOND_LETTERS = [c for c in ascii_letters if c not in OUT_LETTERS + IN_LETTERS + KERNEL_LETTERS + BATCH]

Edge = tuple[int, int, int]
"""(mode, later mode, rank)."""


@dataclass(frozen=True)
class TensorNetwork(Factor):
    """W[n_0, ..., n_{d-1}] = the contraction of cores core_m (size_m, ranks of its bonds) over all bonds.

    `edges` are (mode, later mode, rank), each pair at most once: a path is a train, a cycle a ring, any other graph has
    no name. Modes are the digits `outs`, `ins` and the window positions. The fit is alternating least squares from
    seeded starts. `search` finds the edges.
    """

    edges: tuple[Edge, ...]
    outs: tuple[int, ...] | None = None
    ins: tuple[int, ...] | None = None

    name: ClassVar[str] = "tensor_network"

    def __post_init__(self) -> None:
        edges = self.edges
        if not isinstance(edges, (tuple, list)) or not edges or any(len(tuple(e)) != 3 for e in edges):
            raise SpecError(f"TensorNetwork: edges={edges!r} must be (mode, later mode, rank) triples")
        tidy = tuple(sorted((int(i), int(j), r) for i, j, r in edges))
        for i, j, r in tidy:
            positive("TensorNetwork", **{f"rank of {i}-{j}": r})
            if not 0 <= i < j:
                raise SpecError(f"TensorNetwork: edge {(i, j, r)} must go from a mode to a later one")
        if len({e[:2] for e in tidy}) != len(tidy):
            raise SpecError(f"TensorNetwork: edges={tidy} hold a pair twice")
        object.__setattr__(self, "edges", tidy)
        for field, digits in check_digits("TensorNetwork", outs=self.outs, ins=self.ins).items():
            object.__setattr__(self, field, digits)

    def resolve(self, shape: Shape) -> TensorNetwork:
        grid = modes(shape, self.outs, self.ins)
        return TensorNetwork(self.edges, grid.outs, grid.ins)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        grid = modes(shape, self.outs, self.ins)
        if (reason := refuse_modes(shape, grid)) is not None:
            return reason
        if (last := max(j for _, j, _ in self.edges)) >= len(grid.sizes):
            return f"an edge ends at mode {last}, the last of {grid.sizes} is {len(grid.sizes) - 1}"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        sizes = modes(shape, self.outs, self.ins).sizes
        return {f"core_{m}": (n, *(r for i, j, r in self.edges if m in (i, j))) for m, n in enumerate(sizes)}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        grid = modes(shape, self.outs, self.ins)
        names = self._letters(grid)
        operands = [
            Operand((name,), letters, size)
            for letters, (name, size) in zip(names, self.shapes(shape).items(), strict=True)
        ]
        inputs = operands[len(grid.outs) :]
        return (
            Contraction(
                grid.in_letters,
                grid.out_letters,
                grid.ins + grid.kernel,
                grid.outs,
                (*inputs, *reversed(operands[: len(grid.outs)])),
                grid.kernel_letters,
            ),
        )

    def solve(self, weight: torch.Tensor) -> Buffers:
        shape = tuple(weight.shape)
        grid = modes(shape, self.outs, self.ins)
        tensor = grid.tensor(weight)
        letters = self._letters(grid)
        runs = []
        for seed in range(_RANDOM_STARTS):
            generator = torch.Generator().manual_seed(_SEED + seed)
            sizes = self.shapes(shape).values()
            cores = [torch.randn(s, generator=generator, dtype=torch.float64).to(tensor) for s in sizes]
            runs.append(als(tensor, cores, letters, _SWEEPS))
            if runs[-1][1] <= 1e-20 * float(tensor.abs().square().sum()):
                break
        best = min(runs, key=lambda r: r[1])[0]
        return {f"core_{m}": core for m, core in enumerate(best)}

    def _letters(self, grid: Modes) -> list[str]:
        bonds = [_BOND_LETTERS[at] for at in range(len(self.edges))]
        return [
            letter + "".join(b for b, (i, j, _) in zip(bonds, self.edges) if m in (i, j))
            for m, letter in enumerate(grid.letters)
        ]


def search(tensor: torch.Tensor, error: float, most: int | None = None) -> tuple[Edge, ...]:
    """The bonds of a small network within relative `error` of `tensor`, found greedily from none at all.

    Each round tries one more rank on every pair of modes, fits the new slices alone for a few sweeps, keeps the pair
    with the largest gain and refits all cores (Hashemizadeh, Liu, Miller and Rabusseau, Adaptive learning of tensor
    network structures, 2020); at the end ranks that prove needless are taken back. `most` parameters end the search.
    """
    return _searched(tensor, error, most).edges()


def _searched(tensor: torch.Tensor, error: float, most: int | None) -> _Search:
    wide = _checked(tensor, error)
    goal = error**2 * float(wide.square().sum())
    state = _Search(wide, list(combinations(range(wide.dim()), 2)))
    while state.loss > goal and (most is None or state.parameters() < most):
        if not state.grow(goal):
            break
    if state.loss <= goal:
        state.prune(goal)
    return state


def _checked(tensor: torch.Tensor, error: float) -> torch.Tensor:
    """The tensor in float64."""
    if not 2 <= tensor.dim() <= len(OUT_LETTERS):
        raise SpecError(f"a network is searched for 2 to {len(OUT_LETTERS)} modes, got shape {tuple(tensor.shape)}")
    if tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
        raise SpecError(f"a network is searched for real and finite tensors, got {tensor.dtype}, or NaN or Inf in it")
    if not error >= 0.0:
        raise SpecError(f"error={error!r} must be at least 0")
    return tensor.detach().double()


def structure(tensor: torch.Tensor, error: float) -> TensorNetwork | Tucker:
    """The factor of fewest parameters within relative `error` of `tensor`: a network that `search` found, or Tucker.

    A Tucker core meets every mode and is of none, which no bond between two modes says; its ranks are those at which
    the modes' spectra leave error / sqrt(d) each. The tensor is the weight of one output digit, its first mode, and
    input digits, the others: `factor.fit(tensor.flatten(1))`.
    """
    wide = _checked(tensor, error)
    limit = error**2 * float(wide.square().sum())
    ranks = []
    for m in range(wide.dim()):
        energy = torch.linalg.svdvals(torch.movedim(wide, m, 0).flatten(1)).square()
        ranks.append(max(1, int((energy.flip(0).cumsum(0).flip(0) > limit / wide.dim()).sum())))
    parameters = prod(ranks) + sum(n * r for n, r in zip(wide.shape, ranks))
    state = _searched(wide, error, parameters)
    outs, ins = tuple(wide.shape[:1]), tuple(wide.shape[1:])
    if state.loss <= limit and state.edges() and state.parameters() < parameters:
        return TensorNetwork(state.edges(), outs, ins)
    return Tucker(tuple(ranks), outs, ins)


class _Search:
    """Cores on the complete graph; every core has an axis for every pair it is in, most of them of size 1."""

    def __init__(self, tensor: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
        self.tensor = tensor
        self.ranks = dict.fromkeys(pairs, 1)
        bonds = dict(zip(pairs, _BOND_LETTERS))
        self.pairs_of = [[p for p in pairs if m in p] for m in range(tensor.dim())]
        self.letters = [OUT_LETTERS[m] + "".join(bonds[p] for p in self.pairs_of[m]) for m in range(tensor.dim())]
        self.generator = torch.Generator().manual_seed(_SEED)
        self.cores = [self._random((n, *[1] * len(self.pairs_of[m]))) for m, n in enumerate(tensor.shape)]
        self.cores, self.loss = als(tensor, self.cores, self.letters, _STEP_SWEEPS)

    def edges(self) -> tuple[Edge, ...]:
        return tuple((i, j, r) for (i, j), r in self.ranks.items() if r > 1)

    def parameters(self) -> int:
        return sum(c.numel() for c in self.cores)

    def grow(self, goal: float) -> bool:
        """One more rank where it gains most; False when no pair gains anything."""
        residual = self.tensor - build(self.cores, self.letters)
        trials = []
        for pair in self.ranks:
            part = list(self.cores)
            for m in pair:
                shape = list(part[m].shape)
                shape[1 + self.pairs_of[m].index(pair)] = 1
                part[m] = self._random(tuple(shape))
            slices, loss = als(residual, part, self.letters, _TRIAL_SWEEPS, only=pair)
            added = sum(slices[m].numel() for m in pair)
            trials.append((loss, added, pair, slices))
        best = min(t[0] for t in trials)
        # among pairs that gain nearly as much, the one that adds fewest parameters
        near = [t for t in trials if t[0] <= best + 0.02 * max(self.loss - best, 0.0)]
        loss, _, pair, slices = min(near, key=lambda t: (t[1], t[0], t[2]))
        if self.loss - loss <= 1e-12 * self.loss:
            return False
        for m in pair:
            self.cores[m] = torch.cat([self.cores[m], slices[m]], dim=1 + self.pairs_of[m].index(pair))
        self.ranks[pair] += 1
        self.cores, self.loss = als(self.tensor, self.cores, self.letters, _STEP_SWEEPS)
        if self.loss > goal:  # slow convergence looks like a missing rank: look longer before the next one is added
            self.cores, self.loss = als(self.tensor, self.cores, self.letters, 3 * _STEP_SWEEPS)
        return True

    def prune(self, goal: float) -> None:
        """Take single ranks back, dearest first, as long as the goal is still met."""
        again = True
        while again:
            again = False
            for pair in sorted((p for p, r in self.ranks.items() if r > 1), key=lambda p: (-self._share(p), p)):
                smaller = [
                    c.narrow(1 + self.pairs_of[m].index(pair), 0, self.ranks[pair] - 1) if m in pair else c
                    for m, c in enumerate(self.cores)
                ]
                cores, loss = als(self.tensor, [c.clone() for c in smaller], self.letters, _SWEEPS)
                if loss <= goal:
                    self.cores, self.loss, again = cores, loss, True
                    self.ranks[pair] -= 1
                    break

    def _share(self, pair: tuple[int, int]) -> int:
        return sum(self.cores[m].numel() // self.ranks[pair] for m in pair)

    def _random(self, shape: Shape) -> torch.Tensor:
        found: torch.Tensor = torch.randn(shape, generator=self.generator, dtype=torch.float64) / prod(shape) ** 0.5
        return found


def build(cores: list[torch.Tensor], letters: list[str]) -> torch.Tensor:
    """The tensor of a network; the first letter of each core is its mode."""
    return _joined(cores, letters, "".join(own[0] for own in letters))


def als(
    tensor: torch.Tensor, cores: list[torch.Tensor], letters: list[str], sweeps: int, only: Any = None
) -> tuple[list[torch.Tensor], float]:
    """Cores after alternating least squares over all of them or `only` some, and their squared error."""
    current = list(cores)
    whole = float(tensor.abs().square().sum())
    before = float("inf")
    turns = list(range(len(cores)) if only is None else only)
    for _ in range(sweeps):
        for m in turns:
            others = [c for at, c in enumerate(current) if at != m]
            names = [own for at, own in enumerate(letters) if at != m]
            outer = "".join(own[0] for own in names)
            around = _joined(others, names, outer + letters[m][1:]).reshape(-1, prod(current[m].shape[1:]))
            target = torch.movedim(tensor, m, 0).reshape(tensor.shape[m], -1)
            gram = around.mH @ around
            ridge = 1e-12 * gram.diagonal().real.mean() + 1e-300
            eye = torch.eye(gram.shape[0], dtype=gram.dtype)
            found = torch.linalg.solve(gram + ridge * eye, (target @ around.conj()).mH).mH
            current[m] = found.reshape(current[m].shape)
            if m != turns[-1]:
                current[m] = current[m] / current[m].norm().clamp_min(1e-300)
        rest = float((tensor - build(current, letters)).abs().square().sum())
        if before - rest <= _STALLED * whole:
            break
        before = rest
    return current, rest


def _joined(cores: list[torch.Tensor], letters: list[str], result: str) -> torch.Tensor:
    running, left = cores[0], letters[0]
    for at in range(1, len(cores)):
        needed = set(result).union(*letters[at + 1 :])
        kept = "".join(a for a in dict.fromkeys(left + letters[at]) if a in needed)
        running = torch.einsum(f"{left},{letters[at]}->{kept}", running, cores[at])
        left = kept
    return torch.einsum(f"{left}->{result}", running)
