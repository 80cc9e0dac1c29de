"""Plans for sizes that are known only when they run: costs in sympy, one order per range of sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsec.algebra.cost import Sizes
from sparsec.algebra.network import Network
from sparsec.algebra.operands import Operand, operand, symbol
from sparsec.algebra.plan import Plan, single
from sparsec.algebra.text import count
from sparsec.errors import InputError

SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)
"""Sizes at which orders are looked for; with several unknown sizes only a few of them."""


@dataclass(frozen=True, repr=False)
class Buckets:
    """One plan per order that is the cheapest somewhere. A call takes the cheapest at its sizes."""

    symbols: tuple[Any, ...]
    plans: tuple[Plan, ...]
    counters: tuple[Callable[..., Any], ...] = field(compare=False)

    @property
    def costs(self) -> tuple[Any, ...]:
        """FLOPs of every plan as sympy expressions of the unknown sizes."""
        return tuple(p.flops for p in self.plans)

    def at(self, **sizes: int) -> Plan:
        """The plan that is the cheapest at these sizes, by name. Raises InputError for a missing or unknown name."""
        names = [s.name for s in self.symbols]
        if sorted(sizes) != sorted(names):
            raise InputError(f"this plan needs the sizes {', '.join(names)}; got {', '.join(sizes) or 'none'}")
        values = [sizes[n] for n in names]
        return min(zip(self.plans, self.counters), key=lambda pair: pair[1](*values))[0]

    def __call__(self, *operands: Any) -> Any:
        """Bind the unknown sizes, choose the plan, run it. Raises InputError for operands that do not fit."""
        return self.at(**self._sizes(operands))(*operands)

    def _sizes(self, operands: Sequence[Any]) -> dict[str, int]:
        shapes = self.plans[0].shapes
        if len(operands) != len(shapes):
            shapes = tuple(s for s, k in zip(shapes, self.plans[0].kinds) if k != "Delta")
        if len(operands) != len(shapes):
            raise InputError(f"this plan takes {len(self.plans[0].kinds)} operands, got {len(operands)}")
        found: dict[str, int] = {}
        for position, (value, shape) in enumerate(zip(operands, shapes)):
            sizes = operand(value).shape
            for want, size in zip(shape, sizes):
                if want in self.symbols and found.setdefault(want.name, size) != size:
                    raise InputError(f"operand {position}: size {want} is {size} here and {found[want.name]} before")
        missing = [s.name for s in self.symbols if s.name not in found]
        if missing:
            raise InputError(f"the operands do not tell the size {missing[0]!r}")
        return found

    def ranges(self) -> tuple[tuple[int, int | None, Plan], ...]:
        """For one unknown size: (first size, last size or None, plan), ascending, exact at every crossing."""
        if len(self.symbols) != 1:
            raise InputError(f"ranges need one unknown size, this plan has {len(self.symbols)}")
        name = self.symbols[0].name
        made: list[list[Any]] = [[1, None, self.at(**{name: 1})]]
        for low, high in itertools.pairwise(SAMPLES):
            begin = low
            while self.at(**{name: high}) is not made[-1][2]:
                left, right = begin, high  # left still has the last plan
                while right - left > 1:
                    middle = (left + right) // 2
                    left, right = (middle, right) if self.at(**{name: middle}) is made[-1][2] else (left, middle)
                made[-1][1] = right - 1
                made.append([right, None, self.at(**{name: right})])
                begin = right
        return tuple((a, b, p) for a, b, p in made)

    def to_dict(self) -> dict[str, Any]:
        """All plans as plain values that `json` writes; `sparsec.algebra.from_dict` reads them back."""
        from sparsec.algebra.store import to_dict

        return to_dict(self)

    def __repr__(self) -> str:
        lines = [f"Buckets {self.plans[0].outputs[0].network.equation} over {', '.join(s.name for s in self.symbols)}"]
        lines.append(f"  before: {count(self.plans[0].naive)} flops in one loop nest over dense operands")
        if len(self.symbols) == 1:
            entries = [(f"{self.symbols[0].name} {a} to {b or '...'}", p) for a, b, p in self.ranges()]
        else:
            entries = [(f"order {i + 1}", p) for i, p in enumerate(self.plans)]
        for name, plan in entries:
            lines.append(f"  {name}: {plan.flops} flops")
            lines += [f"    {s.mode:<10}  {s.text}" for s in plan.steps]
        return "\n".join(lines)


def bucketed(
    network: Network, given: Sequence[Operand], same: Sequence[int], limit: float, memory: int | None
) -> Buckets:
    """Plans at sample sizes, one per distinct order, with their FLOPs as expressions."""
    symbols = tuple(sorted({v for s in network.sizes if not isinstance(s, int) for v in s.free_symbols}, key=str))
    some = SAMPLES if len(symbols) == 1 else SAMPLES[::4]
    plans: dict[Any, Plan] = {}
    for point in itertools.product(some, repeat=len(symbols)):
        values = dict(zip(symbols, point))
        sample = Sizes([s if isinstance(s, int) else int(s.subs(values)) for s in network.sizes])
        made = single(network, given, same, sample, Sizes(network.sizes), limit, memory)
        plans.setdefault(tuple((s.mode, s.text) for s in made.steps), made)
    return _counted(symbols, tuple(plans.values()))


def from_plans(names: Sequence[str], plans: Sequence[Plan]) -> Buckets:
    """Buckets of plans that were stored, over the sizes of these names. Raises ValueError for costs of other sizes."""
    symbols = tuple(symbol(name) for name in names)
    for plan in plans:
        strange: set[Any] = getattr(plan.flops, "free_symbols", set()) - set(symbols)
        if strange:
            raise ValueError(f"a cost depends on {min(map(str, strange))!r}, which is no size of this plan")
    return _counted(symbols, tuple(plans))


def _counted(symbols: tuple[Any, ...], plans: tuple[Plan, ...]) -> Buckets:
    import sympy

    return Buckets(symbols, plans, tuple(sympy.lambdify(symbols, p.flops, "math") for p in plans))
