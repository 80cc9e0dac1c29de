"""A factor's product as one einsum: what the planner, the kernels and plain torch all read."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

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
    """

    inputs: str
    outputs: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    operands: tuple[Operand, ...]

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
        letters = self.operands[0].letters
        running = self.operands[0].dense(buffers)
        ends = self.outputs + self.inputs
        for at, operand in enumerate(self.operands[1:], 1):
            needed = set(ends).union(*(o.letters for o in self.operands[at + 1 :]))
            kept = "".join(c for c in dict.fromkeys(letters + operand.letters) if c in needed)
            running = torch.einsum(f"{letters},{operand.letters}->{kept}", running, operand.dense(buffers))
            letters = kept
        return torch.einsum(f"{letters}->{ends}", running).reshape(prod(self.y), prod(self.x))

    def flops(self, batch: int) -> int:
        """Floating point operations of `apply`: two for every product of two numbers, as torch's counter has it."""
        sizes = {**self.sizes, BATCH: batch}
        total = 0
        for operand, (left, right, _) in zip(self.operands, self.steps(), strict=True):
            if operand.format is None:
                total += 2 * prod(sizes[c] for c in set(left + right))
            else:
                total += 2 * operand.stored * prod(sizes[c] for c in set(left) - set(right))
        return total
