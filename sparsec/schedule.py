"""How a compiled graph runs: the same graph, with consecutive kernels as one `sparsec.stream`.

What users inspect, save and edit keeps a node for every kernel. Nodes that shall run as a stream carry its number in
their meta, and only the code that a compiled module runs is made from the scheduled copy. A number is a wish: where the
nodes cannot be one stream (any more), they run one by one.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsec.codegen import stream as streams
from sparsec.codegen.kernel import KernelSpec
from sparsec.codegen.stream import Step, Stream
from sparsec.errors import SpecError
from sparsec.ops import conv, pool
from sparsec.ops import stream as op

STREAM = "sparsec.stream"
"""Key of a node's meta: the number of the stream that it is a step of."""

LEAST = 2  # steps of a stream


@dataclass(frozen=True)
class Group:
    """Nodes that run as one stream: what it reads, its operands, and which nodes are read outside."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    stream: Stream


def candidates(graph: fx.Graph) -> list[Group]:
    """The longest groups of kernels that can run as streams, in the order of the graph, whose nodes have values."""
    found: list[Group] = []
    members: dict[fx.Node, KernelSpec] = {}
    behind: set[fx.Node] = set()  # what depends on members and is none

    def close() -> None:
        group = describe(list(members)) if len(members) >= LEAST else None
        if group is not None:
            found.append(group)
        members.clear()
        behind.clear()

    for node in graph.nodes:
        if _writes(node):
            close()
            continue
        spec = _step(node, members)
        if spec is None or not _batched(node, spec):
            if any(read in behind or read in members for read in node.all_input_nodes):
                behind.add(node)
            continue
        if members and (_kind(node) != _kind(next(iter(members))) or behind.intersection(node.all_input_nodes)):
            close()
        members[node] = spec
    close()
    return found


def describe(nodes: Sequence[fx.Node]) -> Group | None:
    """The stream that these nodes are, in their order; None when they are not the steps of one."""
    known: dict[fx.Node, KernelSpec] = {}
    inputs: list[fx.Node] = []
    operands: list[fx.Node] = []
    reads: list[tuple[fx.Node, fx.Node | None]] = []
    rest: list[tuple[bool, int]] = []
    for node in nodes:
        if (spec := _step(node, known)) is None:
            return None
        buffers, bias, residual = node.args[1:4] if node.target is conv.OVERLOAD else ((), None, None)
        mine = [*([] if bias is None else [bias]), *buffers]  # type: ignore[misc]
        if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in mine):
            return None
        x = node.args[0]
        if not isinstance(x, fx.Node) or not isinstance(residual, fx.Node | None):
            return None
        inputs += [r for r in (x, residual) if r is not None and r not in known and r not in inputs]
        operands += mine
        reads.append((x, residual))
        rest.append((bias is not None, len(buffers)))  # type: ignore[arg-type]
        known[node] = spec
    number = {node: place for place, node in enumerate((*inputs, *nodes))}
    outputs = [node for node in nodes if any(user not in known for user in node.users)]
    steps = tuple(
        Step(spec.text(), number[x], -1 if residual is None else number[residual], *more)
        for spec, (x, residual), more in zip(known.values(), reads, rest, strict=True)
    )
    try:
        stream = Stream(len(inputs), steps, tuple(number[node] for node in outputs))
    except SpecError:
        return None
    return Group(tuple(nodes), tuple(inputs), tuple(operands), tuple(outputs), stream)


def _step(node: fx.Node, known: Mapping[fx.Node, KernelSpec]) -> KernelSpec | None:
    """The kernel that a node runs, if it can be a step of a stream; `known` are those of the nodes before."""
    if node.target is conv.OVERLOAD and len(node.args) == 5 and isinstance(node.args[4], str):
        try:
            spec: KernelSpec | None = streams.parsed(node.args[4])
        except SpecError:
            return None
    elif node.target is pool.OVERLOAD and isinstance(x := node.args[0], fx.Node):
        value = x.meta.get("val")
        if (before := known.get(x)) is not None:
            spec = pool.spec_of(before.output_shape, before.dtype, *node.args[1:])
        elif isinstance(value, torch.Tensor):
            spec = pool.spec_of(tuple(value.shape[1:]), str(value.dtype).removeprefix("torch."), *node.args[1:])
        else:
            return None
    else:
        return None
    return spec if spec is not None and streams.refuse(spec) is None else None


def scheduled(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph in which every marked group is one op, or the graph itself where none is."""
    marked: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if isinstance(number := node.meta.get(STREAM), int):
            marked.setdefault(number, []).append(node)
    groups = [g for nodes in marked.values() if len(nodes) >= LEAST and (g := describe(nodes)) is not None]
    while groups:
        order = _order(graph, groups)
        if order is not None:
            return _copy(graph, order)
        groups.pop()  # something between its nodes needs one of them and is needed by another
    return graph


Unit = fx.Node | Group


def _order(graph: fx.Graph, groups: Sequence[Group]) -> list[Unit] | None:
    """Nodes and groups such that each comes behind what it reads, else in the order of the graph; None: impossible."""
    owner: dict[fx.Node, Unit] = {node: group for group in groups for node in group.nodes}
    position = {owner.get(node, node): place for place, node in enumerate(graph.nodes)}  # a group's is that of its last
    missing: dict[Unit, int] = {}
    users: dict[Unit, list[Unit]] = {unit: [] for unit in position}
    for unit in position:
        reads = {
            owner.get(r, r) for n in (unit.nodes if isinstance(unit, Group) else (unit,)) for r in n.all_input_nodes
        }
        reads.discard(unit)
        missing[unit] = len(reads)
        for read in reads:
            users[read].append(unit)
    ready = [(place, unit) for unit, place in position.items() if not missing[unit]]
    heapq.heapify(ready)
    order: list[Unit] = []
    while ready:
        _, unit = heapq.heappop(ready)
        order.append(unit)
        for user in users[unit]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (position[user], user))
    return order if len(order) == len(position) else None


def _copy(graph: fx.Graph, order: Sequence[Unit]) -> fx.Graph:
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    env: dict[fx.Node, fx.Node] = {}
    for unit in order:
        if isinstance(unit, fx.Node):
            env[unit] = new.node_copy(unit, env.__getitem__)
            continue
        arguments = ([env[n] for n in unit.inputs], [env[n] for n in unit.operands], unit.stream.text())
        made = new.call_function(op.OVERLOAD, arguments)
        made.meta["val"] = [node.meta.get("val") for node in unit.outputs]
        for place, node in enumerate(unit.outputs):
            env[node] = new.call_function(operator.getitem, (made, place))
            env[node].meta["val"] = node.meta.get("val")
    new.set_codegen(graph._codegen)
    return new


def _kind(node: fx.Node) -> tuple[str, str]:
    """Batch and dtype, which all steps of a stream share."""
    value = node.meta["val"]
    return str(value.shape[0]), str(value.dtype)


def _batched(node: fx.Node, spec: KernelSpec) -> bool:
    """Whether a node is known to compute a batch of images on the CPU, rather than one without its batch."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() == 1 + len(spec.output_shape)


def _writes(node: fx.Node) -> bool:
    """Whether a node changes a tensor in place: nothing moves across it."""
    schema = getattr(node.target, "_schema", None)
    return (schema is not None and bool(schema.is_mutable)) or (
        node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    )
