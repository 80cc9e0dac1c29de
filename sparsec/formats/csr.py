"""CSR with row pointers at every block of columns, so that one packed copy serves both GEMV and blocked SpMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import count_per_block, numpy_view, place, pointers_of, row_chunks, select, unsigned

COLS_16 = 65535  # widest matrix whose column numbers are stored in 16 bits


@dataclass(frozen=True)
class CSR(Format):
    """Compressed sparse rows, with pointers per (row, block of `block` columns).

    Buffers: `values` [nnz] row-major; `indices` [nnz] plain column numbers, strictly ascending within a row (int16
    tensors hold uint16 bit patterns, int32 otherwise); `pointers` int32 [rows * blocks + 1] with blocks =
    ceil(cols / block): entry r * blocks + b is the first entry of row r in block b.

    `index_bits` None takes 16 where the columns fit, `block` None one block of all columns (ordinary CSR).
    """

    index_bits: int | None = None
    block: int | None = None

    name: ClassVar[str] = "csr"
    buffers: ClassVar[tuple[str, ...]] = ("values", "indices", "pointers")
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.index_bits not in (None, 16, 32):
            raise SpecError(f"CSR: index_bits={self.index_bits!r} is not 16, 32 or None (from the columns)")
        if wrong := _check.positive("CSR", "block", self.block, optional=True):
            raise SpecError(wrong)

    def resolve(self, rows: int, cols: int) -> CSR:
        return CSR(self.index_bits or (16 if cols <= COLS_16 else 32), self.block or max(1, cols))

    def blocks(self, cols: int) -> int:
        """Blocks of columns in a row."""
        return -(-cols // (self.block or max(1, cols)))

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        if self.index_bits == 16 and dense.shape[1] > COLS_16:
            return f"{dense.shape[1]} columns do not fit 16-bit indices (at most {COLS_16}); use CSR(index_bits=32)"
        return None

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        fmt = self.resolve(*dense.shape)
        assert fmt.block is not None
        bits = numpy_view(kept)
        pointers = pointers_of(count_per_block(bits, fmt.block))
        values, columns = select(dense, bits, columns=True)
        assert columns is not None
        wanted = np.uint16 if fmt.index_bits == 16 else np.int32
        stored = columns.astype(wanted, copy=False)
        indices = torch.from_numpy(stored.view(np.int16) if fmt.index_bits == 16 else stored)
        return {"values": values, "indices": indices.to(dense.device), "pointers": pointers.to(dense.device)}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        if cols == 0:
            return buffers["values"].detach().new_zeros(rows, 0)
        indices = unsigned(buffers["indices"])
        ends = numpy_view(buffers["pointers"])[:: self.blocks(cols)]

        def positions() -> object:
            for start, stop in row_chunks(rows, cols):
                base = np.arange(start, stop, dtype=np.int64) * cols
                yield np.repeat(base, np.diff(ends[start : stop + 1])) + indices[ends[start] : ends[stop]]

        return place(buffers["values"], positions(), rows, cols)  # type: ignore[arg-type]

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        fmt = self.resolve(rows, cols)
        assert fmt.block is not None
        values, blocks = buffers["values"], fmt.blocks(cols)
        _check.value_dtype(self.name, values, 1)
        index_type = torch.int16 if fmt.index_bits == 16 else torch.int32
        _check.buffer(self.name, "indices", buffers["indices"], index_type, tuple(values.shape))
        ends = _check.pointers(self.name, buffers["pointers"], rows * blocks, values.numel())
        if blocks == 0 or rows == 0:
            return
        indices = unsigned(buffers["indices"])
        _check.ascending(self.name, indices, ends[::blocks], "row")
        low = np.arange(blocks, dtype=np.int64) * fmt.block
        high = np.minimum(low + fmt.block, cols)
        _check.segment_ranges(self.name, indices, ends, np.tile(low, rows), np.tile(high, rows))

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        fmt = self.resolve(rows, cols)
        assert fmt.index_bits is not None
        return stored * (itemsize + fmt.index_bits // 8) + 4 * (rows * fmt.blocks(cols) + 1)
