"""What every factorisation promises: a frozen descriptor, a fit, and one einsum that says what it computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch

from sparsec.errors import FormatError, InputError, SpecError
from sparsec.factors._contraction import Contraction
from sparsec.formats import Buffers, Format

Shape = tuple[int, ...]
"""A weight's shape: (out, in) of a linear layer or (rows, width) of a table, (out, in, *kernel) of a convolution."""


@dataclass(frozen=True)
class Fit:
    """The buffers of a fitted factor, in the dtype of the weight, and how far they are from it.

    `error` is ||W - R||_F / ||W||_F of the reconstruction R of these very buffers; with a Gram matrix G = X^T X it is
    ||X (W - R)^T||_F / ||X W^T||_F, the relative error of the layer's output on X. A zero weight has error 0.
    """

    buffers: Buffers
    error: float


@dataclass(frozen=True)
class Factor:
    """A weight as a contraction of smaller tensors. Lossy: a Spec asks for it by name.

    Subclasses are frozen dataclasses of ints, floats, None ("to be chosen by `resolve`"), formats, factors and tuples
    of these; so a factor is hashable and `text()` can go into a kernel key. A weight with more than two dimensions is
    that of a convolution; factors that know only matrices see it as (out, in * prod(kernel)) in C order.
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False

    # What a subclass defines -----------------------------------------------------------------------------------------

    def resolve(self, shape: Shape) -> Factor:
        """This factor with every open (None) field fixed for a weight of this shape."""
        return self

    def refuse(self, shape: Shape) -> str | None:
        """Why no weight of this shape can have this form, e.g. sizes that do not divide; None if one can."""
        return None if len(shape) >= 2 and min(shape) > 0 else f"{shape} is not the shape of a weight (out, in, ...)"

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """Buffer name -> its shape, in the order of the buffers."""
        raise SpecError(f"{type(self).__name__} does not define shapes(shape)")

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        """The einsums whose sum is the product; all but sums have exactly one."""
        raise SpecError(f"{type(self).__name__} does not define contract(shape)")

    def solve(self, weight: torch.Tensor) -> Buffers:
        """Buffers that approximate `weight` (float64 or complex128, of an accepted shape) in the Frobenius norm."""
        raise SpecError(f"{type(self).__name__} does not define solve(weight)")

    def solve_gram(self, weight: torch.Tensor, gram: torch.Tensor) -> Buffers:
        """As `solve`, in the norm tr(E G E^T)^(1/2) of a positive semi-definite `gram` (in, in)."""
        from sparsec.factors._refine import refine

        return refine(self, self.solve(weight), weight, gram)

    def slice(self, buffers: Buffers, rank: Any) -> tuple[Factor, Buffers]:
        """The same weight at a smaller rank, without a new fit: the factor and buffers of the leading components."""
        raise SpecError(f"{self.text()} has no nested ranks; fit it again with the size you want")

    # What every factor has -------------------------------------------------------------------------------------------

    def fit(self, dense: torch.Tensor, gram: torch.Tensor | None = None) -> Fit:
        """The best buffers found for `dense` (out, in, *kernel), any floating or complex dtype; computed in float64.

        `gram` (in * prod(kernel), the same) = X^T X of calibration inputs makes the error on those inputs count instead
        of the weight's own. Raises FormatError when the factor refuses the shape or the weight is not finite,
        InputError for a bad Gram matrix.
        """
        weight = self.accept(dense)
        shape = tuple(dense.shape)
        chosen = self.resolve(shape)
        weights = None if gram is None else accept_gram(gram, weight)
        with torch.no_grad():
            found = chosen.solve(weight) if weights is None else chosen.solve_gram(weight, weights)
            buffers = {k: cast(t, dense) for k, t in found.items()}
            wide = {k: cast(t, weight) for k, t in buffers.items()}
            error = relative_error(weight, chosen.reconstruct(wide, shape), weights)
        return Fit(buffers, error)

    def reconstruct(self, buffers: Buffers, shape: Shape) -> torch.Tensor:
        """The dense weight of `shape` that the buffers stand for, in their dtype."""
        terms = [c.reconstruct(buffers) for c in self.resolve(shape).contract(shape)]
        return sum(terms[1:], terms[0]).reshape(shape)

    def apply(self, x: torch.Tensor, buffers: Buffers, shape: Shape) -> torch.Tensor:
        """x (..., in) times the weight (out, in), (..., out), in plain torch and without forming the weight."""
        width = prod(shape[1:])
        if not x.dim() or x.shape[-1] != width:
            raise InputError(f"x has shape {tuple(x.shape)}, expected (..., {width}) for a {shape} weight")
        rows = x.reshape(-1, width)
        terms = [c.apply(rows, buffers) for c in self.resolve(shape).contract(shape)]
        return sum(terms[1:], terms[0]).reshape(*x.shape[:-1], shape[0])

    def flops(self, shape: Shape, batch: int) -> int:
        """Floating point operations of `apply` on `batch` rows: two a product that is summed, one for others."""
        return sum(c.flops(batch) for c in self.resolve(shape).contract(shape))

    def nbytes(self, shape: Shape, itemsize: int) -> int:
        """Exact bytes of the buffers with values of `itemsize` bytes."""
        return itemsize * sum(prod(s) for s in self.resolve(shape).shapes(shape).values())

    def validate(self, buffers: Buffers, shape: Shape) -> None:
        """Raise FormatError unless these are buffers of this factor for a weight of this shape."""
        expected = self.resolve(shape).shapes(shape)
        if tuple(buffers) != tuple(expected):
            raise FormatError(f"{self.name}: buffers are {tuple(buffers)}, expected {tuple(expected)} in this order")
        first = next(iter(buffers.values()))
        for key, tensor in buffers.items():
            if tuple(tensor.shape) != expected[key]:
                shape = tuple(tensor.shape)
                raise FormatError(f"{self.name}: buffer {key!r} has shape {shape}, expected {expected[key]}")
            self._check_buffer(key, tensor, first)

    def _check_buffer(self, key: str, tensor: torch.Tensor, first: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            raise FormatError(f"{self.name}: buffer {key!r} is not contiguous; call .contiguous() on it")
        if tensor.device != first.device:
            where = tensor.device
            raise FormatError(f"{self.name}: buffer {key!r} is on {where}, others elsewhere; move them together")
        if tensor.dtype != first.dtype or not (tensor.is_floating_point() or tensor.is_complex()):
            raise FormatError(f"{self.name}: buffer {key!r} has dtype {tensor.dtype}; all are one floating dtype")

    def fields(self) -> dict[str, Any]:
        """Field name -> value, for templates and for `text`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def text(self) -> str:
        """Canonical text, e.g. `low_rank(rank=64)`: part of the kernel key and of the report."""
        inner = ",".join(f"{k}={canonical(v)}" for k, v in self.fields().items() if v is not None)
        return f"{self.name}({inner})" if inner else self.name

    def accept(self, dense: torch.Tensor) -> torch.Tensor:
        """`dense` in float64 or complex128. Raises FormatError with the reason when it cannot be fitted."""
        if not (dense.is_floating_point() or dense.is_complex()):
            raise FormatError(f"{self.text()} cannot approximate a {dense.dtype} weight; give a floating one")
        reason = self.refuse(tuple(dense.shape))
        if reason is None and not bool(torch.isfinite(dense).all()):
            reason = "it holds NaN or Inf"
        if reason is not None:
            raise FormatError(f"{self.text()} cannot hold a {tuple(dense.shape)} weight: {reason}")
        return dense.detach().to(torch.complex128 if dense.is_complex() else torch.float64).contiguous()

    def __add__(self, other: object) -> Factor:
        from sparsec.factors.sums import Sum

        return Sum(self, other) if isinstance(other, (Factor, Format)) else NotImplemented

    def __radd__(self, other: object) -> Factor:
        from sparsec.factors.sums import Sum

        return Sum(other, self) if isinstance(other, Format) else NotImplemented


