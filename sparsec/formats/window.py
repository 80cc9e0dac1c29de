"""Sliding windows: sixteen rows in step, whose next entries all lie where registers hold the activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._pack import numpy_view, pointers_of, torch_view

LANES = 16  # rows of a tile, and the unit in which windows start
STEPS = 2  # entries that each row may take from one window
_HALF = 32  # inputs that one lookup instruction chooses from
_LOW, _HIGH = 0x40, 0x80  # marks of a place in the first and in the second half
_STARTS = 1 << 15  # windows are numbered in 15 bits
_NEVER = np.int64(1) << 40  # the next column of a row that has none


@dataclass(frozen=True)
class Window(Format):
    """Rows in tiles of 16, one to a lane, that walk along their columns together, for one row of x.

    A tile's entries come in groups: a window of `reach` (32 or 64) inputs that starts at a multiple of 16, not behind
    the next entry of any row, and two entries of each row that lie inside. A row without a next entry inside gets a
    filling of zero, and rows that are ahead wait, so that windows slide over the inputs once. Kernels keep a window's
    activations in registers and look up sixteen of them with one instruction, as no memory could. The longer reach
    fills better, the shorter one needs half the lookups.

    Buffers: `values` [groups * 32], step by step the 16 rows; `places` uint8, as many: 0x40 | offset in the window for
    its first 32 inputs, 0x80 | offset - 32 for the others, 0 for a filling; `starts` int16 [groups], first input of a
    window / 16; `pointers` int32 [tiles + 1], the first group of each tile. `reach` None takes 64.
    """

    reach: int | None = None

    name: ClassVar[str] = "window"
    buffers: ClassVar[tuple[str, ...]] = ("values", "places", "starts", "pointers")

    def __post_init__(self) -> None:
        if self.reach not in (None, _HALF, 2 * _HALF):
            raise SpecError(f"Window: reach={self.reach!r} is not 32, 64 or None")

    def resolve(self, rows: int, cols: int) -> Window:
        return Window(self.reach or 2 * _HALF)

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        if self._last(dense.shape[1]) >= _STARTS:
            return f"{dense.shape[1]} columns are more than windows are numbered for, {(_STARTS - 1) * LANES}"
        return None

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        source, bits = numpy_view(dense), numpy_view(kept)
        tiles = -(-bits.shape[0] // LANES)
        tile, start, entry, place = self._walk(bits)
        order = np.argsort(tile, kind="stable")
        column = np.nonzero(bits)[1]
        row = (tile[:, None] * LANES + np.arange(LANES))[:, None, :]
        flat = source[np.minimum(row, max(0, bits.shape[0] - 1)), column[entry]] if column.size else entry
        values = np.where(place != 0, flat, np.zeros((), source.dtype)).astype(source.dtype)
        found = {
            "values": torch_view(np.ascontiguousarray(values[order]).reshape(-1), dense),
            "places": torch.from_numpy(place[order].reshape(-1)),
            "starts": torch.from_numpy(start[order]),
            "pointers": pointers_of(np.bincount(tile, minlength=tiles)),
        }
        return {key: tensor.to(dense.device) for key, tensor in found.items()}

    def _walk(self, bits: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of every group its tile [n] and start int16 [n], the numbers of its entries among all [n, steps, lanes] (any
        where there is none) and their places uint8 [n, steps, lanes]. All tiles walk at once, a group each per round.
        """
        height, cols = -(-bits.shape[0] // LANES) * LANES, bits.shape[1]
        reach, last = self.reach or 2 * _HALF, self._last(cols)
        count = np.zeros(height, np.int64)
        count[: bits.shape[0]] = np.count_nonzero(bits, axis=1)
        ends = np.cumsum(count).reshape(-1, LANES)
        at = ends - count.reshape(-1, LANES)
        column = np.append(np.nonzero(bits)[1], 0)
        tile = np.flatnonzero((at < ends).any(axis=1))
        none = np.zeros((0, STEPS, LANES), np.int64)
        flat = none[:, 0, 0]
        found: list[tuple[np.ndarray, ...]] = [(flat, flat.astype(np.int16), none, none.astype(np.uint8))]
        while tile.size:
            here, stop = at[tile], ends[tile]
            following = np.where(here < stop, column[here], _NEVER)
            start = np.minimum(following.min(axis=1) // LANES, last)
            entries, places = [], []
            for _ in range(STEPS):
                offset = following - start[:, None] * LANES
                take = offset < reach
                entries.append(np.where(take, here, 0))
                places.append(np.where(take, np.where(offset < _HALF, _LOW | offset, _HIGH | offset - _HALF), 0))
                here = here + take
                following = np.where(here < stop, column[here], _NEVER)
            at[tile] = here
            found.append((tile, start.astype(np.int16), np.stack(entries, 1), np.stack(places, 1).astype(np.uint8)))
            tile = tile[(here < stop).any(axis=1)]
        return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        source = numpy_view(buffers["values"])
        row, column, at = self._entries(buffers)
        out = np.zeros((rows, cols), source.dtype)
        out[row, column] = source[at]
        return torch_view(out, buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, places, starts = buffers["values"], buffers["places"], buffers["starts"]
        groups = starts.numel()
        _check.value_dtype(self.name, values, 1)
        _check.buffer(self.name, "values", values, values.dtype, (groups * STEPS * LANES,))
        _check.buffer(self.name, "places", places, torch.uint8, (values.numel(),))
        _check.buffer(self.name, "starts", starts, torch.int16, (groups,))
        _check.pointers(self.name, buffers["pointers"], -(-rows // LANES), groups, into="starts")
        if not groups:
            return
        first, last = numpy_view(starts), self._last(cols)
        if ((first < 0) | (first > last)).any():
            at = int(np.argmax((first < 0) | (first > last)))
            raise FormatError(f"{self.name}: buffer 'starts' at position {at} holds {first[at]}, valid: 0 to {last}")
        here = numpy_view(places)
        valid = (here == 0) | (here & 0xE0 == _LOW) | (here & 0xE0 == _HIGH) & (self.resolve(rows, cols).reach != _HALF)
        if not valid.all():
            at = int(np.argmin(valid))
            raise FormatError(
                f"{self.name}: buffer 'places' at position {at} holds {int(here[at]):#x}; valid: 0, 0x40 to 0x5f"
                + ("" if self.reach == _HALF else ", 0x80 to 0x9f")
            )
        self._valid_entries(buffers, rows, cols)

    def stored(self, dense: torch.Tensor) -> int:
        return int(self._walk(numpy_view(pattern(dense)))[0].size) * STEPS * LANES

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """Exact bytes for `stored` values, filling included: at random places 1.1 (50 % zeros) to 1.6 (95 %) times the
        nonzeros with the longer reach."""
        groups = -(-stored // (STEPS * LANES))
        return groups * (STEPS * LANES * (itemsize + 1) + 2) + 4 * (-(-rows // LANES) + 1)

    def _last(self, cols: int) -> int:
        """The last place at which a window may start: kernels read whole windows of an x completed to whole lanes."""
        reach = self.reach or 2 * _HALF
        return max(0, -(-cols // LANES) - reach // LANES)

    def _entries(self, buffers: Buffers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, column and position in `values` of everything that is stored and no filling."""
        place = numpy_view(buffers["places"]).reshape(-1, STEPS, LANES).astype(np.int64)
        pointers = numpy_view(buffers["pointers"])
        tile = np.repeat(np.arange(pointers.size - 1), np.diff(pointers))
        group, step, lane = np.nonzero(place)
        here = place[group, step, lane]
        column = numpy_view(buffers["starts"]).astype(np.int64)[group] * LANES + (here & 31) + (here >> 7) * _HALF
        return tile[group] * LANES + lane, column, (group * STEPS + step) * LANES + lane

    def _valid_entries(self, buffers: Buffers, rows: int, cols: int) -> None:
        """Entries lie in the matrix and ascend along a row; filling is zero."""
        _check.ascending_entries(self.name, self._entries(buffers), rows, cols, "entry")
        filling = numpy_view(buffers["values"])[numpy_view(buffers["places"]) == 0]
        if (filling.view(np.uint8) != 0).any():
            raise FormatError(f"{self.name}: buffer 'values' holds a value where 'places' says filling")
