"""Sparse: the entries of a weight that matter most, in a storage format; the sparse term of a sum or product."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch

from sparsec.errors import FormatError, SpecError
from sparsec.factors._base import Factor, Shape, matrix_shape
from sparsec.factors._contraction import Contraction, Operand
from sparsec.formats import CSR, Buffers, Format

_STEPS = 20


@dataclass(frozen=True)
class Sparse(Factor):
    """The round((1 - sparsity) * out * in) entries of largest magnitude, packed in `format`.

    With a Gram matrix G the score of an entry is |w| G_jj^(1/2), its effect on the output (Wanda, Sun et al., 2024).
    `sparsity` None leaves the choice to a format that fixes it: NM(2, 4) keeps the best 2 of 4, FanIn(k) the best k of
    a row. Ties keep the earlier entry. The buffers are those of the format.
    """

    sparsity: float | None = None
    format: Format = field(default_factory=CSR)

    name: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format) or not self.format.exact or self.format.blocked:
            raise SpecError(f"Sparse: format={self.format!r} is no exact format of single entries such as CSR()")
        if self.sparsity is None:
            if not _fixes(self.format):
                raise SpecError(
                    f"Sparse: {self.format.text()} does not say how much it keeps; write Sparse(0.95) for 95 % zeros, "
                    f"Sparse(0.95, {self.format!r}) in this format"
                )
            return
        if _fixes(self.format):
            raise SpecError(f"Sparse: {self.format.text()} says itself how much it keeps; leave the sparsity out")
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise SpecError(f"Sparse: sparsity={self.sparsity!r} is no number; 0.95 means 95 % zeros")
        if not 0.0 <= self.sparsity < 1.0:
            raise SpecError(f"Sparse: sparsity={self.sparsity!r} must be from 0 to below 1; 0.95 means 95 % zeros")
        object.__setattr__(self, "sparsity", float(self.sparsity))

    def resolve(self, shape: Shape) -> Sparse:
        return Sparse(self.sparsity, self.format.resolve(*matrix_shape(shape)))

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        return self.format.refuse(torch.zeros(1, matrix_shape(shape)[1]))

    def stored(self, shape: Shape) -> int:
        """How many values are stored for a weight of this shape."""
        out, width = matrix_shape(shape)
        if self.sparsity is None:
            return self.format.stored(torch.empty(out, width, device="meta"))
        return round((1.0 - self.sparsity) * out * width)

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        return dict(buffer_shapes(self.format, self.stored(shape), *matrix_shape(shape)))

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        out, width = matrix_shape(shape)
        fmt = self.format.resolve(out, width)
        operand = Operand(fmt.buffers, "oi", (out, width), fmt, self.stored(shape))
        return (Contraction("i", "o", (width,), (out,), (operand,)),)

    def nbytes(self, shape: Shape, itemsize: int) -> int:
        out, width = matrix_shape(shape)
        return self.format.resolve(out, width).nbytes(out, width, self.stored(shape), itemsize)

    def validate(self, buffers: Buffers, shape: Shape) -> None:
        out, width = matrix_shape(shape)
        self.format.resolve(out, width).validate(buffers, out, width)
        stored = buffers["values"].numel()
        if stored != self.stored(shape):
            raise FormatError(f"{self.text()}: {stored} stored values, expected {self.stored(shape)} for {shape}")

    def accept(self, dense: torch.Tensor) -> torch.Tensor:
        if dense.is_complex():
            raise FormatError(f"{self.text()} cannot hold a {dense.dtype} weight: formats store real values")
        return super().accept(dense)

    def solve(self, weight: torch.Tensor) -> Buffers:
        flat = weight.flatten(1)
        return self.format.resolve(*matrix_shape(tuple(weight.shape))).pack(flat, self.choose(flat.abs()))

    def solve_gram(self, weight: torch.Tensor, gram: torch.Tensor) -> Buffers:
        """The pattern by score, then the values that are best on it."""
        flat = weight.flatten(1)
        mask = self.choose(flat.abs() * gram.diagonal().clamp_min(0).sqrt())
        values = on_pattern(flat, mask, gram)
        return self.format.resolve(*matrix_shape(tuple(weight.shape))).pack(values, mask)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The bool mask (out, in) of the entries to keep, from scores of the same shape."""
        fields = self.format.fields()
        if self.sparsity is not None:
            return _largest(scores.flatten(), self.stored(tuple(scores.shape))).reshape(scores.shape)
        keep, group = (fields["k"], scores.shape[1]) if "k" in fields else (fields["n"], fields["m"])
        short = -scores.shape[1] % group
        padded = torch.nn.functional.pad(scores, (0, short), value=-1.0).reshape(scores.shape[0], -1, group)
        order = torch.argsort(padded, dim=2, descending=True, stable=True)[..., :keep]
        mask = torch.zeros(padded.shape, dtype=torch.bool, device=scores.device).scatter_(2, order, True)
        return mask.flatten(1)[:, : scores.shape[1]].contiguous()


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The bool mask of the `count` largest of a vector, ties to the earlier; no sort of the whole."""
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    least = scores.kthvalue(scores.numel() - count + 1).values
    mask = scores > least
    mask[(scores == least).nonzero().flatten()[: count - int(mask.sum())]] = True
    return mask


def on_pattern(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The matrix with this pattern that is nearest to `weight` in the norm of `gram`; conjugate gradients by rows."""
    values = weight * mask
    residual = ((weight - values) @ gram) * mask
    direction, size = residual, residual.square().sum(1)
    for _ in range(_STEPS):
        moved = (direction @ gram) * mask
        curvature = (moved * direction).sum(1)
        step = torch.where(curvature > 0, size / curvature.clamp_min(1e-300), 0.0)[:, None]
        values, residual = values + step * direction, residual - step * moved
        last, size = size, residual.square().sum(1)
        direction = residual + torch.where(last > 0, size / last.clamp_min(1e-300), 0.0)[:, None] * direction
    return values


def _fixes(fmt: Format) -> bool:
    """Whether the format itself says how many entries of a row are kept: k of a row, or n of every m."""
    fields = fmt.fields()
    return fmt.regular and ("k" in fields or ("n" in fields and "m" in fields))


@lru_cache(maxsize=64)
def buffer_shapes(fmt: Format, stored: int, rows: int, cols: int) -> tuple[tuple[str, Shape], ...]:
    """Shapes of the buffers, learned from packing a matrix with as many entries."""
    probe = Sparse(None, fmt) if _fixes(fmt) else None
    if probe is not None:
        mask = probe.choose(torch.zeros(rows, cols))
    else:
        mask = (torch.arange(rows * cols) < stored).reshape(rows, cols)
    return tuple((k, tuple(t.shape)) for k, t in fmt.resolve(rows, cols).pack(mask.float(), mask).items())