def canonical(value: Any) -> str:
    """A field's value as text that `parse` reads back."""
    if isinstance(value, (Factor, Format)):
        return value.text()
    if isinstance(value, tuple):
        return "(" + ",".join(canonical(v) for v in value) + ")"
    return repr(value)


def cast(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values in the dtype of `like`, contiguous and detached; index buffers as they are."""
    floating = tensor.is_floating_point() or tensor.is_complex()
    return tensor.detach().to(like.dtype if floating else tensor.dtype).contiguous()


def accept_gram(gram: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`gram` in the dtype of `weight`, symmetric. Raises InputError unless it is a finite (in, in) matrix."""
    width = weight[0].numel()
    if tuple(gram.shape) != (width, width):
        raise InputError(f"gram has shape {tuple(gram.shape)}, expected {(width, width)}: X^T X of the inputs X")
    wide = gram.detach().to(weight.dtype)
    if not bool(torch.isfinite(wide).all()):
        raise InputError("gram holds NaN or Inf; check the calibration data")
    if bool((wide.diagonal().real < 0).any()):
        raise InputError("gram has a negative diagonal, so it is no X^T X")
    return (wide + wide.mH) / 2


def relative_error(weight: torch.Tensor, found: torch.Tensor, gram: torch.Tensor | None = None) -> float:
    """||W - R|| / ||W||, in the norm of `gram` when given; 0 for a zero weight that was met, inf otherwise."""

    def norm(t: torch.Tensor) -> float:
        flat = t.flatten(1)
        if gram is None:
            return float(torch.linalg.vector_norm(flat))
        return float(((flat @ gram) * flat.conj()).sum().real.clamp_min(0).sqrt())

    whole, rest = norm(weight), norm(weight - found)
    if whole == 0:
        return 0.0 if rest == 0 else float("inf")
    return rest / whole


def positive(owner: str, **values: Any) -> None:
    """Raise SpecError unless every value is a positive int."""
    for field, value in values.items():
        if type(value) is not int or value < 1:
            raise SpecError(f"{owner}: {field}={value!r} must be a positive integer")


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """(out, in * prod(kernel)): how a matrix factor sees a weight."""
    return shape[0], prod(shape[1:])
