"""Quantized: int8 codes with a scale per output, in a sparse format of codes or of quads of codes. Lossy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats.bitmask import Bitmask
from sparsec.formats.csr_groups import CSRGroups
from sparsec.formats.picks import Picks
from sparsec.formats.tiles import Tiles

QUAD = 4  # inputs that one dot product instruction takes per lane
CENTRE = 128  # what kernels add to quantised activations, which makes them unsigned
LEVELS = 127  # largest code of a weight or an activation
SMALLEST = 2.0**-120  # a token whose largest activation is below this is quantised as if it were this


@dataclass(frozen=True)
class Quantized(Format):
    """Symmetric int8: w = scales[row] * code, |code| <= 127; codes that round to zero are not stored.

    Buffers: `scales` fp32 [rows]; those of `format` over the codes, `values` int8; `offsets` int32 [rows], -128 times
    the sum of its codes. `format` is `Picks()`, `Bitmask(64)`, `Tiles()` or `CSRGroups()` (None). The last one stores
    quads, aligned groups of four inputs that hold a nonzero code: it is over the (rows, ceil(cols / 4)) matrix of
    quads, four codes to each of its values, and its block counts quads.

    Kernels quantise the activations of a token to int8 by the token's largest magnitude, so that products are exact
    integers; `blur` is the error that this makes. A token with a NaN or an infinity gives NaN in all of its outputs.
    """

    format: Format | None = None
    bits: int = 8

    name: ClassVar[str] = "quantized"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise SpecError(f"Quantized: bits={self.bits!r} is not supported; valid: 8")
        if self.format is not None and not isinstance(self.format, (CSRGroups, Picks, Bitmask, Tiles)):
            raise SpecError(
                f"Quantized: codes are stored by CSRGroups (or None), Picks, Bitmask or Tiles, not by {self.format!r}"
            )

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the format inside, between what turns its codes into values."""
        return ("scales", *(self.format or CSRGroups()).buffers, "offsets")

    def resolve(self, rows: int, cols: int) -> Quantized:
        return Quantized(self._inner(rows, cols), self.bits)

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
        inner = self._inner(*dense.shape)
        if isinstance(inner, CSRGroups):
            quads = _view(torch.nn.functional.pad(codes, (0, -codes.shape[1] % QUAD)), np.float32)
            packed = inner.pack(quads, _view(quads, np.int32) != 0)
            packed["values"] = _view(packed["values"], np.int8)
        else:
            packed = inner.pack(codes)
        offsets = -CENTRE * codes.sum(1, dtype=torch.int32)
        return {"scales": scales, **packed, "offsets": offsets.to(torch.int32)}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return self._codes(buffers, rows, cols).float() * buffers["scales"][:, None]

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        inner = self._inner(rows, cols)
        if not isinstance(inner, CSRGroups):
            return self._codes(buffers, rows, cols) != 0
        quads = inner.positions(self._inside(buffers), rows, -(-cols // QUAD))
        return quads.repeat_interleave(QUAD, dim=1)[:, :cols]

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        _check.buffer(self.name, "scales", buffers["scales"], torch.float32, (rows,))
        _check.buffer(self.name, "offsets", buffers["offsets"], torch.int32, (rows,))
        values, inner = buffers["values"], self._inner(rows, cols)
        quads = isinstance(inner, CSRGroups)
        if quads and values.numel() % QUAD:
            raise FormatError(f"{self.name}: buffer 'values' has {values.numel()} codes, expected a multiple of {QUAD}")
        _check.buffer(self.name, "values", values, torch.int8, (values.numel(),))
        if not bool(((buffers["scales"] > 0) & buffers["scales"].isfinite()).all()):
            raise FormatError(f"{self.name}: buffer 'scales' must hold positive finite numbers")
        inner.validate(self._inside(buffers), rows, -(-cols // QUAD) if quads else cols)
        wrong = buffers["offsets"] != -CENTRE * self._codes(buffers, rows, cols).sum(1, dtype=torch.int32)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise FormatError(f"{self.name}: buffer 'offsets' at position {row} is not -{CENTRE} times its row's codes")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """As the inner format estimates, for `stored` codes (four to a quad). `itemsize` has no part in it."""
        inner = self._inner(rows, cols)
        if isinstance(inner, CSRGroups):
            return 8 * rows + inner.nbytes(rows, -(-cols // QUAD), -(-stored // QUAD), QUAD)
        return 8 * rows + inner.nbytes(rows, cols, stored, 1)

    def stored(self, dense: torch.Tensor) -> int:
        return int(self.pack(dense)["values"].numel())

    def blur(self, x: torch.Tensor) -> torch.Tensor:
        """The largest error [batch] that rounding the activations x (batch, in) makes to each of them."""
        largest = x.abs().amax(1).double() if x.shape[1] else x.new_zeros(x.shape[0], dtype=torch.float64)
        return largest.clamp(min=SMALLEST) * (0.5 / LEVELS) * (1 + 1e-4)

    def _inner(self, rows: int, cols: int) -> Format:
        inner = self.format or CSRGroups()
        return inner.resolve(rows, -(-cols // QUAD) if isinstance(inner, CSRGroups) else cols)

    def _inside(self, buffers: Buffers) -> Buffers:
        """The buffers of the format inside, quads as its values."""
        inner = {key: tensor for key, tensor in buffers.items() if key not in ("scales", "offsets")}
        if isinstance(self.format or CSRGroups(), CSRGroups):
            inner["values"] = _view(inner["values"], np.float32)
        return inner

    def _codes(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        inner = self._inner(rows, cols)
        if not isinstance(inner, CSRGroups):
            return inner.unpack(self._inside(buffers), rows, cols)
        return _view(inner.unpack(self._inside(buffers), rows, -(-cols // QUAD)), np.int8)[:, :cols]


def _view(tensor: torch.Tensor, dtype: type[np.generic]) -> torch.Tensor:
    """The bits of a tensor as another type, along its last dimension; torch refuses some tensors of one element."""
    array = np.ascontiguousarray(tensor.cpu().numpy())
    shape = (*array.shape[:-1], array.shape[-1] * array.itemsize // np.dtype(dtype).itemsize)
    return torch.from_numpy(np.frombuffer(array.tobytes(), dtype).reshape(shape).copy()).to(tensor.device)
