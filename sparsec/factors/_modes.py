"""The tensor that a weight is to the tensor factorisations: digits of out, digits of in, window positions."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Shape, positive

OUT_LETTERS = "ABCDEFGH"
IN_LETTERS = "abcdefgh"
KERNEL_LETTERS = "uvw"
RANK_LETTERS = "ijklmnopqrst"
_LOPSIDED = 8  # a pair of digits further apart than this is worth less than none


@dataclass(frozen=True)
class Modes:
    """Sizes of the modes of a weight's tensor, in the order outs, ins, kernel."""

    outs: Shape
    ins: Shape
    kernel: Shape

    @property
    def sizes(self) -> Shape:
        """All of them."""
        return self.outs + self.ins + self.kernel

    @property
    def letters(self) -> str:
        """A letter for each mode."""
        return self.out_letters + self.in_letters

    @property
    def out_letters(self) -> str:
        """Letters of the outputs."""
        return OUT_LETTERS[: len(self.outs)]

    @property
    def in_letters(self) -> str:
        """Letters of the inputs, the window's last."""
        return IN_LETTERS[: len(self.ins)] + self.kernel_letters

    @property
    def kernel_letters(self) -> str:
        """Letters of the window."""
        return KERNEL_LETTERS[: len(self.kernel)]

    def tensor(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as a tensor of these modes."""
        return weight.reshape(self.sizes)


def modes(shape: Shape, outs: Shape | None, ins: Shape | None) -> Modes:
    """The modes of a weight of this shape; digits None: a balanced pair for a matrix, one digit for a convolution."""
    single = len(shape) > 2
    return Modes(
        outs if outs is not None else ((shape[0],) if single else balanced(shape[0])),
        ins if ins is not None else ((shape[1],) if single else balanced(shape[1])),
        tuple(shape[2:]),
    )


def balanced(size: int) -> Shape:
    """The most even pair of factors, larger first, or the size alone where the pair would be lopsided."""
    low = next(d for d in range(isqrt(size), 0, -1) if size % d == 0)
    return (size // low, low) if low > 1 and size // low <= _LOPSIDED * low else (size,)


def check_digits(owner: str, **digits: Any) -> dict[str, Shape | None]:
    """The digit fields as tuples. Raises SpecError unless each is None or positive integers."""
    found: dict[str, Shape | None] = {}
    for field, value in digits.items():
        if value is not None:
            if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= len(OUT_LETTERS):
                raise SpecError(f"{owner}: {field}={value!r} must be a tuple of 1 to {len(OUT_LETTERS)} sizes, or None")
            positive(owner, **{f"{field}[{i}]": d for i, d in enumerate(value)})
        found[field] = None if value is None else tuple(value)
    return found


def check_ranks(owner: str, ranks: Any) -> int | Shape:
    """A rank for all, or a tuple of ranks. Raises SpecError for anything else."""
    if isinstance(ranks, (tuple, list)):
        if not ranks:
            raise SpecError(f"{owner}: ranks={ranks!r} is empty; give an int for all modes or a tuple")
        positive(owner, **{f"ranks[{i}]": r for i, r in enumerate(ranks)})
        return tuple(ranks)
    positive(owner, ranks=ranks)
    return int(ranks)


def refuse_modes(shape: Shape, grid: Modes) -> str | None:
    """Why the digits do not fit the shape."""
    if len(shape) > 2 + len(KERNEL_LETTERS):
        return f"{shape} has more than {len(KERNEL_LETTERS)} window dimensions"
    for what, size, digits in (("outputs", shape[0], grid.outs), ("inputs", shape[1], grid.ins)):
        if prod(digits) != size:
            return f"its {size} {what} are not the product of {digits}"
    return None
