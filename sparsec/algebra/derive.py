"""Deriving library calls from index expressions: loops, sums and affine accesses, rewritten until a product matches.

An expression is `out[x] = sum_y A[f(x, y)] B[g(x, y)]` with zeros outside of a tensor. The rules are those of
derivation-based optimisation (OLLIE, Zheng et al., OSDI 2023): a sum is split into stages, a variable is substituted so
that a boundary is relaxed to the tensor's own extent, a traversal is split by a factor. A 3 x 3 convolution becomes one
matrix product over the unpadded input and an addition of shifted results; what is no library call is left as a gather.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from sparsec.errors import InputError

PRODUCT, CONVOLUTION, GATHER, LOOPS = "product", "convolution", "gather", "loops"
WEIGHT = {PRODUCT: 1.0, CONVOLUTION: 1.5, GATHER: 4.0, LOOPS: 50.0}
"""Time of one iteration, relative to one of a matrix product."""


@dataclass(frozen=True)
class Affine:
    """(sum of coefficient * iterator) / den; an index exists only where the division has no remainder."""

    terms: tuple[tuple[str, int], ...]
    const: int = 0
    den: int = 1

    @staticmethod
    def of(**terms: int) -> Affine:
        return Affine(tuple(sorted(terms.items())))

    def __str__(self) -> str:
        parts = [f"{c if c != 1 else ''}{n}" for n, c in self.terms] + ([str(self.const)] if self.const else [])
        made = " + ".join(parts) or "0"
        return made if self.den == 1 else f"({made}) / {self.den}"


@dataclass(frozen=True)
class Range:
    name: str
    size: int


@dataclass(frozen=True)
class View:
    """A tensor with one axis split into (size / by, by): a data layout transformation, free for contiguous axes."""

    name: str
    axis: int
    by: int


@dataclass(frozen=True)
class Access:
    """A read of a tensor by name, of a view, or of an inner expression, whose sizes are `shape`."""

    source: str | View | Scope
    dims: tuple[Affine, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Scope:
    """out[loops] = sum over `sums` of the product of the factors."""

    loops: tuple[Range, ...]
    sums: tuple[Range, ...]
    factors: tuple[Access, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(r.size for r in self.loops)

    @property
    def iterations(self) -> int:
        return math.prod(r.size for r in (*self.loops, *self.sums))

    @property
    def kind(self) -> str:
        """What runs this scope: a product, a dense convolution, a gather of one tensor, or plain loops."""
        if len(self.factors) == 1:
            return GATHER
        pure = all(len(d.terms) <= 1 and d.const == 0 and d.den == 1 and all(c == 1 for _, c in d.terms)
                   for f in self.factors for d in f.dims)  # fmt: skip
        distinct = all(len({d.terms for d in f.dims if d.terms}) == sum(bool(d.terms) for d in f.dims)
                       for f in self.factors)  # fmt: skip
        if pure and distinct and all(_covers(f, self) for f in self.factors):
            return PRODUCT
        dense = all(d.den == 1 and all(c == 1 for _, c in d.terms) for f in self.factors for d in f.dims)
        return CONVOLUTION if dense else LOOPS

    def __str__(self) -> str:
        loops = " ".join(f"{r.name}<{r.size}" for r in self.loops)
        sums = f" sum {' '.join(f'{r.name}<{r.size}' for r in self.sums)}" if self.sums else ""
        body = " * ".join(f"{_name(f.source)}[{', '.join(map(str, f.dims))}]" for f in self.factors)
        return f"{self.kind}[{loops}{sums}: {body}]"


def _name(source: str | View | Scope) -> str:
    if isinstance(source, View):
        return f"{source.name}.split({source.axis}, {source.by})"
    return str(source)


def _covers(access: Access, scope: Scope) -> bool:
    sizes = {r.name: r.size for r in (*scope.loops, *scope.sums)}
    return all(sizes[n] == size for d, size in zip(access.dims, access.shape) for n, _ in d.terms)


def cost(scope: Scope) -> float:
    """Weighted iterations of a scope and of those inside it."""
    inner = sum(cost(f.source) for f in scope.factors if isinstance(f.source, Scope))
    return WEIGHT[scope.kind] * scope.iterations + inner


def evaluate(scope: Scope, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value of an expression by its definition, exact on integers; for checks."""
    ranges = (*scope.loops, *scope.sums)
    grid = {r.name: torch.arange(r.size).reshape([-1 if q is r else 1 for q in ranges]) for r in ranges}
    total: torch.Tensor | None = None
    for access in scope.factors:
        value = _value(access.source, tensors)
        if tuple(value.shape) != access.shape:
            name, got = _name(access.source), tuple(value.shape)
            raise InputError(f"{name} has shape {got}, the expression reads {access.shape}")
        index, inside = [], torch.ones([1] * len(ranges), dtype=torch.bool)
        for dim, size in zip(access.dims, access.shape):
            raw = torch.full([1] * len(ranges), dim.const)
            for name, factor in dim.terms:
                raw = raw + factor * grid[name]
            place = torch.div(raw, dim.den, rounding_mode="floor")
            inside = inside & (raw % dim.den == 0) & (place >= 0) & (place < size)
            index.append(place.clamp(0, size - 1))
        read = value[tuple(index)] * inside
        total = read if total is None else total * read
    if total is None:
        raise InputError("an expression needs a factor")
    total = total.expand([r.size for r in ranges])
    return total.sum(list(range(len(scope.loops), len(ranges)))) if scope.sums else total


