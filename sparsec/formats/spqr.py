"""SpQR: 3 bits for every value, CSR for the few that 3 bits serve badly (Dettmers et al., SpQR, ICLR 2024). Lossy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats import _check
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import numpy_view, pointers_of
from sparsec.formats._quant import GROUP, dequantise, pack_bits, quantise, unpack_bits

BITS = 3


@dataclass(frozen=True)
class SpQR(Format):
    """Every aligned group of 16 inputs quantised to 3 bits, `permille` thousandths of all entries kept as they are.

    Outliers are the entries that a first quantisation misses most; scales are fitted again without them. Buffers:
    `values` [outliers] and `indices` int32 [outliers], their columns; `pointers` int32 [rows + 1]; `scales`
    [rows, groups, 2], scale and minimum in the dtype of `values`; `codes` int16 [rows, groups, 3], 16 codes of 3 bits.
    An outlier replaces the value of its code.
    """

    permille: int = 10

    name: ClassVar[str] = "spqr"
    buffers: ClassVar[tuple[str, ...]] = ("values", "indices", "pointers", "scales", "codes")
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self.permille) is not int or not 0 <= self.permille <= 500:
            raise SpecError(f"SpQR: permille={self.permille!r} is not an integer from 0 to 500")

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
        source = torch.where(kept, dense, torch.zeros_like(dense)).cpu()
        groups = torch.nn.functional.pad(source, (0, -cols % GROUP)).reshape(-1, GROUP)
        real = torch.nn.functional.pad(torch.ones(rows, cols, dtype=torch.bool), (0, -cols % GROUP)).reshape(-1, GROUP)
        missed = (dequantise(*quantise(groups, real, BITS)).double() - groups.double()).abs()
        missed[~real] = -1.0  # padding is never an outlier, not even where nothing is missed
        outliers = torch.zeros_like(real)
        count = rows * cols * self.permille // 1000
        outliers.view(-1)[missed.view(-1).topk(count).indices] = True
        scales, codes = quantise(groups, real & ~outliers, BITS)
        flags = outliers.reshape(rows, -1)[:, :cols]
        packed = {
            "values": source[flags], "indices": flags.nonzero()[:, 1].int(),
            "pointers": pointers_of(np.count_nonzero(flags.numpy(), axis=1)),
            "scales": scales.reshape(rows, -1, 2), "codes": pack_bits(codes, BITS).reshape(rows, -1, BITS),
        }  # fmt: skip
        return {key: tensor.contiguous().to(dense.device) for key, tensor in packed.items()}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        codes = unpack_bits(buffers["codes"].reshape(-1, BITS), BITS)
        dense = dequantise(buffers["scales"].cpu().reshape(-1, 2), codes).reshape(rows, -1)[:, :cols].contiguous()
        row = torch.arange(rows).repeat_interleave(buffers["pointers"].cpu().diff().long())
        dense[row, buffers["indices"].cpu().long()] = buffers["values"].cpu()
        return dense.to(buffers["values"].device)

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return torch.ones(rows, cols, dtype=torch.bool, device=buffers["values"].device)

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values, wide = buffers["values"], -(-cols // GROUP)
        _check.value_dtype(self.name, values, 1)
        _check.buffer(self.name, "indices", buffers["indices"], torch.int32, tuple(values.shape))
        ends = _check.pointers(self.name, buffers["pointers"], rows, values.numel())
        indices = numpy_view(buffers["indices"])
        _check.ascending(self.name, indices, ends, "row")
        _check.segment_ranges(self.name, indices, ends, np.zeros(rows, np.int64), np.full(rows, cols, np.int64))
        _check.buffer(self.name, "scales", buffers["scales"], values.dtype, (rows, wide, 2))
        _check.buffer(self.name, "codes", buffers["codes"], torch.int16, (rows, wide, BITS))
        if not bool(torch.isfinite(buffers["scales"]).all()):
            raise FormatError(f"{self.name}: buffer 'scales' holds a scale or minimum that is not finite")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        outliers = rows * cols * self.permille // 1000
        groups = rows * -(-cols // GROUP)
        return outliers * (itemsize + 4) + 4 * (rows + 1) + groups * (2 * itemsize + 2 * BITS)

    def stored(self, dense: torch.Tensor) -> int:
        return dense.numel()
