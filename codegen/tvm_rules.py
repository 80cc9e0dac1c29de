"""Schedules for the blocks of a TVM kernel: rules in order of preference, of which the last one always applies.

A rule looks at one block by name and either schedules its loops or says why not; the first that does ends the search.
Where a rule has a choice, it asks for it by name: the tile of a KernelSpec answers, or MetaSchedule while it searches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.errors import SpecError

Rule = Callable[["Block"], "str | None"]
"""block -> None when the rule has scheduled it, else why not."""

Pick = Callable[[str, tuple[int, ...], int], int]
"""(knob, values worth trying, the usual one) -> the value that a rule takes."""

MAX_UNROLL = 8  # longer loops gain nothing from it and take long to compile
UNROLLS = (1, MAX_UNROLL, 64)


@dataclass(frozen=True)
class Block:
    """A block of one function of a schedule `sch`, where vectors have `lanes` fp32 values."""

    sch: Any
    function: str
    name: str
    lanes: int
    pick: Pick

    @property
    def block(self) -> Any:
        return self.sch.get_sblock(self.name, self.function)

    def knob(self, name: str, values: tuple[int, ...], usual: int) -> int:
        """A choice of this block: what it is called does not depend on the processor."""
        return self.pick(f"{self.function}_{self.name}_{name}", values, usual)


def schedule(sch: Any, blocks: Mapping[str, Sequence[str]], lanes: int, pick: Pick) -> list[tuple[str, str, str]]:
    """Schedule every named block of every function in place. Returns (function, block, rule) in order."""
    done = []
    for function, names in blocks.items():
        sch.work_on(function)
        for name in names:
            block = Block(sch, function, name, lanes, pick)
            rule = next(rule for rule in RULES if rule(block) is None)
            done.append((function, name, rule.__name__))
    return done


class Tile:
    """Picks what the tile of a KernelSpec says, and the usual values for what it does not say."""

    def __init__(self, tile: Sequence[tuple[str, int]]) -> None:
        self.open = dict(tile)

    def __call__(self, name: str, values: tuple[int, ...], usual: int) -> int:
        return self.open.pop(name, usual)

    def finish(self) -> None:
        """Raises SpecError for names in the tile that no rule asked for."""
        if self.open:
            raise SpecError(f"no TVM rule has a choice named {next(iter(self.open))!r:.80}")


def contract(b: Block) -> str | None:
    """A sum over stored entries --> accumulators in vector registers, set before the loop over entries."""
    if b.name not in ("fma", "dot"):
        return "not a contraction"
    sch, block = b.sch, b.block
    loops = sch.get_loops(block)
    outer, inner = _split(b, loops[-1])
    sch.vectorize(inner)
    sch.unroll(outer)
    constant = [loop for loop in loops[1:-1] if (_constant(sch, loop) or 1) > 1]
    limit = _unroll(b) if constant else 0
    for loop in loops[1:-1]:
        if (extent := _constant(sch, loop)) is not None and extent <= max(1, limit):
            sch.unroll(loop)
    sch.decompose_reduction(block, loops[0])
    return None


def vectors(b: Block) -> str | None:
    """A block whose innermost extent is a known number of vectors --> vectors, unrolled when they are few."""
    loop = b.sch.get_loops(b.block)[-1]
    extent = _constant(b.sch, loop)
    if extent is None or extent % min(b.lanes, extent):
        return "the innermost extent is not a known number of vectors"
    outer, inner = _split(b, loop)
    b.sch.vectorize(inner)
    if extent // min(b.lanes, extent) <= _unroll(b):
        b.sch.unroll(outer)
    return None


def plain(b: Block) -> str | None:
    """Any block: its loops stay as they are, for LLVM to do what it can."""
    return None


RULES: tuple[Rule, ...] = (contract, vectors, plain)


def _constant(sch: Any, loop: Any) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if hasattr(extent, "value") else None


def _split(b: Block, loop: Any) -> tuple[Any, Any]:
    """Vectors of a loop with a constant extent, and the lanes of one. Half and double vectors are worth trying."""
    extent = _constant(b.sch, loop)
    if extent is None:
        raise SpecError("a contraction needs a constant number of columns")
    usual = math.gcd(extent, b.lanes)
    worth = {usual} | {w for w in (b.lanes // 2, b.lanes, 2 * b.lanes) if w >= 4 and extent % w == 0}
    lanes = b.knob("lanes", tuple(sorted(worth)), usual)
    if lanes < 1 or extent % lanes:
        raise SpecError(f"{b.function}.{b.name}: {extent} columns are not whole vectors of {lanes} lanes")
    outer, inner = b.sch.split(loop, [None, lanes])
    return outer, inner


def _unroll(b: Block) -> int:
    limit = b.knob("unroll", UNROLLS, MAX_UNROLL)
    if not 1 <= limit <= UNROLLS[-1]:
        raise SpecError(f"{b.function}.{b.name}: loops are unrolled up to {UNROLLS[-1]} times, not {limit}")
    return limit
