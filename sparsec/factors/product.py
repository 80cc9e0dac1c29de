"""Product: any factors multiplied, fitted by alternating projected gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from string import ascii_letters
from typing import ClassVar

import torch

from sparsec.errors import FormatError, SpecError
from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import BATCH, Contraction, Operand
from sparsec.factors._linalg import truncated_svd, whitening
from sparsec.factors.sparse import Sparse
from sparsec.formats import Buffers, Format

_ROUNDS = 60
_STALLED = 1e-6


@dataclass(frozen=True, init=False)
class Product(Factor):
    """W = terms[0] terms[1] ... as matrices, so that x meets the last one first: `Product(Monarch(), LowRank(64))`.

    Between two terms stand `inner` features, None for the smaller of out and in. Terms are factors with one einsum
    each, or formats as in a sum; where two meet, the digits of the one must be those of the other. The fit starts from
    the SVD and takes a gradient step and the term's own fit as a projection in turn (PALM, Bolte, Sabach and Teboulle,
    2014); the best round wins. Buffers carry their term's place: `"0_left"`.
    """

    terms: tuple[Factor, ...]
    inner: int | None

    name: ClassVar[str] = "product"

    def __init__(
        self, *parts: Factor | Format, terms: tuple[Factor | Format, ...] = (), inner: int | None = None
    ) -> None:
        found: list[Factor] = []
        for part in (*parts, *terms):
            if not isinstance(part, (Factor, Format)):
                raise SpecError(f"Product: {part!r} is neither a factor such as LowRank(64) nor a format")
            found.append(Sparse(format=part) if isinstance(part, Format) else part)
        if len(found) < 2:
            raise SpecError(f"Product: {len(found)} term(s); a product has at least two")
        if inner is not None:
            positive("Product", inner=inner)
        object.__setattr__(self, "terms", tuple(found))
        object.__setattr__(self, "inner", inner)

    def resolve(self, shape: Shape) -> Product:
        sizes = self.sizes(shape)
        terms = tuple(t.resolve(s) for t, s in zip(self.terms, sizes, strict=True))
        return Product(*terms, inner=sizes[0][1])

    def sizes(self, shape: Shape) -> list[Shape]:
        """The matrix shape of every term."""
        out, width = matrix_shape(shape)
        inner = self.inner or min(out, width)
        ends = [out, *[inner] * (len(self.terms) - 1), width]
        return list(pairwise(ends))

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        for term, size in zip(self.terms, self.sizes(shape), strict=True):
            if (reason := term.refuse(size)) is not None:
                return f"{term.text()} as a {size} term: {reason}"
        try:
            self.contract(shape)
        except SpecError as error:
            return str(error)
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        sizes = self.sizes(shape)
        return {
            f"{at}_{k}": s
            for at, (term, size) in enumerate(zip(self.terms, sizes, strict=True))
            for k, s in term.shapes(size).items()
        }

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        joined: Contraction | None = None
        for at, (term, size) in reversed(list(enumerate(zip(self.terms, self.sizes(shape), strict=True)))):
            own = term.resolve(size).contract(size)
            if len(own) != 1:
                raise SpecError(f"{term.text()} is a sum; a product of sums is a sum of products: write it that way")
            operands = tuple(replace(o, names=tuple(f"{at}_{n}" for n in o.names)) for o in own[0].operands)
            single = replace(own[0], operands=operands, kernel="")
            joined = single if joined is None else _chained(joined, single, term.text())
        return () if joined is None else (joined,)

    def nbytes(self, shape: Shape, itemsize: int) -> int:
        return sum(t.nbytes(s, itemsize) for t, s in zip(self.terms, self.sizes(shape), strict=True))

    def validate(self, buffers: Buffers, shape: Shape) -> None:
        expected = tuple(self.resolve(shape).shapes(shape))
        if tuple(buffers) != expected:
            raise FormatError(f"{self.name}: buffers are {tuple(buffers)}, expected {expected} in this order")
        for at, (term, size) in enumerate(zip(self.terms, self.sizes(shape), strict=True)):
            term.validate({k: buffers[f"{at}_{k}"] for k in term.resolve(size).shapes(size)}, size)

    def accept(self, dense: torch.Tensor) -> torch.Tensor:
        if dense.is_complex():
            raise FormatError(f"{self.text()} cannot hold a {dense.dtype} weight: its fit is for real ones")
        return super().accept(dense)

    def solve(self, weight: torch.Tensor) -> Buffers:
        return self._alternate(weight.flatten(1), None)

    def solve_gram(self, weight: torch.Tensor, gram: torch.Tensor) -> Buffers:
        return self._alternate(weight.flatten(1), whitening(gram))

    def _alternate(self, weight: torch.Tensor, root: torch.Tensor | None) -> Buffers:
        sizes = self.sizes(tuple(weight.shape))
        target = weight if root is None else weight @ root
        dense = _start(weight, sizes)
        found: list[Buffers] = [{} for _ in sizes]
        for at, (term, size) in enumerate(zip(self.terms, sizes, strict=True)):
            found[at], dense[at] = _projected(term, size, dense[at])
        best, least, before = list(found), float("inf"), float("inf")
        for _ in range(_ROUNDS):
            for at, (term, size) in enumerate(zip(self.terms, sizes, strict=True)):
                left = _multiplied(dense[:at])
                right = _multiplied([*dense[at + 1 :], *([] if root is None else [root])])
                built = _multiplied([m for m in (left, dense[at], right) if m is not None])
                slope = built - target if built is not None else target
                slope = slope if left is None else left.mT @ slope
                slope = slope if right is None else slope @ right.mT
                bound = prod(float(torch.linalg.matrix_norm(m, 2)) ** 2 for m in (left, right) if m is not None)
                if bound > 0:
                    found[at], dense[at] = _projected(term, size, dense[at] - slope / (1.001 * bound))
            built = _multiplied([*dense, *([] if root is None else [root])])
            error = float((target - built).norm()) if built is not None else 0.0
            if error < least:
                best, least = list(found), error
            if abs(before - error) <= _STALLED * before:
                break
            before = error
        return {f"{at}_{k}": t for at, own in enumerate(best) for k, t in own.items()}


def _projected(term: Factor, size: Shape, dense: torch.Tensor) -> tuple[Buffers, torch.Tensor]:
    chosen = term.resolve(size)
    buffers = chosen.solve(dense.contiguous())
    return buffers, chosen.reconstruct(buffers, size)


def _start(weight: torch.Tensor, sizes: list[Shape]) -> list[torch.Tensor]:
    """The SVD's halves at both ends and unit matrices between, turned so that no entry is special."""
    inner = sizes[0][1]
    left, right = truncated_svd(weight, min(inner, *weight.shape))
    pad = inner - left.shape[1]
    left, right = torch.nn.functional.pad(left, (0, pad)), torch.nn.functional.pad(right, (0, 0, 0, pad))
    generator = torch.Generator().manual_seed(0x90D)
    turn = torch.linalg.qr(torch.randn(inner, inner, generator=generator, dtype=weight.dtype)).Q
    return [left @ turn, *(torch.eye(inner, dtype=weight.dtype) for _ in sizes[2:]), turn.mT @ right]


