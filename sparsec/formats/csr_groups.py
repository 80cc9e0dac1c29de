"""CSR over groups of four rows, whose columns are sorted by which of the four rows are nonzero there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import numpy_view, pointers_of, torch_view

ROWS = 4  # rows of a group
ORDER = (15, 14, 13, 11, 7, 12, 10, 9, 6, 5, 3, 8, 4, 2, 1)
"""Patterns in stored order; bit i is row i of the group. Templates repeat this order."""

MAX_BLOCK = 255  # offsets and counts are bytes
_BLOCK = 128  # with 64 columns of fp32 activations, 32 KiB: the usual L1 data cache
_CHUNK = 1 << 16  # group columns packed at a time
_BITS = (np.arange(16)[:, None] >> np.arange(ROWS)[None, :] & 1).astype(bool)  # pattern -> its rows
_RANK = np.full(16, len(ORDER), np.uint8)  # pattern -> place in ORDER; the empty one comes last
_RANK[list(ORDER)] = np.arange(len(ORDER))


@dataclass(frozen=True)
class CSRGroups(Format):
    """Row-grouped CSR: one loop per pattern of nonzero rows, without a branch inside, and each activation serves up to
    four rows once it is loaded.

    A segment is a group of four rows (zero rows complete the last one) in a block of `block` columns; segments lie
    group by group, blocks ascending. Its columns are sorted by pattern in `ORDER`, then ascending. Buffers: `values`
    [nnz], for each column those of its rows in ascending order; `indices` uint8 [entries], each column's offset in its
    block; `counts` uint8 [segments, 15], columns per pattern; `pointers` and `starts` int32 [segments + 1], the first
    value and the first column of each segment. `block` None takes 128 columns, or all where there are fewer.
    """

    block: int | None = None

    name: ClassVar[str] = "csr_groups"
    buffers: ClassVar[tuple[str, ...]] = ("values", "indices", "counts", "pointers", "starts")

    def __post_init__(self) -> None:
        if wrong := _check.positive("CSRGroups", "block", self.block, optional=True):
            raise SpecError(wrong)
        if self.block is not None and self.block > MAX_BLOCK:
            raise SpecError(f"CSRGroups: block={self.block} is more than {MAX_BLOCK}, offsets are bytes")

    def resolve(self, rows: int, cols: int) -> CSRGroups:
        return CSRGroups(self.block or max(1, min(_BLOCK, cols)))

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        rows, cols = int(dense.shape[0]), int(dense.shape[1])
        groups, blocks, block = self._sizes(rows, cols)
        source, bits = numpy_view(dense), numpy_view(kept)
        values, indices = [source[:0, :0].reshape(-1)], [np.zeros(0, np.uint8)]
        counts = np.zeros((groups * blocks, len(ORDER)), np.uint8)
        step = max(1, _CHUNK // max(1, cols))
        for g in range(0, groups, step):
            end = min(groups, g + step)
            here = slice(g * ROWS, end * ROWS)
            padded, pattern = (
                np.zeros(((end - g) * ROWS, cols), source.dtype),
                np.zeros((end - g, blocks * block), np.uint8),
            )
            padded[: source[here].shape[0]] = source[here]
            for row in range(ROWS):
                part = bits[here][row::ROWS]
                pattern[: part.shape[0], :cols] |= part.astype(np.uint8) << row
            rank = _RANK[pattern].reshape(-1, block)
            order = np.argsort(rank, axis=1, kind="stable")
            segment, slot = np.nonzero(np.take_along_axis(rank, order, axis=1) < len(ORDER))
            offset = order[segment, slot]
            column = segment % blocks * block + offset
            group = segment // blocks
            four = padded.reshape(end - g, ROWS, cols)[group, :, column]
            values.append(four[_BITS[pattern[group, column]]])
            indices.append(offset.astype(np.uint8))
            number = np.arange(rank.shape[0])[:, None] * 16 + rank
            tally = np.bincount(number.reshape(-1), minlength=rank.shape[0] * 16).reshape(-1, 16)
            counts[g * blocks : end * blocks] = tally[:, : len(ORDER)]
        found = {
            "values": torch_view(np.concatenate(values), dense),
            "indices": torch.from_numpy(np.concatenate(indices)),
            "counts": torch.from_numpy(counts),
            "pointers": pointers_of(counts @ _BITS[list(ORDER)].sum(axis=1, dtype=np.int32)),
            "starts": pointers_of(counts.sum(axis=1, dtype=np.int32)),
        }
        return {key: tensor.to(dense.device) for key, tensor in found.items()}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        groups, blocks, block = self._sizes(rows, cols)
        source, counts = numpy_view(buffers["values"]), numpy_view(buffers["counts"])
        segment = np.repeat(np.arange(groups * blocks), counts.sum(axis=1, dtype=np.int64))
        held = _BITS[np.repeat(np.tile(np.array(ORDER), groups * blocks), counts.reshape(-1))]
        column = segment % max(1, blocks) * block + numpy_view(buffers["indices"])
        out = np.zeros((groups * ROWS, cols), source.dtype)
        entry, row = np.nonzero(held)
        out[segment[entry] // max(1, blocks) * ROWS + row, column[entry]] = source
        return torch_view(out[:rows], buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        groups, blocks, block = self._sizes(rows, cols)
        values, indices, counts = buffers["values"], buffers["indices"], buffers["counts"]
        _check.value_dtype(self.name, values, 1)
        _check.buffer(self.name, "indices", indices, torch.uint8, (indices.numel(),))
        _check.buffer(self.name, "counts", counts, torch.uint8, (groups * blocks, len(ORDER)))
        _check.pointers(self.name, buffers["pointers"], groups * blocks, values.numel())
        starts = _check.pointers(self.name, buffers["starts"], groups * blocks, indices.numel(), "starts", "indices")
        tally = numpy_view(counts)
        self._agree(buffers["pointers"], tally @ _BITS[list(ORDER)].sum(axis=1, dtype=np.int32), "pointers", "values")
        self._agree(buffers["starts"], tally.sum(axis=1, dtype=np.int32), "starts", "columns")
        if groups * blocks == 0:
            return
        offsets, segment = numpy_view(indices), np.repeat(np.arange(groups * blocks), np.diff(starts))
        limit = np.minimum(block, cols - segment % blocks * block)
        if (offsets >= limit).any():
            at = int(np.argmax(offsets >= limit))
            raise FormatError(
                f"{self.name}: buffer 'indices' at position {at} holds {offsets[at]}, valid: 0 to {limit[at] - 1}"
            )
        runs = np.concatenate([[0], np.cumsum(tally.reshape(-1), dtype=np.int64)])
        _check.ascending(self.name, offsets, runs, "run of one pattern")
        self._no_twins(offsets, segment)
        self._no_rows_past(tally.reshape(groups, -1, len(ORDER)), rows)

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """As `bytes_of`, with the columns that `stored` values at random places need on average."""
        groups = -(-rows // ROWS)
        density = stored / max(1, rows * cols)
        return self.bytes_of(rows, cols, stored, round(groups * cols * (1 - (1 - density) ** ROWS)), itemsize)

    def bytes_of(self, rows: int, cols: int, stored: int, columns: int, itemsize: int) -> int:
        """Exact bytes of `stored` values that lie in `columns` (group, column) pairs."""
        groups, blocks, _ = self._sizes(rows, cols)
        return stored * itemsize + columns + groups * blocks * len(ORDER) + 8 * (groups * blocks + 1)

    def _sizes(self, rows: int, cols: int) -> tuple[int, int, int]:
        """Groups of rows, blocks of columns, columns in a block."""
        block = self.resolve(rows, cols).block or 1
        return -(-rows // ROWS), -(-cols // block), block

    def _agree(self, pointers: torch.Tensor, counts: np.ndarray, key: str, what: str) -> None:
        steps = np.diff(numpy_view(pointers))
        if (steps != counts).any():
            at = int(np.argmax(steps != counts))
            raise FormatError(
                f"{self.name}: buffer {key!r} gives segment {at} {steps[at]} {what}, its 'counts' add up to "
                f"{counts[at]}"
            )

    def _no_twins(self, offsets: np.ndarray, segment: np.ndarray) -> None:
        place = segment * (MAX_BLOCK + 1) + offsets
        seen = np.sort(place)
        twins = seen[1:][seen[1:] == seen[:-1]]
        if twins.size:
            at = int(np.flatnonzero(place == twins[0])[1])
            raise FormatError(
                f"{self.name}: buffer 'indices' at position {at} holds {offsets[at]} a second time in segment "
                f"{segment[at]}; a column has one pattern"
            )

    def _no_rows_past(self, tally: np.ndarray, rows: int) -> None:
        """The rows that complete the last group hold nothing."""
        past = np.array([code >> (rows - 1) % ROWS + 1 != 0 for code in ORDER])
        if tally.shape[0] and tally[-1][:, past].any():
            raise FormatError(f"{self.name}: buffer 'counts' stores values in a row past {rows - 1}")
