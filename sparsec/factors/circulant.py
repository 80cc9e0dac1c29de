"""Circulant: blocks that are circular convolutions, multiplied through short Fourier transforms."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import torch

from sparsec.errors import InputError
from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.formats import Buffers


@dataclass(frozen=True)
class CirculantOperand(Operand):
    """The dense (p, q, b, b) tensor C[p, q, i, j] = columns[p, q, (i - j) mod b] that stands for first columns."""

    def dense(self, buffers: Buffers) -> torch.Tensor:
        columns = buffers[self.names[0]]
        b = columns.shape[-1]
        turn = (torch.arange(b)[:, None] - torch.arange(b)[None, :]) % b
        return columns[..., turn.to(columns.device)]


@dataclass(frozen=True)
class Circulant(Factor):
    """W[(p, i), (q, j)] = columns[p, q, (i - j) mod block]: block x block circulant blocks, one for a circulant weight.

    A block is diagonal in the Fourier basis, so y = ifft(sum_q fft(columns)[p, q] fft(x)[q]): in + out short transforms
    and out * in / block complex products (Ding et al., CirCNN, MICRO 2017). The best fit is the mean along each
    circulant diagonal.
    """

    block: int

    name: ClassVar[str] = "circulant"

    def __post_init__(self) -> None:
        positive("Circulant", block=self.block)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        for what, size in zip(("outputs", "inputs"), matrix_shape(shape)):
            if size % self.block:
                return f"its {size} {what} do not divide into blocks of {self.block}"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        out, width = matrix_shape(shape)
        return {"columns": (out // self.block, width // self.block, self.block)}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        p, q, b = self.shapes(shape)["columns"]
        operand = CirculantOperand(("columns",), "pqij", (p, q, b, b))
        return (Contraction("qj", "pi", (q, b), (p, b), (operand,)),)

    def apply(self, x: torch.Tensor, buffers: Buffers, shape: Shape) -> torch.Tensor:
        p, q, b = self.shapes(shape)["columns"]
        if not x.dim() or x.shape[-1] != q * b:
            raise InputError(f"x has shape {tuple(x.shape)}, expected (..., {q * b}) for a {shape} weight")
        columns, rows = buffers["columns"], x.reshape(-1, q, b)
        whole = columns.is_complex() or rows.is_complex()
        forward, back = (torch.fft.fft, torch.fft.ifft) if whole else (torch.fft.rfft, torch.fft.irfft)
        product = torch.einsum("zqf,pqf->zpf", forward(rows), forward(columns))
        found: torch.Tensor = back(product, n=b)
        return found.reshape(*x.shape[:-1], p * b)

    def flops(self, shape: Shape, batch: int) -> int:
        """Of the Fourier form on real x: 2.5 b log2 b a real transform, 8 a complex product that is summed.

        The transforms of the columns are constants and not counted.
        """
        p, q, b = self.shapes(shape)["columns"]
        return batch * (round((p + q) * 2.5 * b * log2(b)) + 8 * p * q * (b // 2 + 1))

    def solve(self, weight: torch.Tensor) -> Buffers:
        p, q, b = self.shapes(tuple(weight.shape))["columns"]
        blocks = weight.reshape(p, b, q, b).permute(0, 2, 1, 3)  # (p, q, i, j)
        i = (torch.arange(b)[:, None] + torch.arange(b)[None, :]) % b  # row k + j of column j lies on diagonal k
        j = torch.arange(b).expand(b, b)
        return {"columns": blocks[:, :, i, j].mean(dim=3)}
