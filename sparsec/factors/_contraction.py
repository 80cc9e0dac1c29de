"""A factor's product as one einsum: what the planner, the kernels and plain torch all read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from string import ascii_letters

import torch

from sparsec.formats import Buffers, Format

BATCH = "z"
"""The letter of the batch in every equation; x comes first and starts with it, and so does y."""


@dataclass(frozen=True)
class Operand:
    """An operand after x: the letters and sizes of the dense tensor it stands for, and the buffers that hold it.

    `format` None: the one buffer is that tensor, up to a view. A Format: the operand is a matrix of two letters,
    (rows, cols), held by the format's buffers under the names given here, with `stored` values.
    """

    names: tuple[str, ...]
    letters: str
    shape: tuple[int, ...]
    format: Format | None = None
    stored: int = 0

    def dense(self, buffers: Buffers) -> torch.Tensor:
        """The tensor of `shape` that the buffers stand for."""
        if self.format is None:
            return buffers[self.names[0]].reshape(self.shape)
        own = {key: buffers[name] for key, name in zip(self.format.buffers, self.names, strict=True)}
        return self.format.unpack(own, self.shape[0], self.shape[1])


@dataclass(frozen=True)
class Contraction:
    """y = einsum(equation, x, *operands), contracted from left to right.

    x (batch, in) is viewed as (batch, *x) and y (batch, *y) as (batch, out); `inputs` and `outputs` are their letters
    without the batch. The factor chose the order of the operands: left to right is how `apply` runs and `flops` counts.
    `kernel` are the last letters of `inputs` where they run over the positions of a convolution's window.
    """

    inputs: str
    outputs: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    operands: tuple[Operand, ...]
    kernel: str = ""

    @property
    def equation(self) -> str:
        """In the syntax of einsum: `"zi,ri,or->zo"` for a low rank product."""
        letters = ",".join([BATCH + self.inputs, *(o.letters for o in self.operands)])
        return f"{letters}->{BATCH}{self.outputs}"

    @property
    def sizes(self) -> dict[str, int]:
        """Letter -> size, the batch left out."""
        found = dict(zip(self.inputs + self.outputs, self.x + self.y, strict=True))
        for operand in self.operands:
            found.update(zip(operand.letters, operand.shape, strict=True))
        return found

    def steps(self) -> tuple[tuple[str, str, str], ...]:
        """The letters of (running product, operand, their product), from left to right, the batch included."""
        found = []
        running = BATCH + self.inputs
        for at, operand in enumerate(self.operands):
            needed = set(BATCH + self.outputs).union(*(o.letters for o in self.operands[at + 1 :]))
            last = at == len(self.operands) - 1
            union = dict.fromkeys(running + operand.letters)
            result = BATCH + self.outputs if last else "".join(c for c in union if c in needed)
            found.append((running, operand.letters, result))
            running = result
        return tuple(found)

    def apply(self, x: torch.Tensor, buffers: Buffers) -> torch.Tensor:
        """x (batch, in) times the weight, (batch, out), without forming the weight."""
        running = x.reshape(x.shape[0], *self.x)
        for operand, (left, right, result) in zip(self.operands, self.steps(), strict=True):
            running = torch.einsum(f"{left},{right}->{result}", running, operand.dense(buffers))
        return running.reshape(x.shape[0], prod(self.y))

    def reconstruct(self, buffers: Buffers) -> torch.Tensor:
        """The dense (out, in) weight: the operands contracted with each other, x left out."""
        equations, letters, ends = _without_x(self)
        running = self.operands[0].dense(buffers)
        for operand, equation in zip(self.operands[1:], equations, strict=True):
            running = torch.einsum(equation, running, operand.dense(buffers))
        running = torch.einsum(f"{letters}->{ends}", running)
        if shared := [c for c in self.inputs if c in self.outputs]:  # a block-diagonal weight: zero off the diagonal
            running = self._spread(running, ends, shared)
        return running.reshape(prod(self.y), prod(self.x))

    def _spread(self, running: torch.Tensor, ends: str, shared: list[str]) -> torch.Tensor:
        """(outputs, inputs) from a tensor that has the letters of both only once."""
        sizes = self.sizes
        fresh = dict(zip(shared, (c for c in ascii_letters if c not in ends), strict=False))
        deltas = [torch.eye(sizes[c], dtype=running.dtype, device=running.device) for c in shared]
        inputs = "".join(fresh.get(c, c) for c in self.inputs)
        terms = ",".join([ends, *(c + fresh[c] for c in shared)])
        return torch.einsum(f"{terms}->{self.outputs}{inputs}", running, *deltas)

    def flops(self, batch: int) -> int:
        """Floating point operations of `apply`: two for every product that is summed, one for others."""
        sizes = {**self.sizes, BATCH: batch}
        total = 0
        for operand, (left, right, result) in zip(self.operands, self.steps(), strict=True):
            letters = set(left + right)
            if operand.format is None:
                total += (2 if letters - set(result) else 1) * prod(sizes[c] for c in letters)
            else:
                total += 2 * operand.stored * prod(sizes[c] for c in set(left) - set(right))
        return total


@lru_cache(maxsize=1024)
def _without_x(c: Contraction) -> tuple[tuple[str, ...], str, str]:
    """The einsums that multiply the operands, the letters they leave, and those that the weight has, outputs first."""
    ends = c.outputs + "".join(a for a in c.inputs if a not in c.outputs)
    letters = c.operands[0].letters
    equations = []
    for at, operand in enumerate(c.operands[1:], 1):
        needed = set(ends).union(*(o.letters for o in c.operands[at + 1 :]))
        kept = "".join(a for a in dict.fromkeys(letters + operand.letters) if a in needed)
        equations.append(f"{letters},{operand.letters}->{kept}")
        letters = kept
    return tuple(equations), letters, ends
