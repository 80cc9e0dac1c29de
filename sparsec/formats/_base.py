"""What every storage format promises: a frozen descriptor, plain dense buffers, and properties that passes ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsec.errors import FormatError
from sparsec.formats._pack import nonzero, refuse_dtype

Buffers = dict[str, torch.Tensor]
"""Buffer name -> tensor, always in the order of `Format.buffers`; the first one is always the floating `values`."""


@dataclass(frozen=True)
class Format:
    """A way to store a sparse (out, in) matrix.

    Subclasses are frozen dataclasses whose fields are ints (or None for "to be chosen by `resolve`"), other formats or
    tuples of ints, so that a format is hashable and its `text()` can go into a kernel key.

    The pattern of a weight is `weight != 0` unless a mask is given: NaN and Inf are stored, zeros of either sign are
    not. Pruned positions are structural; they contribute nothing to a product, even times Inf or NaN.
    """

    name: ClassVar[str] = ""
    buffers: ClassVar[tuple[str, ...]] = ()
    blocked: ClassVar[bool] = False  # values come in dense blocks
    regular: ClassVar[bool] = False  # every row stores the same number of values
    ordered: ClassVar[bool] = False  # values lie in row-major order of the matrix
    exact: ClassVar[bool] = True  # unpack(pack(w)) == w wherever the pattern allows w

    def resolve(self, rows: int, cols: int) -> Format:
        """This format with every open (None) field fixed for a (rows, cols) matrix."""
        return self

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        """Why this format cannot hold `dense` (rows, cols) exactly, with the first offending place; None if it can.

        `mask` overrides the pattern as in `pack`.
        """
        return refuse_dtype(dense)

    def choose(self, dense: torch.Tensor) -> torch.Tensor:
        """The bool mask of the entries of `dense` (rows, cols) to keep in this format: all nonzeros that it has room
        for, the largest first; of blocks those that are full enough to be worth it."""
        return pattern(dense)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        """Store `dense` (rows, cols). `mask` (bool, same shape) overrides the pattern `dense != 0`.

        Raises FormatError when the weight does not obey the format. Open fields are resolved first.
        """
        raise FormatError(f"{type(self).__name__} does not define pack(dense, mask)")

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        """The dense (rows, cols) matrix that `buffers` hold, in the dtype of `values`."""
        raise FormatError(f"{type(self).__name__} does not define unpack(buffers, rows, cols)")

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        """Raise FormatError unless every index a kernel will follow is in range. Linear in the stored entries."""
        raise FormatError(f"{type(self).__name__} does not define validate(buffers, rows, cols)")

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        """The bool (rows, cols) mask of stored positions: what the structural pattern of the packed weight is.

        It may be larger than the pattern that was packed, by the padding that the format stores.
        """
        ones = torch.ones_like(buffers["values"], dtype=torch.int8)
        return self.unpack({**buffers, "values": ones}, rows, cols) != 0

    def blur(self, x: torch.Tensor) -> torch.Tensor | None:
        """How far kernels may round each activation of x (batch, in) before multiplying, [batch]; None: not at all."""
        return None

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """Exact bytes of the buffers of a resolved format that stores `stored` values of `itemsize` bytes."""
        raise FormatError(f"{type(self).__name__} does not define nbytes(rows, cols, stored, itemsize)")

    def stored(self, dense: torch.Tensor) -> int:
        """How many values `pack(dense)` stores, padding included."""
        return int(torch.count_nonzero(pattern(dense).view(torch.uint8)))

    def __add__(self, other: object) -> Format:
        """Both formats side by side: this one stores what lies in its order, the other the rest."""
        from sparsec.formats.sum import Sum

        return Sum(self, other) if isinstance(other, Format) else NotImplemented

    def fields(self) -> dict[str, Any]:
        """Field name -> value, for templates and for `text`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def text(self) -> str:
        """Canonical text, e.g. `csr(index_bits=16,block=128)`: part of the kernel key and of the report."""
        inner = ",".join(f"{k}={_canonical(v)}" for k, v in self.fields().items() if v is not None)
        return f"{self.name}({inner})" if inner else self.name

    def accept(self, dense: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`dense` detached and contiguous, and its pattern. Raises FormatError with the reason when refused."""
        kept = pattern(dense, mask)
        reason = self.refuse(dense) if mask is None else self.refuse(dense, mask)
        if reason is not None:
            raise FormatError(f"{self.text()} cannot hold a {tuple(dense.shape)} weight: {reason}")
        return dense.detach().contiguous(), kept

    def check_names(self, buffers: Buffers) -> None:
        """Raise FormatError unless the buffers are exactly those of this format, contiguous, and on one device."""
        if tuple(buffers) != self.buffers:
            raise FormatError(f"{self.name}: buffers are {tuple(buffers)}, expected {self.buffers} in this order")
        for key, tensor in buffers.items():
            if not tensor.is_contiguous():
                raise FormatError(f"{self.name}: buffer {key!r} is not contiguous; call .contiguous() on it")
            if tensor.device != buffers[self.buffers[0]].device:
                where = tensor.device
                raise FormatError(f"{self.name}: buffer {key!r} is on {where}, others elsewhere; move them together")


def _canonical(value: Any) -> str:
    if isinstance(value, Format):
        return value.text()
    if isinstance(value, tuple):
        return "(" + ",".join(_canonical(v) for v in value) + ")"
    return str(value)


def pattern(dense: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The bool (rows, cols) pattern of stored positions: `mask` when given, else every entry that is not a zero."""
    if dense.dim() != 2:
        raise FormatError(f"a format packs a 2-D (out, in) matrix, got shape {tuple(dense.shape)}; flatten it first")
    if mask is None:
        if (reason := refuse_dtype(dense)) is not None:
            raise FormatError(reason)
        return torch.from_numpy(nonzero(dense)).to(dense.device)
    if mask.dtype != torch.bool or mask.shape != dense.shape:
        raise FormatError(f"mask must be bool of shape {tuple(dense.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    return mask
