"""Fast schemes for structured matrix products, found by random walks on the flip graph and lifted to rationals.

A product of structured matrices (general, symmetric, transposed, triangular) is a 3-tensor over their independent
entries; a scheme is a sum of rank-one terms u (x) v (x) w that equals it, one multiplication per term. A flip rewrites
two terms that share a factor; a reduction merges two that share two (Kauers and Moosbauer 2022; for structured products
Khoruzhii, Gelss and Pokutta 2025). The search runs modulo 2 or 3, Hensel lifting makes the coefficients rational.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from sparsec.errors import InputError

Vector = tuple[Any, ...]
Entry = tuple[int, int, int]  # coordinates of A, of B, of C

KINDS = "gutsw"
"""g: general, s: symmetric, u: upper triangular, w: lower triangular, t: the transpose of A (as B alone)."""


@dataclass(frozen=True)
class Problem:
    """A product of two n x n matrices of given kinds: which products of entries make up which entry of the result."""

    kinds: str
    n: int
    sizes: tuple[int, int, int]
    entries: frozenset[Entry]
    places: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]  # per operand, the matrix positions of every coordinate


@dataclass(frozen=True)
class Scheme:
    """Terms (u, v, w): C = sum of (u . A)(v . B) w. `prime` 0 means rational coefficients."""

    problem: Problem
    terms: tuple[tuple[Vector, Vector, Vector], ...]
    prime: int = 0

    @property
    def rank(self) -> int:
        """Multiplications."""
        return len(self.terms)

    def holds(self) -> bool:
        """Brent's equations: the terms add up to the product's tensor, exactly."""
        return not any(_residual(self.problem, self.terms, self.prime).values())


def problem(kinds: str, n: int) -> Problem:
    """The product of an A of kind kinds[0] and a B of kind kinds[1], both n x n. Raises InputError."""
    if len(kinds) != 2 or any(k not in KINDS for k in kinds) or kinds[0] == "t" or n < 1:
        raise InputError(f"kinds={kinds!r} names two of {', '.join(KINDS)} (t for B only), n={n} is positive")
    tables = [_coordinates(k, n) for k in (kinds[0], kinds[1] if kinds[1] != "t" else "g", "g")]
    a, b, c = tables
    entries: set[Entry] = set()
    for i, j, k in itertools.product(range(n), repeat=3):
        second = (k, j) if kinds[1] == "t" else (j, k)
        table = a if kinds[1] == "t" else b
        if (i, j) in a and second in table:
            entry = a[i, j], table[second], c[i, k]
            entries ^= {entry}
    places = tuple(_places(t) for t in (a, a if kinds[1] == "t" else b, c))
    return Problem(kinds, n, tuple(len(p) for p in places), frozenset(entries), places)  # type: ignore[arg-type]


def _coordinates(kind: str, n: int) -> dict[tuple[int, int], int]:
    table: dict[tuple[int, int], int] = {}
    for i, j in itertools.product(range(n), repeat=2):
        if (kind == "u" and i > j) or (kind == "w" and i < j):
            continue
        if kind == "s" and i > j:
            table[i, j] = table[j, i]
        else:
            table[i, j] = len(set(table.values()))
    return table


def _places(table: dict[tuple[int, int], int]) -> tuple[tuple[tuple[int, int], ...], ...]:
    count = len(set(table.values()))
    return tuple(tuple(p for p, c in table.items() if c == number) for number in range(count))


def standard(kinds: str, n: int, prime: int = 0) -> Scheme:
    """One multiplication per product of entries; equal ones are merged by the search."""
    made = problem(kinds, n)
    terms = tuple(
        tuple(tuple(int(i == at) for i in range(size)) for at, size in zip(entry, made.sizes))
        for entry in sorted(made.entries)
    )
    return Scheme(made, terms, prime)  # type: ignore[arg-type]


def _residual(p: Problem, terms: Sequence[Sequence[Vector]], prime: int) -> dict[Entry, Any]:
    """The product's tensor minus the sum of the terms, at every coordinate."""
    left: dict[Entry, Any] = dict.fromkeys(itertools.product(*map(range, p.sizes)), 0)  # type: ignore[arg-type]
    left.update(dict.fromkeys(p.entries, 1))
    for u, v, w in terms:
        for (i, a), (j, b), (k, c) in itertools.product(*(enumerate(f) for f in (u, v, w))):
            if a and b and c:
                left[i, j, k] -= a * b * c
    return {e: r % prime for e, r in left.items()} if prime else left


# -- the walk ------------------------------------------------------------------------------------------------------


