"""Dictionary: every output is a combination of few atoms, which all outputs share (CoSpaDi)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.errors import FormatError
from sparsec.factors._base import Factor, Shape, matrix_shape, positive
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._ksvd import ksvd
from sparsec.factors._linalg import whitening
from sparsec.factors.sparse import buffer_shapes
from sparsec.formats import Bitmask, Buffers, FanIn, Format


@dataclass(frozen=True)
class Dictionary(Factor):
    """W (out, in) = codes (out, atoms) atoms (atoms, in), with `nonzeros` values in every row of codes.

    y = (x atoms^T) codes^T: a dense product, then a sparse one of constant fan-in. The buffers are `atoms` and those of
    the codes, with column numbers (FanIn) or masks (Bitmask), whichever takes fewer bytes. The fit is K-SVD with
    orthogonal matching pursuit; with a Gram matrix G = L L^T it runs on W L and takes the root off the atoms, so that
    the error on the layer's outputs is minimised (CoSpaDi, Shopkhoev et al., 2025).
    """

    atoms: int
    nonzeros: int

    name: ClassVar[str] = "dictionary"

    def __post_init__(self) -> None:
        positive("Dictionary", atoms=self.atoms, nonzeros=self.nonzeros)

    def refuse(self, shape: Shape) -> str | None:
        if (reason := super().refuse(shape)) is not None:
            return reason
        if self.nonzeros > self.atoms:
            return f"nonzeros={self.nonzeros} is more than the {self.atoms} atoms"
        return None

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        out, width = matrix_shape(shape)
        return {"atoms": (self.atoms, width), **dict(buffer_shapes(self._codes(out), *self._sizes(out)))}

    def contract(self, shape: Shape) -> tuple[Contraction, ...]:
        out, width = matrix_shape(shape)
        atoms = Operand(("atoms",), "ai", (self.atoms, width))
        fmt = self._codes(out)
        codes = Operand(fmt.buffers, "oa", (out, self.atoms), fmt, out * self.nonzeros)
        return (Contraction("i", "o", (width,), (out,), (atoms, codes)),)

    def nbytes(self, shape: Shape, itemsize: int) -> int:
        out, width = matrix_shape(shape)
        stored = out * self.nonzeros
        return self.atoms * width * itemsize + self._codes(out).nbytes(out, self.atoms, stored, itemsize)

    def validate(self, buffers: Buffers, shape: Shape) -> None:
        expected = self.shapes(shape)
        if tuple(buffers) != tuple(expected):
            raise FormatError(f"{self.name}: buffers are {tuple(buffers)}, expected {tuple(expected)} in this order")
        if tuple(buffers["atoms"].shape) != expected["atoms"]:
            found = tuple(buffers["atoms"].shape)
            raise FormatError(f"{self.name}: buffer 'atoms' has shape {found}, expected {expected['atoms']}")
        self._check_buffer("atoms", buffers["atoms"], buffers["values"])
        fmt = self._codes(shape[0])
        fmt.validate({k: buffers[k] for k in fmt.buffers}, shape[0], self.atoms)
        if buffers["values"].numel() != shape[0] * self.nonzeros:
            count = buffers["values"].numel()
            raise FormatError(f"{self.name}: {count} values of codes, expected {self.nonzeros} for each output")

    def accept(self, dense: torch.Tensor) -> torch.Tensor:
        if dense.is_complex():
            raise FormatError(f"{self.text()} cannot hold a {dense.dtype} weight: formats store real values")
        return super().accept(dense)

    def solve(self, weight: torch.Tensor) -> Buffers:
        codes, atoms, _ = ksvd(weight.flatten(1), self.atoms, self.nonzeros)
        return self._packed(codes, atoms)

    def solve_gram(self, weight: torch.Tensor, gram: torch.Tensor) -> Buffers:
        root = whitening(gram)
        if root is None:
            return self.solve(weight)
        codes, atoms, _ = ksvd(weight.flatten(1) @ root, self.atoms, self.nonzeros)
        return self._packed(codes, torch.linalg.solve_triangular(root, atoms, upper=False, left=False))

    def _packed(self, codes: torch.Tensor, atoms: torch.Tensor) -> Buffers:
        order = torch.argsort(codes.abs(), dim=1, descending=True, stable=True)[:, : self.nonzeros]
        mask = torch.zeros(codes.shape, dtype=torch.bool).scatter_(1, order, True)
        return {"atoms": atoms, **self._codes(codes.shape[0]).pack(codes, mask)}

    def _sizes(self, out: int) -> tuple[int, int, int]:
        """Stored values, rows and columns of the codes."""
        return out * self.nonzeros, out, self.atoms

    def _codes(self, out: int) -> Format:
        """The smaller way to say where the values are; of as many bytes, column numbers."""
        stored, _, atoms = self._sizes(out)
        ways: tuple[Format, ...] = FanIn(self.nonzeros).resolve(out, atoms), Bitmask().resolve(out, atoms)
        return min(ways, key=lambda fmt: fmt.nbytes(out, atoms, stored, 0))
