"""FactoredRows: a fitted factor as the storage of an embedding table, whose rows are computed as they are looked up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from string import ascii_letters
from typing import ClassVar

import torch

from sparsec.errors import InputError
from sparsec.factors._base import Factor, Shape
from sparsec.factors._contraction import BATCH, Contraction, Operand
from sparsec.factors.stored import Stored, sums, widened
from sparsec.formats import Buffers


@dataclass(frozen=True)
class Lookup:
    """How one term gives rows: operands that hold digits of the row number are gathered at them, which leaves einsums
    over the batch of indices.

    `operands` are in the order of the products and `held` the digits (places in `y`) that each is gathered at, in the
    order of its first axes once permuted by `turns`; `deltas` are digits that x and y share (a block-diagonal weight
    has only a row's own block). `equations` join the running result with the next operand, the last one sorts letters.
    """

    y: Shape
    operands: tuple[Operand, ...]
    turns: tuple[Shape, ...]
    held: tuple[Shape, ...]
    deltas: tuple[tuple[int, int], ...]  # (place in y, size)
    equations: tuple[tuple[str, str, str], ...]

    def __call__(self, index: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Rows (n, width) for `index` (n,) and the dense operands."""
        digits = torch.unravel_index(index, self.y) if len(self.y) > 1 else (index,)
        given = []
        for tensor, turn, held in zip(tensors, self.turns, self.held, strict=True):
            if len(held) == 1 and turn[0] == 0:
                given.append(tensor.index_select(0, digits[held[0]]))
            else:
                given.append(tensor.permute(turn)[tuple(digits[d] for d in held)] if held else tensor)
        for place, size in self.deltas:
            given.append(torch.nn.functional.one_hot(digits[place], size).to(tensors[0].dtype))
        running = given[0]
        for other, (left, right, result) in zip(given[1:], self.equations, strict=False):
            if len(left) == len(right) == 2 and (left[1], result) == (right[0], left[0] + right[1]):
                running = running @ other
            else:
                running = torch.einsum(f"{left},{right}->{result}", running, other)
        left, _, result = self.equations[-1]
        if left != result:
            running = torch.einsum(f"{left}->{result}", running)
        return running.reshape(index.shape[0], -1)

    @property
    def lengths(self) -> list[int]:
        """How many numbers each product sums."""
        return [
            prod(self._sizes[c] for c in set(left + right) - set(result)) for left, right, result in self.equations[:-1]
        ]

    @property
    def flops(self) -> int:
        """Of one row: two for every product that is summed, one for others."""
        total = 0
        for left, right, result in self.equations[:-1]:
            letters = set(left + right) - {BATCH}
            total += (2 if letters - set(result) else 1) * prod(self._sizes[c] for c in letters)
        return total

    @property
    def _sizes(self) -> dict[str, int]:
        found = {c: n for o in self.operands for c, n in zip(o.letters, o.shape, strict=True)}
        new = [c for _, right, _ in self.equations for c in right if c not in found and c != BATCH]
        return found | {c: size for c, (_, size) in zip(new, self.deltas, strict=True)}


@lru_cache(maxsize=1024)
def lookup_of(c: Contraction) -> Lookup:
    """The plan of one term. Operands nearest to the output come first: they hold the digits of the row."""
    operands, place = tuple(reversed(c.operands)), {a: at for at, a in enumerate(c.outputs)}
    terms, turns, held = [], [], []
    for o in operands:
        mine = [a for a in o.letters if a in place]
        rest = [a for a in o.letters if a not in place]
        turns.append(tuple(o.letters.index(a) for a in (*mine, *rest)))
        held.append(tuple(place[a] for a in mine))
        terms.append((BATCH if mine else "") + "".join(rest))
    shared = [a for a in c.inputs if a in place]
    taken = set("".join(o.letters for o in operands) + c.inputs + c.outputs + BATCH)
    fresh = dict(zip(shared, (a for a in ascii_letters if a not in taken), strict=False))
    terms += [BATCH + fresh[a] for a in shared]
    inputs = "".join(fresh.get(a, a) for a in c.inputs)
    running, equations = terms[0], []
    for at in range(1, len(terms)):
        needed = set(BATCH + inputs).union(*terms[at + 1 :])
        union = dict.fromkeys(running + terms[at])
        kept = "".join(sorted((a for a in union if a in needed), key=lambda a: a != BATCH))
        equations.append((running, terms[at], kept))
        running = kept
    equations.append((running, "", BATCH + inputs))
    deltas = tuple((place[a], c.sizes[a]) for a in shared)
    return Lookup(c.y, operands, tuple(turns), tuple(held), deltas, tuple(equations))


def lookups(factor: Factor, shape: Shape) -> tuple[Lookup, ...]:
    """The terms of a factor of a table (rows, width), whose sum is a row."""
    return tuple(lookup_of(c) for c in factor.resolve(shape).contract(shape))


def check_index(index: torch.Tensor, rows: int) -> None:
    """Raises InputError for row numbers below zero or beyond the table."""
    if index.numel():
        low, high = (int(end) for end in torch.aminmax(index))
        if low < 0 or high >= rows:
            raise InputError(f"indices run from {low} to {high}; valid: 0 to {rows - 1}")


def rows(factor: Factor, index: torch.Tensor, buffers: Buffers, shape: Shape) -> torch.Tensor:
    """Rows of the weight (rows, width): index (...) of int64 gives (..., width), without forming the table.

    Raises InputError for indices out of range.
    """
    flat = index.reshape(-1)
    check_index(flat, shape[0])
    terms = [plan(flat, [o.dense(buffers) for o in plan.operands]) for plan in lookups(factor, shape)]
    found = sum(terms[1:], terms[0]) if terms else flat.new_zeros(0)
    return found.reshape(*index.shape, prod(shape[1:]))


@dataclass(frozen=True)
class FactoredRows(Stored):
    """A table (rows, width), looked up by row; the buffers are the factor's."""

    weight: Shape

    name: ClassVar[str] = "factored_rows"

    def sizes(self) -> tuple[int, ...]:
        return self.weight if len(self.weight) == 2 else (-1,)

    @property
    def plans(self) -> tuple[Lookup, ...]:
        return lookups(self.factor, self.weight)

    def products(self, index: torch.Tensor, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The rows in float64 (indices, width), the same of absolute operands, and how many sums they round like."""
        wide = widened(buffers)
        exact = size = torch.zeros((), dtype=torch.float64)
        for plan in self.plans:
            operands = [o.dense(wide) for o in plan.operands]
            exact = exact + plan(index, operands)
            size = size + plan(index, [t.abs() for t in operands])
        worst = max(8 + sum(8 + 2 * n**0.5 for n in plan.lengths) for plan in self.plans)
        return exact, size, sums(worst, len(self.plans))
