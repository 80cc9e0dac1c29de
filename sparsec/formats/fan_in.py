"""FanIn: the same number of values in every row, as in condensed layers (Lasby et al., SRigL, ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._pack import numpy_view, row_chunks, torch_view, unsigned
from sparsec.formats.csr import COLS_16


@dataclass(frozen=True)
class FanIn(Format):
    """`values` [rows, k] and their column numbers `indices` [rows, k], strictly ascending in a row.

    Indices are int16 tensors of uint16 bit patterns where the columns fit, int32 otherwise; `index_bits` None chooses.
    A row with fewer than k values is filled up with zeros at its first free columns.
    """

    k: int
    index_bits: int | None = None

    name: ClassVar[str] = "fan_in"
    buffers: ClassVar[tuple[str, ...]] = ("values", "indices")
    regular: ClassVar[bool] = True
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if wrong := _check.positive("FanIn", "k", self.k):
            raise SpecError(wrong)
        if self.index_bits not in (None, 16, 32):
            raise SpecError(f"FanIn: index_bits={self.index_bits!r} is not 16, 32 or None (from the columns)")

    def resolve(self, rows: int, cols: int) -> FanIn:
        return FanIn(self.k, self.index_bits or (16 if cols <= COLS_16 else 32))

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        if self.k > dense.shape[1]:
            return f"k={self.k} is more than its {dense.shape[1]} columns"
        if self.index_bits == 16 and dense.shape[1] > COLS_16:
            return f"{dense.shape[1]} columns do not fit 16-bit indices (at most {COLS_16}); use index_bits=32"
        counts = np.count_nonzero(numpy_view(pattern(dense, mask)), axis=1)
        if counts.size and counts.max() > self.k:
            row = int(np.argmax(counts > self.k))
            return f"row {row} has {counts[row]} nonzeros, {self.k} at most fit"
        return None

    def choose(self, dense: torch.Tensor) -> torch.Tensor:
        """The k largest of each row."""
        size = np.abs(numpy_view(dense.detach().float()))
        rank = np.argsort(np.argsort(-size, axis=1, kind="stable"), axis=1)
        return pattern(dense) & torch.from_numpy(rank < self.k).to(dense.device)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        rows, cols = int(dense.shape[0]), int(dense.shape[1])
        source, bits = numpy_view(dense), numpy_view(kept)
        wide = self.resolve(rows, cols).index_bits == 32
        values = np.zeros((rows, self.k), source.dtype)
        indices = np.zeros((rows, self.k), np.int32 if wide else np.uint16)
        for start, stop in row_chunks(rows, cols):
            taken = bits[start:stop].copy()
            missing = self.k - np.count_nonzero(taken, axis=1)
            if missing.any():  # the first free positions of a row are stored too, as zeros
                taken |= np.cumsum(~taken, axis=1, dtype=np.int32) * ~taken - 1 < missing[:, None]
            order = np.nonzero(taken)[1].reshape(stop - start, self.k)
            part = np.where(bits[start:stop], source[start:stop], np.zeros((), source.dtype))
            values[start:stop] = np.take_along_axis(part, order, axis=1)
            indices[start:stop] = order
        stored = torch.from_numpy(indices if wide else indices.view(np.int16))
        return {"values": torch_view(values, dense), "indices": stored.to(dense.device)}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        source = numpy_view(buffers["values"])
        out = np.zeros((rows, cols), source.dtype)
        np.put_along_axis(out, unsigned(buffers["indices"]).astype(np.int64), source, axis=1)
        return torch_view(out, buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values = buffers["values"]
        _check.value_dtype(self.name, values, 2)
        _check.buffer(self.name, "values", values, values.dtype, (rows, self.k))
        index_type = torch.int16 if self.resolve(rows, cols).index_bits == 16 else torch.int32
        _check.buffer(self.name, "indices", buffers["indices"], index_type, (rows, self.k))
        indices = unsigned(buffers["indices"])
        self._complain(indices, (indices < 0) | (indices >= cols), f"valid: 0 to {cols - 1}")
        self._complain(indices[:, 1:], indices[:, 1:] <= indices[:, :-1], "indices rise strictly inside a row", 1)

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return stored * (itemsize + (2 if self.resolve(rows, cols).index_bits == 16 else 4))

    def stored(self, dense: torch.Tensor) -> int:
        return int(dense.shape[0]) * self.k

    def _complain(self, indices: np.ndarray, bad: np.ndarray, valid: str, shift: int = 0) -> None:
        if bad.any():
            row, slot = (int(i) for i in np.argwhere(bad)[0])
            raise FormatError(
                f"{self.name}: buffer 'indices' at ({row}, {slot + shift}) holds {indices[row, slot]}; {valid}"
            )
