"""Following labels through a captured graph: the walk, and the two operations that every rule is made of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparsec.graph import arguments, constants, get_constant, opname
from sparsec.sparsifiers.structure_labels import (
    FIXED,
    MOVE,
    PRUNE,
    Relations,
    Value,
    Weight,
    compress,
    spread,
    varying,
)

Result = Any  # Value | Weight | list of them, or None for what is no tensor
Rule = Callable[["Trace", fx.Node, dict[str, Any]], Result]


class Trace:
    """One walk over a graph. `values` has what each node carries, `relations` what was learnt on the way."""

    def __init__(self, gm: fx.GraphModule, rules: dict[str, Rule]) -> None:
        self.gm, self.rules = gm, rules
        self.relations = Relations()
        self.values: dict[fx.Node, Result] = {}
        self.heads: list[torch.Tensor] = []  # labels of attention heads
        self.picks: list[tuple[fx.Node, torch.Tensor, int]] = []  # one index taken along a dimension

    def run(self) -> Trace:
        for node in self.gm.graph.nodes:
            self.relations.node = node
            if node.op == "get_attr":
                self.values[node] = self._constant(node)
            elif node.op == "output":
                for value in pytree.tree_leaves(node.args):
                    self.pin(self.get(value), MOVE, "is an output of the model")
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            else:
                self.values[node] = FIXED
                for value in node.all_input_nodes:
                    self.pin(self.get(value), MOVE, f"is used by an opaque {node.op} ({node.target})")
        return self

    def _constant(self, node: fx.Node) -> Result:
        tensor = get_constant(self.gm, str(node.target))
        known = constants(self.gm).get(str(node.target))
        if known is None or not known.sources or known.recipe is not None:
            return FIXED
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return FIXED
        return self.relations.weight(known.sources[0], known.sources[1:], tensor.shape)

    def _call(self, node: fx.Node) -> Result:
        if node.target is operator.getitem:
            inside, index = self.get(node.args[0]), node.args[1]
            return inside[index] if isinstance(inside, list) and isinstance(index, int) else self.refuse(node)
        if node.meta.get("val") is None and not node.users:  # a check without a result
            return FIXED
        inputs = [self.get(n) for n in node.all_input_nodes]
        moving = any(_labelled(value) for value in inputs)
        name = opname(node)
        if not moving and name not in ("aten::expand", "aten::full", "aten::zeros", "aten::ones"):
            return self._fixed_result(node)
        rule = self.rules.get(name)
        if rule is None and name and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
            rule = self.rules["pointwise"]
        if rule is None:
            return self.refuse(node)
        return rule(self, node, arguments(node))

    def _fixed_result(self, node: fx.Node) -> Result:
        if isinstance(node.meta.get("val"), (list, tuple)):
            return [FIXED for _ in node.meta["val"]]
        name = opname(node)
        if name and torch.Tag.pointwise in node.target.tags and not isinstance(node.meta.get("val"), (int, float)):  # type: ignore[union-attr]
            return self.rules["pointwise"](self, node, arguments(node))
        return FIXED

    # What rules ask for

    def get(self, item: Any) -> Result:
        """What a node carries; FIXED for everything that is no node."""
        return self.values.get(item, FIXED) if isinstance(item, fx.Node) else FIXED

    def labels(self, item: Any) -> torch.Tensor | None:
        """The labels of a node, those of a parameter along its last dimension."""
        value = self.get(item)
        return self.carried(value).labels if isinstance(value, (Value, Weight)) else None

    def carried(self, value: Value | Weight, carrier: int | None = None) -> Value:
        """A parameter as a value: labels along `carrier` (default: the last real dimension), the others are blocked."""
        if isinstance(value, Value):
            return value
        real = [d for d, atoms in enumerate(value.atoms) if atoms is not None]
        if not real:
            return FIXED
        carrier = real[-1] if carrier is None else carrier
        for dim in real:
            if dim != carrier:
                self.relations.block(
                    value.atoms[dim], MOVE, f"dimension {dim} of {value.name} is read position by position"
                )
        chosen = value.atoms[carrier]
        return FIXED if chosen is None else Value(spread(chosen, carrier, value.shape), zero=True)

    def refuse(self, node: fx.Node, reason: str = "") -> Result:
        """Block everything that flows into a node; its results stay whole."""
        target = opname(node) or str(node.target)
        for source in node.all_input_nodes:
            self.pin(self.get(source), MOVE, reason or f"{target} is not understood")
        result = node.meta.get("val")
        return [FIXED for _ in result] if isinstance(result, (list, tuple)) else FIXED

    def pin(self, value: Result, level: str, reason: str) -> None:
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Weight):
                for atoms in part.atoms:
                    self.relations.block(atoms, level, reason)
            elif isinstance(part, Value):
                self.relations.block(part.labels, level, reason)

    def inexact(self, labels: torch.Tensor | None, what: str) -> None:
        """Removing would change a result that depends on how many there are; permuting would not."""
        self.relations.block(labels, PRUNE, what)

    def join(self, shape: Sequence[int], operands: Sequence[tuple[Result, Sequence[int]]], zero: bool = False) -> Value:
        """Elementwise: broadcast the operands (value, shape) to `shape`; elements that meet go together."""
        rank, shape = len(shape), tuple(shape)
        fixed: set[int] = set()
        parts: list[tuple[torch.Tensor, frozenset[int]]] = []  # labels, and the dimensions that were broadcast
        weights = []
        for value, own in operands:
            offset = rank - len(own)
            if isinstance(value, Weight):
                weights.append((value, offset))
            elif value.labels is None:
                fixed |= {d + offset for d, size in enumerate(own) if size > 1 and d not in value.wild}
            else:
                parts.append((value.labels.expand(shape), _broadcast(own, rank)))
        used = {d for labels, _ in parts for d in varying(labels)}
        for weight, offset in weights:
            candidates = [d for d, a in enumerate(weight.atoms) if a is not None and d + offset in used]
            labels = self.carried(weight, candidates[0] if len(candidates) == 1 else None).labels
            if labels is not None:
                parts.append((labels.expand(shape), _broadcast(weight.shape, rank)))
        if not parts:
            return Value(wild=frozenset(range(rank)) - fixed)
        result, ones = parts[0]
        for other, broadcast in parts[1:]:
            result = self._meet(result, ones, other, broadcast)
            ones &= broadcast
        return self._against_fixed(result, fixed, zero)

    def _against_fixed(self, labels: torch.Tensor, fixed: set[int], zero: bool) -> Value:
        dims = varying(labels)
        clash = [d for d in dims if d in fixed]
        if clash and len(clash) == len(dims):
            self.relations.block(labels, MOVE, "is combined with a tensor whose dimension is fixed")
            return FIXED
        return value_of(self.relations.collapse(labels, clash), zero)

    def _meet(self, a: torch.Tensor, a_ones: frozenset[int], b: torch.Tensor, b_ones: frozenset[int]) -> torch.Tensor:
        """Two labelled operands of one shape. The outermost dimension that varies carries the units."""
        first, second = varying(a), varying(b)
        if first == second or not first or not second:
            self.relations.unify(a, b)
            return a if first else b
        carrier = min(first + second)
        if carrier in first and carrier in second:
            a = self.relations.collapse(a, [d for d in first if d != carrier])
            b = self.relations.collapse(b, [d for d in second if d != carrier])
            self.relations.unify(a, b)
            return a
        if carrier in second:
            a, b, b_ones, first, second = b, a, a_ones, second, first
        if not set(first) - set(second) <= b_ones:
            self.relations.block(a, MOVE, "is combined with a tensor whose dimension is fixed")
        self.relations.block(b, MOVE, "is shared by all units of another dimension")
        return self.relations.collapse(a, [d for d in first if d in second])


def _labelled(value: Result) -> bool:
    if isinstance(value, list):
        return any(_labelled(v) for v in value)
    return isinstance(value, Weight) or (isinstance(value, Value) and value.labels is not None)


def _broadcast(own: Sequence[int], rank: int) -> frozenset[int]:
    offset = rank - len(own)
    return frozenset(range(offset)) | {d + offset for d, size in enumerate(own) if size == 1}


def value_of(labels: torch.Tensor, zero: bool = False) -> Value:
    """A value with compressed labels; FIXED when none is left, repeating itself everywhere when it has no elements."""
    if not labels.numel():
        return Value(wild=frozenset(range(labels.dim())))
    return Value(compress(labels), zero=zero) if bool(labels.any()) else FIXED


def shape_of(node: Any) -> tuple[int, ...]:
    """The static shape of a node's tensor; () for numbers."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else ()
