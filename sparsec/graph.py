"""The graph that passes see: facts about sites, constants and where they come from, and the edit primitives."""

from __future__ import annotations

import dataclasses
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsec.aten import WEIGHT_OPS as WEIGHT_OPS
from sparsec.aten import arguments as arguments
from sparsec.aten import operands as operands
from sparsec.aten import opname as opname
from sparsec.errors import PassError
from sparsec.recipes import Constant as Constant
from sparsec.recipes import call
from sparsec.recipes import evaluate as evaluate
from sparsec.recipes import invert as invert
from sparsec.recipes import invertible as invertible

KEY = "sparsec"
"""Facts live under `node.meta[KEY]`, graph-wide records under `gm.meta[KEY]`."""


@dataclass(frozen=True)
class Structure:
    """A structure that every entry of a weight obeys, e.g. `Structure("nm", (2, 4))`, `Structure("block", (16, 1))`."""

    kind: str  # unstructured | nm | block | fan_in | banded | block_diagonal | zero_rows | zero_cols | dense
    params: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.params))})" if self.params else self.kind


@dataclass(frozen=True)
class Fact:
    """What is known about one site; passes add to it with `dataclasses.replace` and never wipe it.

    `shape` is the weight as stored by the node; `matrix` the (out, in) matrix that formats pack.
    """

    site: str  # qualified module name, `<root>`, `path#2` for a second use
    op: str  # linear | conv1d | conv2d | conv3d | embedding | bmm | matmul
    module: str  # type name of the owning module, "" for a functional call
    weight: str  # root attribute
    bias: str | None
    shape: tuple[int, ...]
    dtype: str  # "float32"
    nnz: int = -1
    structures: tuple[Structure, ...] = ()
    refusal: tuple[str, str] | None = None  # (code, sentence): why the site must stay dense
    epilogue: tuple[Any, ...] = ()  # codegen Steps, in order
    absorbed: tuple[str, ...] = ()  # names of the nodes that the epilogue replaces, last one is the site's new output
    residual: str | None = None  # name of the node that an `add` step reads
    choice: Any = None  # the Choice of select

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of the packed matrix: a convolution flattens (in/groups, *kernel) in C order."""
        out = self.shape[0]
        return out, _product(self.shape[1:])

    @property
    def density(self) -> float:
        return self.nnz / max(1, _product(self.shape))


# Reading


def fact(node: fx.Node) -> Fact | None:
    """The site fact of a node, if it is a site."""
    return node.meta.get(KEY)


def update(node: fx.Node, **changes: Any) -> Fact:
    """Add to the fact of a site node; raises PassError on a node that carries none."""
    old = fact(node)
    if old is None:
        raise PassError(f"node {node.name!r} is no site: it carries no fact; run `annotate` first")
    new = dataclasses.replace(old, **changes)
    node.meta[KEY] = new
    return new


def sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Fact]]:
    """Every site node with its fact, in graph order."""
    for node in gm.graph.nodes:
        known = fact(node)
        if known is not None:
            yield node, known


def constants(gm: fx.GraphModule) -> dict[str, Constant]:
    """Root attribute -> Constant, shared by every pass; passes that make constants add to it."""
    table: dict[str, Constant] = gm.meta.setdefault(KEY, {}).setdefault("constants", {})
    return table


def ties(gm: fx.GraphModule) -> dict[str, str]:
    """State-dict name -> the name it is tied to, for ties whose shared tensor was folded into another constant."""
    table: dict[str, str] = gm.meta.setdefault(KEY, {}).setdefault("ties", {})
    return table


def get_constant(gm: fx.GraphModule, name: str) -> torch.Tensor:
    """The tensor behind a get_attr target (flat or dotted)."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def owner(node: fx.Node) -> tuple[str, str]:
    """(qualified path, type name) of the module that called `node`; the root's path is "".

    Read from `nn_module_stack`, never from the attribute: tied weights all carry the last name.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    return path, kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__


def site_names(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Unique site names in the given order: the owning module's path, `<root>`, and `path#2` for a second use."""
    seen: dict[str, int] = {}
    names: dict[fx.Node, str] = {}
    for node in nodes:
        path = owner(node)[0] or "<root>"
        seen[path] = seen.get(path, 0) + 1
        names[node] = path if seen[path] == 1 else f"{path}#{seen[path]}"
    return names


