"""FactoredConv: a fitted factor as the storage of a convolution's weight, for chains of small convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from sparsec.factors._base import Shape
from sparsec.factors.conv_steps import ConvChain, chains_of, depth, run_chains
from sparsec.factors.stored import Stored, sums, widened
from sparsec.formats import Buffers


@dataclass(frozen=True)
class FactoredConv(Stored):
    """The weight (out, in, *kernel) of a convolution; the buffers are the factor's."""

    weight: Shape

    name: ClassVar[str] = "factored_conv"

    @property
    def chains(self) -> tuple[ConvChain, ...]:
        """The convolutions to run; SpecError where the factor is no chain of them."""
        return _chains(self)

    def sizes(self) -> tuple[int, ...]:
        return self.weight if 3 <= len(self.weight) <= 5 else (-1,)

    def products(self, x: torch.Tensor, buffers: Buffers, walk: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The chain on images x (batch, in, *size), padded already, in float64: (batch * pixels, out); the same of
        absolute operands; and how many sums it rounds like, as `Factored.products` has it."""
        wide = widened(buffers)
        clean = torch.where(torch.isfinite(x), x, torch.zeros((), dtype=x.dtype)).double().abs()
        exact, size = (
            run_chains(self.chains, given, wide, walk, absolute).movedim(1, -1).flatten(0, -2)
            for given, absolute in ((x.double(), False), (clean, True))
        )
        return exact, size, sums(depth(self.chains))


@lru_cache(maxsize=256)
def _chains(fmt: FactoredConv) -> tuple[ConvChain, ...]:
    return chains_of(fmt.factor, fmt.weight)
