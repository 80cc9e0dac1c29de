"""Sum: one format for what lies in its order, a second for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.errors import FormatError, SpecError
from sparsec.formats._base import Buffers, Format

PREFIX = "rest_"


@dataclass(frozen=True)
class Sum(Format):
    """`Sum(BSR(16, 1), CSR())`: `first` stores what its `choose` takes of the weight, `second` what is left.

    Buffers are those of `first`, then those of `second` with `rest_` before their names. No position is stored twice.
    """

    first: Format
    second: Format

    name: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        for part in (self.first, self.second):
            if not isinstance(part, Format) or isinstance(part, Sum) or not part.exact or not part.buffers:
                raise SpecError(f"Sum: {part!r} is no exact format of one kind, such as BSR(16, 1) or CSR()")

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of both parts' buffers."""
        return (*self.first.buffers, *(PREFIX + key for key in self.second.buffers))

    def resolve(self, rows: int, cols: int) -> Sum:
        return Sum(self.first.resolve(rows, cols), self.second.resolve(rows, cols))

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if (reason := super().refuse(dense, mask)) is not None:
            return reason
        kept, mine = self._split(dense, mask)
        for part, share in ((self.first, mine), (self.second, kept & ~mine)):
            if (reason := part.refuse(dense, share)) is not None:
                return f"{part.text()}: {reason}"
        return None

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        dense, _ = self.accept(dense, mask)
        kept, mine = self._split(dense, mask)
        rest = self.second.pack(dense, kept & ~mine)
        return {**self.first.pack(dense, mine), **{PREFIX + key: tensor for key, tensor in rest.items()}}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        first, rest = self.split(buffers)
        a, b = self.first.unpack(first, rows, cols), self.second.unpack(rest, rows, cols)
        return torch.where(b != 0, b, a)

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        first, rest = self.split(buffers)
        return self.first.positions(first, rows, cols) | self.second.positions(rest, rows, cols)

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        first, rest = self.split(buffers)
        if first["values"].dtype != rest["values"].dtype:
            found = rest["values"].dtype
            raise FormatError(f"{self.name}: buffer 'rest_values' has dtype {found}, 'values' {first['values'].dtype}")
        self.first.validate(first, rows, cols)
        try:
            self.second.validate(rest, rows, cols)
        except FormatError as error:
            raise FormatError(f"{self.name}, in the buffers of the rest: {error}") from error
        twice = (self.first.unpack(first, rows, cols) != 0) & (self.second.unpack(rest, rows, cols) != 0)
        if bool(twice.any()):
            place = tuple(int(i) for i in twice.nonzero()[0])
            raise FormatError(f"{self.name}: position {place} is stored by both parts")

    def split(self, buffers: Buffers) -> tuple[Buffers, Buffers]:
        """The buffers of the parts, each under its own names."""
        rest = {key: buffers[PREFIX + key] for key in self.second.buffers}
        return {key: buffers[key] for key in self.first.buffers}, rest

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        """An estimate for `stored` values, all but a tenth of them in `first`; `bytes_of` is exact."""
        return self.bytes_of(rows, cols, stored - stored // 10, stored // 10, itemsize)

    def bytes_of(self, rows: int, cols: int, first: int, second: int, itemsize: int) -> int:
        """Exact bytes of `first` and `second` values stored by the parts."""
        return self.first.nbytes(rows, cols, first, itemsize) + self.second.nbytes(rows, cols, second, itemsize)

    def stored(self, dense: torch.Tensor) -> int:
        packed = self.pack(dense)
        return packed["values"].numel() + packed[PREFIX + "values"].numel()

    def _split(self, dense: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What is stored at all, and what of it by `first`."""
        from sparsec.formats._base import pattern

        kept = pattern(dense, mask)
        seen = dense if mask is None else torch.where(kept, torch.where(dense == 0, 1.0, dense).to(dense.dtype), 0)
        return kept, self.first.choose(seen) & kept
