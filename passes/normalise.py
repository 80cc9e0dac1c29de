"""normalise: one spelling for everything that carries a weight, and nothing that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsec.aten import arguments, operands, opname, same_shape, same_size, set_argument
from sparsec.driver import Context, Pass
from sparsec.graph import (
    Constant,
    cone,
    constant_nodes,
    constants,
    drop_unread,
    fold_constants,
    get_constant,
    mutated,
    pure,
)

aten = torch.ops.aten


class Normalise(Pass):
    """Products with a constant --> aten.linear; `w.t()`, casts, `w / norm(w)` --> one attribute; no-ops --> nothing.

    Results are unchanged but for the order of summation inside a product. A training capture keeps its constant
    expressions, because gradients flow through them.
    """

    name = "normalise"
    ensures = ("normalised",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        changes = _one_reader(gm) + _drop_noops(gm)
        if not ctx.options.training:
            changes += _spell_out(gm) + _products(gm) + _batched(gm) + _unflatten(gm)
        changes += _positional(gm) + _dead_code(gm)  # before folding: what nobody uses must not keep a constant alive
        return changes if ctx.options.training else changes + fold_constants(gm)


def _dead_code(gm: fx.GraphModule) -> int:
    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code()
    return before - len(gm.graph.nodes)


def _one_reader(gm: fx.GraphModule) -> int:
    """Several get_attr of one tensor, under one name or tied names --> one get_attr; the record keeps all names."""
    written = mutated(gm)
    first: dict[Any, fx.Node] = {}
    merged: list[fx.Node] = []
    table = constants(gm)
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and n.target not in written]:
        tensor = get_constant(gm, str(node.target))
        if not isinstance(tensor, torch.Tensor):
            continue
        place = (tensor.data_ptr() or id(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())
        keep = first.setdefault(place, node)
        if keep is node:
            continue
        a, b = table.get(str(keep.target), Constant(())), table.get(str(node.target), Constant(()))
        if keep.target != node.target:
            if a.recipe is not None or b.recipe is not None:
                continue
            table[str(keep.target)] = Constant(tuple(dict.fromkeys((*a.sources, *b.sources))))
        node.replace_all_uses_with(keep)
        merged.append(node)
    drop_unread(gm, merged)
    return len(merged)


# What does nothing


def _drop_noops(gm: fx.GraphModule) -> int:
    """Casts to the same dtype, copies nobody can tell from the original, eval-mode dropout, metadata checks."""
    copies_may_go = not any(_writes(n) for n in gm.graph.nodes)
    shared = _leaving(gm)
    count = 0
    for node in list(gm.graph.nodes):
        name = opname(node)
        if name == "aten::_assert_tensor_metadata":
            gm.graph.erase_node(node)
        elif name in _NOOPS and isinstance(node.args[0] if node.args else None, fx.Node) and _NOOPS[name](node):
            source = node.args[0]
            if name in _COPIES and not (copies_may_go and (node not in shared or _fresh(source))):
                continue
            node.replace_all_uses_with(source)
            if node in shared:
                shared.add(source)
            gm.graph.erase_node(node)
        else:
            continue
        count += 1
    return count


def _always(node: fx.Node) -> bool:
    return True


def _inactive(node: fx.Node) -> bool:
    bound = arguments(node)
    return bound["train"] is False or bound["p"] == 0


def _same_shape(node: fx.Node) -> bool:
    return same_shape(node.args[0].meta.get("val"), node.meta.get("val"))  # type: ignore[union-attr]


def _same_layout(node: fx.Node) -> bool:
    """Whether input and output agree in shape, dtype, device and strides."""
    a, b = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if a is None or b is None or not same_shape(a, b) or a.device != b.device or a.layout != b.layout:
        return False
    return all(same_size(x, y) for x, y in zip(a.stride(), b.stride()))


_NOOPS: dict[str, Callable[[fx.Node], bool]] = {
    "aten::alias": _always,
    "aten::dropout": _inactive,
    "aten::feature_dropout": _inactive,
    "aten::alpha_dropout": _inactive,
    "aten::view": _same_shape,
    "aten::reshape": _same_shape,
    "aten::_unsafe_view": _same_shape,
    "aten::expand": _same_shape,
    "aten::contiguous": _same_layout,
    "aten::to": _same_layout,
    "aten::clone": _same_layout,
    "aten::_to_copy": _same_layout,
    "aten::lift_fresh_copy": _same_layout,
}
_COPIES = frozenset({"aten::clone", "aten::_to_copy", "aten::lift_fresh_copy", "aten::to"})


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    """Whether the output may share memory with an input; unknown calls may."""
    if isinstance(node.target, torch._ops.OpOverload):
        return any(r.alias_info is not None for r in node.target._schema.returns)
    return node.op != "placeholder" and node.op != "get_attr"


def _leaving(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose memory the caller gets: the outputs and what they are views of."""
    found: set[fx.Node] = set()
    stack = [n for node in gm.graph.nodes if node.op == "output" for n in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes if _is_view(node) else []
    return found


def _fresh(node: fx.Node) -> bool:
    """Whether `node` makes new memory that only its one user sees: then a copy of it is as good as itself."""
    return node.op == "call_function" and not _is_view(node) and len(node.users) == 1


# Constant expressions of a traced graph


def _spell_out(gm: fx.GraphModule) -> int:
    """`w.t()`, `w / torch.norm(w)` --> ATen calls, for what a traced graph computes from constants for a weight op."""
    written = mutated(gm)
    settled: set[fx.Node] = set()
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        call = node.op in ("call_function", "call_method") and inputs and all(n in settled for n in inputs)
        if call or (node.op == "get_attr" and node.target not in written):
            settled.add(node)
    roots: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node not in settled:
            roots.update(dict.fromkeys(n for n in operands(node, bias=True) if n in settled))
    opaque = [root for root in roots if any(n.op != "get_attr" and not opname(n) for n in cone(root))]
    return sum(_spell(gm, root) for root in opaque)


def _spell(gm: fx.GraphModule, root: fx.Node) -> int:
    """Trace the expression on fake tensors; it stays opaque when it cannot be traced or is not a pure function."""
    from torch.fx.experimental.proxy_tensor import make_fx

    nodes = cone(root)
    leaves = [n for n in nodes if n.op == "get_attr"]

    def run(*tensors: torch.Tensor) -> Any:
        values: dict[fx.Node, Any] = dict(zip(leaves, tensors))
        for node in nodes:
            if node not in values:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                method = getattr(args[0], str(node.target)) if node.op == "call_method" else None
                values[node] = method(*args[1:], **kwargs) if method else node.target(*args, **kwargs)  # type: ignore[operator]
        return values[root]

    try:
        with torch.no_grad():
            traced = make_fx(run, tracing_mode="fake")(*(get_constant(gm, str(n.target)).detach() for n in leaves))
    except Exception:  # an arbitrary function of the model, which nothing promises to be traceable
        return 0
    graph = traced.graph
    if any(n.op == "get_attr" or (n.op == "call_function" and not pure(n)) for n in graph.nodes):
        return 0
    holes = [n for n in graph.nodes if n.op == "placeholder"]
    with gm.graph.inserting_before(root):
        new = gm.graph.graph_copy(graph, dict(zip(holes, leaves, strict=True)))
    if not isinstance(new, fx.Node):
        return 0
    root.replace_all_uses_with(new)
    return 1


# Products with a constant


def _products(gm: fx.GraphModule) -> int:
    """`addmm(b, x, W)`, `x @ W`, `einsum("bi,io->bo", x, W)` --> `linear(x, W.t(), b)`."""
    known = constant_nodes(gm)
    count = 0
    for node in list(gm.graph.nodes):
        form = _FORMS.get(opname(node))
        parts = form(node, gm, known) if form is not None and node not in known else None
        if parts is None:
            continue
        x, weight, transposed, bias = parts
        with gm.graph.inserting_before(node):
            weight = _transposed(gm, weight) if transposed else weight
            args = (x, weight) if bias is None else (x, weight, bias)
            new = gm.graph.call_function(aten.linear.default, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        count += 1
    return count


Parts = tuple[fx.Node, fx.Node, bool, fx.Node | None]
"""x, weight, whether linear needs the weight transposed, bias."""
Known = dict[fx.Node, None]


def _addmm(node: fx.Node, gm: fx.GraphModule, known: Known) -> Parts | None:
    bound = arguments(node)
    bias, x, weight = bound["self"], bound["mat1"], bound["mat2"]
    if weight not in known or x in known or bound["beta"] != 1 or bound["alpha"] != 1:
        return None
    sizes, wide = _shape(gm, bias), _shape(gm, weight)
    if sizes is None or wide is None or len(sizes) != 1 or not same_size(sizes[0], wide[1]):
        return None
    return x, weight, True, bias


def _matmul(node: fx.Node, gm: fx.GraphModule, known: Known) -> Parts | None:
    bound = list(arguments(node).values())
    x, weight = bound[:2]
    if weight not in known or x in known or len(_shape(gm, weight) or ()) != 2:
        return None
    return x, weight, True, None


def _einsum(node: fx.Node, gm: fx.GraphModule, known: Known) -> Parts | None:
    bound = arguments(node)
    left, arrow, out = bound["equation"].replace(" ", "").partition("->")
    labels, tensors = left.split(","), list(bound["tensors"])
    if not arrow or len(tensors) != 2 or sum(t in known for t in tensors) != 1:
        return None
    if tensors[0] in known:
        labels, tensors = labels[::-1], tensors[::-1]
    (a, w), (x, weight) = labels, tensors
    if len(w) != 2 or w[0] == w[1] or "." in w or len(set(a.replace(".", ""))) != len(a.replace(".", "")):
        return None
    inner, outer = (w[1], w[0]) if w[1] in a else (w[0], w[1])
    if not a.endswith(inner) or outer in a or out != a[:-1] + outer:
        return None
    return x, weight, inner == w[0], None


def _batched(gm: fx.GraphModule) -> int:
    """`einsum("nbi,bio->nbo", x, W)` --> `permute(bmm(permute(x), W))`, which is how torch computes it."""
    known = constant_nodes(gm)
    count = 0
    for node in list(gm.graph.nodes):
        form = _batch_form(node, known) if opname(node) == "aten::einsum" and node not in known else None
        if form is None:
            continue
        x, weight, (first, second, back) = form
        with gm.graph.inserting_before(node):
            left, right = (t if o == [0, 1, 2] else _permuted(gm, t, o) for t, o in ((x, first), (weight, second)))
            new = gm.graph.call_function(aten.bmm.default, (left, right))
            values = [get_constant(gm, str(t.target)) if t.op == "get_attr" else t.meta.get("val") for t in (x, weight)]
            new.meta = {k: value for k, value in node.meta.items() if k != "val"}
            if all(isinstance(t, torch.Tensor) for t in values):
                new.meta["val"] = node.meta["val"].permute([back.index(d) for d in range(3)])
            last = new if back == [0, 1, 2] else _permuted(gm, new, back)
        if last is not new:
            last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        gm.graph.erase_node(node)
        count += 1
    return count


def _permuted(gm: fx.GraphModule, source: fx.Node, order: list[int]) -> fx.Node:
    made = gm.graph.call_function(aten.permute.default, (source, order))
    if isinstance(source.meta.get("val"), torch.Tensor):
        made.meta["val"] = source.meta["val"].permute(order)
    return made


def _batch_form(node: fx.Node, known: Known) -> tuple[fx.Node, fx.Node, tuple[list[int], list[int], list[int]]] | None:
    """x, weight, and the orders that make them and the result (batch, rows, in), (batch, in, out), and the einsum's."""
    bound = arguments(node)
    left, arrow, out = bound["equation"].replace(" ", "").partition("->")
    labels, tensors = left.split(","), list(bound["tensors"])
    if not arrow or len(tensors) != 2 or sum(t in known for t in tensors) != 1 or "val" not in node.meta:
        return None
    if tensors[0] in known:
        labels, tensors = labels[::-1], tensors[::-1]
    a, w = labels
    if any(len(t) != 3 or len(set(t)) != 3 or "." in t for t in (a, w, out)):
        return None
    place = [(c in a, c in w, c in out) for c in dict.fromkeys(a + w + out)]
    kinds = [(True, True, True), (True, False, True), (True, True, False), (False, True, True)]
    if sorted(place) != sorted(kinds):
        return None
    batch, rows, inner, outer = (next(c for c, p in zip(dict.fromkeys(a + w + out), place) if p == k) for k in kinds)
    order = [a.index(c) for c in (batch, rows, inner)], [w.index(c) for c in (batch, inner, outer)]
    return tensors[0], tensors[1], (*order, [(batch, rows, outer).index(c) for c in out])


_FORMS: dict[str, Callable[[fx.Node, fx.GraphModule, Known], Parts | None]] = {
    "aten::addmm": _addmm,
    "aten::mm": _matmul,
    "aten::matmul": _matmul,
    "aten::einsum": _einsum,
}


def _shape(gm: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    value = get_constant(gm, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _transposed(gm: fx.GraphModule, weight: fx.Node) -> fx.Node:
    """The transpose of a 2-D node: what it is already a transpose of, else a new call at the insertion point."""
    name = opname(weight)
    swapped = {int(d) % 2 for d in weight.args[1:3]} == {0, 1} if name == "aten::transpose" else False  # type: ignore[arg-type]
    permuted = [int(d) % 2 for d in weight.args[1]] == [1, 0] if name == "aten::permute" else False  # type: ignore[arg-type,union-attr]
    if name in ("aten::t", "aten::numpy_T") or swapped or permuted:
        return weight.args[0]  # type: ignore[return-value]
    return gm.graph.call_function(aten.t.default, (weight,))


_VIEWS = ("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten")


def _unflatten(gm: fx.GraphModule) -> int:
    """`view(linear(view(x, [-1, K]), W, b), [..., N])` --> `linear(x, W, b)`: the leading sizes need no merging."""
    count = 0
    for node in list(gm.graph.nodes):
        if opname(node) != "aten::linear" or len(node.users) != 1:
            continue
        flat, back = arguments(node)["input"], next(iter(node.users))
        if opname(flat) not in _VIEWS or opname(back) not in _VIEWS or back.args[0] is not node:
            continue
        wide, rows, out = (n.meta.get("val") for n in (flat.args[0], flat, back))
        if not all(isinstance(v, torch.Tensor) for v in (wide, rows, out)) or wide.dim() < 2 or wide.dim() != out.dim():
            continue
        leading = all(same_size(a, b) for a, b in zip(wide.shape[:-1], out.shape[:-1]))
        out_last = _shape(gm, node)
        kept = same_size(wide.shape[-1], rows.shape[-1]) and out_last and same_size(out_last[-1], out.shape[-1])
        if leading and kept:
            set_argument(node, "input", flat.args[0])
            node.meta["val"] = out
            back.replace_all_uses_with(node)
            gm.graph.erase_node(back)
            count += 1
    return count


_CANONICAL = ("aten::linear", "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::embedding")


def _positional(gm: fx.GraphModule) -> int:
    """`linear(x, weight=w, bias=b)` --> `linear(x, w, b)`, so that later passes may read positions."""
    count = 0
    for node in gm.graph.nodes:
        if node.kwargs and opname(node) in _CANONICAL:
            bound = arguments(node)
            last = max(i for i, name in enumerate(bound) if name in node.kwargs or i < len(node.args))
            names = [a.name for a in node.target._schema.arguments]
            node.args, node.kwargs = tuple(bound[n] for n in names[: last + 1]), {}
            count += 1
    return count
