"""Pairs: neighbouring inputs two at a time in one 32-bit entry, what the dot products of bfloat16 pairs multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats._base import Buffers, Format
from sparsec.formats._pack import numpy_view
from sparsec.formats.csr_groups import MAX_BLOCK, CSRGroups

PAIR = 2  # inputs that a lane of the dot product takes


@dataclass(frozen=True)
class Pairs(Format):
    """An aligned pair of inputs of a row is stored whole when either of the two is; bfloat16 only.

    Buffers: those of `format`, grouped CSR, over the (rows, ceil(cols / 2)) matrix of pairs, but `values` bfloat16, two
    for each of its values: the lower input of a pair first. A missing half is a zero that counts as stored: it
    multiplies the activation in its place. Of the last pair of an odd row the second half is zero, and so is its
    activation. `format` None takes CSRGroups(255).
    """

    format: Format | None = None

    name: ClassVar[str] = "pairs"
    buffers: ClassVar[tuple[str, ...]] = CSRGroups.buffers
    blocked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.format is not None and not isinstance(self.format, CSRGroups):
            raise SpecError(f"Pairs: pairs are stored by CSRGroups (or None), not by {self.format!r}")

    def resolve(self, rows: int, cols: int) -> Pairs:
        return Pairs(self._inner(rows, cols))

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        return None if dense.dtype == torch.bfloat16 else f"pairs are of torch.bfloat16, not of {dense.dtype}"

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, kept = self.accept(dense, mask)
        pairs = _joined(torch.where(kept, dense, torch.zeros_like(dense)))
        inner = self._inner(*dense.shape).pack(pairs, _either(kept))
        return {**inner, "values": _split(inner["values"])}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return self._halves(buffers, rows, cols)[:, :cols].contiguous()

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        pairs = self._inner(rows, cols).positions(_as_pairs(buffers), rows, -(-cols // PAIR))
        return pairs.repeat_interleave(PAIR, dim=1)[:, :cols]

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        values = buffers["values"]
        if values.dtype != torch.bfloat16:
            raise FormatError(f"{self.name}: buffer 'values' has dtype {values.dtype}; valid: torch.bfloat16")
        if values.dim() != 1 or values.numel() % PAIR:
            raise FormatError(
                f"{self.name}: buffer 'values' has shape {tuple(values.shape)}, expected whole pairs in one dimension"
            )
        self._inner(rows, cols).validate(_as_pairs(buffers), rows, -(-cols // PAIR))
        if cols % PAIR:
            behind = numpy_view(self._halves(buffers, rows, cols)[:, cols])
            if behind.any():
                row = int(np.flatnonzero(behind)[0])
                raise FormatError(f"{self.name}: buffer 'values' holds a value behind the last input of row {row}")

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """As the format inside, for `stored` values, two to a pair."""
        return self._inner(rows, cols).nbytes(rows, -(-cols // PAIR), -(-stored // PAIR), PAIR * itemsize)

    def stored(self, dense: torch.Tensor) -> int:
        return PAIR * self._inner(*dense.shape).stored(_either(dense != 0).float())

    def _inner(self, rows: int, cols: int) -> Format:
        wide = -(-cols // PAIR)
        return (self.format or CSRGroups(max(1, min(MAX_BLOCK, wide)))).resolve(rows, wide)

    def _halves(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        """The matrix (rows, cols rounded up to whole pairs)."""
        return _split(self._inner(rows, cols).unpack(_as_pairs(buffers), rows, -(-cols // PAIR)))


def _either(kept: torch.Tensor) -> torch.Tensor:
    """Which pairs of a bool (rows, cols) pattern have a member in it."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % PAIR))
    return padded.reshape(kept.shape[0], padded.shape[1] // PAIR, PAIR).any(2)


def _joined(halves: torch.Tensor) -> torch.Tensor:
    """Bits of bfloat16 (..., n) as float32 (..., ceil(n / 2)), the even ones in the low half; by numpy, which copies
    the bits of NaN as they are."""
    padded = torch.nn.functional.pad(halves, (0, -halves.shape[-1] % PAIR))
    bits = np.ascontiguousarray(numpy_view(padded))
    shape = (*bits.shape[:-1], bits.shape[-1] // PAIR)
    return torch.from_numpy(np.frombuffer(bits.tobytes(), np.float32).reshape(shape).copy()).to(halves.device)


def _split(pairs: torch.Tensor) -> torch.Tensor:
    """The inverse of `_joined`, for an even n."""
    bits = np.ascontiguousarray(pairs.cpu().numpy())
    halves = np.frombuffer(bits.tobytes(), np.int16).reshape(*bits.shape[:-1], bits.shape[-1] * PAIR).copy()
    return torch.from_numpy(halves).view(torch.bfloat16).to(pairs.device)


def _as_pairs(buffers: Buffers) -> Buffers:
    return {**buffers, "values": _joined(buffers["values"])}