def _multiplied(matrices: list[torch.Tensor]) -> torch.Tensor | None:
    running = None
    for matrix in matrices:
        running = matrix if running is None else running @ matrix
    return running


def _chained(first: Contraction, second: Contraction, what: str) -> Contraction:
    """The einsum of `second` after `first`: letters renamed, a single letter split where the other has digits."""
    if first.y != second.x:
        if len(first.y) == 1:
            first = _split_outputs(first, second.x, what)
        elif len(second.x) == 1:
            second = _split_inputs(second, first.y, what)
        else:
            raise SpecError(f"{what} takes its input as {second.x}, but the term before gives {first.y}")
    used = first.inputs + first.outputs + "".join(o.letters for o in first.operands) + BATCH
    own = dict.fromkeys(second.inputs + second.outputs + "".join(o.letters for o in second.operands))
    names = dict(zip(second.inputs, first.outputs, strict=True))
    free = (a for a in ascii_letters if a not in used)
    for letter in own:
        if letter not in names:
            names[letter] = next(free)

    def renamed(letters: str) -> str:
        return "".join(names[a] for a in letters)

    operands = tuple(replace(o, letters=renamed(o.letters)) for o in second.operands)
    return Contraction(first.inputs, renamed(second.outputs), first.x, second.y, (*first.operands, *operands))


def _split_outputs(c: Contraction, sizes: Shape, what: str) -> Contraction:
    letters, operands = _split(c, c.outputs, sizes, what)
    return replace(c, outputs=letters, y=sizes, operands=operands)


def _split_inputs(c: Contraction, sizes: Shape, what: str) -> Contraction:
    letters, operands = _split(c, c.inputs, sizes, what)
    return replace(c, inputs=letters, x=sizes, operands=operands)


def _split(c: Contraction, letter: str, sizes: Shape, what: str) -> tuple[str, tuple[Operand, ...]]:
    """The one `letter` as letters of these sizes in every operand, whose buffers stay as they are."""
    used = c.inputs + c.outputs + "".join(o.letters for o in c.operands) + BATCH
    fresh = "".join([a for a in ascii_letters if a not in used][: len(sizes)])
    operands = []
    for o in c.operands:
        if letter in o.letters:
            if o.format is not None or type(o) is not Operand:
                raise SpecError(f"{what} meets digits {sizes} that buffer {o.names[0]!r} cannot be split into")
            at = o.letters.index(letter)
            shape = (*o.shape[:at], *sizes, *o.shape[at + 1 :])
            o = replace(o, letters=o.letters.replace(letter, fresh), shape=shape)
        operands.append(o)
    return fresh, tuple(operands)
