"""Permuted: any format of a reordered weight, with the orders beside it; kernels undo them as they read and store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format, pattern
from sparsec.formats._order import ORDERS, order_of
from sparsec.formats._pack import numpy_view


@dataclass(frozen=True, init=False)
class Permuted(Format):
    """`Permuted(BSR(16, 16), "jaccard")`: the format of P W Q, rows in a found order, columns if asked for as well.

    `row_order` and `col_order` name how an order is found from the pattern: "none", "jaccard" (clusters of like rows,
    Okanovic et al., SMaT, SC 2024), "rcm" (reverse Cuthill-McKee) or "length" (longest first); they are stored as their
    numbers. Buffers are those of `format`, then int32 `row_places` [rows], the output that row i of the stored matrix
    is, and int32 `col_places` [cols], the input that its column i reads. "none" stores nothing.
    """

    format: Format
    row_order: int
    col_order: int

    name: ClassVar[str] = "permuted"

    def __init__(self, format: Format, row_order: str | int = "jaccard", col_order: str | int = "none") -> None:
        if not isinstance(format, Format) or isinstance(format, Permuted) or not format.exact or not format.buffers:
            raise SpecError(f"Permuted: {format!r} is no exact format that can be reordered, such as BSR(16, 16)")
        object.__setattr__(self, "format", format)
        for field, given in (("row_order", row_order), ("col_order", col_order)):
            number = ORDERS.index(given) if given in ORDERS else given
            if type(number) is not int or not 0 <= number < len(ORDERS):
                raise SpecError(f"Permuted: {field}={given!r}; valid: {', '.join(map(repr, ORDERS))}")
            object.__setattr__(self, field, number)

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the format, and the orders there are."""
        orders = (("row_places", self.row_order), ("col_places", self.col_order))
        return (*self.format.buffers, *(key for key, order in orders if order))

    @property
    def blocked(self) -> bool:  # type: ignore[override]
        """As the format inside."""
        return self.format.blocked

    def resolve(self, rows: int, cols: int) -> Permuted:
        return Permuted(self.format.resolve(rows, cols), self.row_order, self.col_order)

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        kept = pattern(dense, mask)
        dense = dense.detach()
        bits, wide = numpy_view(kept), self.format.fields()
        rows = order_of(ORDERS[self.row_order], bits, int(wide.get("c") or 1))
        cols = order_of(ORDERS[self.col_order], bits[rows].T, int(wide.get("r") or 1))
        row_places, col_places = torch.from_numpy(rows).to(dense.device), torch.from_numpy(cols).to(dense.device)
        moved = dense[row_places][:, col_places].contiguous()
        packed = self.format.pack(moved, None if mask is None else kept[row_places][:, col_places].contiguous())
        if self.row_order:
            packed["row_places"] = row_places.int()
        if self.col_order:
            packed["col_places"] = col_places.int()
        return packed

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return self._back(self.format.unpack(self._inner(buffers), rows, cols), buffers)

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return self._back(self.format.positions(self._inner(buffers), rows, cols), buffers)

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        for key, count in (("row_places", rows), ("col_places", cols)):
            if key in buffers:
                _check.buffer(self.name, key, buffers[key], torch.int32, (count,))
                wrong = buffers[key].sort().values != torch.arange(count, device=buffers[key].device)
                if bool(wrong.any()):
                    raise FormatError(f"{self.name}: buffer {key!r} is no order; valid: each of 0 to {count - 1} once")
        self.format.validate(self._inner(buffers), rows, cols)

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        orders = 4 * (rows * bool(self.row_order) + cols * bool(self.col_order))
        return self.format.nbytes(rows, cols, stored, itemsize) + orders

    def stored(self, dense: torch.Tensor) -> int:
        return int(self.pack(dense)["values"].numel())

    def _inner(self, buffers: Buffers) -> Buffers:
        return {key: buffers[key] for key in self.format.buffers}

    def _back(self, moved: torch.Tensor, buffers: Buffers) -> torch.Tensor:
        out = moved
        if self.row_order:
            out = torch.empty_like(moved)
            out[buffers["row_places"].long()] = moved
        if self.col_order:
            wide, out = out, torch.empty_like(out)
            out[:, buffers["col_places"].long()] = wide
        return out
