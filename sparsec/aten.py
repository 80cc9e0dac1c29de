"""Reading ATen calls: which ops carry a weight and where, arguments by their schema names, sizes that surely agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsec.errors import PassError


@dataclass(frozen=True)
class WeightOp:
    """Where an ATen op keeps its weight: schema names of the operands that may be one, and of its bias."""

    weights: tuple[str, ...]
    bias: str | None = None


WEIGHT_OPS: dict[str, WeightOp] = {
    "aten::linear": WeightOp(("weight",), "bias"),
    "aten::conv1d": WeightOp(("weight",), "bias"),
    "aten::conv2d": WeightOp(("weight",), "bias"),
    "aten::conv3d": WeightOp(("weight",), "bias"),
    "aten::embedding": WeightOp(("weight",)),
    "aten::addmm": WeightOp(("mat1", "mat2"), "self"),
    "aten::mm": WeightOp(("self", "mat2")),
    "aten::bmm": WeightOp(("self", "mat2")),
    "aten::matmul": WeightOp(("self", "other")),
    "aten::einsum": WeightOp(("tensors",)),
}
"""Weight ops of the IR contract: products have a weight only if an operand is constant."""


def opname(node: fx.Node) -> str:
    """`aten::linear` for any overload of aten.linear, "" for everything that is not an ATen or library op call."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name
    return ""


def arguments(node: fx.Node) -> dict[str, Any]:
    """Schema name -> value for every argument of a library op call, in schema order, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise PassError(f"node {node.name!r} calls {target}, which is no library op and has no schema")
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Change one argument of a library op call by its schema name, wherever it is passed."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def operands(node: fx.Node, *, bias: bool = False) -> list[fx.Node]:
    """The nodes in weight position of a weight op (with `bias`, the bias too); empty for any other node."""
    kind = WEIGHT_OPS.get(opname(node))
    if kind is None:
        return []
    bound = arguments(node)
    found: list[fx.Node] = []
    for name in (*kind.weights, kind.bias) if bias and kind.bias else kind.weights:
        value = bound[name]
        found += [v for v in (value if isinstance(value, list | tuple) else (value,)) if isinstance(v, fx.Node)]
    return found


def same_shape(a: Any, b: Any) -> bool:
    """Whether two (fake) tensors surely have equal shape and dtype; never installs a guard on symbolic sizes."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return all(same_size(x, y) for x, y in zip(a.shape, b.shape))


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes (int or symbolic) are surely equal."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b
