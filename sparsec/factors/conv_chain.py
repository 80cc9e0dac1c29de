"""FactoredConv: a fitted factor as the storage of a convolution's weight, for chains of small convolutions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import torch

from sparsec.errors import FormatError, SpecError
from sparsec.factors._base import Factor, Shape
from sparsec.factors.conv_steps import ConvChain, chains_of, depth, run_chains
from sparsec.formats import Buffers, Format

_TEXT = re.compile(r"factored_conv\(factor=(.+),weight=\(([0-9]{1,10}(?:,[0-9]{1,10}){2,4})\)\)")


@dataclass(frozen=True)
class FactoredConv(Format):
    """The weight (out, in, *kernel) of a convolution held as `factor`, which is resolved; its buffers are the factor's.

    As a matrix it is (out, in * prod(kernel)), as all convolution weights are packed. Not a format of a Spec:
    `passes.factor` makes it for the factors in one.
    """

    factor: Factor
    weight: Shape

    name: ClassVar[str] = "factored_conv"
    exact: ClassVar[bool] = False

    @property
    def shape(self) -> Shape:
        """Of the matrix."""
        return self.weight[0], prod(self.weight[1:])

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the factor
        return tuple(self.factor.shapes(self.weight))

    @property
    def chains(self) -> tuple[ConvChain, ...]:
        """The convolutions to run; SpecError where the factor is no chain of them."""
        return _chains(self)

    def refuse(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
        if tuple(dense.shape) != self.shape:
            return f"it has shape {tuple(dense.shape)}, {self.text()} is for {self.shape}"
        try:
            self.factor.accept(dense.reshape(self.weight))
        except FormatError as error:
            return str(error)
        return None

    def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> Buffers:
        """Fit the factor to the matrix `dense`; a lossy step. Raises FormatError when the factor refuses."""
        if mask is not None:
            raise FormatError(f"{self.text()} has no pattern: leave the mask out")
        if (reason := self.refuse(dense)) is not None:
            raise FormatError(reason)
        return self.store(self.factor.fit(dense.reshape(self.weight)).buffers)

    def store(self, fitted: Buffers) -> Buffers:
        """The buffers of a fit, as this format keeps them."""
        return {key: fitted[key] for key in self.buffers}

    def unpack(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        wide = {key: t.double() if t.is_floating_point() else t for key, t in buffers.items()}
        dtype = buffers[self.buffers[0]].dtype
        return self.factor.reconstruct(wide, self.weight).reshape(rows, cols).to(dtype)

    def products(self, x: torch.Tensor, buffers: Buffers, walk: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The chain on images x (batch, in, *size), padded already, in float64: (batch * pixels, out); the same of
        absolute operands; and how many sums it rounds like, as `Factored.products` has it."""
        wide = {key: t.double() if t.is_floating_point() else t for key, t in buffers.items()}
        clean = torch.where(torch.isfinite(x), x, torch.zeros((), dtype=x.dtype)).double().abs()
        exact, size = (
            run_chains(self.chains, given, wide, walk, absolute).movedim(1, -1).flatten(0, -2)
            for given, absolute in ((x.double(), False), (clean, True))
        )
        return exact, size, int(((depth(self.chains) - 8) / 2) ** 2) + 1

    def positions(self, buffers: Buffers, rows: int, cols: int) -> torch.Tensor:
        return torch.ones(rows, cols, dtype=torch.bool)

    def validate(self, buffers: Buffers, rows: int, cols: int) -> None:
        self.check_names(buffers)
        if (rows, cols) != self.shape:
            raise FormatError(f"{self.text()} holds a weight of {self.shape}, not of {(rows, cols)}")
        self.factor.validate(buffers, self.weight)

    def nbytes(self, rows: int, cols: int, stored: int, itemsize: int) -> int:
        return self.factor.nbytes(self.weight, itemsize)

    def stored(self, dense: torch.Tensor) -> int:
        return self.factor.nbytes(self.weight, 1)

    def fields(self) -> dict[str, Any]:
        """Nothing: its kernels read the factor itself."""
        return {}

    def resolve(self, rows: int, cols: int) -> FactoredConv:
        return self

    def text(self) -> str:
        return f"{self.name}(factor={self.factor.text()},weight=({','.join(map(str, self.weight))}))"

    @classmethod
    def parse(cls, text: str) -> FactoredConv:
        """The inverse of `text`. Raises SpecError."""
        from sparsec.factors import parse

        found = _TEXT.fullmatch(text)
        if found is None:
            raise SpecError(f"not the text of a factored convolution: {text[:120]!r}")
        made = cls(parse(found[1]), tuple(int(n) for n in found[2].split(",")))
        refusal = made.factor.refuse(made.weight)
        if refusal or made.factor.resolve(made.weight) != made.factor or made.text() != text:
            raise SpecError(f"not the text of a factored convolution: {text[:120]!r} {refusal or 'has open fields'}")
        return made


@lru_cache(maxsize=256)
def _chains(fmt: FactoredConv) -> tuple[ConvChain, ...]:
    return chains_of(fmt.factor, fmt.weight)
