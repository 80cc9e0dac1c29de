"""TwoFour: 2:4 sparsity in the words that the sparse tensor cores of CUDA devices read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import numpy_view, torch_view, unsigned
from sparsec.formats.nm import NM

ROWS, COLS = 16, 64  # of a tile: buffers are padded up to whole ones
_SHIFTS = 4 * np.arange(4)


@dataclass(frozen=True)
class TwoFour(Format):
    """At most two values in each aligned group of four inputs, as `mma.sp` (PTX ISA, sparse matrix storage) takes them.

    Buffers: `values` [rows16, cols64 / 2], two for each group, ascending; `places` int16 [rows16, cols64 / 16] (uint16
    bit patterns): for each of four groups, lowest first, two 2-bit places. rows16 and cols64 are rows and columns
    rounded up to whole tiles of 16 and 64. Groups with fewer values are filled with zeros at their first free places.
    """

    name: ClassVar[str] = "two_four"
    buffers: ClassVar[tuple[str, ...]] = ("values", "places")
    regular: ClassVar[bool] = True

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        return NM(2, 4).refuse(dense, mask)

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and groups of four columns, padded."""
        return -(-rows // ROWS) * ROWS, -(-cols // COLS) * COLS // 4

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, _ = self.accept(dense, mask)
        plain = NM(2, 4).pack(dense, mask)
        source, at = numpy_view(plain["values"]), numpy_view(plain["places"])
        high, wide = self.shape(int(dense.shape[0]), int(dense.shape[1]))
        values = np.zeros((high, wide, 2), source.dtype)
        places = np.zeros((high, wide, 2), np.uint16)
        places[..., 1] = 1
        values[: at.shape[0], : at.shape[1]] = source
        places[: at.shape[0], : at.shape[1]] = at
        nibbles = (places[..., 0] | places[..., 1] << 2).reshape(high, wide // 4, 4)
        words = np.bitwise_or.reduce(nibbles.astype(np.uint16) << _SHIFTS.astype(np.uint16), axis=2)
        return {
            "values": torch_view(values.reshape(high, wide * 2), dense),
            "places": torch.from_numpy(words.astype(np.uint16).view(np.int16)).to(dense.device),
        }

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        source = numpy_view(buffers["values"])
        high, wide = self.shape(rows, cols)
        out = np.zeros((high, wide, 4), source.dtype)
        np.put_along_axis(out, self._places(buffers), source.reshape(high, wide, 2), axis=2)
        return torch_view(np.ascontiguousarray(out.reshape(high, wide * 4)[:rows, :cols]), buffers["values"])

    def _places(self, buffers: Buffers) -> np.ndarray:
        """int64 [rows16, groups, 2]."""
        words = unsigned(buffers["places"]).astype(np.int64)
        nibbles = (words[..., None] >> _SHIFTS & 15).reshape(words.shape[0], -1)
        return np.stack([nibbles & 3, nibbles >> 2], axis=2)

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, (high, wide) = buffers["values"], self.shape(rows, cols)
        _check.value_dtype(self.name, values, 2)
        _check.buffer(self.name, "values", values, values.dtype, (high, 2 * wide))
        _check.buffer(self.name, "places", buffers["places"], torch.int16, (high, wide // 4))
        places = self._places(buffers)
        bad = places[..., 1] <= places[..., 0]
        if bad.any():
            row, group = (int(i) for i in np.argwhere(bad)[0])
            raise FormatError(
                f"{self.name}: buffer 'places' gives row {row}, group {group} the places {places[row, group].tolist()}"
                "; valid: two that rise, 0 to 3"
            )
        set_entries = numpy_view(values).reshape(high, wide, 2) != 0
        beyond = set_entries & (places + 4 * np.arange(wide)[:, None] >= cols)
        beyond[rows:] = set_entries[rows:]
        if beyond.any():
            row, group, slot = (int(i) for i in np.argwhere(beyond)[0])
            raise FormatError(
                f"{self.name}: buffer 'values' at ({row}, {2 * group + slot}) is not zero outside ({rows}, {cols})"
            )

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return stored * itemsize + stored // 4

    def stored(self, dense: torch.Tensor) -> int:
        high, wide = self.shape(int(dense.shape[0]), int(dense.shape[1]))
        return high * wide * 2