def epilogue_nodes(gm: fx.GraphModule, node: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node | None]:
    """The nodes that a site's epilogue replaces, in graph order, and the node its `add` step reads.

    The residual is read from the absorbed add itself, because an earlier rewrite may have renamed it since `fuse`.
    Raises PassError when an absorbed node has disappeared.
    """
    known = fact(node)
    if known is None or not known.absorbed:
        return (), None
    table = {n.name: n for n in gm.graph.nodes}
    missing = [name for name in known.absorbed if name not in table]
    if missing:
        raise PassError(
            f"site {known.site!r}: absorbed node {missing[0]!r} is gone; run `fuse` after the pass that removed it"
        )
    absorbed = tuple(table[name] for name in known.absorbed)
    inside = {node, *absorbed}
    outside = [n for a in absorbed for n in a.all_input_nodes if n not in inside]
    if len(outside) > 1 or bool(outside) != (known.residual is not None):
        raise PassError(f"site {known.site!r}: its epilogue reads {outside}; run `fuse` again after changing the graph")
    return absorbed, outside[0] if outside else None


# Editing


def add_constant(
    gm: fx.GraphModule,
    name: str,
    tensor: torch.Tensor,
    origin: Constant | None = None,
    *,
    parameter: bool = False,
    persistent: bool = True,
) -> str:
    """Register `tensor` flat on the root under a free name near `name`, with its origin; returns the name.

    Without an origin the constant is known to be no state-dict entry. A Parameter, or any tensor with
    `parameter` (frozen then), becomes a parameter, everything else a buffer.
    """
    flat = re.sub(r"\W", "_", name) or "constant"
    if flat[0].isdigit() or keyword.iskeyword(flat):
        flat = "_" + flat
    free, ordinal = flat, 0
    while hasattr(gm, free):
        ordinal += 1
        free = f"{flat}_{ordinal}"
    if parameter and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        gm.register_parameter(free, tensor)
    else:
        gm.register_buffer(free, tensor, persistent=persistent)
    constants(gm)[free] = origin or Constant(())
    return free


def remove_constant(gm: fx.GraphModule, name: str) -> None:
    """Delete a root attribute and its record; raises PassError while a node still reads it."""
    reader = next((n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name), None)
    if reader is not None:
        raise PassError(f"constant {name!r} is still read by node {reader.name!r}; erase the node first")
    delattr(gm, name)
    constants(gm).pop(name, None)


def constant_node(gm: fx.GraphModule, name: str, before: fx.Node) -> fx.Node:
    """A get_attr node for a root attribute that may be used at `before`: an earlier one if there is one, else new."""
    for node in gm.graph.nodes:
        if node is before:
            break
        if node.op == "get_attr" and node.target == name:
            return node  # type: ignore[no-any-return]
    with gm.graph.inserting_before(before):
        return gm.graph.get_attr(name)


def move_to_front(operand: fx.Node | None) -> None:
    """Make a get_attr readable from everywhere: it depends on nothing, so it moves freely. Other nodes stay."""
    if operand is not None and operand.op == "get_attr":
        first = next(n for n in operand.graph.nodes if n.op != "placeholder")
        if first is not operand:
            first.prepend(operand)


def take_over(new: fx.Node, node: fx.Node, absorbed: Sequence[fx.Node]) -> None:
    """Let `new` stand for a site and what it absorbed: their uses, the meta of the one, the value of the last."""
    last = absorbed[-1] if absorbed else node
    new.meta = {**node.meta, "val": last.meta.get("val", node.meta.get("val"))}
    last.replace_all_uses_with(new)
    for old in (*reversed(absorbed), node):
        node.graph.erase_node(old)


