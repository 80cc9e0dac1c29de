"""BSR: dense r x c blocks at block coordinates. `BSR(1, k)` and `BSR(k, 1)` are the vector forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._pack import numpy_view, pointers_of, row_chunks, torch_view, unsigned

FULL = 0.5  # share of nonzeros from which a block pays beside a format of single values
BLOCKS_16 = 65535  # most block columns whose numbers are stored in 16 bits


@dataclass(frozen=True)
class BSR(Format):
    """Block compressed sparse rows with aligned blocks of `r` outputs by `c` inputs.

    Buffers: `values` [stored blocks, r, c], block rows in order and block columns ascending within one; `indices`
    [stored blocks] block column numbers (int16 tensors hold uint16 bit patterns, int32 otherwise); `pointers` int32
    [ceil(rows / r) + 1]. The matrix is padded with zeros up to whole blocks. A block is stored when any entry of it is,
    so every position of a stored block counts as stored.

    `index_bits` None takes 16 where the block columns fit.
    """

    r: int
    c: int
    index_bits: int | None = None

    name: ClassVar[str] = "bsr"
    buffers: ClassVar[tuple[str, ...]] = ("values", "indices", "pointers")
    blocked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("r", "c"):
            if wrong := _check.positive("BSR", field, getattr(self, field)):
                raise SpecError(wrong)
        if self.index_bits not in (None, 16, 32):
            raise SpecError(f"BSR: index_bits={self.index_bits!r} is not 16, 32 or None (from the columns)")

    def resolve(self, rows: int, cols: int) -> BSR:
        return BSR(self.r, self.c, self.index_bits or (16 if -(-cols // self.c) <= BLOCKS_16 else 32))

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        wide = -(-dense.shape[1] // self.c)
        if self.index_bits == 16 and wide > BLOCKS_16:
            return f"{wide} block columns do not fit 16-bit indices (at most {BLOCKS_16}); use index_bits=32"
        return None

    def choose(self, dense: torch.Tensor) -> torch.Tensor:
        """The nonzeros of the blocks that are at least half full: a block multiplies its zeros too."""
        bits = numpy_view(pattern(dense))
        full = self._tiles(bits).mean(axis=(1, 3)) >= FULL
        spread = full.repeat(self.r, axis=0)[: bits.shape[0]].repeat(self.c, axis=1)[:, : bits.shape[1]]
        return torch.from_numpy(bits & spread).to(dense.device)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        rows, cols = dense.shape
        fmt = self.resolve(rows, cols)
        source, bits = numpy_view(dense), numpy_view(kept)
        index_type = np.uint16 if fmt.index_bits == 16 else np.int32
        counts, indices, values = [np.zeros(0, np.int64)], [np.zeros(0, index_type)], []
        for start, stop in row_chunks(rows, cols, self.r):
            occupied = self._occupied(bits[start:stop])
            block_row, block_col = np.nonzero(occupied)
            part = source[start:stop]
            if mask is not None:
                part = np.where(bits[start:stop], part, np.zeros((), part.dtype))
            values.append(self._tiles(part)[block_row, :, block_col, :])
            indices.append(block_col.astype(index_type))
            counts.append(np.count_nonzero(occupied, axis=1))
        blocks = np.concatenate([np.zeros((0, self.r, self.c), source.dtype), *values])
        flat = np.concatenate(indices)
        return {
            "values": torch_view(blocks, dense),
            "indices": torch.from_numpy(flat.view(np.int16) if fmt.index_bits == 16 else flat).to(dense.device),
            "pointers": pointers_of(np.concatenate(counts)).to(dense.device),
        }

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        source, indices = numpy_view(buffers["values"]), unsigned(buffers["indices"])
        high, wide = -(-rows // self.r), -(-cols // self.c)
        out = np.zeros((high, self.r, wide, self.c), source.dtype)
        block_row = np.repeat(np.arange(high), np.diff(numpy_view(buffers["pointers"])))
        out[block_row, :, indices, :] = source
        full = out.reshape(high * self.r, wide * self.c)
        return torch_view(np.ascontiguousarray(full[:rows, :cols]), buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        fmt = self.resolve(rows, cols)
        values = buffers["values"]
        high, wide = -(-rows // self.r), -(-cols // self.c)
        _check.value_dtype(self.name, values, 3)
        _check.buffer(self.name, "values", values, values.dtype, (values.shape[0], self.r, self.c))
        index_type = torch.int16 if fmt.index_bits == 16 else torch.int32
        _check.buffer(self.name, "indices", buffers["indices"], index_type, (values.shape[0],))
        ends = _check.pointers(self.name, buffers["pointers"], high, values.shape[0])
        indices = unsigned(buffers["indices"])
        _check.ascending(self.name, indices, ends, "block row")
        _check.segment_ranges(self.name, indices, ends, np.zeros(high, np.int64), np.full(high, wide))
        if rows % self.r and high:
            self._check_padding(values[int(ends[-2]) :, rows % self.r :, :], int(ends[-2]), f"rows past row {rows - 1}")
        if cols % self.c:
            last = torch.from_numpy(np.flatnonzero(indices == wide - 1)).to(values.device)
            self._check_padding(values[last, :, cols % self.c :], last, f"columns past column {cols - 1}")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        fmt = self.resolve(rows, cols)
        assert fmt.index_bits is not None
        return stored * itemsize + stored // (self.r * self.c) * (fmt.index_bits // 8) + 4 * (-(-rows // self.r) + 1)

    def stored(self, dense: torch.Tensor) -> int:
        dense, kept = self.accept(dense, None)
        bits = numpy_view(kept)
        blocks = sum(
            int(np.count_nonzero(self._occupied(bits[start:stop])))
            for start, stop in row_chunks(dense.shape[0], dense.shape[1], self.r)
        )
        return blocks * self.r * self.c

    def _tiles(self, part: np.ndarray) -> np.ndarray:
        """A band of whole block rows as (block rows, r, block columns, c), padded with zeros where needed."""
        rows, cols = part.shape
        high, wide = -(-rows // self.r), -(-cols // self.c)
        if rows % self.r or cols % self.c:
            padded = np.zeros((high * self.r, wide * self.c), part.dtype)
            padded[:rows, :cols] = part
            part = padded
        return part.reshape(high, self.r, wide, self.c)

    def _occupied(self, bits: np.ndarray) -> np.ndarray:
        """Which blocks of a band hold a stored entry: bool (block rows, block columns)."""
        tiles = self._tiles(bits)
        high, _, wide, _ = tiles.shape
        lines: np.ndarray = tiles.reshape(high, self.r, wide * self.c)
        columns: np.ndarray = lines[:, 0] if self.r == 1 else np.bitwise_or.reduce(lines, axis=1)
        if self.c in (2, 4, 8):  # a block's bools are one machine word
            occupied: np.ndarray = np.ascontiguousarray(columns).view(f"u{self.c}") != 0
        elif self.c == 1:
            occupied = columns
        else:
            occupied = np.bitwise_or.reduce(columns.reshape(high, wide, self.c), axis=2)
        return occupied

    def _check_padding(self, padding: torch.Tensor, where: torch.Tensor | int, what: str) -> None:
        bad = (padding != 0).flatten(1).any(dim=1).nonzero().flatten()
        if bad.numel():
            first = int(bad[0])
            block = where + first if isinstance(where, int) else int(where[first])
            raise FormatError(f"{self.name}: buffer 'values' at block {block} is not zero in {what}")
