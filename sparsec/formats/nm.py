"""N:M: at most n values in each aligned group of m inputs, each with its place in the group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._pack import numpy_view, row_chunks, torch_view

MAX_M = 32


@dataclass(frozen=True)
class NM(Format):
    """`values` [rows, groups, n] and their `places` uint8 [rows, groups, n] in groups of m columns, ascending.

    groups = ceil(cols / m); columns past the last are zero. A group with fewer than n values is filled up with zeros at
    its first free places, so every row stores the same number of values and kernels need no pointers.
    """

    n: int
    m: int

    name: ClassVar[str] = "nm"
    buffers: ClassVar[tuple[str, ...]] = ("values", "places")
    regular: ClassVar[bool] = True
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("n", "m"):
            if wrong := _check.positive("NM", field, getattr(self, field)):
                raise SpecError(wrong)
        if self.n >= self.m or self.m > MAX_M:
            raise SpecError(f"NM({self.n}, {self.m}): n must be below m, and m at most {MAX_M}")

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        bits = numpy_view(pattern(dense, mask))
        for start, stop in row_chunks(*_shape(bits)):
            counts = np.count_nonzero(self._groups(bits[start:stop]), axis=2)
            if counts.size and counts.max() > self.n:
                row, group = (int(i) for i in np.argwhere(counts > self.n)[0])
                first = group * self.m
                return (
                    f"row {start + row} has {counts[row, group]} nonzeros in columns {first} to {first + self.m - 1}, "
                    f"{self.n} at most fit"
                )
        return None

    def choose(self, dense: torch.Tensor) -> torch.Tensor:
        """The n largest of each group."""
        size = np.abs(numpy_view(dense.detach().float()))
        rank = np.argsort(np.argsort(-self._groups(size), axis=2, kind="stable"), axis=2)
        kept = (rank < self.n).reshape(size.shape[0], -1)[:, : size.shape[1]]
        return pattern(dense) & torch.from_numpy(np.ascontiguousarray(kept)).to(dense.device)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        rows, cols = _shape(dense)
        source, bits = numpy_view(dense), numpy_view(kept)
        groups = -(-cols // self.m)
        values = np.zeros((rows, groups, self.n), source.dtype)
        places = np.zeros((rows, groups, self.n), np.uint8)
        for start, stop in row_chunks(rows, cols):
            grouped = self._groups(bits[start:stop])
            # a stable sort puts the kept places first, and behind them the free ones
            order = np.argsort(~grouped, axis=2, kind="stable")[..., : self.n]
            order.sort(axis=2)
            part = np.where(bits[start:stop], source[start:stop], np.zeros((), source.dtype))
            values[start:stop] = np.take_along_axis(self._groups(part), order, axis=2)
            places[start:stop] = order
        return {"values": torch_view(values, dense), "places": torch.from_numpy(places).to(dense.device)}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        source, places = numpy_view(buffers["values"]), numpy_view(buffers["places"])
        groups = -(-cols // self.m)
        out = np.zeros((rows, groups, self.m), source.dtype)
        np.put_along_axis(out, places.astype(np.int64), source, axis=2)
        flat = out.reshape(rows, groups * self.m)[:, :cols]
        return torch_view(np.ascontiguousarray(flat), buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, shape = buffers["values"], (rows, -(-cols // self.m), self.n)
        _check.value_dtype(self.name, values, 3)
        _check.buffer(self.name, "values", values, values.dtype, shape)
        _check.buffer(self.name, "places", buffers["places"], torch.uint8, shape)
        places = numpy_view(buffers["places"])
        if not places.size:
            return
        self._complain(places, places >= self.m, f"valid: 0 to {self.m - 1}")
        self._complain(places[..., 1:], places[..., 1:] <= places[..., :-1], "places rise strictly inside a group", 1)
        tail = cols - (shape[1] - 1) * self.m
        bad = (places[:, -1] >= tail) & (numpy_view(values)[:, -1] != 0)
        if bad.any():
            row, slot = (int(i) for i in np.argwhere(bad)[0])
            at = (row, shape[1] - 1, slot)
            raise FormatError(f"{self.name}: buffer 'values' at {at} is not zero in a column past {cols - 1}")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return stored * (itemsize + 1)

    def stored(self, dense: torch.Tensor) -> int:
        return dense.shape[0] * -(-dense.shape[1] // self.m) * self.n

    def _groups(self, part: np.ndarray) -> np.ndarray:
        """(rows, groups, m), padded with zeros past the last column."""
        rows, cols = part.shape
        groups = -(-cols // self.m)
        if cols % self.m:
            padded = np.zeros((rows, groups * self.m), part.dtype)
            padded[:, :cols] = part
            part = padded
        return part.reshape(rows, groups, self.m)

    def _complain(self, places: np.ndarray, bad: np.ndarray, valid: str, shift: int = 0) -> None:
        if bad.any():
            row, group, slot = (int(i) for i in np.argwhere(bad)[0])
            at, value = (row, group, slot + shift), places[row, group, slot]
            raise FormatError(f"{self.name}: buffer 'places' at {at} holds {value}; {valid}")


def _shape(array: np.ndarray | torch.Tensor) -> tuple[int, int]:
    rows, cols = array.shape
    return int(rows), int(cols)