def trace_into(before: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
    """Insert before `before` the calls that `function` makes on `args`; nodes among them act as tensors."""
    graph = before.graph
    tracer = fx.proxy.GraphAppendingTracer(graph)
    with graph.inserting_before(before):
        result = function(*(fx.Proxy(a, tracer) if isinstance(a, fx.Node) else a for a in args))
    return result.node  # type: ignore[no-any-return]


def replace_weight_op(
    gm: fx.GraphModule,
    node: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    absorbed: Sequence[fx.Node] = (),
) -> fx.Node:
    """Put a call of `target` in the place of `node` and of the `absorbed` nodes after it; returns the new node.

    It inherits the meta of `node` and the value of the last absorbed one. Constants that only the old nodes read are
    removed from graph and root, in this order: new call, uses, old calls, their get_attr, attributes.
    """
    last = absorbed[-1] if absorbed else node
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(target, args, kwargs or {})
    new.meta = dict(node.meta)
    if "val" in last.meta:
        new.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(new)
    read = [n for n in node.all_input_nodes if n.op == "get_attr"]
    for old in (*reversed(absorbed), node):
        gm.graph.erase_node(old)
    drop_unread(gm, read)
    return new


def drop_unread(gm: fx.GraphModule, reads: Iterable[fx.Node]) -> list[str]:
    """Of some get_attr nodes, erase those without users, and root attributes that nothing reads then; their names."""
    dead = [n for n in dict.fromkeys(reads) if n.op == "get_attr" and not n.users]
    for node in dead:
        gm.graph.erase_node(node)
    left = _read(gm)
    gone = [name for name in dict.fromkeys(str(n.target) for n in dead) if name not in left]
    for name in gone:
        remove_constant(gm, name)
    return gone


def drop_dead_constants(gm: fx.GraphModule) -> list[str]:
    """Erase get_attr nodes without users and every parameter and buffer of the root that nothing reads; their names."""
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]:
        gm.graph.erase_node(node)
    left = _read(gm)
    gone = [name for name in (*gm._parameters, *gm._buffers) if name not in left]
    for name in gone:
        remove_constant(gm, name)
    return gone


def _read(gm: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}


# Constants that are computed from constants


