"""Constants with a memory: where a root attribute comes from, how to compute it again, and how to go back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsec.aten import opname
from sparsec.errors import PassError


@dataclass(frozen=True)
class Constant:
    """Where a root attribute comes from: the original state-dict names, and how it is computed from them.

    `recipe` is an FX graph of ATen calls with one placeholder per source, then one per literal; None when the attribute
    is the source itself, and then several sources are tied names of one tensor. A constant that is no state-dict entry
    (a non-persistent buffer, a lifted literal) has no sources; a recipe carries such operands in `literals`.
    """

    sources: tuple[str, ...]
    recipe: fx.Graph | None = field(default=None, compare=False)
    literals: tuple[torch.Tensor, ...] = field(default=(), compare=False)


def evaluate(constant: Constant, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The value of a constant, given one tensor per source (of its original shape and dtype)."""
    if len(tensors) != len(constant.sources):
        raise PassError(f"constant of {constant.sources} takes {len(constant.sources)} tensors, got {len(tensors)}")
    if constant.recipe is None:
        if not tensors:
            raise PassError("a constant without sources keeps its value; there is nothing to evaluate")
        return tensors[0]
    inputs = iter((*tensors, *constant.literals))
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in constant.recipe.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs).detach()
            elif node.op == "output":
                return values[node.args[0]]  # type: ignore[no-any-return]
            else:
                values[node] = call(node, values)
    raise PassError(f"the recipe of {constant.sources} has no output")


def invertible(constant: Constant) -> bool:
    """Whether the one source can be computed back bit-equal: the recipe only permutes dimensions."""
    return len(constant.sources) == 1 and not constant.literals and _permutations(constant) is not None


def invert(constant: Constant, value: torch.Tensor) -> torch.Tensor | None:
    """The source that gives `value`, as a view of it; None when the constant is not invertible."""
    steps = _permutations(constant) if invertible(constant) else None
    if steps is None:
        return None
    for dims in reversed(steps):
        order = dims(value.dim())
        value = value.permute([order.index(d) for d in range(len(order))])
    return value


def _permutations(constant: Constant) -> list[Callable[[int], list[int]]] | None:
    steps: list[Callable[[int], list[int]]] = []
    for node in constant.recipe.nodes if constant.recipe is not None else ():
        if node.op != "call_function":
            continue
        name = opname(node)
        if name in ("aten::t", "aten::numpy_T"):
            steps.append(lambda rank: list(range(rank))[::-1])
        elif name == "aten::transpose":
            first, second = node.args[1:3]
            steps.append(lambda rank, a=first, b=second: _swapped(rank, a, b))  # type: ignore[misc]
        elif name == "aten::permute":
            steps.append(lambda rank, dims=node.args[1]: [d % rank for d in dims])  # type: ignore[misc]
        elif name not in ("aten::alias", "aten::detach", "aten::clone", "aten::contiguous"):
            return None
    return steps


def _swapped(rank: int, first: int, second: int) -> list[int]:
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return order


def call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a call_function node gives when its input nodes have these values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]