def search(kinds: str, n: int, rank: int, prime: int, seed: int = 0, steps: int = 400_000) -> Scheme | None:
    """A scheme of at most `rank` terms modulo `prime` by random flips from the standard one; None if none is met.

    After a while without progress two terms are split so that the walk leaves its component (a plus transition).
    """
    rng = random.Random(seed)
    start = standard(kinds, n, prime)
    terms = _reduced([_normal(t, prime) for t in start.terms], prime)
    best, idle = len(terms), 0
    for _ in range(steps):
        if len(terms) <= rank:
            return Scheme(start.problem, tuple(terms), prime)
        pairs = [
            (i, j, axis)
            for i, j in itertools.permutations(range(len(terms)), 2)
            for axis in range(3)
            if terms[i][axis] == terms[j][axis]
        ]
        if not pairs or idle > 3000:
            terms, idle = _plus(terms, prime, rng), 0
            continue
        i, j, axis = pairs[rng.randrange(len(pairs))]
        terms = _reduced(_flip(terms, i, j, axis, rng, prime), prime)
        idle = idle + 1
        if len(terms) < best:
            best, idle = len(terms), 0
        elif len(terms) > best + 2:
            terms = _reduced([_normal(t, prime) for t in start.terms], prime)
    return None


Term = tuple[Vector, Vector, Vector]


def _normal(term: Term, prime: int) -> Term:
    """The first nonzero coefficient of u and v is 1; w takes what is left."""
    factors, scale = [list(f) for f in term], 1
    for f in factors[:2]:
        lead = next((x for x in f if x % prime), 1)
        inverse = pow(lead, -1, prime)
        f[:] = [x * inverse % prime for x in f]
        scale = scale * lead % prime
    factors[2] = [x * scale % prime for x in factors[2]]
    return tuple(tuple(f) for f in factors)  # type: ignore[return-value]


def _flip(terms: list[Term], i: int, j: int, axis: int, rng: random.Random, prime: int) -> list[Term]:
    """a(x)b(x)c + a(x)b'(x)c' = a(x)(b + s b')(x)c + a(x)b'(x)(c' - s c)."""
    first, second = [axis_ for axis_ in range(3) if axis_ != axis]
    if rng.random() < 0.5:
        first, second = second, first
    s = rng.randrange(1, prime)
    one, two = list(terms[i]), list(terms[j])
    one[first] = tuple((x + s * y) % prime for x, y in zip(one[first], two[first]))
    two[second] = tuple((y - s * x) % prime for x, y in zip(terms[i][second], two[second]))
    made = list(terms)
    made[i], made[j] = _normal(tuple(one), prime), _normal(tuple(two), prime)  # type: ignore[arg-type]
    return made


def _plus(terms: list[Term], prime: int, rng: random.Random) -> list[Term]:
    """a(x)b(x)c + a'(x)b'(x)c' = a(x)(b + b')(x)c - a(x)b'(x)(c - c') + (a' - a)(x)b'(x)c', one term more."""
    i, j = rng.sample(range(len(terms)), 2)
    (a, b, c), (d, e, f) = terms[i], terms[j]

    def mix(x: Vector, y: Vector, s: int) -> Vector:
        return tuple((p + s * q) % prime for p, q in zip(x, y))

    extra: list[Term] = [(a, mix(b, e, 1), c), (a, e, mix(f, c, -1)), (mix(d, a, -1), e, f)]
    rest = [t for k, t in enumerate(terms) if k not in (i, j)]
    return _reduced([_normal(t, prime) for t in (*rest, *extra)], prime)


def _reduced(terms: list[Term], prime: int) -> list[Term]:
    """Without zero terms, and with terms merged that share two factors."""
    made = [t for t in terms if all(any(f) for f in t)]
    merged = True
    while merged:
        merged = False
        for i, j in itertools.combinations(range(len(made)), 2):
            same = [made[i][k] == made[j][k] for k in range(3)]
            if sum(same) >= 2:
                odd = same.index(False) if False in same else 2
                joint = list(made[i])
                joint[odd] = tuple((x + y) % prime for x, y in zip(made[i][odd], made[j][odd]))
                rest = [t for k, t in enumerate(made) if k not in (i, j)]
                made = [*rest, _normal(tuple(joint), prime)] if any(joint[odd]) else rest  # type: ignore[arg-type]
                merged = True
                break
    return made


# -- lifting -------------------------------------------------------------------------------------------------------


