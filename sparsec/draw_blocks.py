"""An FX graph with its small nodes folded away: the boxes that a picture shows, and the edges between them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsec.graph import fact
from sparsec.report import Report, Row

_SHAPES = """view reshape permute transpose contiguous size expand unsqueeze squeeze flatten clone detach to float t
    type_as arange zeros ones full new_ones new_zeros zeros_like ones_like lift_fresh_copy to_copy assert_async
    getitem assert_tensor_metadata assert_scalar sym_size sym_numel sym_constrain_range getattr unsafe_view
    dropout"""
_ELEMENTWISE = """relu gelu silu tanh sigmoid add sub mul div truediv neg pow floordiv mod eq ne lt gt le ge and or"""
_WORTH_A_WORD = """add mul sub div relu gelu silu tanh sigmoid hardswish clamp hardtanh softmax pow rsqrt"""

QUIET = frozenset(_SHAPES.split() + _ELEMENTWISE.split())
"""Ops that never deserve a box of their own, beside everything that aten tags as pointwise or declares a view."""

SHOWN = frozenset(_WORTH_A_WORD.split())
"""Folded ops worth a word in the label of the box that took them in."""

ALIASES = {"scaled_dot_product_attention": "attention", "_native_batch_norm_legit_no_training": "batch_norm"}


@dataclass
class Block:
    """One box: a site, a large op, an input, the output, or a bundle of small ops that belong to none of these."""

    kind: str  # site | op | input | output | glue
    name: str
    group: str
    site: str = ""
    row: Row | None = None
    folded: list[str] = field(default_factory=list)  # op names, in order
    nodes: list[str] = field(default_factory=list)


@dataclass
class Blocks:
    """Boxes in topological order, with edges between their indices in ascending order."""

    blocks: list[Block]
    edges: list[tuple[int, int]]


def op_name(node: fx.Node) -> str:
    """The op without namespace and overload: `aten.layer_norm.default` -> `layer_norm`."""
    if node.op == "call_module":
        return str(node.target).rpartition(".")[2]
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).rpartition("::")[2]
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", node.target)).rstrip("_")


def quiet(node: fx.Node) -> bool:
    """True for a node that is folded into a neighbour: elementwise ops, views, shapes and constants."""
    if node.op not in ("call_function", "call_method"):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace != "aten":
            return False
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)
        if view or torch.Tag.pointwise in target.tags:
            return True
    return target is operator.getitem or op_name(node).strip("_") in QUIET


def group_of(path: str) -> str:
    """The part of a module path up to its first number: `encoder.layer.3.output.dense` -> `encoder.layer.3`."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() or part.partition("#")[0].isdigit():
            return ".".join(parts[: i + 1])
    return parts[0] if len(parts) > 1 or path in ("", "<root>") else path


def module_path(node: fx.Node) -> str:
    """The innermost module that the node was captured in, with the use's ordinal; "" at the root."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    key, entry = list(stack.items())[-1]
    path = str(entry[0]).removeprefix("L['self'].")
    use = key.partition("@")[2]
    return f"{path}#{int(use) + 1}" if path and use.isdigit() else path


class _Folder:
    """Folds nodes into blocks one by one, never closing a cycle between blocks."""

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self.blocks: list[Block] = []
        self.parents: list[set[int]] = []
        self.home: dict[fx.Node, int] = {}  # node -> block; constants have none

    def run(self, graph: fx.Graph) -> Blocks:
        for node in graph.nodes:
            if node.op == "get_attr":
                continue
            inputs = sorted({self.home[n] for n in node.all_input_nodes if n in self.home})
            known = fact(node)
            if node.op in ("placeholder", "output"):
                at = self._new(Block("input" if node.op == "placeholder" else "output", node.name, ""))
            elif known is not None:
                row = self.report.row(known.site) if self.report and known.site in self.report else None
                block = Block("site", known.site, group_of(known.site), known.site, row)
                block.folded += [s.name for s in known.epilogue]
                at = self._new(block)
            elif quiet(node):
                at = self._quiet(node, inputs)
                self.blocks[at].folded.append(op_name(node).strip("_"))
            else:
                name = op_name(node)
                at = self._new(Block("op", ALIASES.get(name, name.strip("_")), group_of(module_path(node))))
            self.blocks[at].nodes.append(node.name)
            self.home[node] = at
            self.parents[at] |= set(inputs) - {at}
        return self._sorted()

    def _new(self, block: Block) -> int:
        self.blocks.append(block)
        self.parents.append(set())
        return len(self.blocks) - 1

    def _quiet(self, node: fx.Node, inputs: list[int]) -> int:
        """The block that takes in a quiet node: its latest producer that is no input, else a bundle of its own."""
        for at in reversed(inputs):
            if self.blocks[at].kind != "input" and not any(self._reaches(at, other) for other in inputs if other != at):
                return at
        group = group_of(module_path(node))
        for at in reversed(range(len(self.blocks))):
            block = self.blocks[at]
            if block.kind == "glue" and block.group == group and not any(self._reaches(at, i) for i in inputs):
                return at
        return self._new(Block("glue", "small ops", group))

    def _reaches(self, start: int, end: int) -> bool:
        """True when `end` depends on `start`."""
        seen, todo = set(), [end]
        while todo:
            at = todo.pop()
            if at == start:
                return True
            if at not in seen:
                seen.add(at)
                todo += self.parents[at]
        return False

    def _sorted(self) -> Blocks:
        """Blocks in a topological order that follows the order of creation wherever it can."""
        import heapq

        waiting = [len(p) for p in self.parents]
        children: list[list[int]] = [[] for _ in self.blocks]
        for at, parents in enumerate(self.parents):
            for p in parents:
                children[p].append(at)
        ready = [at for at, n in enumerate(waiting) if n == 0]
        heapq.heapify(ready)
        order: list[int] = []
        while ready:
            at = heapq.heappop(ready)
            order.append(at)
            for child in children[at]:
                waiting[child] -= 1
                if waiting[child] == 0:
                    heapq.heappush(ready, child)
        place = {at: i for i, at in enumerate(order)}
        edges = sorted((place[p], place[at]) for at, parents in enumerate(self.parents) for p in parents)
        return Blocks([self.blocks[at] for at in order], edges)


def fold(graph: fx.Graph, report: Report | None = None) -> Blocks:
    """Fold `graph` into blocks; rows of `report` are attached to the sites they name."""
    return _Folder(report).run(graph)


def shown(folded: Iterable[Any]) -> str:
    """The folded ops worth a word, once each: `+ gelu, add`."""
    words = [w for w in dict.fromkeys(folded) if w.removesuffix("_tanh") in SHOWN]
    return "+ " + ", ".join(words) if words else ""
