"""A factor's product as stages for generated kernels: small matrix products between buffers of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from sparsec.errors import SpecError
from sparsec.factors._base import Factor, Shape
from sparsec.factors._contraction import BATCH, Contraction, Operand

MAX_STAGES = 24  # beyond these the kernel's text would grow past what a compiler does in a second
TILES = (16, 8, 4, 2, 1)
INPUT = 0  # the buffer that holds x


@dataclass(frozen=True)
class Axis:
    """A loop: `size` steps, features apart in the buffer that is read and in the one that is written."""

    size: int
    read: int = 0
    write: int = 0


@dataclass(frozen=True)
class Stage:
    """out[g, n, p] (+)= sum_k in[g, k, p] operand[g, n, k], where an index into a buffer is a sum of strides.

    `groups` g are shared by both operands and the result, `spectators` p come from the input alone, `new` n from the
    operand alone; `depth` k are summed, `step` features apart. `order` are the operand's letters as (g, n, k). A
    sparse stage has no groups and no spectators. `resume` adds to what the target holds.
    """

    operand: Operand
    order: str
    groups: tuple[Axis, ...]
    spectators: tuple[Axis, ...]
    new: tuple[Axis, ...]
    depth: int
    step: int
    source: int
    target: int
    resume: bool = False

    @property
    def sparse(self) -> bool:
        return self.operand.format is not None

    @property
    def outputs(self) -> int:
        """n: rows of the operand in each group."""
        return prod(a.size for a in self.new)

    @property
    def blocks(self) -> int:
        """g: how many matrices the operand holds."""
        return prod(a.size for a in self.groups)

    @property
    def tile(self) -> int:
        """Outputs that a kernel sums at a time: what wastes least of the last tile, wider ones before narrow ones."""
        return min(TILES, key=lambda t: -(-self.outputs // t) * (t + 1))

    @property
    def tiles(self) -> int:
        return -(-self.outputs // self.tile)

    @property
    def packed(self) -> int:
        """Values that a dense operand takes in tiles."""
        return self.blocks * self.tiles * self.tile * self.depth

    def pack(self, dense: torch.Tensor) -> torch.Tensor:
        """The operand as [block][tile][k][output of the tile], short tiles completed with zeros."""
        wide = dense.permute([self.operand.letters.index(c) for c in self.order])
        wide = wide.reshape(self.blocks, self.outputs, self.depth)
        wide = torch.nn.functional.pad(wide, (0, 0, 0, self.tiles * self.tile - self.outputs))
        return wide.reshape(self.blocks, self.tiles, self.tile, self.depth).transpose(2, 3).reshape(-1)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`."""
        wide = values.reshape(self.blocks, self.tiles, self.depth, self.tile).transpose(2, 3)
        wide = wide.reshape(self.blocks, self.tiles * self.tile, self.depth)[:, : self.outputs]
        sizes = dict(zip(self.operand.letters, self.operand.shape, strict=True))
        wide = wide.reshape([sizes[c] for c in self.order])
        return wide.permute([self.order.index(c) for c in self.operand.letters]).contiguous()


@dataclass(frozen=True)
class Stages:
    """All stages of a product in order, and the sizes in features of the buffers they read and write.

    Buffer 0 holds x at first. `result` holds y at the end; the stages of a term accumulate there.
    """

    stages: tuple[Stage, ...]
    buffers: tuple[int, ...]
    result: int

    def products(self) -> int:
        """Multiplications for one row of x, those of the padding included."""
        return sum(s.operand.stored if s.sparse else s.packed * prod(a.size for a in s.spectators) for s in self.stages)


@lru_cache(maxsize=256)
def stages_of(factor: Factor, shape: Shape) -> Stages:
    """The stages of a factor for a weight (out, in). Raises SpecError, with the reason, where it is no such chain."""
    terms = factor.resolve(shape).contract(shape)
    found: list[Stage] = []
    sizes: list[int] = [shape[1]]
    result = -1
    for at, term in enumerate(terms):
        _check(term, factor)
        last = at == len(terms) - 1
        source, layout = INPUT, term.inputs
        steps = term.steps()
        for place, (operand, (_left, _, right)) in enumerate(zip(term.operands, steps, strict=True)):
            final = place == len(steps) - 1
            onward = term.outputs if final else _layout(right, term.operands[place + 1], steps[place + 1][2])
            size = prod(term.sizes[c] for c in onward)
            if final and at > 0:
                target = result
            else:
                kept = {source} | ({INPUT} if not last else set()) | ({result} if result >= 0 else set())
                target = _free(sizes, kept, size)
            found.append(_stage(operand, term.sizes, layout, onward, source, target, resume=final and at > 0))
            source, layout = target, onward
        result = source
    if len(found) > MAX_STAGES:
        raise SpecError(f"{factor.text()} takes {len(found)} products, more than the {MAX_STAGES} of one kernel")
    return Stages(tuple(found), tuple(sizes), result)