def _value(source: str | View | Scope, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(source, Scope):
        return evaluate(source, tensors)
    if isinstance(source, str):
        return tensors[source]
    whole = tensors[source.name]
    shape = list(whole.shape)
    shape[source.axis : source.axis + 1] = [shape[source.axis] // source.by, source.by]
    return whole.reshape(shape)


# -- rules ---------------------------------------------------------------------------------------------------------


def split_sum(scope: Scope) -> Iterator[Scope]:
    """`sum_{r, c} f --> sum_r (sum_c f)`, the inner result having r as an axis more."""
    if len(scope.factors) < 2:
        return
    mixed = {n for f in scope.factors for d in f.dims if len(d.terms) > 1 for n, _ in d.terms}
    outer = tuple(r for r in scope.sums if r.name in mixed)
    if outer:
        inner = Scope((*scope.loops, *outer), tuple(r for r in scope.sums if r not in outer), scope.factors)
        dims = tuple(Affine(((r.name, 1),)) for r in inner.loops)
        yield Scope(scope.loops, outer, (Access(inner, dims, inner.shape),))


def substitute(scope: Scope) -> Iterator[Scope]:
    """`E[h, r] with A[h + r] --> E'[t, r] with A[t]`, read at t = h + r; t runs over all of A's axis and no more."""
    if len(scope.factors) != 1 or not isinstance(scope.factors[0].source, Scope):
        return
    (access,) = scope.factors
    inner = access.source
    if not isinstance(inner, Scope):
        return
    loops = {r.name: i for i, r in enumerate(inner.loops)}
    for factor in inner.factors:
        for dim, size in zip(factor.dims, factor.shape):
            first = next((n for n, c in dim.terms if n in loops and c == 1), None)
            if first is None or (len(dim.terms) == 1 and dim.den == 1 and not dim.const):
                continue
            others = [f for f in inner.factors if f is not factor]
            elsewhere = [d for f in others for d in f.dims] + [d for d in factor.dims if d is not dim]
            if any(n == first for d in elsewhere for n, _ in d.terms) or any(n not in loops for n, _ in dim.terms):
                continue
            fresh = first + "'"
            made = replace(factor, dims=tuple(Affine(((fresh, 1),)) if d is dim else d for d in factor.dims))
            ranges = tuple(Range(fresh, size) if r.name == first else r for r in inner.loops)
            body = Scope(ranges, inner.sums, tuple(made if f is factor else f for f in inner.factors))
            place = _composed(dim, {n: access.dims[i] for n, i in loops.items()})
            if place is None:
                continue
            reads = tuple(place if i == loops[first] else d for i, d in enumerate(access.dims))
            yield Scope(scope.loops, scope.sums, (Access(body, reads, body.shape),))


def _composed(dim: Affine, outer: Mapping[str, Affine]) -> Affine | None:
    """An index over inner iterators as one over what the outer scope reads there; one division at most."""
    dens = [outer[n].den for n, _ in dim.terms if outer[n].den > 1]
    if len(dens) > 1 or (dens and dim.den > 1):
        return None
    scale = dens[0] if dens else 1
    made: dict[str, int] = {}
    const = dim.const * scale
    for name, factor in dim.terms:
        read = outer[name]
        const += factor * read.const * (scale // read.den)
        for other, c in read.terms:
            made[other] = made.get(other, 0) + factor * c * (scale // read.den)
    return Affine(tuple(sorted((n, c) for n, c in made.items() if c)), const, dim.den * scale)


def drop_units(scope: Scope) -> Iterator[Scope]:
    """`sum_{r < 1} A[h + r] --> A[h]`."""
    units = {r.name for r in scope.sums if r.size == 1}
    if units and not any(isinstance(f.source, Scope) for f in scope.factors):
        factors = tuple(
            replace(f, dims=tuple(replace(d, terms=tuple(t for t in d.terms if t[0] not in units)) for d in f.dims))
            for f in scope.factors
        )
        yield Scope(scope.loops, tuple(r for r in scope.sums if r.name not in units), factors)


def split_traversal(scope: Scope) -> Iterator[Scope]:
    """`out[h] with A[h + 2 r] --> out[h] = sum_p E[p, (h - p) / 2], E[p, g] with A.split(2)[g + r, p]`."""
    for position, loop in enumerate(scope.loops):
        for factor in scope.factors:
            for axis, (dim, size) in enumerate(zip(factor.dims, factor.shape)):
                terms = dict(dim.terms)
                by = math.gcd(*(c for n, c in dim.terms if n != loop.name)) if len(dim.terms) > 1 else 1
                alone = sum(n == loop.name for f in scope.factors for d in f.dims for n, _ in d.terms) == 1
                whole = isinstance(factor.source, str) and size % by == 0 and dim.const % by == 0 and dim.den == 1
                if terms.get(loop.name) != 1 or by < 2 or not alone or not whole:
                    continue
                phase, step = Range(loop.name + "p", by), Range(loop.name + "g", -(-loop.size // by))
                rest = [(n, c // by) for n, c in dim.terms if n != loop.name]
                inside = Affine(tuple(sorted([(step.name, 1), *rest])), dim.const // by)
                dims = (*factor.dims[:axis], inside, Affine(((phase.name, 1),)), *factor.dims[axis + 1 :])
                shape = (*factor.shape[:axis], size // by, by, *factor.shape[axis + 1 :])
                made = Access(View(str(factor.source), axis, by), dims, shape)
                loops = (*scope.loops[:position], step, phase, *scope.loops[position + 1 :])
                body = Scope(loops, scope.sums, tuple(made if f is factor else f for f in scope.factors))
                back = Affine(((loop.name, 1), (phase.name, -1)), 0, by)
                reads = tuple(back if r is step else Affine(((r.name, 1),)) for r in loops)
                yield Scope(scope.loops, (phase,), (Access(body, reads, body.shape),))


RULES = {"drop_units": drop_units, "split_sum": split_sum, "substitute": substitute, "split_traversal": split_traversal}


@dataclass(frozen=True)
class Derivation:
    """An equal expression, the rules that led to it, and its weighted cost."""

    scope: Scope
    applied: tuple[str, ...]
    cost: float


def derive(scope: Scope, depth: int = 6) -> tuple[Derivation, ...]:
    """Every expression that the rules reach in `depth` steps, cheapest first; equal fingerprints are met once."""
    seen = {fingerprint(scope): Derivation(scope, (), cost(scope))}
    front = list(seen.values())
    for _ in range(depth):
        grown = []
        for found in front:
            for name, made in _everywhere(found.scope):
                key = fingerprint(made)
                if key not in seen:
                    seen[key] = Derivation(made, (*found.applied, name), cost(made))
                    grown.append(seen[key])
        front = grown
    return tuple(sorted(seen.values(), key=lambda d: (d.cost, len(d.applied))))


def _everywhere(scope: Scope) -> Iterator[tuple[str, Scope]]:
    for name, rule in RULES.items():
        for made in rule(scope):
            yield name, made
    for position, access in enumerate(scope.factors):
        if isinstance(access.source, Scope):
            for name, made in _everywhere(access.source):
                factors = list(scope.factors)
                factors[position] = replace(access, source=made)
                yield name, replace(scope, factors=tuple(factors))


def fingerprint(scope: Scope) -> str:
    """The text of an expression with its iterators numbered in order, so that names make no difference."""
    text = str(scope)
    names: dict[str, str] = {}

    def visit(s: Scope) -> None:
        for r in (*s.loops, *s.sums):
            names.setdefault(r.name, f"i{len(names)}")
        for f in s.factors:
            if isinstance(f.source, Scope):
                visit(f.source)

    visit(scope)
    for name in sorted(names, key=len, reverse=True):
        text = _renamed(text, name, names[name])
    return text


def _renamed(text: str, old: str, new: str) -> str:
    return re.sub(rf"(?<![\w']){re.escape(old)}(?![\w'])", f"${new}", text)


def kinds(scope: Scope) -> tuple[str, ...]:
    """What runs the expression, inner scopes first."""
    inner = (kinds(f.source) for f in scope.factors if isinstance(f.source, Scope))
    return (*itertools.chain(*inner), scope.kind)


# -- problems ------------------------------------------------------------------------------------------------------


def convolution(
    n: int, c: int, f: int, size: int, kernel: int, stride: int = 1, dilation: int = 1, padding: int = 0
) -> Scope:
    """out[n, f, h] = sum_{c, r} x[n, c, stride h + dilation r - padding] w[f, c, r] over one spatial axis."""
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    place = Affine((("h", stride), ("r", dilation)), -padding)
    x = Access("x", (Affine.of(n=1), Affine.of(c=1), place), (n, c, size))
    w = Access("w", (Affine.of(f=1), Affine.of(c=1), Affine.of(r=1)), (f, c, kernel))
    return Scope((Range("n", n), Range("f", f), Range("h", out)), (Range("c", c), Range("r", kernel)), (x, w))


def transposed_convolution(n: int, c: int, f: int, size: int, kernel: int, stride: int) -> Scope:
    """out[n, f, h] = sum_{c, r} x[n, c, (h - r) / stride] w[c, f, r], no padding."""
    place = Affine((("h", 1), ("r", -1)), 0, stride)
    x = Access("x", (Affine.of(n=1), Affine.of(c=1), place), (n, c, size))
    w = Access("w", (Affine.of(c=1), Affine.of(f=1), Affine.of(r=1)), (c, f, kernel))
    out = (size - 1) * stride + kernel
    return Scope((Range("n", n), Range("f", f), Range("h", out)), (Range("c", c), Range("r", kernel)), (x, w))
