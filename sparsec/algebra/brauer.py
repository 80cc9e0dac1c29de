"""Linear maps between tensor powers of R^n that commute with a group, applied diagram by diagram without their matrix.

A diagram joins l output points and k input points; its matrix is a product of deltas, one per block. For O(n) and Sp(n)
the blocks are pairs (Brauer 1937), for the symmetric group any partition. An input is applied to a diagram by taking
diagonals, summing, and writing diagonals: about n^k additions instead of n^(k+l) products (Pearce-Crump, "An Algorithm
for Computing with Brauer's Group Equivariant Neural Network Layers"). For Sp(n) a pair within a row is the skew form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sparsec.algebra.operands import Delta, Operand, Sparse
from sparsec.algebra.plan import Plan
from sparsec.algebra.sharing import plan_many
from sparsec.errors import InputError, SpecError

Diagram = tuple[tuple[int, ...], ...]
"""Blocks of points; points 0..l-1 are outputs, l..l+k-1 inputs."""


def pairings(points: Sequence[int]) -> Iterator[Diagram]:
    """All ways to join points in pairs: (m-1)!! of them for an even number m, none for an odd one."""
    if not points:
        yield ()
        return
    first, rest = points[0], points[1:]
    for i, other in enumerate(rest):
        for more in pairings((*rest[:i], *rest[i + 1 :])):
            yield ((first, other), *more)


def partitions(points: Sequence[int], most: int) -> Iterator[Diagram]:
    """All partitions of points into at most `most` blocks."""

    def grow(done: tuple[tuple[int, ...], ...], left: Sequence[int]) -> Iterator[Diagram]:
        if not left:
            yield done
            return
        point, rest = left[0], left[1:]
        for i, block in enumerate(done):
            yield from grow((*done[:i], (*block, point), *done[i + 1 :]), rest)
        if len(done) < most:
            yield from grow((*done, (point,)), rest)

    yield from grow((), tuple(points))


def diagrams(group: str, n: int, k: int, l: int) -> tuple[Diagram, ...]:  # noqa: E741
    """The diagrams that span the maps from the k-th to the l-th power which commute with O(n), Sp(n) or S_n."""
    if group not in ("O", "Sp", "S"):
        raise SpecError(f"group {group!r} is none of 'O', 'Sp', 'S'")
    if min(n, k + 1, l + 1) < 1:
        raise InputError(f"n={n} is positive, k={k} and l={l} are not negative")
    if group == "Sp" and n % 2:
        raise InputError(f"Sp(n) needs an even n, got {n}")
    points = tuple(range(k + l))
    return tuple(partitions(points, n) if group == "S" else pairings(points))


def skew_form(n: int) -> torch.Tensor:
    """The (n, n) form e_{2i} ^ e_{2i+1} that Sp(n) keeps."""
    form = torch.zeros(n, n)
    even = torch.arange(0, n, 2)
    form[even, even + 1], form[even + 1, even] = 1.0, -1.0
    return form


def _factors(group: str, diagram: Diagram, n: int, l: int) -> list[tuple[str, Operand]]:  # noqa: E741
    """(labels, operand) per block: a delta, or the skew form for a pair within one row of Sp(n)."""
    found: list[tuple[str, Operand]] = []
    for block in diagram:
        labels = "".join(chr(ord("a") + p) for p in block)
        inside = len(block) == 2 and (block[0] < l) == (block[1] < l)
        found.append((labels, Sparse(skew_form(n)) if group == "Sp" and inside else Delta(n, len(block))))
    return found


def dense_matrix(group: str, diagram: Diagram, n: int, k: int, l: int) -> torch.Tensor:  # noqa: E741
    """The (n^l, n^k) matrix of one diagram with every entry written out; for tests."""
    labels = "".join(chr(ord("a") + p) for p in range(k + l))
    made = torch.ones([1] * (k + l))
    for block, op in _factors(group, diagram, n, l):
        at = torch.einsum(f"{block}->{''.join(sorted(block))}", op.dense())
        made = made * at.reshape([n if c in block else 1 for c in labels])
    return made.expand([n] * (k + l)).reshape(n**l, n**k)


@dataclass(frozen=True)
class Equivariant:
    """All maps (batch, n^k) -> (batch, n^l) that commute with a group, one coefficient per diagram.

    Made by `equivariant`. The diagrams share what they have in common: `plan.flops` counts all of them together.
    """

    group: str
    n: int
    k: int
    l: int  # noqa: E741
    diagrams: tuple[Diagram, ...]
    plan: Plan
    constants: tuple[Operand, ...]

    def apply(self, coefficients: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """sum_d coefficients[d] D_d v for v (batch, n, ..., n) with k axes of n; the result has l axes."""
        if coefficients.shape != (len(self.diagrams),):
            raise InputError(f"{len(self.diagrams)} coefficients are needed, got shape {tuple(coefficients.shape)}")
        made = self.plan(v, *(op for op in self.constants if not isinstance(op, Delta)))
        total = made[0] * coefficients[0]
        for weight, term in zip(coefficients[1:], made[1:]):
            total = total + weight * term
        return total  # type: ignore[no-any-return]

    @property
    def dense_flops(self) -> int:
        """FLOPs of applying every diagram's (n^l, n^k) matrix to the batch the plan was made for."""
        batch = self.plan.shapes[0][0]
        return int(2 * batch * self.n ** (self.k + self.l) * len(self.diagrams))


def equivariant(group: str, n: int, k: int, l: int, batch: int = 1) -> Equivariant:  # noqa: E741
    """The maps from R^n's k-th tensor power to its l-th that commute with `group` ("O", "Sp" or "S").

    Raises SpecError for an unknown group, InputError for sizes that leave no diagram (O and Sp need even k + l).
    """
    found = diagrams(group, n, k, l)
    if not found:
        raise InputError(f"no diagram joins k={k} and l={l} points in pairs: k + l must be even")
    from sparsec.algebra.operands import operand

    v = operand((batch, *(n for _ in range(k))))
    constants: list[Operand] = []
    made: dict[tuple[str, int], Operand] = {}
    expressions = []
    outputs = "".join(chr(ord("a") + p) for p in range(l))
    inputs = "".join(chr(ord("a") + p) for p in range(l, k + l))
    for diagram in found:
        factors = _factors(group, diagram, n, l)
        terms = []
        for labels, op in factors:
            shared = made.setdefault((op.kind, len(labels)), op)
            terms.append((labels, shared))
            if shared not in constants:
                constants.append(shared)
        einsum = ",".join([f"Z{inputs}", *(labels for labels, _ in terms)]) + f"->Z{outputs}"
        expressions.append((einsum, v, *(op for _, op in terms)))
    return Equivariant(group, n, k, l, found, plan_many(expressions), tuple(constants))
