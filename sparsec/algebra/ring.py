"""Exact arithmetic to prove rules in: integers modulo a prime, with a number-theoretic Fourier transform.

A polynomial identity of low degree that fails, fails for random elements of GF(2^31 - 1) with probability at least
1 - degree / 2^31 (Schwartz and Zippel). GF(2013265921) has roots of unity of every order 2^a 3^b 5^c that divides
p - 1 = 15 * 2^27, so transforms are exact there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsec.errors import InputError

MERSENNE = 2**31 - 1
FOURIER = 15 * 2**27 + 1
GENERATOR = 31  # of the multiplicative group modulo FOURIER


@dataclass(frozen=True)
class Ring:
    """Numbers that terms are evaluated in: GF(prime) on int64 tensors, or float64 when `prime` is 0."""

    prime: int = MERSENNE

    @property
    def exact(self) -> bool:
        return self.prime > 0

    def random(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Uniform elements, or standard normal numbers."""
        if not self.exact:
            return torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
        return torch.randint(0, self.prime, tuple(shape), generator=generator)

    def wrap(self, x: torch.Tensor) -> torch.Tensor:
        """A sum or product of two elements, reduced."""
        return x % self.prime if self.exact else x

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.wrap(a + b)

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Elementwise: products of residues below 2^31 fit into 62 bits."""
        return self.wrap(a * b)

    def sum(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Sum of one axis; 2^32 residues fit."""
        return self.wrap(x.sum(dim))

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(..., m, k) by (..., k, n)."""
        if not self.exact:
            return a @ b
        return self.sum(self.mul(a[..., :, :, None], b[..., None, :, :]), -2)

    def dft(self, x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """The transform of the last axis, by its definition. In float64 its values are complex, the inverse's real."""
        n = x.shape[-1]
        if not self.exact:
            return torch.fft.ifft(x).real if inverse else torch.fft.fft(x)  # type: ignore[no-any-return]
        if self.prime != FOURIER or (self.prime - 1) % n:
            raise InputError(f"GF({self.prime}) has no root of unity of order {n}")
        root = pow(GENERATOR, (self.prime - 1) // n, self.prime)
        root = pow(root, -1, self.prime) if inverse else root
        powers = torch.tensor([pow(root, k, self.prime) for k in range(n)])
        grid = torch.arange(n)
        table = powers[grid[:, None] * grid[None] % n]
        scale = pow(n, -1, self.prime) if inverse else 1
        made = self.matmul(x[..., None, :], table)[..., 0, :]
        return self.mul(made, torch.tensor(scale))

    def opaque(self, x: torch.Tensor) -> torch.Tensor:
        """A function of one number that satisfies no identity a rule could rely on."""
        if not self.exact:
            return torch.sin(3.1 * x) + x * x
        y = self.add(self.mul(x, x), torch.tensor(1234577))
        y = self.mul(y, self.add(x, torch.tensor(777767777)))
        return self.add(self.mul(y, y), self.mul(x, torch.tensor(48271)))

    def opaque_rows(self, x: torch.Tensor) -> torch.Tensor:
        """A function of the whole last axis, as a norm or a softmax is."""
        weights = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
        total = self.sum(self.mul(self.opaque(x), weights), -1)[..., None]
        return self.add(self.mul(self.opaque(x), total), x)

    def same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Equality: exact, or within the rounding of a few thousand operations."""
        if a.shape != b.shape:
            return False
        if self.exact:
            return torch.equal(a, b)
        bound = 4096 * torch.finfo(torch.float64).eps
        return bool((a - b).abs().max() <= bound * (1 + b.abs().max())) if a.numel() else True


LINEAR, TRANSFORM, FLOAT = Ring(MERSENNE), Ring(FOURIER), Ring(0)


def transform_lengths(most: int) -> list[int]:
    """The lengths up to `most` that have an exact transform."""
    return [n for n in range(1, most + 1) if math.gcd(FOURIER - 1, n) == n]