def _check(term: Contraction, factor: Factor) -> None:
    """Refuse letters that only one operand has: nothing pairs with them."""
    known = set(term.inputs + term.outputs)
    for at, operand in enumerate(term.operands):
        others = known.union(*(o.letters for i, o in enumerate(term.operands) if i != at))
        alone = [c for c in operand.letters if c not in others]
        if alone or len(set(operand.letters)) != len(operand.letters):
            raise SpecError(f"{factor.text()}: operand {operand.names[0]!r} has an index that nothing else has")


def _layout(letters: str, operand: Operand, result: str) -> str:
    """The order of an intermediate's letters: what the next operand sums over comes last, in the operand's order."""
    kept = letters.replace(BATCH, "")
    summed = [c for c in operand.letters if c in kept and c not in result]
    return "".join([c for c in kept if c not in summed] + summed)


def _free(sizes: list[int], kept: set[int], size: int) -> int:
    """A buffer that is not in use: the smallest that suffices, else the largest grown, else a new one."""
    idle = [i for i in range(len(sizes)) if i not in kept]
    fits = [i for i in idle if sizes[i] >= size]
    if fits:
        return min(fits, key=lambda i: sizes[i])
    if idle:
        grown = max(idle, key=lambda i: sizes[i])
        sizes[grown] = size
        return grown
    sizes.append(size)
    return len(sizes) - 1


def _stage(
    operand: Operand, sizes: Mapping[str, int], read: str, write: str, source: int, target: int, resume: bool
) -> Stage:
    here, there = _strides(read, sizes), _strides(write, sizes)
    groups = sorted((c for c in operand.letters if c in here and c in there), key=lambda c: -there[c])
    summed = sorted((c for c in operand.letters if c in here and c not in there), key=lambda c: -here[c])
    new = sorted((c for c in operand.letters if c not in here), key=lambda c: -there[c])
    spectators = sorted((c for c in read if c not in operand.letters), key=lambda c: -there[c])
    depth = _merged([Axis(sizes[c], here[c]) for c in summed])
    if len(depth) > 1:
        raise SpecError(f"operand {operand.names[0]!r} sums over {summed} of x, which do not lie evenly")
    stage = Stage(
        operand, "".join([*groups, *new, *summed]),
        _merged([Axis(sizes[c], here[c], there[c]) for c in groups]),
        _merged([Axis(sizes[c], here[c], there[c]) for c in spectators]),
        _merged([Axis(sizes[c], 0, there[c]) for c in new]),
        depth[0].size if depth else 1, depth[0].read if depth else 0, source, target, resume,
    )  # fmt: skip
    plain = stage.order == operand.letters and not stage.groups and not stage.spectators
    if stage.sparse and not (plain and stage.step <= 1 and all(a.write == 1 for a in stage.new)):
        raise SpecError(
            f"sparse operand {operand.names[0]!r} is no plain matrix (rows out, columns in) in this product"
        )
    return stage


def _strides(layout: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Letter -> features apart, for a row-major layout."""
    found: dict[str, int] = {}
    stride = 1
    for c in reversed(layout):
        found[c] = stride
        stride *= sizes[c]
    return found


def _merged(axes: list[Axis]) -> tuple[Axis, ...]:
    """Neighbouring loops that step evenly as one, and none of size one."""
    found: list[Axis] = []
    for axis in (a for a in axes if a.size > 1):
        if found:
            outer = found[-1]
            if outer.read == axis.read * axis.size and outer.write == axis.write * axis.size:
                found[-1] = Axis(outer.size * axis.size, axis.read, axis.write)
                continue
        found.append(axis)
    return tuple(found)
