"""SparseProduct: a weight as a product of several sparse matrices, fitted by hierarchical PALM (FAuST)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.errors import FormatError, SpecError
from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._linalg import whitening
from sparsec.factors.butterfly import Butterfly
from sparsec.formats import Buffers, FanIn

_ITERATIONS = 40
_SEED = 0xFA57


@dataclass(frozen=True)
class SparseProduct(Factor):
    """W = S_J ... S_1, S_j with `nonzeros[j - 1]` values in every row; S_1 meets x first.

    S_1 is (inner, in), S_J (out, inner), those between (inner, inner); `inner` None is the smaller of out and in. A
    product costs sum_j rows_j nonzeros_j multiplications. Buffers `values_j` and `indices_j` are those of FanIn.

    The fit is hierarchical PALM (Le Magoarou and Gribonval, IEEE J. Sel. Topics Signal Process. 2016): peel a sparse
    factor off a residual, then improve all of them. Projected gradients stall where entries tie, as in a Hadamard
    matrix, so it starts from the supports of a butterfly as well where sizes allow, and the better result wins.
    """

    nonzeros: tuple[int, ...]
    inner: int | None = None

    name: ClassVar[str] = "sparse_product"

    def __post_init__(self) -> None:
        if not isinstance(self.nonzeros, (tuple, list)) or len(self.nonzeros) < 2:
            raise SpecError(f"SparseProduct: nonzeros={self.nonzeros!r} must be a tuple of at least two, one a factor")
        object.__setattr__(self, "nonzeros", tuple(self.nonzeros))
        positive("SparseProduct", **{f"nonzeros[{i}]": k for i, k in enumerate(self.nonzeros)})
        if self.inner is not None:
            positive("SparseProduct", inner=self.inner)

    def resolve(self, shape: Shape) -> SparseProduct:
        return SparseProduct(self.nonzeros, self.inner or min(matrix_shape(shape)))

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        for at, (_, cols, k) in enumerate(self._sizes(shape), 1):
            if k > cols:
                return f"factor {at} has {cols} columns, so no {k} nonzeros in a row"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        found: dict[str, Shape] = {}
        for at, (rows, _, k) in enumerate(self._sizes(shape), 1):
            found[f"values_{at}"] = (rows, k)
            found[f"indices_{at}"] = (rows, k)
        return found

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        out, width = matrix_shape(shape)
        operands = []
        letters = "abcdefghijklmnopqrstuvwxy"
        for at, (rows, cols, k) in enumerate(self._sizes(shape), 1):
            names = (f"values_{at}", f"indices_{at}")
            pair = letters[at] + letters[at - 1]
            operands.append(Operand(names, pair, (rows, cols), FanIn(k).resolve(rows, cols), rows * k))
        return (Contraction("a", letters[len(operands)], (width,), (out,), tuple(operands)),)

    def nbytes(self, shape: Shape, itemsize: int) -> int:
        return sum(FanIn(k).nbytes(rows, cols, rows * k, itemsize) for rows, cols, k in self._sizes(shape))

    def validate(self, buffers: Buffers, shape: Shape) -> None:
        if tuple(buffers) != tuple(self.shapes(shape)):
            raise FormatError(f"{self.name}: buffers are {tuple(buffers)}, expected {tuple(self.shapes(shape))}")
        for at, (rows, cols, k) in enumerate(self._sizes(shape), 1):
            own = {"values": buffers[f"values_{at}"], "indices": buffers[f"indices_{at}"]}
            FanIn(k).resolve(rows, cols).validate(own, rows, cols)

    def accept(self, dense: torch.Tensor) -> torch.Tensor:
        if dense.is_complex():
            raise FormatError(f"{self.text()} cannot hold a {dense.dtype} weight: formats store real values")
        return super().accept(dense)

    def solve(self, weight: torch.Tensor) -> Buffers:
        return self._packed(self._best(weight.flatten(1), None), tuple(weight.shape))

    def solve_gram(self, weight: torch.Tensor, gram: torch.Tensor) -> Buffers:
        return self._packed(self._best(weight.flatten(1), whitening(gram)), tuple(weight.shape))

    def _packed(self, factors: list[torch.Tensor], shape: Shape) -> Buffers:
        found: Buffers = {}
        for at, (factor, (_, _, k)) in enumerate(zip(factors, self._sizes(shape), strict=True), 1):
            own = FanIn(k).pack(factor.contiguous())
            found[f"values_{at}"], found[f"indices_{at}"] = own["values"], own["indices"]
        return found

    def _best(self, weight: torch.Tensor, root: torch.Tensor | None) -> list[torch.Tensor]:
        sizes = self._sizes(tuple(weight.shape))
        starts = [_hierarchical(weight, sizes, root)]
        if (supported := self._butterfly(weight)) is not None:
            starts.append(palm(weight, supported, [k for _, _, k in sizes], root))
        target = weight if root is None else weight @ root

        def error(factors: list[torch.Tensor]) -> float:
            return float((target - _product(factors, root)).norm())

        return min(starts, key=error)

    def _butterfly(self, weight: torch.Tensor) -> list[torch.Tensor] | None:
        """The stages of a butterfly as matrices, where this product has room for them."""
        shape = tuple(weight.shape)
        plan = Butterfly().resolve(shape)
        if plan.outs is None or plan.outs != plan.ins or len(plan.outs) != len(self.nonzeros):
            return None
        sizes = self._sizes(shape)
        if any(r > k or rows != cols for r, (rows, cols, k) in zip(plan.outs, sizes, strict=True)):
            return None
        stages = []
        for stage in plan.fit(weight).buffers.values():
            a, o, i, b = stage.shape
            eye_a, eye_b = (torch.eye(n, dtype=stage.dtype) for n in (a, b))
            full = torch.einsum("aoib,ac,bd->aobcid", stage, eye_a, eye_b)
            stages.append(full.reshape(a * o * b, a * i * b))
        return stages

    def _sizes(self, shape: Shape) -> list[tuple[int, int, int]]:
        """(rows, columns, nonzeros in a row) of every factor, the first applied first."""
        out, width = matrix_shape(shape)
        inner = self.inner or min(out, width)
        count = len(self.nonzeros)
        rows = [inner] * (count - 1) + [out]
        cols = [width] + [inner] * (count - 1)
        return list(zip(rows, cols, self.nonzeros, strict=True))


def palm(
    weight: torch.Tensor, factors: list[torch.Tensor], keep: list[int], root: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Proximal alternating linearised minimisation of ||(W - S_J ... S_1) root||_F with `keep[j]` values a row of S_j.

    Each turn is a gradient step of 1 / Lipschitz on one factor and the projection of its rows on their largest entries.
    """
    target = weight if root is None else weight @ root
    current = list(factors)
    for _ in range(_ITERATIONS):
        for j in range(len(current)):
            left = _product(current[j + 1 :], None) if j + 1 < len(current) else None
            right = _product(current[:j], root) if j or root is not None else None
            built = _sandwich(left, current[j], right)
            slope = _sandwich(None if left is None else left.mT, built - target, None if right is None else right.mT)
            bound = _squared_norm(left) * _squared_norm(right)
            stepped = current[j] - slope / (1.001 * bound) if bound > 0 else current[j]
            current[j] = _top(stepped, keep[j])
        built = _product(current, root)
        size = float((built * built).sum())
        if size > 0:  # the scale lambda of the paper, spread over the factors
            share = abs(float((target * built).sum()) / size) ** (1.0 / len(current))
            current = [c * share for c in current]
    return current


