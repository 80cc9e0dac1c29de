"""GroupInt4: groups of 16 inputs that survive, quantised to 4 bits (Zeng et al., GQSA, 2024). Lossy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import numpy_view, pointers_of
from sparsec.formats._quant import GROUP, dequantise, pack_bits, quantise, unpack_bits

BITS = 4


@dataclass(frozen=True)
class GroupInt4(Format):
    """Aligned groups of 16 inputs of a row, stored when any entry is nonzero: w = scale * code + minimum.

    Buffers: `values` [groups, 2], scale and minimum; `codes` int16 [groups, 4], 16 codes of 4 bits, lowest first;
    `indices` int32 [groups], the number of the group in its row; `pointers` int32 [rows + 1]. A stored group counts
    as stored as a whole, and its zeros become the nearest code.
    """

    name: ClassVar[str] = "group_int4"
    buffers: ClassVar[tuple[str, ...]] = ("values", "codes", "indices", "pointers")
    blocked: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        if dense.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype {dense.dtype} is not quantised; valid: float32, float16, bfloat16"
        if not bool(torch.isfinite(dense).all()):
            return "it holds infinite or NaN values, which no code stands for"
        return None

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        rows, cols = int(dense.shape[0]), int(dense.shape[1])
        source = torch.nn.functional.pad(torch.where(kept, dense, torch.zeros_like(dense)), (0, -cols % GROUP))
        groups = source.reshape(rows, -1, GROUP).cpu()
        row, group = (groups != 0).any(2).nonzero(as_tuple=True)
        real = (group[:, None] * GROUP + torch.arange(GROUP)) < cols
        parameters, codes = quantise(groups[row, group], real, BITS)
        counts = np.bincount(row.numpy(), minlength=rows).astype(np.int64)
        packed = {
            "values": parameters, "codes": pack_bits(codes, BITS), "indices": group.int(),
            "pointers": pointers_of(counts),
        }  # fmt: skip
        return {key: tensor.contiguous().to(dense.device) for key, tensor in packed.items()}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        values = dequantise(buffers["values"].cpu(), unpack_bits(buffers["codes"], BITS))
        return self._spread(buffers, values, rows, cols).to(buffers["values"].device)

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        ones = torch.ones(buffers["indices"].numel(), GROUP, dtype=torch.bool)
        return self._spread(buffers, ones, rows, cols).to(buffers["values"].device)

    def _spread(self, buffers: Buffers, groups: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        out = groups.new_zeros(rows, -(-cols // GROUP), GROUP)
        counts = buffers["pointers"].cpu().diff().long()
        out[torch.arange(rows).repeat_interleave(counts), buffers["indices"].cpu().long()] = groups
        return out.reshape(rows, out.shape[1] * GROUP)[:, :cols].contiguous()

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, count = buffers["values"], buffers["values"].shape[0]
        _check.value_dtype(self.name, values, 2)
        _check.buffer(self.name, "values", values, values.dtype, (count, 2))
        _check.buffer(self.name, "codes", buffers["codes"], torch.int16, (count, BITS))
        _check.buffer(self.name, "indices", buffers["indices"], torch.int32, (count,))
        ends = _check.pointers(self.name, buffers["pointers"], rows, count)
        indices, wide = numpy_view(buffers["indices"]), -(-cols // GROUP)
        _check.ascending(self.name, indices, ends, "row")
        _check.segment_ranges(self.name, indices, ends, np.zeros(rows, np.int64), np.full(rows, wide, np.int64))
        if not bool(torch.isfinite(values).all()):
            raise FormatError(f"{self.name}: buffer 'values' holds a scale or minimum that is not finite")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return stored // GROUP * (2 * itemsize + 2 * BITS + 4) + 4 * (rows + 1)

    def stored(self, dense: torch.Tensor) -> int:
        padded = torch.nn.functional.pad(dense != 0, (0, -dense.shape[1] % GROUP))
        return int(padded.reshape(dense.shape[0], -1, GROUP).any(2).sum()) * GROUP
