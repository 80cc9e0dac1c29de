"""Schedules for the blocks of a TVM kernel: rules in order of preference, of which the last one always applies.

A rule looks at one block by name and either schedules its loops or says why not; the first that does ends the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sparsec.errors import SpecError

Rule = Callable[[Any, str, Any, int], "str | None"]
"""(schedule, name of a block, the block, lanes of a vector) -> None when it has scheduled the block, else why not."""

MAX_UNROLL = 8  # longer loops gain nothing from it and take long to compile


def schedule(sch: Any, blocks: dict[str, list[str]], lanes: int) -> list[tuple[str, str, str]]:
    """Schedule every named block of every function in place. Returns (function, block, rule) in order."""
    done = []
    for function, names in blocks.items():
        sch.work_on(function)
        for name in names:
            block = sch.get_sblock(name)
            rule = next(rule for rule in RULES if rule(sch, name, block, lanes) is None)
            done.append((function, name, rule.__name__))
    return done


def contract(sch: Any, name: str, block: Any, lanes: int) -> str | None:
    """A sum over stored entries --> accumulators in vector registers, set before the loop over entries."""
    if name not in ("fma", "dot"):
        return "not a contraction"
    loops = sch.get_loops(block)
    outer, inner = _split(sch, loops[-1], lanes)
    sch.vectorize(inner)
    sch.unroll(outer)
    for loop in loops[1:-1]:
        if (extent := _constant(sch, loop)) is not None and extent <= MAX_UNROLL:
            sch.unroll(loop)
    sch.decompose_reduction(block, loops[0])
    return None


def vectors(sch: Any, name: str, block: Any, lanes: int) -> str | None:
    """A block whose innermost extent is a known number of vectors --> vectors, unrolled when they are few."""
    loop = sch.get_loops(block)[-1]
    extent = _constant(sch, loop)
    if extent is None or extent % min(lanes, extent):
        return "the innermost extent is not a known number of vectors"
    outer, inner = _split(sch, loop, lanes)
    sch.vectorize(inner)
    if extent // min(lanes, extent) <= MAX_UNROLL:
        sch.unroll(outer)
    return None


def plain(sch: Any, name: str, block: Any, lanes: int) -> str | None:
    """Any block: its loops stay as they are, for LLVM to do what it can."""
    return None


RULES: tuple[Rule, ...] = (contract, vectors, plain)


def _constant(sch: Any, loop: Any) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if hasattr(extent, "value") else None


def _split(sch: Any, loop: Any, lanes: int) -> tuple[Any, Any]:
    """Vectors of a loop with a constant extent, and the lanes of one."""
    extent = _constant(sch, loop)
    if extent is None:
        raise SpecError("a contraction needs a constant number of columns")
    outer, inner = sch.split(loop, [None, math.gcd(extent, lanes)])
    return outer, inner
