"""Picks: sixteen rows in step, four codes of each at a time, all within a window of 64 inputs that a register holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._pack import numpy_view, pointers_of

LANES = 16  # rows of a tile: the 32-bit sums of a vector
STEPS = 4  # codes of a row in a group: what a dot product instruction adds in one lane
REACH = 64  # inputs of a window: what a byte permutation chooses from
MAX_COLS = 1 << 16  # windows start at an input whose number is 16 bits
_NEVER = np.int64(1) << 40  # the next column of a row that has none


@dataclass(frozen=True)
class Picks(Format):
    """Tiles of 16 rows that walk along their columns together; int8 only, and a zero is never stored.

    A tile's codes come in groups: a window of 64 inputs that starts at the first input any row needs next, and four
    codes of each row that lie inside; a row that has fewer there gets zeros, and waits. A kernel looks up the 64
    activations of a group with one byte permutation of the window.

    Buffers: `values` int8 [groups * 64], of each row of the tile its four codes; `places` uint8, as many: offset in the
    window, 0 for a filling; `starts` int16 [groups] (uint16 bit patterns), the first input of the window; `pointers`
    int32 [tiles + 1], the first group of each tile.
    """

    name: ClassVar[str] = "picks"
    buffers: ClassVar[tuple[str, ...]] = ("values", "places", "starts", "pointers")

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        if dense.dtype != torch.int8:
            return f"picks are of torch.int8, not of {dense.dtype}; Quantized makes codes of a weight"
        wide = dense.shape[1]
        return f"{wide} columns are more than windows are numbered for, {MAX_COLS}" if wide > MAX_COLS else None

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        source = numpy_view(torch.where(kept, dense, torch.zeros_like(dense)))
        tiles = -(-source.shape[0] // LANES)
        tile, start, entry, place = self._walk(source != 0)
        order = np.argsort(tile, kind="stable")
        codes = source[source != 0]
        filled = entry >= 0
        values = np.where(filled, codes[np.where(filled, entry, 0)] if codes.size else np.int8(0), np.int8(0))
        found = {
            "values": torch.from_numpy(np.ascontiguousarray(values[order]).reshape(-1).astype(np.int8)),
            "places": torch.from_numpy(np.ascontiguousarray(place[order]).reshape(-1)),
            "starts": torch.from_numpy(start[order].astype(np.uint16).view(np.int16)),
            "pointers": pointers_of(np.bincount(tile, minlength=tiles)),
        }
        return {key: tensor.to(dense.device) for key, tensor in found.items()}

    def _walk(self, bits: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of every group its tile and start [n], and the numbers of its codes among all [n, lanes, steps] (-1 where
        there is none) and their places. All tiles walk at once, a group each per round."""
        height = -(-bits.shape[0] // LANES) * LANES
        count = np.zeros(height, np.int64)
        count[: bits.shape[0]] = np.count_nonzero(bits, axis=1)
        ends = np.cumsum(count).reshape(-1, LANES)
        at = ends - count.reshape(-1, LANES)
        column = np.append(np.nonzero(bits)[1], 0)
        none = np.zeros((0, LANES, STEPS), np.int64)
        found: list[tuple[np.ndarray, ...]] = [(none[:, 0, 0], none[:, 0, 0], none, none.astype(np.uint8))]
        tile = np.flatnonzero((at < ends).any(axis=1))
        while tile.size:
            here, stop = at[tile], ends[tile]
            following = np.where(here < stop, column[np.minimum(here, column.size - 1)], _NEVER)
            start = following.min(axis=1)
            entries, places = [], []
            for _ in range(STEPS):
                take = following < start[:, None] + REACH
                entries.append(np.where(take, here, -1))
                places.append(np.where(take, following - start[:, None], 0))
                here = here + take
                following = np.where(here < stop, column[np.minimum(here, column.size - 1)], _NEVER)
            at[tile] = here
            found.append((tile, start, np.stack(entries, 2), np.stack(places, 2).astype(np.uint8)))
            tile = tile[(here < stop).any(axis=1)]
        return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        row, column, at = self._entries(buffers)
        out = np.zeros((rows, cols), np.int8)
        out[row, column] = numpy_view(buffers["values"])[at]
        return torch.from_numpy(out).to(buffers["values"].device)

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return self.unpack(buffers, rows, cols) != 0

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, starts, groups = buffers["values"], buffers["starts"], buffers["starts"].numel()
        _check.buffer(self.name, "values", values, torch.int8, (groups * LANES * STEPS,))
        _check.buffer(self.name, "places", buffers["places"], torch.uint8, (values.numel(),))
        _check.buffer(self.name, "starts", starts, torch.int16, (groups,))
        _check.pointers(self.name, buffers["pointers"], -(-rows // LANES), groups, into="starts")
        first, place = numpy_view(starts).view(np.uint16), numpy_view(buffers["places"])
        for key, array, limit in (("starts", first, cols), ("places", place, REACH)):
            if (array >= limit).any():
                first_wrong = int(np.argmax(array >= limit))
                raise FormatError(
                    f"{self.name}: buffer {key!r} at position {first_wrong} holds {array[first_wrong]}; "
                    f"valid: below {limit}"
                )
        _check.ascending_entries(self.name, self._entries(buffers), rows, cols, "code")

    def stored(self, dense: torch.Tensor) -> int:
        return int(self._walk(numpy_view(pattern(dense)))[0].size) * LANES * STEPS

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """Exact bytes for `stored` codes, filling included: at random places 1.04 (50 % zeros), 1.14 (80 %), 1.3 (90 %)
        to 1.7 (95 %) times the nonzeros. `itemsize` is 1."""
        groups = -(-stored // (LANES * STEPS))
        return groups * (2 * LANES * STEPS + 2) + 4 * (-(-rows // LANES) + 1)

    def _entries(self, buffers: Buffers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, column and position in `values` of every code that is no filling."""
        codes = numpy_view(buffers["values"])
        at = np.flatnonzero(codes)
        group, lane = at // (LANES * STEPS), at // STEPS % LANES
        pointers = numpy_view(buffers["pointers"])
        tile = np.repeat(np.arange(pointers.size - 1), np.diff(pointers))
        start = numpy_view(buffers["starts"]).view(np.uint16).astype(np.int64)
        return tile[group] * LANES + lane, start[group] + numpy_view(buffers["places"])[at], at
