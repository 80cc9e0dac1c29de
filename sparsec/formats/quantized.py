"""Quantized: int8 codes with a scale per output over a sparse format of quads, aligned groups of four inputs. Lossy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats.csr_groups import CSRGroups

QUAD = 4  # inputs that one dot product instruction takes per lane
CENTRE = 128  # what kernels add to quantised activations, which makes them unsigned
LEVELS = 127  # largest code of a weight or an activation
SMALLEST = 2.0**-120  # a token whose largest activation is below this is quantised as if it were this


@dataclass(frozen=True)
class Quantized(Format):
    """Symmetric int8: w = scales[row] * code, |code| <= 127, stored by quads of inputs that hold a nonzero code.

    Buffers: `scales` fp32 [rows]; `values` int8 [4 * quads], and then those of `format` over the (rows, ceil(cols / 4))
    matrix of quads (see CSRGroups; its block counts quads); `offsets` int32 [rows], -128 times the sum of its codes.

    Kernels quantise the activations of a token to int8 by the token's largest magnitude, so that products are exact
    integers; `blur` is the error that this makes. A token with a NaN or an infinity gives NaN in all of its outputs.
    """

    format: Format | None = None
    bits: int = 8

    name: ClassVar[str] = "quantized"
    buffers: ClassVar[tuple[str, ...]] = ("scales", "values", "indices", "counts", "pointers", "starts", "offsets")
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise SpecError(f"Quantized: bits={self.bits!r} is not supported; valid: 8")
        if self.format is not None and not isinstance(self.format, CSRGroups):
            raise SpecError(f"Quantized: values are stored by CSRGroups (or None), not by {self.format!r}")

    def resolve(self, rows: int, cols: int) -> Quantized:
        inner = self.format or CSRGroups()
        return Quantized(inner.resolve(rows, -(-cols // QUAD)), self.bits)

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        if dense.dtype != torch.float32:
            return f"dtype {dense.dtype} is not quantised; valid: torch.float32"
        return (
            None if bool(torch.isfinite(dense).all()) else "it holds infinite or NaN values, which no code stands for"
        )

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        source = torch.where(kept, dense, torch.zeros_like(dense))
        largest = source.abs().amax(1) if source.numel() else source.new_zeros(source.shape[0])
        scales = torch.where(largest > 0, largest.clamp(min=SMALLEST) / LEVELS, torch.ones_like(largest))
        codes = (source / scales[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        quads = _view(torch.nn.functional.pad(codes, (0, -codes.shape[1] % QUAD)), np.float32)
        inner = self._inner(*dense.shape).pack(quads, _view(quads, np.int32) != 0)
        inner["values"] = _view(inner["values"], np.int8)
        offsets = -CENTRE * codes.sum(1, dtype=torch.int32)
        return {"scales": scales, **inner, "offsets": offsets.to(torch.int32)}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return self._codes(buffers, rows, cols).float() * buffers["scales"][:, None]

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        quads = self._inner(rows, cols).positions(self._quads(buffers), rows, -(-cols // QUAD))
        return quads.repeat_interleave(QUAD, dim=1)[:, :cols]

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        _check.buffer(self.name, "scales", buffers["scales"], torch.float32, (rows,))
        _check.buffer(self.name, "offsets", buffers["offsets"], torch.int32, (rows,))
        values = buffers["values"]
        if values.numel() % QUAD:
            raise FormatError(f"{self.name}: buffer 'values' has {values.numel()} codes, expected a multiple of {QUAD}")
        _check.buffer(self.name, "values", values, torch.int8, (values.numel(),))
        if not bool(((buffers["scales"] > 0) & buffers["scales"].isfinite()).all()):
            raise FormatError(f"{self.name}: buffer 'scales' must hold positive finite numbers")
        self._inner(rows, cols).validate(self._quads(buffers), rows, -(-cols // QUAD))
        wrong = buffers["offsets"] != -CENTRE * self._codes(buffers, rows, cols).sum(1, dtype=torch.int32)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise FormatError(f"{self.name}: buffer 'offsets' at position {row} is not -{CENTRE} times its row's codes")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """As the inner format estimates, for `stored` codes (four to a quad). `itemsize` has no part in it."""
        return 8 * rows + self._inner(rows, cols).nbytes(rows, -(-cols // QUAD), -(-stored // QUAD), QUAD)

    def stored(self, dense: torch.Tensor) -> int:
        return int(self.pack(dense)["values"].numel())

    def blur(self, x: torch.Tensor) -> torch.Tensor:
        """The largest error [batch] that rounding the activations x (batch, in) makes to each of them."""
        largest = x.abs().amax(1).double() if x.shape[1] else x.new_zeros(x.shape[0], dtype=torch.float64)
        return largest.clamp(min=SMALLEST) * (0.5 / LEVELS) * (1 + 1e-4)

    def _inner(self, rows: int, cols: int) -> Format:
        inner = self.resolve(rows, cols).format
        assert inner is not None
        return inner

    def _quads(self, buffers: Buffers) -> Buffers:
        inner = {key: buffers[key] for key in CSRGroups.buffers}
        return {**inner, "values": _view(inner["values"], np.float32)}

    def _codes(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        quads = self._inner(rows, cols).unpack(self._quads(buffers), rows, -(-cols // QUAD))
        return _view(quads, np.int8)[:, :cols]


def _view(tensor: torch.Tensor, dtype: type[np.generic]) -> torch.Tensor:
    """The bits of a tensor as another type, along its last dimension; torch refuses some tensors of one element."""
    array = np.ascontiguousarray(tensor.cpu().numpy())
    shape = (*array.shape[:-1], array.shape[-1] * array.itemsize // np.dtype(dtype).itemsize)
    return torch.from_numpy(np.frombuffer(array.tobytes(), dtype).reshape(shape).copy()).to(tensor.device)
