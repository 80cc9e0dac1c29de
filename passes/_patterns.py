"""The elementwise expressions that a kernel can apply to its accumulator, as trees over one tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsec.aten import arguments, opname
from sparsec.codegen.kernel import Step


@dataclass(frozen=True)
class Number:
    """A finite Python number, bound by position."""

    index: int


X = "x"
"""The tensor that the expression is over. A tree is (op, operand, ...); operands left out must have their defaults."""

Tree = Any
Steps = Callable[[tuple[float, ...]], tuple[Step, ...] | None]


@dataclass(frozen=True)
class Pattern:
    """An expression over one tensor and the steps that compute it."""

    tree: Tree
    steps: Steps

    @property
    def size(self) -> int:
        """Number of calls in the tree."""
        return _size(self.tree)


@dataclass
class Match:
    """The nodes of a matched expression in graph order of discovery, and the numbers in it."""

    nodes: dict[fx.Node, None] = field(default_factory=dict)
    numbers: dict[int, float] = field(default_factory=dict)


def _size(tree: Tree) -> int:
    return 1 + sum(_size(t) for t in tree[1:]) if isinstance(tree, tuple) else 0


def _one(name: str) -> Steps:
    return lambda numbers: (Step(name),)


def _clamp(numbers: tuple[float, ...]) -> tuple[Step, ...]:
    return (Step("clamp", numbers),)


def _divide(numbers: tuple[float, ...]) -> tuple[Step, ...] | None:
    """Division by a power of two is a multiplication, by anything else it rounds differently."""
    exact = numbers[0] != 0 and math.frexp(numbers[0])[0] in (0.5, -0.5)
    return (Step("scale", (1.0 / numbers[0],)),) if exact else None


_CUBE = ("add", X, ("mul", ("pow", X, 3.0), 0.044715))
_HALF = ("mul", X, 0.5)

PATTERNS: tuple[Pattern, ...] = tuple(
    sorted(
        (
            Pattern(("relu", X), _one("relu")),
            Pattern(("clamp_min", X, 0.0), _one("relu")),
            Pattern(("clamp", X, 0.0), _one("relu")),
            Pattern(("gelu", X), _one("gelu")),
            Pattern(("gelu", X, "tanh"), _one("gelu_tanh")),
            Pattern(("silu", X), _one("silu")),
            Pattern(("tanh", X), _one("tanh")),
            Pattern(("hardswish", X), _one("hardswish")),
            Pattern(("clamp", X, Number(0), Number(1)), _clamp),
            Pattern(("hardtanh", X, Number(0), Number(1)), _clamp),
            Pattern(("hardtanh", X), lambda _: (Step("clamp", (-1.0, 1.0)),)),
            Pattern(("relu6", X), lambda _: (Step("clamp", (0.0, 6.0)),)),
            Pattern(("mul", X, Number(0)), lambda numbers: (Step("scale", numbers),)),
            Pattern(("div", X, Number(0)), _divide),
            Pattern(("mul", X, ("sigmoid", X)), _one("silu")),
            # the forms that transformers writes out: gelu_new, gelu_fast, gelu_python, quick_gelu
            Pattern(
                ("mul", _HALF, ("add", ("tanh", ("mul", _CUBE, math.sqrt(2 / math.pi))), 1.0)),
                _one("gelu_tanh"),
            ),
            Pattern(
                (
                    "mul",
                    _HALF,
                    (
                        "add",
                        ("tanh", ("mul", ("mul", X, 0.7978845608), ("add", ("mul", ("mul", X, 0.044715), X), 1.0))),
                        1.0,
                    ),
                ),
                _one("gelu_tanh"),
            ),
            Pattern(("mul", _HALF, ("add", ("erf", ("div", X, math.sqrt(2))), 1.0)), _one("gelu")),
            Pattern(("mul", _HALF, ("add", ("erf", ("mul", X, math.sqrt(0.5))), 1.0)), _one("gelu")),
            Pattern(
                ("mul", X, ("sigmoid", ("mul", X, 1.702))),
                lambda _: (Step("scale", (1.702,)), Step("silu"), Step("scale", (1 / 1.702,))),
            ),
        ),
        key=lambda p: -p.size,
    )
)
"""Largest first, so that `x * sigmoid(x)` is never taken for something smaller."""

_COMMUTATIVE = ("mul", "add")


def match(value: Any, tree: Tree, x: fx.Node) -> Match | None:
    """Match the expression that ends in `value` against a tree over `x`."""
    return next(_matches(value, tree, x, Match()), None)


def _matches(value: Any, tree: Tree, x: fx.Node, found: Match) -> Iterator[Match]:
    if tree is X:
        if value is x:
            yield found
    elif isinstance(tree, Number):
        if _finite(value):
            yield Match(found.nodes, {**found.numbers, tree.index: float(value)})
    elif isinstance(tree, float):
        if _finite(value) and math.isclose(value, tree, rel_tol=1e-6):
            yield found
    elif isinstance(tree, str):
        if value == tree:
            yield found
    elif isinstance(value, fx.Node) and opname(value) == f"aten::{tree[0]}" and value is not x:
        operands = _operands(value, len(tree) - 1)
        if operands is None:
            return
        orders = itertools.permutations(operands) if tree[0] in _COMMUTATIVE else [operands]
        for order in orders:
            yield from _all(order, tree[1:], x, Match({**found.nodes, value: None}, found.numbers))


def _all(values: Any, trees: tuple[Tree, ...], x: fx.Node, found: Match) -> Iterator[Match]:
    if not trees:
        yield found
        return
    for step in _matches(values[0], trees[0], x, found):
        yield from _all(values[1:], trees[1:], x, step)


def _operands(node: fx.Node, count: int) -> tuple[Any, ...] | None:
    """The first `count` arguments of a call whose other arguments have their defaults, else None."""
    bound = arguments(node)
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
    names = list(bound)
    if any(bound[name] != defaults[name] for name in names[count:]):
        return None
    return tuple(bound[name] for name in names[:count])


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
