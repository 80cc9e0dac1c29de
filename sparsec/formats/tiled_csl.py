"""TiledCSL: lists of nonzeros per tile, ordered so that a warp scatters them into shared memory without bank conflicts.

The layout of Xia et al., Flash-LLM (VLDB 2023), with values and places in two buffers instead of interleaved words, so
that values stay a parameter of their own; the bytes are the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import INT32_MAX, numpy_view, row_chunks, torch_view, unsigned

TILE = 64  # columns of a tile: a row of 16-bit entries covers the 32 banks once
LANES = 32  # of a warp, and banks of shared memory
RUN = 8  # consecutive entries that one lane loads, 16 bytes of values; a tile's list is padded up to whole runs
CHUNK = LANES * RUN
ROWS = (64, 128, 256)


@dataclass(frozen=True)
class TiledCSL(Format):
    """Tiles of `r` rows by 64 columns, each a list of its stored values and their places in the tile.

    Buffers: `values` [stored]; `places` int16 [stored] (uint16 bit patterns): row * 64 + (column ^ 8 * (row % 8)),
    where a kernel's tile in shared memory holds the entry; `pointers` int32 [tiles + 1], tiles by rows, multiples of 8.
    Padding is zeros at places r * 64 to r * 64 + 63, behind the tile. Of 256 entries, lane l of a warp takes 8 l to
    8 l + 7 and stores one after the other; each time the 32 lanes hit 32 banks, where the pattern allows.
    """

    r: int = 128

    name: ClassVar[str] = "tiled_csl"
    buffers: ClassVar[tuple[str, ...]] = ("values", "places", "pointers")

    def __post_init__(self) -> None:
        if self.r not in ROWS:
            raise SpecError(f"TiledCSL: r={self.r!r} is not one of {', '.join(map(str, ROWS))}")

    def tiles(self, rows: int, cols: int) -> tuple[int, int]:
        """Tiles along the rows and along the columns."""
        return -(-rows // self.r), -(-cols // TILE)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        rows, cols = int(dense.shape[0]), int(dense.shape[1])
        source, bits = numpy_view(dense), numpy_view(kept)
        values, places = [np.zeros(0, source.dtype)], [np.zeros(0, np.uint16)]
        sizes = [np.zeros(0, np.int64)]
        for start, stop in row_chunks(rows, cols, self.r):
            row, col = np.nonzero(bits[start:stop])
            tile = row // self.r * self.tiles(rows, cols)[1] + col // TILE
            count = np.bincount(tile, minlength=int(np.prod(self.tiles(stop - start, cols))))
            inner, at = row % self.r, col % TILE
            place = inner * TILE + (at ^ inner % 8 * 8)
            part_values, part_places, size = self._order(tile, place, source[start:stop][row, col], count)
            values.append(part_values)
            places.append(part_places)
            sizes.append(size)
        pointers = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])
        if pointers[-1] > INT32_MAX:
            raise FormatError(f"tiled_csl: {pointers[-1]} stored entries overflow 32-bit pointers; split the weight")
        flat = np.concatenate(places).view(np.int16)
        return {
            "values": torch_view(np.concatenate(values), dense),
            "places": torch.from_numpy(flat).to(dense.device),
            "pointers": torch.from_numpy(pointers.astype(np.int32)).to(dense.device),
        }

    def _order(
        self, tile: np.ndarray, place: np.ndarray, value: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(values, places, entries per tile) of some tiles, padded and in the order of their lanes and turns."""
        banks = np.zeros((count.size, LANES), np.int64)
        np.add.at(banks, (tile, place // 2 % LANES), 1)
        size = -(-count // RUN) * RUN
        pads = [np.zeros((0, 2), np.int64)]
        for turn in range(RUN - 1):  # padding goes to the emptiest banks
            short = np.flatnonzero(size - count > turn)
            bank = np.argmin(banks[short], axis=1)
            banks[short, bank] += 1
            pads.append(np.stack([short, bank], axis=1))
        pad = np.concatenate(pads)
        tile = np.concatenate([tile, pad[:, 0]])
        place = np.concatenate([place, self.r * TILE + 2 * pad[:, 1]])
        value = np.concatenate([value, np.zeros(len(pad), value.dtype)])
        slot_tile, slot_bank, slot_at = _turns(banks, size)
        entries = np.lexsort((place // 2 % LANES, tile))
        slots = np.lexsort((slot_at, slot_bank, slot_tile))
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
        target = starts[slot_tile[slots]] + slot_at[slots]
        values, places = np.empty_like(value), np.empty(place.size, np.uint16)
        values[target], places[target] = value[entries], place[entries]
        return values, places, size

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        row, col, real = self._where(buffers, rows, cols)
        source = numpy_view(buffers["values"])
        out = np.zeros((rows, cols), source.dtype)
        out[row[real], col[real]] = source[real]
        return torch_view(out, buffers["values"])

    def _where(self, buffers: Buffers, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row and column of every entry, and whether it is one: not padding."""
        places = unsigned(buffers["places"]).astype(np.int64)
        ends = numpy_view(buffers["pointers"]).astype(np.int64)
        tile = np.repeat(np.arange(ends.size - 1), np.diff(ends))
        wide = max(1, self.tiles(rows, cols)[1])
        inner = places // TILE
        col = tile % wide * TILE + (places % TILE ^ inner % 8 * 8)
        return tile // wide * self.r + inner, col, places < self.r * TILE

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, places = buffers["values"], buffers["places"]
        _check.value_dtype(self.name, values, 1)
        _check.buffer(self.name, "places", places, torch.int16, tuple(values.shape))
        high, wide = self.tiles(rows, cols)
        ends = _check.pointers(self.name, buffers["pointers"], high * wide, values.numel())
        if (ends % RUN).any():
            at = int(np.argmax(ends % RUN != 0))
            raise FormatError(
                f"{self.name}: buffer 'pointers' at position {at} holds {ends[at]}, not a multiple of {RUN}"
            )
        row, col, real = self._where(buffers, rows, cols)
        stored, limit = unsigned(places), self.r * TILE + TILE
        self._complain(stored, stored >= limit, f"valid: 0 to {limit - 1}")
        self._complain(stored, real & ((row >= rows) | (col >= cols)), f"which lies outside ({rows}, {cols})")
        self._complain(stored, ~real & (numpy_view(values) != 0), "a place of padding, whose value must be zero")
        flat = (row * cols + col)[real]
        first = np.zeros(rows * cols, bool)
        first[flat] = True
        if np.count_nonzero(first) != flat.size:
            where = np.flatnonzero(real)[np.argsort(flat, kind="stable")][1:][np.diff(np.sort(flat)) == 0]
            raise FormatError(f"{self.name}: buffer 'places' at position {where[0]} repeats another entry of its tile")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        high, wide = self.tiles(rows, cols)
        return stored * (itemsize + 2) + 4 * (high * wide + 1)

    def stored(self, dense: torch.Tensor) -> int:
        rows, cols = int(dense.shape[0]), int(dense.shape[1])
        bits, total = numpy_view(dense != 0), 0
        for start, stop in row_chunks(rows, cols, self.r):
            row, col = np.nonzero(bits[start:stop])
            counts = np.bincount(row // self.r * self.tiles(rows, cols)[1] + col // TILE)
            total += int((-(-counts // RUN) * RUN).sum())
        return total

    def _complain(self, places: np.ndarray, bad: np.ndarray, valid: str) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            raise FormatError(f"{self.name}: buffer 'places' at position {at} holds {places[at]}; {valid}")


def _turns(banks: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tile, bank, position) of every slot of some tiles with `banks` [tiles, 32] entries per bank, `size` in all.

    Turn g of a tile is the g-th time that a warp stores: 32 lanes, fewer in the last chunk. Each turn takes one entry
    from each of the fullest banks, which leaves no conflict wherever that is possible (the greedy of Gale and Ryser).
    """
    left = banks.copy()
    whole, rest = size // CHUNK * RUN, size % CHUNK // RUN
    turns = whole + np.where(rest > 0, RUN, 0)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64),) * 3]
    for turn in range(int(turns.max(initial=0))):
        live = np.flatnonzero(turns > turn)
        lanes = np.where(turn < whole[live], LANES, rest[live])
        taken = np.zeros(live.size, np.int64)
        while (taken < lanes).any():  # once, unless fewer banks than lanes have entries left
            now = left[live]
            order = np.argsort(-now, axis=1, kind="stable")
            use = np.minimum(lanes - taken, np.count_nonzero(now, axis=1))
            which, rank = np.nonzero(np.arange(LANES) < use[:, None])
            bank = order[which, rank]
            left[live[which], bank] -= 1
            lane = taken[which] + rank
            found.append((live[which], bank, turn // RUN * CHUNK + lane * RUN + turn % RUN))
            taken += use
    tile, bank, at = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return tile, bank, at


def conflict_degrees(places: torch.Tensor, pointers: torch.Tensor) -> np.ndarray:
    """For every time a warp stores: how many entries the busiest bank gets. 1 is free of conflicts.

    A simulator of the addresses that a kernel makes from the buffers, for tests and for judging a pattern.
    """
    stored, ends = unsigned(places).astype(np.int64), numpy_view(pointers)
    degrees = []
    for begin, end in itertools.pairwise(ends):
        for chunk in range(int(begin), int(end), CHUNK):
            runs = stored[chunk : min(chunk + CHUNK, int(end))].reshape(-1, RUN)
            for turn in range(RUN):
                degrees.append(int(np.bincount(runs[:, turn] // 2 % LANES).max()))
    return np.asarray(degrees, np.int64)
