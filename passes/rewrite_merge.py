"""Linears that read one input become one linear, where the clock says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn import functional as F

from sparsec.aten import arguments, opname
from sparsec.codegen import tune
from sparsec.driver import Context
from sparsec.graph import constant_nodes, get_constant, move_to_front, site_names, trace_into
from sparsec.passes.rewrite_graph import place

if TYPE_CHECKING:
    from sparsec.passes.rewrite import Log

aten = torch.ops.aten
RULE = "parallel_linears"
UNKNOWN_ROWS = (1, 16, 256)
"""Rows that are timed when the graph does not tell how many there are."""

SPARSE = 0.2
"""At most this density sites become sparse, and merged ones save calls without adding an entry or an operation."""

FEW_ROWS = 64
"""Up to here a call costs a sparse linear a good part of its time: merged QKV of width 384 at 90 % zeros measured
1.4x to 1.8x at 1 to 32 rows (fp32, two threads); at a thousand rows nothing was gained."""

SIMILAR = 0.1
"""Densities of merged weights differ by at most this much: one format has to suit them all."""


def merge(gm: fx.GraphModule, ctx: Context, log: Log) -> None:
    """`linear(x, a), linear(x, b) --> y = linear(x, cat(a, b)); y[..., :n], y[..., n:]`."""
    for group in _groups(gm):
        names = [place(n) for n in group]
        reason = _refusal(gm, ctx, group)
        if reason is not None:
            log.refused(RULE, names, reason)
            continue
        faster, detail = _timed(gm, ctx, group)
        if faster:
            _merge(gm, group)
            log.applied([RULE], names, detail)
        else:
            log.refused(RULE, names, detail)


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Linears by input, in graph order, that have constant weights of one dtype and biases all or none."""
    known = constant_nodes(gm)
    found: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if opname(node) != "aten::linear":
            continue
        bound = arguments(node)
        weight, bias = bound["weight"], bound["bias"]
        if weight not in known or weight.op != "get_attr" or bound["input"] in known:
            continue
        if bias is not None and (bias not in known or bias.op != "get_attr"):
            continue
        tensor = get_constant(gm, str(weight.target))
        if tensor.dim() == 2 and tensor.is_floating_point():
            found.setdefault((bound["input"], tensor.dtype, tensor.device, bias is None), []).append(node)
    return [group for group in found.values() if len(group) > 1]


def _refusal(gm: fx.GraphModule, ctx: Context, group: Sequence[fx.Node]) -> str | None:
    """Why the linears of a group cannot be one site."""
    targets = [str(arguments(n)["weight"].target) for n in group]
    if len(set(targets)) < len(targets):
        return "two of them have one weight"
    if any(u.op == "output" for n in group for u in n.users):
        return "a result of the model would become a view of a larger tensor"
    sites = site_names(n for n in gm.graph.nodes if opname(n) == "aten::linear")
    if ctx.spec is not None:
        keys = {ctx.spec.pattern(sites[n]) for n in group}
        exact = [k for k in keys if k is not None and k in {sites[n] for n in group}]
        if exact:
            return f"the spec names {exact[0]!r} by itself"
        if len({ctx.spec.match(sites[n]) for n in group}) > 1:
            return "the spec treats them differently"
    shares = [float((get_constant(gm, t) != 0).float().mean()) for t in targets]
    if max(shares) - min(shares) > SIMILAR:
        return f"their densities differ: {min(shares):.0%} to {max(shares):.0%}"
    return None


def _timed(gm: fx.GraphModule, ctx: Context, group: Sequence[fx.Node]) -> tuple[bool, str]:
    """Whether the merged linear pays at every number of rows, and the sentence that says so."""
    if ctx.options.tune != "measure":
        return True, f"merged untimed, because tune={ctx.options.tune!r}"
    weights = [get_constant(gm, str(arguments(n)["weight"].target)).detach() for n in group]
    if _sparse(gm, ctx, group, weights):
        rows = max(_rows(arguments(group[0])["input"]))
        return rows <= FEW_ROWS, f"sparse, {rows} rows at most; merging pays up to {FEW_ROWS}"
    biases = [_bias(gm, n) for n in group]
    whole = torch.cat(weights)
    offset = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    widths = [w.shape[0] for w in weights]
    texts, worst = [], float("inf")
    for rows in _rows(arguments(group[0])["input"]):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, weights[0].shape[1], generator=generator).to(weights[0])

        def apart(x: torch.Tensor = x) -> object:
            return [F.linear(x, w, b) for w, b in zip(weights, biases)]

        def merged(x: torch.Tensor = x) -> object:
            return F.linear(x, whole, offset).split(widths, -1)

        timing = tune.measure([apart, merged]).us
        worst = min(worst, timing[0] / timing[1])
        texts.append(f"{timing[0] / timing[1]:.2f}x at {rows} rows ({timing[0]:.1f} --> {timing[1]:.1f} us)")
    needed = ctx.options.min_speedup
    verdict = "" if worst >= needed else f", less than min_speedup={needed:g}"
    return worst >= needed, "merged is " + ", ".join(texts) + verdict


def _sparse(gm: fx.GraphModule, ctx: Context, group: Sequence[fx.Node], weights: Sequence[torch.Tensor]) -> bool:
    """Whether these will be sparse sites: the spec lets them, and nearly everything is zero."""
    sites = site_names(n for n in gm.graph.nodes if opname(n) == "aten::linear")
    if ctx.spec is None or ctx.spec.match(sites[group[0]]) is None:
        return False
    return all(float((w != 0).float().mean()) <= SPARSE for w in weights)


def _bias(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    bias = arguments(node)["bias"]
    return None if bias is None else get_constant(gm, str(bias.target)).detach()


def _rows(x: fx.Node) -> tuple[int, ...]:
    value = x.meta.get("val")
    sizes = tuple(value.shape[:-1]) if value is not None else (None,)
    if any(not isinstance(s, int) for s in sizes):
        return UNKNOWN_ROWS
    rows = 1
    for size in sizes:
        rows *= int(size)
    return (max(1, rows),)


def _merge(gm: fx.GraphModule, group: Sequence[fx.Node]) -> None:
    first = group[0]
    bounds = [arguments(n) for n in group]
    operands = [b[key] for b in bounds for key in ("weight", "bias") if b[key] is not None]
    for operand in operands:
        move_to_front(operand)
    weight = trace_into(first, lambda *w: aten.cat.default(list(w)), *(b["weight"] for b in bounds))
    bias = None
    if bounds[0]["bias"] is not None:
        bias = trace_into(first, lambda *b: aten.cat.default(list(b)), *(b["bias"] for b in bounds))
    with gm.graph.inserting_before(first):
        whole = gm.graph.call_function(aten.linear.default, (bounds[0]["input"], weight, bias))
    whole.meta = {k: v for k, v in first.meta.items() if k != "val"}
    start, values = 0, [n.meta.get("val") for n in group]
    known = [v for v in values if v is not None]
    if len(known) == len(group):
        whole.meta["val"] = torch.cat(known, -1)
    for node, bound in zip(group, bounds):
        width = get_constant(gm, str(bound["weight"].target)).shape[0]
        with gm.graph.inserting_before(node):
            part = gm.graph.call_function(aten.slice.Tensor, (whole, -1, start, start + width))
        part.meta = dict(node.meta)
        if "val" in whole.meta:
            part.meta["val"] = whole.meta["val"][..., start : start + width]
        node.replace_all_uses_with(part)
        start += width
    for node in reversed(group):
        gm.graph.erase_node(node)




