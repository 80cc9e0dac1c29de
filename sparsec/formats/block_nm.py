"""BlockNM: n:m where every block has an n of its own, which follows where the weight is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import numpy_view, pointers_of, torch_view

SIZES = (4, 8, 16, 32)


@dataclass(frozen=True)
class BlockNM(Format):
    """Aligned blocks of r outputs by c inputs whose rows all store the same n values, n one of 0, 1, 2, 4, ..., c.

    The mix of Zeng et al., FlightLLM (FPGA 2024). Buffers: `values` [steps, r] and their `places` uint8 [steps, r] in
    the block's columns, ascending down a block; `pointers` int32 [block rows * block columns + 1], the steps before
    each block. A block of n steps keeps up to n values of each row; free slots hold zeros.
    """

    r: int = 16
    c: int = 16

    name: ClassVar[str] = "block_nm"
    buffers: ClassVar[tuple[str, ...]] = ("values", "places", "pointers")
    blocked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.r not in SIZES or self.c not in SIZES:
            raise SpecError(f"BlockNM({self.r!r}, {self.c!r}): valid sizes: {', '.join(map(str, SIZES))}")

    @property
    def levels(self) -> tuple[int, ...]:
        """The values of n that a block may have."""
        return (0, *(2**k for k in range(self.c.bit_length())))

    def mix(self, dense: torch.Tensor, sparsity: float) -> torch.Tensor:
        """The mask that keeps, in each block, the n of each row nearest to what magnitude pruning would keep there."""
        size = dense.detach().abs().float().cpu().numpy()
        count = round(size.size * (1 - sparsity))
        kept = np.zeros(size.size, bool)
        kept[np.argsort(-size, axis=None, kind="stable")[:count]] = True
        mean = self._tiles(kept.reshape(size.shape)).sum(axis=(2, 3)) / self.r
        levels = np.array(self.levels)
        n = levels[np.abs(mean[..., None] - levels).argmin(axis=2)]
        rank = np.argsort(np.argsort(-self._tiles(size), axis=3, kind="stable"), axis=3)
        mask = self._flat(rank < n[..., None, None], *size.shape)
        return torch.from_numpy(mask).to(dense.device)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        source, bits = numpy_view(dense), numpy_view(kept)
        part = np.where(bits, source, np.zeros((), source.dtype))
        taken, n = self._tiles(bits), self._steps(bits)
        pointers = pointers_of(n)
        starts = pointers.numpy()[:-1].reshape(n.shape)
        values = np.zeros((int(n.sum()), self.r), source.dtype)
        places = np.zeros((int(n.sum()), self.r), np.uint8)
        tiles = self._tiles(part)
        for level in self.levels[1:]:
            block = np.nonzero(n == level)
            # a stable sort puts the kept places first, and behind them the free ones
            order = np.argsort(~taken[block], axis=2, kind="stable")[..., :level]
            order.sort(axis=2)
            at = (starts[block][:, None] + np.arange(level)).reshape(-1)
            held = np.take_along_axis(tiles[block], order, axis=2)
            values[at] = held.transpose(0, 2, 1).reshape(-1, self.r)
            places[at] = order.transpose(0, 2, 1).reshape(-1, self.r)
        found = {"values": torch_view(values, dense), "places": torch.from_numpy(places), "pointers": pointers}
        return {key: tensor.to(dense.device) for key, tensor in found.items()}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        source, places = numpy_view(buffers["values"]), numpy_view(buffers["places"])
        high, wide = self._sizes(rows, cols)
        block = np.repeat(np.arange(high * wide), np.diff(numpy_view(buffers["pointers"])))
        out = np.zeros((high * wide, self.r, self.c), source.dtype)
        out[block[:, None], np.arange(self.r), places] = source
        flat = self._flat(out.reshape(high, wide, self.r, self.c), rows, cols)
        return torch_view(flat, buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, (high, wide) = buffers["values"], self._sizes(rows, cols)
        _check.value_dtype(self.name, values, 2)
        _check.buffer(self.name, "values", values, values.dtype, (values.shape[0], self.r))
        _check.buffer(self.name, "places", buffers["places"], torch.uint8, tuple(values.shape))
        ends = _check.pointers(self.name, buffers["pointers"], high * wide, values.shape[0])
        n = np.diff(ends)
        if not np.isin(n, self.levels).all():
            at = int(np.argmin(np.isin(n, self.levels)))
            raise FormatError(f"{self.name}: buffer 'pointers' gives block {at} {n[at]} steps; valid: {self.levels}")
        places = numpy_view(buffers["places"])
        self._complain(places, places >= self.c, f"valid: 0 to {self.c - 1}")
        falls = np.zeros(places.shape, bool)
        falls[1:] = places[1:] <= places[:-1]
        falls[ends[:-1][n > 0]] = False
        self._complain(places, falls, "places rise down a block")
        full = self.unpack(buffers, high * self.r, wide * self.c)
        if bool((full[rows:] != 0).any()) or bool((full[:, cols:] != 0).any()):
            raise FormatError(f"{self.name}: buffer 'values' is not zero outside ({rows}, {cols})")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        high, wide = self._sizes(rows, cols)
        return stored * (itemsize + 1) + 4 * (high * wide + 1)

    def stored(self, dense: torch.Tensor) -> int:
        _, kept = self.accept(dense, None)
        return int(self._steps(numpy_view(kept)).sum()) * self.r

    def _sizes(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // self.r), -(-cols // self.c)

    def _steps(self, bits: np.ndarray) -> np.ndarray:
        """n of every block: its fullest row, rounded up to a level."""
        fullest = self._tiles(bits).sum(axis=3).max(axis=2, initial=0)
        levels = np.array(self.levels, np.int32)
        found: np.ndarray = levels[np.searchsorted(levels, fullest)]
        return found

    def _tiles(self, full: np.ndarray) -> np.ndarray:
        """[block rows, block columns, r, c], completed with zeros."""
        rows, cols = full.shape
        high, wide = self._sizes(rows, cols)
        padded = np.zeros((high * self.r, wide * self.c), full.dtype)
        padded[:rows, :cols] = full
        return padded.reshape(high, self.r, wide, self.c).transpose(0, 2, 1, 3)

    def _flat(self, tiles: np.ndarray, rows: int, cols: int) -> np.ndarray:
        high, wide = self._sizes(rows, cols)
        full = tiles.transpose(0, 2, 1, 3).reshape(high * self.r, wide * self.c)
        return np.ascontiguousarray(full[:rows, :cols])

    def _complain(self, places: np.ndarray, bad: np.ndarray, valid: str) -> None:
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            raise FormatError(f"{self.name}: buffer 'places' at {at} holds {places[at]}; {valid}")
