"""Operands that a plan can use without their entries: deltas, diagonals, products of factors, shift-invariant matrices.

Every operand has a `shape` and can be made `dense()`, which tests and refusals use and plans avoid. Wherever an
operand takes a tensor, a shape (a tuple of ints, or of names for sizes that are known later) plans without data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.algebra.equation import Size
from sparsec.errors import InputError


class Operand:
    """One tensor of an expression. `kind` says how a plan reads it."""

    kind = "dense"
    symmetric = False

    @property
    def shape(self) -> tuple[Size, ...]:
        raise InputError(f"{type(self).__name__} defines no shape")

    @property
    def dtype(self) -> torch.dtype:
        raise InputError(f"{type(self).__name__} defines no dtype")

    def dense(self) -> torch.Tensor:
        """The tensor with every entry written out."""
        raise InputError(f"{type(self).__name__} defines no dense form")

    @property
    def parts(self) -> tuple[Operand, ...]:
        """The factors of a product operand."""
        return ()


class Dense(Operand):
    """A tensor, or a shape alone. `symmetric` promises that exchanging any two axes changes nothing."""

    def __init__(
        self, data: torch.Tensor | None, shape: Sequence[Size], dtype: torch.dtype, symmetric: bool = False
    ) -> None:
        self.data, self._shape, self._dtype, self.symmetric = data, tuple(shape), dtype, symmetric

    @property
    def shape(self) -> tuple[Size, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def dense(self) -> torch.Tensor:
        if self.data is None:
            raise InputError(f"an operand of shape {self._shape} was planned without data; call the plan with tensors")
        return self.data


def operand(value: Any, dtype: torch.dtype = torch.float32) -> Operand:
    """The Operand for a tensor, a torch sparse tensor, a shape (tuple of ints and names) or an Operand itself."""
    if isinstance(value, Operand):
        return value
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            return Sparse(value)
        return Dense(value, tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list | torch.Size):
        return Dense(None, tuple(_size(s) for s in value), dtype)
    raise InputError(
        f"an operand is a tensor, a shape such as ('batch', 64), or one of sparsec.algebra.operands; "
        f"got {type(value).__name__}"
    )


def symbol(name: str) -> Any:
    """The sympy symbol of a size that is known only at the call."""
    from sympy import Symbol

    return Symbol(name, integer=True, positive=True)


def _size(size: Any) -> Size:
    if isinstance(size, str):
        return symbol(size)
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    if hasattr(size, "free_symbols"):
        return size
    raise InputError(f"a size is a nonnegative int or a name, got {size!r}")


def Symmetric(data: torch.Tensor) -> Dense:
    """A matrix that equals its transpose, so that plans share products of either. Raises InputError if it does not."""
    if data.dim() != 2 or data.shape[0] != data.shape[1] or not torch.equal(data, data.T):
        raise InputError(f"a tensor of shape {tuple(data.shape)} is not a symmetric matrix")
    return Dense(data, tuple(data.shape), data.dtype, symmetric=True)


@dataclass(frozen=True, eq=False)
class Delta(Operand):
    """1 where all `order` indices are equal, else 0: (size,) * order. Order 2 is the identity, order 1 all ones."""

    size: int
    order: int = 2
    kind = "delta"

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1 or type(self.order) is not int or self.order < 1:
            raise InputError(f"Delta({self.size!r}, {self.order!r}): size and order are positive ints")

    @property
    def shape(self) -> tuple[Size, ...]:
        return (self.size,) * self.order

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    def dense(self) -> torch.Tensor:
        made = torch.zeros(self.shape)
        made[(torch.arange(self.size),) * self.order] = 1
        return made


def Identity(size: int) -> Delta:
    """The (size, size) identity; never written out."""
    return Delta(size, 2)


class Diagonal(Operand):
    """diag(values), (n, n) for values (n,): a plan scales by it."""

    kind = "diagonal"

    def __init__(self, values: Any) -> None:
        self.values = operand(values)
        if len(self.values.shape) != 1:
            raise InputError(f"Diagonal takes a vector, got shape {self.values.shape}")

    @property
    def shape(self) -> tuple[Size, ...]:
        return (*self.values.shape, *self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def parts(self) -> tuple[Operand, ...]:
        return (self.values,)

    def dense(self) -> torch.Tensor:
        return torch.diag(self.values.dense())


class Kron(Operand):
    """A (x) B (x) ...: entry [i1 i2, j1 j2] is A[i1, j1] B[i2, j2]; factors of equal rank, any number of them."""

    kind = "kron"

    def __init__(self, *factors: Any) -> None:
        self.factors = tuple(operand(f) for f in factors)
        ranks = {len(f.shape) for f in self.factors}
        if not self.factors or len(ranks) != 1:
            raise InputError(f"Kron takes factors of equal rank, got shapes {[f.shape for f in self.factors]}")

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(math.prod(sizes) for sizes in zip(*(f.shape for f in self.factors)))

    @property
    def dtype(self) -> torch.dtype:
        return _promoted(self.factors)

    @property
    def parts(self) -> tuple[Operand, ...]:
        return self.factors

    def dense(self) -> torch.Tensor:
        made = self.factors[0].dense()
        for factor in self.factors[1:]:
            made = torch.kron(made, factor.dense())
        return made


class KhatriRao(Operand):
    """The column-wise Kronecker product: entry [i1 i2, r] is A[i1, r] B[i2, r]; factors (n_k, rank)."""

    kind = "khatri_rao"

    def __init__(self, *factors: Any) -> None:
        self.factors = tuple(operand(f) for f in factors)
        shapes = [f.shape for f in self.factors]
        if not shapes or any(len(s) != 2 for s in shapes) or len({s[1] for s in shapes}) != 1:
            raise InputError(f"KhatriRao takes matrices with one number of columns, got shapes {shapes}")

    @property
    def shape(self) -> tuple[Size, ...]:
        return math.prod(f.shape[0] for f in self.factors), self.factors[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return _promoted(self.factors)

    @property
    def parts(self) -> tuple[Operand, ...]:
        return self.factors

    def dense(self) -> torch.Tensor:
        made = self.factors[0].dense()
        for factor in self.factors[1:]:
            made = (made[:, None, :] * factor.dense()[None]).reshape(-1, made.shape[1])
        return made


class Shift(Operand):
    """A matrix of which `apply` is cheaper than its entries. `flops` counts one real vector, twice that for complex.

    A subclass gives `generator`, the vector it is made of, and the `_kernel` of the equal cyclic convolution.
    """

    kind = "shift"
    generator: Operand
    rows: int
    cols: int

    @property
    def shape(self) -> tuple[Size, ...]:
        return self.rows, self.cols

    @property
    def dtype(self) -> torch.dtype:
        return self.generator.dtype

    @property
    def parts(self) -> tuple[Operand, ...]:
        return (self.generator,)

    @property
    def length(self) -> int:
        """Length of the transforms: the next size of small primes that holds the linear convolution."""
        return fast_length(self.rows + self.cols - 1)

    def flops(self) -> int:
        """FLOPs of one product with a real vector: two real transforms of `length` and a product of spectra."""
        return 2 * transform_flops(self.length) + 6 * (self.length // 2 + 1)

    def setup_flops(self) -> int:
        """FLOPs of the generator's spectrum, once per call."""
        return transform_flops(self.length)

    def index(self) -> torch.Tensor:
        """Which entry of the generator stands at [i, j]."""
        raise InputError(f"{type(self).__name__} defines no index")

    def dense(self) -> torch.Tensor:
        return self.generator.dense()[self.index()]

    def apply(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """(..., cols) -> (..., rows), or back when `transposed`, by FFT. Integers go through their dense form."""
        raise InputError(f"{type(self).__name__} defines no apply")


def transform_flops(length: int) -> int:
    """FLOPs of a real FFT by the usual count, 2.5 n log2 n."""
    return int(2.5 * length * math.log2(max(length, 2)))


def fast_length(least: int) -> int:
    """The smallest number of the form 2^a 3^b 5^c that is at least `least`."""
    best = 1 << max(0, least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(0, (-(-least // three) - 1).bit_length())
            if least <= two < best:
                best = two
            three *= 3
        five *= 5
    return best


class Toeplitz(Shift):
    """T[i, j] = column[i - j] below and on the diagonal, row[j - i] above it (row[0] is ignored), as in scipy.

    Without `row` the matrix is symmetric. Shapes: column (rows,), row (cols,).
    """

    def __init__(self, column: Any, row: Any = None) -> None:
        self.column = operand(column)
        self.row = operand(row) if row is not None else self.column
        _vectors(self, self.column, self.row)
        self.rows, self.cols = self.column.shape[0], self.row.shape[0]
        self.generator = _joined(self.row, self.column, flip=True)

    def index(self) -> torch.Tensor:
        return torch.arange(self.rows)[:, None] - torch.arange(self.cols)[None] + self.cols - 1

    def apply(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        kernel = self.generator.dense()  # kernel[k] holds i - j = k - (cols - 1)
        if transposed:
            return _correlate(kernel.flip(0), x, self.cols, self.rows - 1, self.length)
        return _correlate(kernel, x, self.rows, self.cols - 1, self.length)


class Hankel(Shift):
    """H[i, j] = h[i + j], with h the `column` followed by `row[1:]`, as in scipy: column (rows,), row (cols,)."""

    def __init__(self, column: Any, row: Any) -> None:
        self.column, self.row = operand(column), operand(row)
        _vectors(self, self.column, self.row)
        self.rows, self.cols = self.column.shape[0], self.row.shape[0]
        self.generator = _joined(self.column, self.row, flip=False)

    def index(self) -> torch.Tensor:
        return torch.arange(self.rows)[:, None] + torch.arange(self.cols)[None]

    def apply(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        count, other = (self.cols, self.rows) if transposed else (self.rows, self.cols)
        return _correlate(self.generator.dense(), x.flip(-1), count, other - 1, self.length)


class Circulant(Shift):
    """C[i, j] = column[(i - j) mod n], (n, n): the spectrum needs no padding."""

    def __init__(self, column: Any) -> None:
        self.generator = operand(column)
        _vectors(self, self.generator)
        self.rows = self.cols = self.generator.shape[0]

    @property
    def length(self) -> int:
        return self.rows

    def index(self) -> torch.Tensor:
        return (torch.arange(self.rows)[:, None] - torch.arange(self.cols)[None]) % self.rows

    def apply(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        kernel = self.generator.dense()
        if transposed:
            kernel = torch.roll(kernel.flip(0), 1)
        return _convolve(kernel, x, self.rows)


def _vectors(owner: Operand, *vectors: Operand) -> None:
    for vector in vectors:
        if len(vector.shape) != 1 or not isinstance(vector.shape[0], int) or vector.shape[0] < 1:
            raise InputError(f"{type(owner).__name__} takes nonempty vectors of known size, got {vector.shape}")


def _joined(first: Operand, second: Operand, flip: bool) -> Operand:
    """The generator of rows + cols - 1 entries, or its shape when there are no data yet."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    if isinstance(first, Dense) and isinstance(second, Dense) and (first.data is None or second.data is None):
        return Dense(None, (first.shape[0] + second.shape[0] - 1,), dtype)
    if flip:  # Toeplitz: row reversed without its first entry, then the column
        data = torch.cat([first.dense()[1:].flip(0).to(dtype), second.dense().to(dtype)])
    else:
        data = torch.cat([first.dense().to(dtype), second.dense()[1:].to(dtype)])
    return Dense(data, tuple(data.shape), dtype)


def _convolve(kernel: torch.Tensor, x: torch.Tensor, length: int) -> torch.Tensor:
    """Cyclic convolution of the last axis at `length`; real inputs use real transforms."""
    dtype = torch.promote_types(kernel.dtype, x.dtype)
    if dtype.is_complex:
        spectrum = torch.fft.fft(kernel, length) * torch.fft.fft(x, length)
        return torch.fft.ifft(spectrum, length).to(dtype)  # type: ignore[no-any-return]
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    spectrum = torch.fft.rfft(kernel.to(wide), length) * torch.fft.rfft(x.to(wide), length)
    return torch.fft.irfft(spectrum, length).to(dtype)  # type: ignore[no-any-return]


def _correlate(kernel: torch.Tensor, x: torch.Tensor, count: int, start: int, length: int) -> torch.Tensor:
    """`count` entries from `start` of the linear convolution of kernel and x along the last axis.

    `length` holds kernel.numel() entries; what wraps around falls on entries before `start`.
    """
    return _convolve(kernel, x, length)[..., start : start + count]


class Sparse(Operand):
    """A tensor of which only nonzero entries count: dense, or torch COO, CSR, CSC, BSR or BSC.

    Entries equal to zero are dropped. `Sparse.packed(format, buffers, rows, cols)` reads any storage format of
    sparsec. `coords` is (rank, nnz), `values` (nnz,).
    """

    kind = "sparse"

    def __init__(self, data: torch.Tensor) -> None:
        if data.layout is torch.strided:
            coords = torch.nonzero(data).T
            values = data[tuple(coords)]
        else:
            coo = data.to_sparse_coo().coalesce()
            if coo.dense_dim():
                raise InputError("Sparse takes tensors whose every dimension is sparse")
            coords, values = coo.indices(), coo.values()
            keep = values != 0
            coords, values = coords[:, keep], values[keep]
        self.coords, self.values = coords.contiguous(), values.contiguous()
        self._shape = tuple(data.shape)

    @staticmethod
    def packed(fmt: Any, buffers: dict[str, torch.Tensor], rows: int, cols: int) -> Sparse:
        """The (rows, cols) matrix that a sparsec storage format holds in `buffers`."""
        return Sparse(fmt.unpack(buffers, rows, cols))

    @property
    def shape(self) -> tuple[Size, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nnz(self) -> int:
        return int(self.values.numel())

    def dense(self) -> torch.Tensor:
        made = torch.zeros(self._shape, dtype=self.values.dtype)
        made[tuple(self.coords)] = self.values
        return made


def _promoted(factors: Sequence[Operand]) -> torch.dtype:
    kinds = [f.dtype for f in factors if f.dtype is not torch.bool]
    dtype = kinds[0] if kinds else torch.float32
    for kind in kinds[1:]:
        dtype = torch.promote_types(dtype, kind)
    return dtype


Reader = Callable[[Operand], Operand]
