"""Rules of whole layers on a graph: a norm's gain and offset go into linears behind it, pooled rows are streamed."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsec.aten import arguments, opname
from sparsec.driver import Context
from sparsec.graph import constant_nodes, get_constant, move_to_front, trace_into
from sparsec.passes.rewrite_graph import give_value, judged, place

if TYPE_CHECKING:
    from sparsec.passes.rewrite import Log

aten = torch.ops.aten
NORM, POOL = "affine_through_norm", "pooled_streamed"
RULES = (NORM, POOL)

POOLS = {"aten::mean": True, "aten::sum": False}
"""Reductions over rows, and whether they divide by how many there are."""

FUNCTIONS = ("aten::relu", "aten::gelu", "aten::silu", "aten::tanh", "aten::sigmoid", "aten::hardswish")
MOST = 8
"""Blocks of rows that a pooled linear is cut into at most: each is a call."""


def affine(gm: fx.GraphModule, ctx: Context, log: Log) -> None:
    """`linear(layer_norm(x) * g + h, W, b) --> linear(layer_norm(x), W * g, b + W h)`, for all readers of the norm."""
    for node in [n for n in gm.graph.nodes if opname(n) == "aten::layer_norm"]:
        bound, known = arguments(node), constant_nodes(gm)
        gain, offset = bound["weight"], bound["bias"]
        if gain is None and offset is None:
            continue
        names = [place(n) for n in (node, *node.users)]
        reason = _norm_refusal(gm, node, bound, known)
        if reason is not None:
            log.refused(NORM, names, reason)
            continue
        pays, detail = _norm_timed(gm, ctx, node, bound)
        if pays:
            _move_affine(gm, node, gain, offset)
            log.applied([NORM], names, detail)
        else:
            log.refused(NORM, names, detail)


def _norm_refusal(gm: fx.GraphModule, node: fx.Node, bound: dict[str, Any], known: dict[fx.Node, None]) -> str | None:
    given = [n for n in (bound["weight"], bound["bias"]) if n is not None]
    if len(bound["normalized_shape"]) != 1 or any(n not in known or n.op != "get_attr" for n in given):
        return "its gain and offset are no constants over the last dimension"
    for user in node.users:
        inner = arguments(user) if opname(user) == "aten::linear" else {}
        if not inner or inner["input"] is not node or node in (inner["weight"], inner["bias"]):
            return f"{user.name} reads it too, and that is no linear"
        operands = [inner["weight"]] + ([inner["bias"]] if inner["bias"] is not None else [])
        if any(n not in known or n.op != "get_attr" for n in operands):
            return f"the weight of {user.name} is no constant"
        if inner["bias"] is None and bound["bias"] is not None:
            return f"{user.name} has no bias that could take the offset up"
    return None if node.users else "nothing reads it"


def _moved(w: Any, b: Any, g: Any, h: Any) -> tuple[Any, Any]:
    """Weight and bias behind a norm without gain and offset; None for what there is not."""
    bias = aten.add.Tensor(b, aten.mv.default(w, h)) if h is not None else b
    return (aten.mul.Tensor(w, g) if g is not None else w), bias


def _norm_timed(gm: fx.GraphModule, ctx: Context, node: fx.Node, bound: dict[str, Any]) -> tuple[bool, str]:
    (width,) = bound["normalized_shape"]
    saved = width * ((bound["weight"] is not None) + (bound["bias"] is not None))
    detail = f"{saved} --> 0 flops a row"
    if ctx.options.tune != "measure":
        return True, detail
    shape = _static(node)
    if shape is None:
        return False, "whether it pays depends on a size that is not known yet"

    def read(n: Any) -> Any:
        return None if n is None else get_constant(gm, str(n.target)).detach()

    g, h = read(bound["weight"]), read(bound["bias"])
    linears = [(read(arguments(u)["weight"]), read(arguments(u)["bias"])) for u in node.users]
    moved = [_moved(w, b, g, h) for w, b in linears]
    dtype = (g if g is not None else h).dtype
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(pairs: list[tuple[Any, Any]], *affine: Any) -> list[torch.Tensor]:
        y = aten.layer_norm.default(x, [width], *affine, bound["eps"])
        return [aten.linear.default(y, w, b) for w, b in pairs]

    return judged(ctx, detail, [("", [lambda: run(linears, g, h)], [lambda: run(moved, None, None)])])


def _static(node: Any) -> tuple[int, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    good = isinstance(value, torch.Tensor) and all(isinstance(s, int) for s in value.shape)
    return tuple(value.shape) if good and value is not None else None


def _move_affine(gm: fx.GraphModule, node: fx.Node, gain: fx.Node | None, offset: fx.Node | None) -> None:
    for user in list(node.users):
        inner = arguments(user)
        weight, bias = inner["weight"], inner["bias"]
        for operand in (weight, bias, gain, offset):
            move_to_front(operand)
        if gain is not None:
            made = trace_into(user, lambda w, g: aten.mul.Tensor(w, g), weight, gain)
            user.args = (user.args[0], made, *user.args[2:])
        if offset is not None:
            made = trace_into(user, lambda w, b, h: aten.add.Tensor(b, aten.mv.default(w, h)), weight, bias, offset)
            user.args = (*user.args[:2], made)
    bound = arguments(node)
    node.args, node.kwargs = (bound["input"], bound["normalized_shape"], None, None, bound["eps"]), {}


def stream(gm: fx.GraphModule, ctx: Context, log: Log) -> None:
    """`sum(f(linear(x, W, b)), rows) --> sums of f(linear(x[some rows], W, b))`, where the rows overflow the cache."""
    for node in [n for n in gm.graph.nodes if opname(n) in POOLS]:
        found = _pooled(gm, node)
        if found is None:
            continue
        linear, function, dim, shape = found
        rows, size = shape[dim], math.prod(shape) * torch.empty((), dtype=node.meta["val"].dtype).element_size()
        blocks = min(MOST, rows, math.ceil(2 * size / max(1, ctx.target.l2)))
        names = [place(linear)]
        if rows < 2:
            log.refused(POOL, names, "there is one row, so there is nothing to stream")
            continue
        if size <= ctx.target.l2 or blocks < 2:
            log.refused(POOL, names, f"its {size} bytes fit the cache")
            continue
        edges = [rows * k // blocks for k in range(blocks + 1)]
        pays, detail = _stream_timed(gm, ctx, (node, function, linear), dim, edges, f"{blocks} blocks of {size} bytes")
        if pays:
            _cut(gm, node, function, linear, dim, edges)
            log.applied([POOL], names, detail)
        else:
            log.refused(POOL, names, detail)


def _pooled(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node, int, tuple[int, ...]] | None:
    """The linear and the function under a pool over one dimension of rows, that dimension, and the pooled shape."""
    bound = arguments(node)
    function, dims = bound["self"], bound.get("dim")
    if not isinstance(function, fx.Node) or opname(function) not in FUNCTIONS or len(function.users) != 1:
        return None
    linear = function.args[0]
    if not isinstance(linear, fx.Node) or opname(linear) != "aten::linear" or len(linear.users) != 1:
        return None
    shape = _static(linear)
    if shape is None or not isinstance(dims, list | tuple) or len(dims) != 1 or bound.get("dtype") is not None:
        return None
    dim = int(dims[0]) % len(shape)
    weight = arguments(linear)["weight"]
    good = dim < len(shape) - 1 and isinstance(weight, fx.Node) and weight.op == "get_attr"
    return (linear, function, dim, shape) if good else None


def _blocks(node: fx.Node, function: fx.Node, dim: int, edges: list[int]) -> Callable[..., Any]:
    """(x, W, b or nothing) -> the pooled result, block by block."""
    bound, rows = arguments(node), edges[-1]
    rest, extra = tuple(function.args[1:]), dict(function.kwargs)

    def run(x: Any, w: Any, *b: Any) -> Any:
        total: Any = None
        for low, high in pairwise(edges):
            part = aten.linear.default(aten.slice.Tensor(x, dim, low, high), w, *b)
            part = function.target(part, *rest, **extra)  # type: ignore[operator]
            one = aten.sum.dim_IntList(part, [dim], bound.get("keepdim", False))
            total = one if total is None else aten.add.Tensor(total, one)
        return aten.mul.Tensor(total, 1.0 / rows) if POOLS[opname(node)] else total

    return run


def _stream_timed(
    gm: fx.GraphModule, ctx: Context, nodes: tuple[fx.Node, fx.Node, fx.Node], dim: int, edges: list[int], detail: str
) -> tuple[bool, str]:
    if ctx.options.tune != "measure":
        return True, detail
    node, function, linear = nodes
    bound = arguments(linear)
    operands = [get_constant(gm, str(n.target)).detach() for n in (bound["weight"], bound["bias"]) if n is not None]
    shape = _static(bound["input"])
    if shape is None:
        return False, "the shape of its input is not known"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(operands[0].dtype)
    whole, cut = (_blocks(node, function, dim, e) for e in ([0, edges[-1]], edges))
    return judged(ctx, detail, [("", [lambda: whole(x, *operands)], [lambda: cut(x, *operands)])])


def _cut(
    gm: fx.GraphModule, node: fx.Node, function: fx.Node, linear: fx.Node, dim: int, edges: list[int]
) -> None:
    bound, old = arguments(linear), set(gm.graph.nodes)
    args = [n for n in (bound["input"], bound["weight"], bound["bias"]) if n is not None]
    new = trace_into(node, _blocks(node, function, dim, edges), *args)
    for made in gm.graph.nodes:
        if made not in old and "nn_module_stack" in linear.meta:
            made.meta["nn_module_stack"] = linear.meta["nn_module_stack"]
        if made not in old and all("val" in n.meta or n.op == "get_attr" for n in made.all_input_nodes):
            give_value(gm, made)
    new.meta = {**node.meta, **new.meta, "val": node.meta["val"]}
    node.replace_all_uses_with(new)
    for unread in (node, function, linear):
        gm.graph.erase_node(unread)
