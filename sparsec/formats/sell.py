"""Sliced ELLPACK: rows sorted by length inside a window, four at a time, so that loops end together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._pack import count_per_block, numpy_view, pointers_of, torch_view

ROWS = 4  # rows of a slice
MAX_BLOCK = 255  # places are bytes, and place 0 is the slot of zeros
MAX_WINDOW = 256  # row numbers inside a window are bytes
_WINDOW = 128


@dataclass(frozen=True)
class SELL(Format):
    """SELL-C-sigma (Kreutzer et al., SIAM J. Sci. Comput. 36(5), 2014), C = 4 and sigma = `window`, by column blocks.

    In each block of `block` columns the rows of a window are sorted by how many entries they have there, the longest
    first, and cut into slices of four. A slice is as long as its first row; the others are filled with zeros whose
    place is 0, a slot of zeros that a kernel keeps in front of each block's activations, so that filling multiplies
    nothing of the caller's. A segment is a window in a block; segments lie window by window, blocks ascending.

    Buffers: `values` [4 * entries], entry by entry the four rows of its slice; `indices` uint8 [4 * entries], 1 +
    offset in the block; `counts` uint8 [slices], entries of each slice; `rows` uint8 [4 * slices], the rows of each
    slice, counted from the window's first (numbers past the last row fill the last slice); `pointers` int32
    [segments + 1], the first entry of each segment. `block` None takes 255 columns, or all where there are fewer;
    `window` is a multiple of 4.
    """

    block: int | None = None
    window: int = _WINDOW

    name: ClassVar[str] = "sell"
    buffers: ClassVar[tuple[str, ...]] = ("values", "indices", "counts", "rows", "pointers")

    def __post_init__(self) -> None:
        wrong = _check.positive("SELL", "block", self.block, optional=True)
        if wrong := wrong or _check.positive("SELL", "window", self.window):
            raise SpecError(wrong)
        if self.block is not None and self.block > MAX_BLOCK:
            raise SpecError(f"SELL: block={self.block} is more than {MAX_BLOCK}, places are bytes")
        if self.window > MAX_WINDOW or self.window % ROWS:
            raise SpecError(f"SELL: window={self.window} must be a multiple of {ROWS} up to {MAX_WINDOW}")

    def resolve(self, rows: int, cols: int) -> SELL:
        return SELL(self.block or max(1, min(MAX_BLOCK, cols)), self.window)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        rows, cols = int(dense.shape[0]), int(dense.shape[1])
        source, bits = numpy_view(dense), numpy_view(kept)
        parts = [
            self._window(source[at : at + self.window], bits[at : at + self.window], cols)
            for at in range(0, rows, self.window)
        ]
        none = np.zeros(0, np.uint8)
        values, indices, counts, order, entries = (
            [part[i] for part in parts] or [none] for i in range(5)
        )  # fmt: skip
        found = {
            "values": torch_view(np.concatenate([source[:0, :0].reshape(-1), *values]).astype(source.dtype), dense),
            "indices": torch.from_numpy(np.concatenate(indices)),
            "counts": torch.from_numpy(np.concatenate(counts)),
            "rows": torch.from_numpy(np.concatenate(order)),
            "pointers": pointers_of(np.concatenate(entries).astype(np.int32)),
        }
        return {key: tensor.to(dense.device) for key, tensor in found.items()}

    def _window(self, source: np.ndarray, bits: np.ndarray, cols: int) -> tuple[np.ndarray, ...]:
        """values, indices, counts, rows and entries per segment of one window."""
        block, blocks = self._blocks(cols)
        lengths, order, counts = self._lengths(bits)
        height = lengths.shape[0]
        row, column = np.nonzero(bits)
        where, offset = column // block, column % block
        begins = np.concatenate([[0], np.cumsum(counts.reshape(-1))])
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(height)[:, None], axis=0)
        here = place[row, where]
        first = np.concatenate([[0], np.cumsum(lengths.reshape(-1))])[row * blocks + where]
        entry = begins[where * counts.shape[1] + here // ROWS] + np.arange(row.size) - first
        values = np.zeros(int(begins[-1]) * ROWS, source.dtype)
        indices = np.zeros(int(begins[-1]) * ROWS, np.uint8)
        values[entry * ROWS + here % ROWS] = source[row, column]
        indices[entry * ROWS + here % ROWS] = offset + 1
        return values, indices, counts.reshape(-1).astype(np.uint8), order.T.reshape(-1).astype(np.uint8), counts.sum(1)

    def _lengths(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries of a window's rows in each block [row, block], the rows by length, and [block, slice] the longest."""
        block, blocks = self._blocks(bits.shape[1])
        height = -(-bits.shape[0] // ROWS) * ROWS
        lengths = np.zeros((height, blocks), np.int64)
        lengths[: bits.shape[0]] = count_per_block(bits, block)
        order = np.argsort(-lengths, axis=0, kind="stable")
        return lengths, order, np.take_along_axis(lengths, order, axis=0)[::ROWS].T

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        source = numpy_view(buffers["values"])
        row, column, at = self._entries(buffers, rows, cols)
        out = np.zeros((rows, cols), source.dtype)
        out[row, column] = source[at]
        return torch_view(out, buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        _, blocks = self._blocks(cols)
        slices = self._slices(rows)
        values, indices, counts = buffers["values"], buffers["indices"], buffers["counts"]
        total = int(slices.sum()) * blocks
        _check.value_dtype(self.name, values, 1)
        _check.buffer(self.name, "indices", indices, torch.uint8, (values.numel(),))
        _check.buffer(self.name, "counts", counts, torch.uint8, (total,))
        _check.buffer(self.name, "rows", buffers["rows"], torch.uint8, (total * ROWS,))
        if values.numel() % ROWS:
            raise FormatError(f"{self.name}: buffer 'values' has {values.numel()} elements, no multiple of {ROWS}")
        pointers = _check.pointers(self.name, buffers["pointers"], slices.size * blocks, values.numel() // ROWS)
        lengths = numpy_view(counts).astype(np.int64)
        cuts = np.concatenate([[0], np.cumsum(np.repeat(slices, blocks))])
        sums = np.concatenate([[0], np.cumsum(lengths)])[cuts]
        if (np.diff(pointers) != np.diff(sums)).any():
            at = int(np.argmax(np.diff(pointers) != np.diff(sums)))
            raise FormatError(
                f"{self.name}: buffer 'pointers' gives segment {at} {np.diff(pointers)[at]} entries, its 'counts' add "
                f"up to {np.diff(sums)[at]}"
            )
        self._valid_rows(numpy_view(buffers["rows"]), slices, blocks)
        self._valid_places(buffers, rows, cols)

    def stored(self, dense: torch.Tensor) -> int:
        bits = numpy_view(pattern(dense))
        return ROWS * sum(
            int(self._lengths(bits[at : at + self.window])[2].sum()) for at in range(0, bits.shape[0], self.window)
        )

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """Exact bytes for `stored` values, filling included: 1 to 2 % more than nonzeros where these lie at random, up
        to a tenth more in trained weights at 90 % zeros."""
        _, blocks = self._blocks(cols)
        slices = self._slices(rows)
        listed = int(slices.sum()) * blocks * (1 + ROWS)
        return -(-stored // ROWS) * ROWS * (itemsize + 1) + listed + 4 * (slices.size * blocks + 1)

    def _blocks(self, cols: int) -> tuple[int, int]:
        """Columns of a block, number of blocks."""
        block = self.resolve(1, cols).block or 1
        return block, -(-cols // block)

    def _slices(self, rows: int) -> np.ndarray:
        """Slices in each window."""
        heights = np.minimum(self.window, rows - np.arange(0, rows, self.window))
        return np.asarray(-(-heights // ROWS), np.int64)

    def _spread(self, buffers: Buffers, rows: int, cols: int) -> tuple[np.ndarray, ...]:
        """Per stored number: slice, row, first column of its block, and place in the block."""
        block, blocks = self._blocks(cols)
        slices = self._slices(rows)
        counts, order = numpy_view(buffers["counts"]), numpy_view(buffers["rows"]).reshape(-1, ROWS)
        segment = np.repeat(np.arange(slices.size * blocks), np.repeat(slices, blocks))
        owner = np.repeat(np.arange(counts.size), counts)
        row = segment[owner, None] // max(1, blocks) * self.window + order[owner]
        start = np.repeat(segment[owner] % max(1, blocks) * block, ROWS)
        return np.repeat(owner, ROWS), row.reshape(-1), start, numpy_view(buffers["indices"]).astype(np.int64)

    def _entries(self, buffers: Buffers, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, column and position in `values` of everything that is stored and no filling."""
        _, row, start, place = self._spread(buffers, rows, cols)
        at = np.flatnonzero(place)
        return row[at], start[at] + place[at] - 1, at

    def _valid_rows(self, order: np.ndarray, slices: np.ndarray, blocks: int) -> None:
        """Every segment lists each row of its window once."""
        heights = np.repeat(slices * ROWS, blocks)
        segment = np.repeat(np.arange(heights.size), heights)
        seen = np.sort(segment * MAX_WINDOW + order)
        want = segment * MAX_WINDOW + np.arange(order.size) - np.repeat(np.cumsum(heights) - heights, heights)
        if (seen != want).any():
            at = int(segment[np.argmax(seen != want)])
            raise FormatError(f"{self.name}: buffer 'rows' does not list every row of segment {at} once")

    def _valid_places(self, buffers: Buffers, rows: int, cols: int) -> None:
        """Places ascend along a row and stay in its block; filling is zero, and at the end of every row."""
        block, _ = self._blocks(cols)
        owner, row, start, place = self._spread(buffers, rows, cols)
        limit = np.where(row < rows, np.minimum(block, cols - start), 0)
        if (place > limit).any():
            at = int(np.argmax(place > limit))
            raise FormatError(
                f"{self.name}: buffer 'indices' at position {at} holds {place[at]}, valid: 0 to {limit[at]}"
            )
        follows = owner[ROWS:] == owner[:-ROWS]
        later, before = place[ROWS:], place[:-ROWS]
        wrong = follows & (later <= before) & (later != 0) | follows & (before == 0) & (later != 0)
        if wrong.any():
            at = int(np.argmax(wrong)) + ROWS
            raise FormatError(
                f"{self.name}: buffer 'indices' at position {at} holds {place[at]} after {place[at - ROWS]}; places "
                "of a row ascend, and zeros fill its end"
            )
        filling = numpy_view(buffers["values"])[place == 0]
        if (filling.view(np.uint8) != 0).any():
            raise FormatError(f"{self.name}: buffer 'values' holds a value where 'indices' says filling")
