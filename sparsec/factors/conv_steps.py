"""A factored convolution as small ones: each step of its einsum is one, with letters of the window as its kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape
from sparsec.factors._contraction import Contraction, Operand
from sparsec.factors._modes import KERNEL_LETTERS
from sparsec.formats import Buffers

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class ConvStep:
    """One convolution. x (batch, *letters, *space) is read in the order of `axes` as (batch * aside, channels, *space),
    the operand in the order of `turn` as the weight (`out`, `channels` / `groups`, *`kernel`)."""

    operand: Operand
    axes: Shape
    aside: int
    channels: int
    turn: Shape
    out: int
    kernel: Shape
    groups: int
    window: tuple[bool, ...]  # the spatial axes that this step's kernel walks over
    sizes: Shape  # of the letters behind the batch of the result

    def weight(self, dense: torch.Tensor) -> torch.Tensor:
        """The operand as torch's convolution takes it."""
        return dense.permute(self.turn).reshape(self.out, self.channels // self.groups, *self.kernel)

    def flops(self, batch: int, pixels: int) -> int:
        """Two a product, on the `pixels` of the result."""
        return 2 * batch * self.aside * pixels * self.out * (self.channels // self.groups) * math.prod(self.kernel)


@dataclass(frozen=True)
class ConvChain:
    """The steps of one einsum; `order` turns the last result into (batch, out, *space). `entry` are the sizes of the
    input's channels, one for each letter."""

    entry: Shape
    steps: tuple[ConvStep, ...]
    order: Shape

    def __call__(self, x: torch.Tensor, operands: Sequence[torch.Tensor], walk: Any) -> torch.Tensor:
        """x (batch, channels, *size) through all steps; `walk` has stride, padding and dilation by axis."""
        batch, dims = x.shape[0], x.dim() - 2
        running = x.reshape(batch, *self.entry, *x.shape[2:])
        for step, dense in zip(self.steps, operands, strict=True):
            letters = running.dim() - dims
            space = range(letters, running.dim())
            flat = running.permute(*step.axes, *space).reshape(
                batch * step.aside, step.channels, *running.shape[letters:]
            )
            stride, dilation, padding = (
                tuple(v if used else idle for v, used in zip(values, step.window, strict=True))
                for values, idle in ((walk.stride, 1), (walk.dilation, 1), (walk.padding, 0))
            )
            done = CONVOLUTIONS[dims - 1](flat, step.weight(dense), None, stride, padding, dilation, step.groups)
            running = done.reshape(batch, *step.sizes, *done.shape[2:])
        letters = running.dim() - dims
        turned = running.permute(*self.order, *range(letters, running.dim()))
        return turned.reshape(batch, -1, *running.shape[letters:])


def chains_of(factor: Factor, shape: Shape) -> tuple[ConvChain, ...]:
    """A chain for each term of a factor of a convolution's weight (out, in, *kernel).

    Raises SpecError, with the reason, where the einsum cannot run over positions.
    """
    found = []
    for term in factor.resolve(shape).contract(shape):
        opened = windowed(term, shape)
        if opened is None:
            raise SpecError(f"{factor.text()} mixes the window with channels, so it is no chain of convolutions")
        found.append(chain_of(opened))
    return tuple(found)


def windowed(term: Contraction, shape: Shape) -> Contraction | None:
    """A term whose window letters each stand alone in one operand; None where it has no such form.

    Factors of the matrix (out, in * prod(kernel)) whose first operand reads all inputs at once are opened: that operand
    is a convolution with the whole window, and what follows 1x1.
    """
    dims = len(shape) - 2
    if not term.kernel and len(term.inputs) == 1 and term.x == (math.prod(shape[1:]),):
        letter, fresh = term.inputs, "".join(c for c in KERNEL_LETTERS if c not in term.sizes)[:dims]
        if len(fresh) == dims and letter not in term.outputs and all(o.format is None for o in term.operands):
            operands = tuple(_opened(o, letter, fresh, shape) for o in term.operands)
            term = dataclasses.replace(term, inputs=letter + fresh, x=shape[1:], operands=operands, kernel=fresh)
    holders = [sum(letter in o.letters for o in term.operands) for letter in term.kernel]
    return term if len(term.kernel) == dims and all(n == 1 for n in holders) else None


def _opened(operand: Operand, letter: str, fresh: str, shape: Shape) -> Operand:
    if letter not in operand.letters:
        return operand
    at = operand.letters.index(letter)
    sizes = (*operand.shape[:at], *shape[1:], *operand.shape[at + 1 :])
    return dataclasses.replace(operand, letters=operand.letters.replace(letter, letter + fresh), shape=sizes)


def chain_of(c: Contraction) -> ConvChain:
    """The steps of an einsum: letters that operand and result share are groups, window letters the kernel."""
    sizes = c.sizes
    letters = c.inputs.removesuffix(c.kernel)
    entry = tuple(sizes[a] for a in letters)
    steps = []
    for operand, (_, right, result) in zip(c.operands, c.steps(), strict=True):
        groups = [a for a in letters if a in right and a in result]
        summed = [a for a in letters if a in right and a not in result]
        aside = [a for a in letters if a not in right]
        new = [a for a in right if a not in letters and a not in c.kernel]
        window = [k for k in c.kernel if k in right]
        g, s, n = (math.prod(sizes[a] for a in part) for part in (groups, summed, new))
        steps.append(
            ConvStep(
                operand,
                (0, *(1 + letters.index(a) for a in (*aside, *groups, *summed))),
                math.prod(sizes[a] for a in aside),
                g * s,
                tuple(right.index(a) for a in (*groups, *new, *summed, *window)),
                g * n,
                tuple(sizes[k] if k in right else 1 for k in c.kernel),
                g,
                tuple(k in right for k in c.kernel),
                tuple(sizes[a] for a in (*aside, *groups, *new)),
            )
        )
        letters = "".join([*aside, *groups, *new])
    return ConvChain(entry, tuple(steps), (0, *(1 + letters.index(a) for a in c.outputs)))


def run_chains(
    chains: Sequence[ConvChain], x: torch.Tensor, buffers: Buffers, walk: Any, absolute: bool = False
) -> torch.Tensor:
    """The sum of all chains on x; `absolute`: of the absolute operands, which bounds the rounding error."""
    total: torch.Tensor | None = None
    for chain in chains:
        operands = [s.operand.dense(buffers) for s in chain.steps]
        if absolute:
            operands = [t.abs() for t in operands]
        term = chain(x, operands, walk)
        total = term if total is None else total + term
    if total is None:
        raise SpecError("a factor without terms computes nothing")
    return total


def depth(chains: Sequence[ConvChain]) -> float:
    """sum_s (8 + 2 sqrt(n_s)) of the longest chain, n_s being how many numbers step s sums."""
    lengths = [[s.channels // s.groups * math.prod(s.kernel) for s in chain.steps] for chain in chains]
    return max(sum(8 + 2 * math.sqrt(n) for n in chain) for chain in lengths) + len(chains)
