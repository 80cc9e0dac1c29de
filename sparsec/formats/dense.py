"""Dense: every entry, as torch stores it. The baseline format, and the one a spec names to leave a site alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format


@dataclass(frozen=True)
class Dense(Format):
    """`values` [rows, cols], row-major."""

    name: ClassVar[str] = "dense"
    buffers: ClassVar[tuple[str, ...]] = ("values",)
    regular: ClassVar[bool] = True
    ordered: ClassVar[bool] = True

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        return {"values": dense.clone() if mask is None else torch.where(kept, dense, torch.zeros_like(dense))}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return buffers["values"].detach().reshape(rows, cols).clone()

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        _check.value_dtype(self.name, buffers["values"], 2)
        _check.buffer(self.name, "values", buffers["values"], buffers["values"].dtype, (rows, cols))

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return stored * itemsize

    def stored(self, dense: torch.Tensor) -> int:
        return dense.numel()