def _hierarchical(
    weight: torch.Tensor, sizes: list[tuple[int, int, int]], root: torch.Tensor | None
) -> list[torch.Tensor]:
    """Split the residual in two again and again, and improve all factors after each split."""
    generator = torch.Generator().manual_seed(_SEED)
    done: list[torch.Tensor] = []
    rest = weight
    for at in range(len(sizes) - 1):
        rows, final = sizes[at][0], sizes[-1][2]
        # the residual keeps half as many with every factor, down to what the last one may
        left_keep = final if at == len(sizes) - 2 else max(final, rows >> (at + 1))
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        count = min(rows, s.numel())
        turn = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=weight.dtype)).Q[:, :count]
        scale = s[:count].sqrt()
        pair = [turn @ (scale[:, None] * vh[:count]), (u[:, :count] * scale) @ turn.mT]
        pair = palm(rest, pair, [sizes[at][2], left_keep], root if not done else None)
        keep = [k for _, _, k in sizes[: at + 1]] + [left_keep]
        everything = palm(weight, [*done, *pair], keep, root)
        done, rest = everything[:-1], everything[-1]
    return [*done, rest]


def _product(factors: list[torch.Tensor], root: torch.Tensor | None) -> torch.Tensor:
    """S_j ... S_1 root; at least one of them is there."""
    parts = factors if root is None else [root, *factors]
    running = parts[0]
    for factor in parts[1:]:
        running = factor @ running
    return running


def _sandwich(left: torch.Tensor | None, middle: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    middle = middle if left is None else left @ middle
    return middle if right is None else middle @ right


def _squared_norm(matrix: torch.Tensor | None) -> float:
    return 1.0 if matrix is None else float(torch.linalg.matrix_norm(matrix, 2)) ** 2


def _top(matrix: torch.Tensor, keep: int) -> torch.Tensor:
    """Each row with all but its `keep` largest entries set to zero; ties keep the earlier."""
    order = torch.argsort(matrix.abs(), dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(matrix).scatter_(1, order, matrix.gather(1, order))
