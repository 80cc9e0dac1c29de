"""FactoredBatch: fitted factors as the storage of a batch of matrices, for products x[b] W[b]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsec.errors import FormatError
from sparsec.factors._base import Shape
from sparsec.factors.chain import Factored
from sparsec.factors.stored import Stored
from sparsec.formats import Buffers


@dataclass(frozen=True)
class FactoredBatch(Stored):
    """A weight (batch, in, out), each of whose matrices is, transposed, a `factor` of (out, in).

    The buffers are those of `Factored`, one behind the other along a first axis. `tiled` as there.
    """

    weight: Shape
    tiled: int = 1

    name: ClassVar[str] = "factored_batch"

    @property
    def each(self) -> Factored:
        """The storage of one matrix."""
        out, width = self.seen
        return Factored(self.factor, out, width, self.tiled)

    @property
    def seen(self) -> Shape:
        return self.weight[2], self.weight[1]

    @property
    def features(self) -> Shape:
        return self.seen

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the factor
        return self.each.buffers

    def sizes(self) -> tuple[int, ...]:
        return (*self.weight, self.tiled if self.tiled in (0, 1) else -1) if len(self.weight) == 3 else (-1,)

    def parts(self, dense: torch.Tensor) -> list[torch.Tensor]:
        return [part.t().contiguous() for part in dense.reshape(self.weight)]

    def fit(self, dense: torch.Tensor, gram: torch.Tensor | None = None) -> Buffers:
        """`gram` is (batch, in, in). Raises FormatError where the matrices store different numbers of values."""
        parts = self.parts(dense)
        grams = [None] * len(parts) if gram is None else list(gram)
        each = self.each
        found = [each.store(self.factor.fit(w, g).buffers) for w, g in zip(parts, grams, strict=True)]
        for key in self.buffers:
            if len({t[key].shape for t in found}) > 1:
                raise FormatError(f"{self.text()}: the matrices store different numbers of values in {key!r}")
        return {key: torch.stack([t[key] for t in found]) for key in self.buffers}

    def matrix(self, buffers: Buffers, at: int) -> Buffers:
        """The buffers of one matrix."""
        return {key: tensor[at] for key, tensor in buffers.items()}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        each = self.each
        found = [each.unpack(self.matrix(buffers, at), *self.seen).t() for at in range(self.weight[0])]
        return torch.stack(found).reshape(rows, cols)

    def products(self, x: torch.Tensor, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor, int]:
        """As `Factored.products`, for x (batch, n, in): (batch * n, out)."""
        found = [self.each.products(part, self.matrix(buffers, at)) for at, part in enumerate(x)]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]), found[0][2]

    def check(self, buffers: Buffers) -> None:
        for key, tensor in buffers.items():
            if tensor.shape[:1] != self.weight[:1]:
                raise FormatError(f"{self.name}: buffer {key!r} has not {self.weight[0]} matrices")
        for at in range(self.weight[0]):
            self.each.check(self.matrix(buffers, at))

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return self.weight[0] * self.each.nbytes(self.weight[2], self.weight[1], stored, itemsize)

    def fields(self) -> dict[str, Any]:
        return self.each.fields()
