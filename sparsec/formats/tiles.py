"""Tiles: sixteen rows by as many columns as fill 64 bytes of each, masked, in the order of matrix units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import numpy_view, pointers_of, row_chunks, torch_view

ROWS = 16  # of a tile, and words of its mask
WORDS = 16
MAX_WIDE = 1 << 16  # tiles along a row of the matrix
_MASKS: dict[int, tuple[torch.dtype, type[np.unsignedinteger]]] = {
    1: (torch.int16, np.uint16),
    2: (torch.int32, np.uint32),
    4: (torch.int64, np.uint64),
}


def together(itemsize: int) -> int:
    """Neighbouring columns that one 32-bit lane holds: 1 of fp32, 2 of bf16 and fp16, 4 of int8."""
    return 4 // itemsize


@dataclass(frozen=True)
class Tiles(Format):
    """The matrix in tiles of 16 rows by 16 (fp32), 32 (16 bits) or 64 (int8) columns, stored one after the other.

    A tile has 16 words. Word i holds columns g i to g i + g - 1 of the tile, g = 4 bytes / itemsize, row after row:
    what a matrix unit takes as its second operand, and what a vector of 16 outputs is multiplied with. Kernels spread
    the stored values of a tile into the L1 data cache and run a dense product over it; the scheme is that of Xia et
    al., Flash-LLM (VLDB 2023), with masks in the place of lists, since processors expand by masks. A full tile is used
    where it lies, an empty one is passed over.

    Buffers: `values` [nnz], tiles by rows; `masks` [tiles, 16] (int16, int32 or int64 bit patterns), bit g * row + j of
    word i for column g * i + j; `pointers` int32 [tiles + 1], the first value of each tile.
    """

    name: ClassVar[str] = "tiles"
    buffers: ClassVar[tuple[str, ...]] = ("values", "masks", "pointers")

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        if dense.element_size() > 4:
            return f"tiles are of values of 1, 2 or 4 bytes, not of {dense.dtype}"
        most = MAX_WIDE * WORDS * together(dense.element_size())
        return f"{dense.shape[1]} columns are more than {most}, {MAX_WIDE} tiles" if dense.shape[1] > most else None

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        group = together(dense.element_size())
        source, bits = numpy_view(dense), numpy_view(kept)
        word = _MASKS[group][1]
        values, masks = [np.zeros(0, source.dtype)], [np.zeros((0, WORDS), word)]
        rows, cols = bits.shape
        for start, stop in row_chunks(rows, cols, ROWS):
            there = _words(bits[start:stop], group)
            values.append(_words(source[start:stop], group)[there])
            masks.append(np.packbits(there, axis=2, bitorder="little").view(word).reshape(-1, WORDS))
        words = np.concatenate(masks)
        return {
            "values": torch_view(np.concatenate(values), dense),
            "masks": torch.from_numpy(words.view(f"i{words.itemsize}")).to(dense.device),
            "pointers": pointers_of(np.bitwise_count(words).sum(axis=1, dtype=np.int64)).to(dense.device),
        }

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        group, octets = self._group(buffers), numpy_view(buffers["masks"]).view(np.uint8)
        source = numpy_view(buffers["values"])
        wide = self.tiles(rows, cols, group)[1]
        out = np.zeros((rows, cols), source.dtype)
        ends = numpy_view(buffers["pointers"])
        for start, stop in row_chunks(rows, cols, ROWS):
            first, last = start // ROWS * wide, -(-stop // ROWS) * wide
            there = np.unpackbits(octets[first:last], axis=1, bitorder="little").view(bool)
            part = np.zeros(there.shape, source.dtype)
            part[there] = source[ends[first] : ends[last]]
            grid = part.reshape(-(-(stop - start) // ROWS), wide, WORDS, ROWS, group).transpose(0, 3, 1, 2, 4)
            out[start:stop] = grid.reshape(grid.shape[0] * ROWS, wide * WORDS * group)[: stop - start, :cols]
        return torch_view(out, buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, masks = buffers["values"], buffers["masks"]
        _check.value_dtype(self.name, values, 1)
        if values.element_size() > 4:
            raise FormatError(f"{self.name}: buffer 'values' has dtype {values.dtype}, whose items exceed 4 bytes")
        group = together(values.element_size())
        high, wide = self.tiles(rows, cols, group)
        if wide > MAX_WIDE:
            raise FormatError(f"{self.name}: {cols} columns make {wide} tiles; valid: at most {MAX_WIDE}")
        _check.buffer(self.name, "masks", masks, _MASKS[group][0], (high * wide, WORDS))
        ends = _check.pointers(self.name, buffers["pointers"], high * wide, values.numel())
        words = np.ascontiguousarray(numpy_view(masks)).view(_MASKS[group][1])
        self._outside(words.reshape(high, wide, WORDS), rows, cols, group)
        counts = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
        wrong = counts != np.diff(ends)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise FormatError(
                f"{self.name}: buffer 'pointers' at position {at + 1} holds {ends[at + 1]}, but the masks of tile {at} "
                f"set {counts[at]} bits: expected {ends[at] + counts[at]}"
            )

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        group = together(itemsize)
        high, wide = self.tiles(rows, cols, group)
        return stored * itemsize + high * wide * (2 * group * WORDS + 4) + 4

    def tiles(self, rows: int, cols: int, group: int) -> tuple[int, int]:
        """Tiles along the rows and along the columns, `group` columns to a lane."""
        return -(-rows // ROWS), -(-cols // (WORDS * group))

    def _group(self, buffers: Buffers) -> int:
        """Columns to a lane: by the masks, whose words have a bit for each of 16 rows and column."""
        return int(buffers["masks"].element_size()) // 2

    def _outside(self, words: np.ndarray, rows: int, cols: int, group: int) -> None:
        """FormatError where a mask [high, wide, 16] sets a bit past the last row or column."""
        high, wide = words.shape[:2]
        if high * wide == 0:
            return
        column = np.arange(WORDS)[:, None, None] * group + np.arange(group)
        row = np.arange(ROWS)[None, :, None]
        shape = WORDS, ROWS, group
        for what, inside, part, first, step in (
            ("column", column < cols - (wide - 1) * WORDS * group, words[:, -1], wide - 1, wide),
            ("row", row < rows - (high - 1) * ROWS, words[-1], (high - 1) * wide, 1),
        ):
            flat = np.broadcast_to(inside, shape).reshape(WORDS, -1)
            allowed = np.packbits(flat, axis=1, bitorder="little").view(words.dtype)[:, 0]
            past = part & ~allowed
            if past.any():
                tile, at = (int(i[0]) for i in np.nonzero(past))
                last = (cols if what == "column" else rows) - 1
                raise FormatError(
                    f"{self.name}: buffer 'masks' at position ({first + step * tile}, {at}) holds "
                    f"{int(part[tile, at]):#x}, which sets bits past {what} {last}; valid there: {int(allowed[at]):#x}"
                )


def _words(array: np.ndarray, group: int) -> np.ndarray:
    """Rows and columns of a matrix as [tiles, words, row and column of a word], zeros where it ends inside a tile."""
    high, wide = -(-array.shape[0] // ROWS), -(-array.shape[1] // (WORDS * group))
    whole = np.zeros((high * ROWS, wide * WORDS * group), array.dtype)
    whole[: array.shape[0], : array.shape[1]] = array
    grid = whole.reshape(high, ROWS, wide, WORDS, group).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(grid).reshape(high * wide, WORDS, ROWS * group)
