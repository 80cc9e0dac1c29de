"""N:M:G: every n-of-m pattern is used by exactly g rows of a chunk, so that kernels never look a pattern up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._pack import numpy_view, torch_view

LARGEST = 4096  # rows of a chunk: their sums stay in cache, and their numbers fit 16 bits


@lru_cache(maxsize=64)
def patterns(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """All n-subsets of range(m) in an order in which neighbours exchange one member (the revolving door order)."""
    if n == 0 or n == m:
        return (tuple(range(n)),)
    return patterns(n, m - 1) + tuple((*p, m - 1) for p in reversed(patterns(n - 1, m - 1)))


@dataclass(frozen=True)
class NMG(Format):
    """n:m:g of Ivanov et al., STen: Productive and Efficient Sparsity in PyTorch (2023).

    A chunk is `C(m, n) * g` rows; in each aligned group of m inputs each pattern of `patterns(n, m)` belongs to g rows
    of the chunk. Buffers: `values` [chunks, groups, C * g, n], pattern by pattern; `slots` int16 [chunks, groups,
    C * g], the row of the chunk that each entry belongs to. Rows and columns are completed with zeros.
    """

    n: int
    m: int
    g: int

    name: ClassVar[str] = "nmg"
    buffers: ClassVar[tuple[str, ...]] = ("values", "slots")
    regular: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("n", "m", "g"):
            if wrong := _check.positive("NMG", field, getattr(self, field)):
                raise SpecError(wrong)
        if self.n >= self.m or self.m > 32 or self.chunk > LARGEST:
            raise SpecError(
                f"NMG({self.n}, {self.m}, {self.g}): n must be below m, m at most 32, and C(m, n) * g at most {LARGEST}"
            )

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        return comb(self.m, self.n) * self.g

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        bits = numpy_view(pattern(dense, mask))
        over = self._tiles(bits).sum(axis=3) > self.n
        if over.any():
            chunk, group, slot = (int(i) for i in np.argwhere(over)[0])
            return f"row {chunk * self.chunk + slot} has more than {self.n} nonzeros in group {group} of {self.m}"
        lost = self._assign(bits.astype(np.float32))[1]
        if lost.any():
            chunk, group = (int(i) for i in np.argwhere(lost)[0])
            first = chunk * self.chunk
            return (
                f"rows {first} to {first + self.chunk - 1} cannot share the patterns of group {group} out evenly, "
                f"{self.g} rows to each; prune with NMG({self.n}, {self.m}, {self.g}).choose(weight)"
            )
        return None

    def choose(self, dense: torch.Tensor) -> torch.Tensor:
        """The bool mask of the entries to keep: greedy over (row, pattern) by kept magnitude, as STen does it."""
        assigned, _ = self._assign(dense.detach().abs().float().cpu().numpy())
        table = np.zeros((comb(self.m, self.n), self.m), bool)
        np.put_along_axis(table, np.array(patterns(self.n, self.m)), True, axis=1)
        rows, cols = int(dense.shape[0]), int(dense.shape[1])
        kept = table[assigned].transpose(0, 2, 1, 3).reshape(assigned.shape[0] * self.chunk, -1)
        return torch.from_numpy(np.ascontiguousarray(kept[:rows, :cols])).to(dense.device)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        bits = numpy_view(kept)
        assigned, _ = self._assign(bits.astype(np.float32))
        slots = np.argsort(assigned, axis=2, kind="stable")
        source = np.where(bits, numpy_view(dense), np.zeros((), numpy_view(dense).dtype))
        tiles = np.take_along_axis(self._tiles(source), slots[..., None], axis=2)
        order = np.repeat(np.array(patterns(self.n, self.m)), self.g, axis=0)
        values = np.take_along_axis(tiles, np.broadcast_to(order, (*tiles.shape[:3], self.n)), axis=3)
        return {
            "values": torch_view(np.ascontiguousarray(values), dense),
            "slots": torch.from_numpy(slots.astype(np.int16)).to(dense.device),
        }

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        source, slots = numpy_view(buffers["values"]), numpy_view(buffers["slots"]).astype(np.int64)
        order = np.repeat(np.array(patterns(self.n, self.m)), self.g, axis=0)
        tiles = np.zeros((*source.shape[:3], self.m), source.dtype)
        np.put_along_axis(tiles, np.broadcast_to(order, source.shape), source, axis=3)
        out = np.zeros_like(tiles)
        np.put_along_axis(out, slots[..., None], tiles, axis=2)
        full = out.transpose(0, 2, 1, 3).reshape(source.shape[0] * self.chunk, source.shape[1] * self.m)
        return torch_view(np.ascontiguousarray(full[:rows, :cols]), buffers["values"])

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, (chunks, groups) = buffers["values"], self._sizes(rows, cols)
        _check.value_dtype(self.name, values, 4)
        _check.buffer(self.name, "values", values, values.dtype, (chunks, groups, self.chunk, self.n))
        _check.buffer(self.name, "slots", buffers["slots"], torch.int16, (chunks, groups, self.chunk))
        slots = numpy_view(buffers["slots"])
        wrong = np.sort(slots, axis=2) != np.arange(self.chunk, dtype=np.int16)
        if wrong.any():
            chunk, group, _ = (int(i) for i in np.argwhere(wrong)[0])
            raise FormatError(
                f"{self.name}: buffer 'slots' at ({chunk}, {group}) is no order of the rows; valid: each of 0 to "
                f"{self.chunk - 1} once"
            )
        full = self.unpack(buffers, chunks * self.chunk, groups * self.m)
        if bool((full[rows:] != 0).any()) or bool((full[:, cols:] != 0).any()):
            raise FormatError(f"{self.name}: buffer 'values' is not zero outside ({rows}, {cols})")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return stored * itemsize + 2 * (stored // self.n)

    def stored(self, dense: torch.Tensor) -> int:
        chunks, groups = self._sizes(int(dense.shape[0]), int(dense.shape[1]))
        return chunks * groups * self.chunk * self.n

    def _sizes(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // self.chunk), -(-cols // self.m)

    def _tiles(self, full: np.ndarray) -> np.ndarray:
        """[chunks, groups, rows of a chunk, m], completed with zeros."""
        rows, cols = full.shape
        chunks, groups = self._sizes(rows, cols)
        padded = np.zeros((chunks * self.chunk, groups * self.m), full.dtype)
        padded[:rows, :cols] = full
        return padded.reshape(chunks, self.chunk, groups, self.m).transpose(0, 2, 1, 3)

    def _assign(self, energy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pattern of each row [chunks, groups, rows], and which (chunk, group) lose energy by it.

        Greedy: the (row, pattern) pair that keeps most comes first, while the row is free and the pattern has room.
        Where that loses something, an exact assignment is looked for.
        """
        tiles = self._tiles(energy)
        shape, count = tiles.shape[:3], comb(self.m, self.n)
        tiles = tiles.reshape(-1, self.chunk, self.m)
        member = np.array(patterns(self.n, self.m))
        score = tiles[..., member].sum(axis=3)
        order = np.argsort(-score.reshape(score.shape[0], -1), axis=1, kind="stable")
        found = np.full(score.shape[:2], -1, np.int64)
        room = np.full((score.shape[0], count), self.g)
        every = np.arange(score.shape[0])
        for step in range(order.shape[1]):
            row, code = np.divmod(order[:, step], count)
            take = (found[every, row] < 0) & (room[every, code] > 0)
            found[every[take], row[take]] = code[take]
            room[every[take], code[take]] -= 1
        lost = np.take_along_axis(score, found[..., None], axis=2)[..., 0].sum(axis=1)
        lost = ~np.isclose(lost, tiles.sum(axis=(1, 2)))
        if set(np.unique(energy)) <= {0.0, 1.0}:
            for at in np.flatnonzero(lost):
                found[at], lost[at] = self._match(score[at], tiles[at])
        return found.reshape(shape), lost.reshape(shape[:2])

    def _match(self, score: np.ndarray, tile: np.ndarray) -> tuple[np.ndarray, bool]:
        from scipy.optimize import linear_sum_assignment

        _, place = linear_sum_assignment(np.repeat(score, self.g, axis=1), maximize=True)
        code = place // self.g
        return code, bool(score[np.arange(len(code)), code].sum() < tile.sum())