def lift(scheme: Scheme, rounds: int = 12) -> Scheme | None:
    """The scheme with rational coefficients that is this one modulo its prime; None when it does not lift.

    Every round solves Brent's equations, linearised, for one more digit; fractions are then reconstructed.
    """
    prime, p = scheme.prime, scheme.problem
    shape = [(t, f, i) for t in range(scheme.rank) for f in range(3) for i in range(p.sizes[f])]
    centred = {x: x if x <= prime // 2 else x - prime for x in range(prime)}
    values = {key: centred[scheme.terms[key[0]][key[1]][key[2]]] for key in shape}
    modulus = prime
    solve = _solver(p, scheme, shape)
    for _ in range(rounds):
        terms = _grouped(values, scheme.rank, p.sizes)
        left = _residual(p, terms, 0)
        if not any(left.values()):
            return Scheme(p, terms)
        if any(r % modulus for r in left.values()):
            return None
        digits = solve([left[e] // modulus % prime for e in sorted(left)])
        if digits is None:
            return None
        values = {key: value + modulus * digit for (key, value), digit in zip(values.items(), digits)}
        modulus *= prime
    rational = {key: _fraction(value % modulus, modulus) for key, value in values.items()}
    if any(value is None for value in rational.values()):
        return None
    made = Scheme(p, _grouped(rational, scheme.rank, p.sizes))
    return made if made.holds() else None


def _grouped(values: dict[Any, Any], rank: int, sizes: Sequence[int]) -> Any:
    return tuple(tuple(tuple(values[t, f, i] for i in range(sizes[f])) for f in range(3)) for t in range(rank))


def _solver(p: Problem, scheme: Scheme, shape: list[Any]) -> Callable[[list[int]], list[int] | None]:
    """Solves the linearised equations modulo the prime for a right side; free unknowns stay 0."""
    prime = scheme.prime
    equations = sorted(_residual(p, scheme.terms, prime))
    matrix = [[0] * len(shape) for _ in equations]
    for row, entry in enumerate(equations):
        for col, (t, f, i) in enumerate(shape):
            if entry[f] == i:
                others = [scheme.terms[t][g][entry[g]] for g in range(3) if g != f]
                matrix[row][col] = others[0] * others[1] % prime

    def solve(right: list[int]) -> list[int] | None:
        rows = [[*m, r] for m, r in zip(matrix, right)]
        pivots: list[int] = []
        for col in range(len(shape)):
            at = next((k for k in range(len(pivots), len(rows)) if rows[k][col]), None)
            if at is None:
                continue
            rows[len(pivots)], rows[at] = rows[at], rows[len(pivots)]
            top = rows[len(pivots)]
            inverse = pow(top[col], -1, prime)
            top[:] = [x * inverse % prime for x in top]
            for k, other in enumerate(rows):
                if k != len(pivots) and other[col]:
                    factor = other[col]
                    rows[k] = [(x - factor * y) % prime for x, y in zip(other, top)]
            pivots.append(col)
        if any(row[-1] for row in rows[len(pivots) :]):
            return None
        made = [0] * len(shape)
        for row, col in enumerate(pivots):
            made[col] = rows[row][-1]
        return made

    return solve


def _fraction(residue: int, modulus: int) -> Fraction | None:
    """The fraction with small numerator and denominator that has this residue (Wang's algorithm)."""
    bound = int((modulus // 2) ** 0.5)
    a, b, s, t = modulus, residue, 0, 1
    while b > bound:
        quotient = a // b
        a, b, s, t = b, a - quotient * b, t, s - quotient * t
    return Fraction(b, t) if t and abs(t) <= bound else None


# -- running -------------------------------------------------------------------------------------------------------


def apply(scheme: Scheme, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b by the scheme, entries being square blocks: (n m, n m) matrices for blocks of m.

    Raises InputError for symmetric kinds with blocks larger than 1: there a block's mirror image is its transpose,
    which the scheme does not know, and the result would be wrong.
    """
    n = scheme.problem.n
    if scheme.prime:
        raise InputError("a scheme modulo a prime multiplies no real numbers; lift it first")
    if a.shape != b.shape or a.dim() != 2 or a.shape[0] != a.shape[1] or a.shape[0] % n:
        raise InputError(f"both matrices are square of a size divisible by {n}, got {tuple(a.shape)}, {tuple(b.shape)}")
    m = a.shape[0] // n
    if m > 1 and ("s" in scheme.problem.kinds or "t" in scheme.problem.kinds):
        raise InputError(f"a scheme for kinds {scheme.problem.kinds!r} is right for entries, not for blocks of {m}")

    def blocks(x: torch.Tensor, which: int) -> list[torch.Tensor]:
        firsts = [p[0] for p in scheme.problem.places[which]]
        return [x[i * m : (i + 1) * m, j * m : (j + 1) * m] for i, j in firsts]

    left, right = blocks(a, 0), blocks(b, 1)
    made = torch.zeros_like(a)
    for u, v, w in scheme.terms:
        product = _combined(u, left) @ _combined(v, right)
        for (place,), weight in zip(scheme.problem.places[2], w):
            if weight:
                i, j = place
                made[i * m : (i + 1) * m, j * m : (j + 1) * m] += float(weight) * product
    return made


def _combined(weights: Vector, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(parts[0])
    for weight, part in zip(weights, parts):
        if weight:
            total = total + float(weight) * part
    return total


def recursive_share(rank: int, calls: int, general: int) -> Fraction:
    """Leading cost of a scheme that calls itself `calls` times, as a share of the general product's.

    (rank - calls) / (n^omega - calls), where `general` is n^omega, the rank of the general scheme of the same size.
    """
    return Fraction(rank - calls, general - calls)