def mutated(gm: fx.GraphModule) -> frozenset[str]:
    """Root attributes that the graph writes (running statistics of a training capture): they are no constants."""
    found = []
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            found += [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    return frozenset(found)


def constant_nodes(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """Nodes whose value depends on root attributes alone, in graph order: ATen calls that are pure and not random."""
    written = mutated(gm)
    known: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            fixed = node.target not in written and isinstance(get_constant(gm, node.target), torch.Tensor)
        else:
            fixed = pure(node) and all(n in known for n in node.all_input_nodes)
        if fixed:
            known[node] = None
    return known


def fold_constants(gm: fx.GraphModule, only_weights: bool = True, also: Sequence[fx.Node] = ()) -> int:
    """`linear(x, t(w)) --> linear(x, w_t)`: evaluate what is computed from constants alone; returns how many.

    With `only_weights` only what stands in weight or bias position of a weight op, and `also`. Every result is
    registered flat with a recipe that `evaluate` can replay on other weights; equal expressions become one attribute.
    """
    known = constant_nodes(gm)
    roots: dict[fx.Node, None] = dict.fromkeys(n for n in also if n in known)
    for node in gm.graph.nodes:
        if node not in known:
            inputs = operands(node, bias=True) if only_weights else node.all_input_nodes
            roots.update(dict.fromkeys(n for n in inputs if n in known and n.op != "get_attr"))
    made: dict[Any, fx.Node] = {}
    first = next((n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
    for root in roots:
        key = _expression(root)
        if key not in made:
            name = _register(gm, cone(root))
            with gm.graph.inserting_before(first):
                made[key] = gm.graph.get_attr(name)
            if "val" in root.meta:
                made[key].meta["val"] = root.meta["val"]
        root.replace_all_uses_with(made[key])
    if roots:
        _sweep(gm, roots)
    return len(roots)


def pure(node: fx.Node) -> bool:
    """Whether a node is an ATen call without effects and without chance (or an element of a result)."""
    target = node.target
    if node.op != "call_function":
        return False
    if target is operator.getitem:
        return isinstance(node.args[1], int)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    return not (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags)


def cone(root: fx.Node) -> list[fx.Node]:
    """The nodes that `root` is computed from, itself included, inputs first."""
    order: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in order:
                visit(source)
        order[node] = None

    visit(root)
    return list(order)


def _expression(node: fx.Node) -> Any:
    """A hashable form of what a constant node computes: equal forms have equal values."""
    if node.op == "get_attr":
        return node.target
    known: dict[Any, str] = {n: f"<{_expression(n)}>" for n in node.all_input_nodes}
    return str(node.target), repr(fx.node.map_aggregate((node.args, node.kwargs), lambda v: known.get(v, v)))


def _register(gm: fx.GraphModule, nodes: list[fx.Node]) -> str:
    """Evaluate the last node of `nodes` and put it on the root; returns its name."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            leaf = node.op == "get_attr"
            values[node] = get_constant(gm, str(node.target)).detach() if leaf else call(node, values)
    tensor = values[nodes[-1]]
    names = [str(n.target) for n in nodes if n.op == "get_attr"]
    learned = any(isinstance(get_constant(gm, name), nn.Parameter) for name in names)
    stem = names[0] if names else nodes[-1].name
    stem = stem if stem.endswith("_folded") else f"{stem}_folded"
    return add_constant(gm, stem, tensor, _recipe(gm, nodes), parameter=learned and tensor.is_floating_point())


def _recipe(gm: fx.GraphModule, nodes: list[fx.Node]) -> Constant:
    """The origin of the last node of `nodes`; recipes of constants that were folded before are inlined."""
    table = constants(gm)
    origins = {n: table.get(str(n.target), Constant(())) for n in nodes if n.op == "get_attr"}
    sources: dict[str, None] = {}
    for origin in origins.values():
        names = origin.sources if origin.recipe is not None else origin.sources[:1]
        sources.update(dict.fromkeys(names))
        for tied in origin.sources[len(names) :]:
            ties(gm)[tied] = names[0]
    graph = fx.Graph()
    inputs = {name: graph.placeholder(f"source_{i}") for i, name in enumerate(sources)}
    literals: list[torch.Tensor] = []

    def literal(tensor: torch.Tensor) -> fx.Node:
        literals.append(tensor.detach())
        return graph.placeholder(f"literal_{len(literals) - 1}")

    fed: dict[fx.Node, list[fx.Node]] = {}
    for node, origin in origins.items():  # every placeholder before the first call
        if origin.sources or origin.recipe is not None:
            names = origin.sources if origin.recipe is not None else origin.sources[:1]
            fed[node] = [inputs[name] for name in names] + [literal(t) for t in origin.literals]
        else:
            fed[node] = [literal(get_constant(gm, str(node.target)))]
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        inner = origins[node].recipe if node in origins else None
        if node not in origins:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = {}
        elif inner is None:
            values[node] = fed[node][0]
        else:
            holes = [n for n in inner.nodes if n.op == "placeholder"]
            values[node] = graph.graph_copy(inner, dict(zip(holes, fed[node], strict=True)))
    graph.output(values[nodes[-1]])
    return Constant(tuple(sources), graph, tuple(literals))


def _sweep(gm: fx.GraphModule, roots: Iterable[fx.Node]) -> None:
    """Erase folded expressions, and the constants that nothing reads any more."""
    cones = {node for root in roots for node in cone(root)}
    for node in [n for n in reversed(gm.graph.nodes) if n in cones and n.op != "get_attr"]:
        if not node.users:
            gm.graph.erase_node(node)
    drop_unread(gm, [n for n in gm.graph.nodes if n in cones])


def _product(dims: tuple[int, ...]) -> int:
    return math.prod(dims)
