"""Bitmask: one bit per entry of the matrix, and the stored values in a row. Smallest from about 6 % to 97 % density."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import numpy_view, place, pointers_of, row_chunks, select

_WORDS: dict[int, tuple[torch.dtype, type[np.unsignedinteger]]] = {
    16: (torch.int16, np.uint16),
    32: (torch.int32, np.uint32),
    64: (torch.int64, np.uint64),
}
DEFAULT_WIDTH = 16


@dataclass(frozen=True)
class Bitmask(Format):
    """Masks of `width` columns each, least significant bit first, with value pointers per (row, block of columns).

    Buffers: `values` [nnz] row-major; `masks` [rows, ceil(cols / width)] (int16, int32 or int64 bit patterns; bits past
    the last column are 0); `pointers` int32 [rows * blocks + 1] with blocks = ceil(cols / block): entry r * blocks + b
    is the first value of row r in block b. `block` is a multiple of `width`.

    `width` None takes 16, `block` None one block of all columns (rounded up to whole masks).
    """

    width: int | None = None
    block: int | None = None

    name: ClassVar[str] = "bitmask"
    buffers: ClassVar[tuple[str, ...]] = ("values", "masks", "pointers")
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.width is not None and self.width not in _WORDS:
            raise SpecError(f"Bitmask: width={self.width!r} is not one of 16, 32, 64 or None")
        if wrong := _check.positive("Bitmask", "block", self.block, optional=True):
            raise SpecError(wrong)
        if self.block is not None and self.block % (self.width or DEFAULT_WIDTH):
            raise SpecError(f"Bitmask: block={self.block} is not a multiple of width={self.width or DEFAULT_WIDTH}")

    def resolve(self, rows: int, cols: int) -> Bitmask:
        width = self.width or DEFAULT_WIDTH
        return Bitmask(width, self.block or max(1, -(-cols // width)) * width)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        rows, cols = dense.shape
        fmt = self.resolve(rows, cols)
        assert fmt.width is not None and fmt.block is not None
        bits = numpy_view(kept)
        words = -(-cols // fmt.width)
        masks = np.zeros((rows, words * fmt.width // 8), np.uint8)
        masks[:, : -(-cols // 8)] = np.packbits(bits, axis=1, bitorder="little")
        packed = masks.view(_WORDS[fmt.width][1])
        pointers = pointers_of(_popcounts(packed, fmt.block // fmt.width))
        values, _ = select(dense, bits, columns=False)
        stored = torch.from_numpy(packed.view(f"i{fmt.width // 8}"))
        return {"values": values, "masks": stored.to(dense.device), "pointers": pointers.to(dense.device)}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        octets = numpy_view(buffers["masks"]).view(np.uint8)

        def positions() -> Iterator[np.ndarray]:
            for start, stop in row_chunks(rows, cols):
                bits = np.unpackbits(octets[start:stop], axis=1, count=cols, bitorder="little")
                yield np.flatnonzero(bits.view(bool)) + start * cols

        return place(buffers["values"], positions(), rows, cols)

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        fmt = self.resolve(rows, cols)
        assert fmt.width is not None and fmt.block is not None
        values, words = buffers["values"], -(-cols // fmt.width)
        _check.value_dtype(self.name, values, 1)
        _check.buffer(self.name, "masks", buffers["masks"], _WORDS[fmt.width][0], (rows, words))
        blocks = -(-cols // fmt.block)
        ends = _check.pointers(self.name, buffers["pointers"], rows * blocks, values.numel())
        if rows == 0 or words == 0:
            return
        masks = numpy_view(buffers["masks"]).view(_WORDS[fmt.width][1])
        tail = cols - (words - 1) * fmt.width
        past = masks[:, -1] >> masks.dtype.type(tail) if tail < fmt.width else np.zeros(0, masks.dtype)
        if past.any():
            row = int(np.flatnonzero(past)[0])
            raise FormatError(
                f"{self.name}: buffer 'masks' at position ({row}, {words - 1}) holds {int(masks[row, -1]):#x}, "
                f"which sets bits past column {cols - 1}; valid: below {1 << tail:#x}"
            )
        counts = _popcounts(masks, fmt.block // fmt.width).reshape(-1)
        wrong = counts != np.diff(ends)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise FormatError(
                f"{self.name}: buffer 'pointers' at position {at + 1} holds {ends[at + 1]}, but the masks of row "
                f"{at // blocks}, block {at % blocks} set {counts[at]} bits: expected {ends[at] + counts[at]}"
            )

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        fmt = self.resolve(rows, cols)
        assert fmt.width is not None and fmt.block is not None
        masks = rows * -(-cols // fmt.width) * (fmt.width // 8)
        return stored * itemsize + masks + 4 * (rows * -(-cols // fmt.block) + 1)


def _popcounts(masks: np.ndarray, per_block: int) -> np.ndarray:
    """Set bits per row and group of `per_block` masks: int32 (rows, ceil(words / per_block))."""
    rows, words = masks.shape
    if words == 0:
        return np.zeros((rows, 0), np.int32)
    counts = np.bitwise_count(masks)
    blocks = -(-words // per_block)
    if words % per_block == 0:
        sums: np.ndarray = counts.reshape(rows, blocks, per_block).sum(axis=2, dtype=np.int32)
    else:
        sums = np.add.reduceat(counts, np.arange(blocks) * per_block, axis=1, dtype=np.int32)
    return sums
