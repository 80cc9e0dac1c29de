"""Butterfly: n log n products through stages that each mix one digit of the index, fitted one by one."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from string import ascii_lowercase, ascii_uppercase
from typing import ClassVar

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._linalg import truncated_svd
from sparsec.factors._refine import refine
from sparsec.formats import Buffers

_MOST_STAGES = 24  # a letter of each case a stage
_REFINED = 1 << 18  # weights up to this many entries are improved after the closed form
_EXACT = 1e-10


@dataclass(frozen=True)
class Butterfly(Factor):
    """out and in are written in mixed radix digits, `outs` and `ins`; stage l turns digit i_l into o_l.

    Its entries depend on the digits o_1 ... o_l and i_l ... i_k: `stage_l` is (o_1 ... o_{l-1}, o_l, i_l, i_{l+1} ...
    i_k), the first and last axes flattened. 2^k x 2^k with radix 2 is the butterfly of the fast Fourier transform: k
    stages of 2n values. Digits None: the prime factors, merged until out and in have equally many.

    The fit peels stages off: given o_1 and i_2 ... i_k, a butterfly is a matrix of rank 1 in (o_2 ... o_k) and i_1, so
    an exact one is found exactly (Zheng, Riccietti and Gribonval, SIAM J. Math. Data Sci. 2023); small weights are
    improved by alternating least squares.
    """

    outs: tuple[int, ...] | None = None
    ins: tuple[int, ...] | None = None

    name: ClassVar[str] = "butterfly"

    def __post_init__(self) -> None:
        for field in ("outs", "ins"):
            digits = getattr(self, field)
            if digits is not None:
                if not isinstance(digits, (tuple, list)) or not digits:
                    raise SpecError(f"Butterfly: {field}={digits!r} must be a tuple of radices such as (2, 2, 3)")
                object.__setattr__(self, field, tuple(digits))
                positive("Butterfly", **{f"{field}[{i}]": d for i, d in enumerate(digits)})
        if (self.outs is None) != (self.ins is None):
            raise SpecError("Butterfly: give both outs and ins, or neither")
        if self.outs is not None and self.ins is not None and len(self.outs) != len(self.ins):
            raise SpecError(f"Butterfly: {len(self.outs)} outs and {len(self.ins)} ins; every stage needs one of each")

    def resolve(self, shape: Shape) -> Butterfly:
        if self.outs is not None:
            return self
        outs, ins = (_primes(n) for n in matrix_shape(shape))
        stages = min(len(outs), len(ins), _MOST_STAGES)
        return Butterfly(_merged(outs, stages), _merged(ins, stages))

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        outs, ins = self._digits(shape)
        for what, size, digits in zip(("outputs", "inputs"), matrix_shape(shape), (outs, ins)):
            if prod(digits) != size:
                return f"its {size} {what} are not the product of {digits}"
        return f"{len(outs)} stages are more than {_MOST_STAGES}" if len(outs) > _MOST_STAGES else None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        outs, ins = self._digits(shape)
        return {f"stage_{at}": (prod(outs[:at]), outs[at], ins[at], prod(ins[at + 1 :])) for at in range(len(outs))}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        outs, ins = self._digits(shape)
        o, i = ascii_uppercase[: len(outs)], ascii_lowercase[: len(ins)]
        operands = tuple(
            Operand((f"stage_{at}",), o[: at + 1] + i[at:], (*outs[: at + 1], *ins[at:])) for at in range(len(outs))
        )
        return (Contraction(i, o, ins, outs, operands),)

    def solve(self, weight: torch.Tensor) -> Buffers:
        outs, ins = self._digits(tuple(weight.shape))
        rest = weight.reshape(1, prod(outs), prod(ins))  # (o_1 ... o_{l-1}) x (o_l ... o_k) x (i_l ... i_k)
        found: Buffers = {}
        for at in range(len(outs) - 1):
            done, tail, after = rest.shape[0], prod(outs[at + 1 :]), prod(ins[at + 1 :])
            blocks = rest.reshape(done, outs[at], tail, ins[at], after).permute(0, 1, 4, 2, 3)
            left, right = truncated_svd(blocks, 1)  # (done, o_l, after, tail, 1), (done, o_l, after, 1, i_l)
            found[f"stage_{at}"] = right[..., 0, :].permute(0, 1, 3, 2)
            rest = left[..., 0].permute(0, 1, 3, 2).reshape(done * outs[at], tail, after)
        found[f"stage_{len(outs) - 1}"] = rest.reshape(rest.shape[0], outs[-1], ins[-1], 1)
        if weight.numel() <= _REFINED and not self._exact(found, weight):
            found = refine(self, found, weight)
        return found

    def _exact(self, found: Buffers, weight: torch.Tensor) -> bool:
        rest = weight - self.reconstruct(found, tuple(weight.shape))
        return float(rest.norm()) <= _EXACT * float(weight.norm())

    def _digits(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        chosen = self.resolve(shape)
        assert chosen.outs is not None and chosen.ins is not None
        return chosen.outs, chosen.ins


def _primes(n: int) -> list[int]:
    found, d = [], 2
    while d * d <= n:
        while n % d == 0:
            found.append(d)
            n //= d
        d += 1
    return [*found, n] if n > 1 or not found else found


def _merged(digits: list[int], count: int) -> tuple[int, ...]:
    """The two smallest digits merged until `count` are left, largest first."""
    digits = sorted(digits)
    while len(digits) > count:
        digits = sorted([digits[0] * digits[1], *digits[2:]])
    return tuple(reversed(digits))
