"""Linears that read one input become one linear, where the clock says so."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn import functional as F

from sparsec.aten import arguments, opname
from sparsec.codegen.build import build_kernels
from sparsec.codegen.dense_variants import few_rows
from sparsec.codegen.kernel import Kernel
from sparsec.driver import Context
from sparsec.graph import constant_nodes, get_constant, move_to_front, site_names, trace_into
from sparsec.passes import _product
from sparsec.passes.rewrite_graph import judged, place
from sparsec.spec import Auto

if TYPE_CHECKING:
    from sparsec.passes.rewrite import Log

aten = torch.ops.aten
RULES = ("parallel_linears", "qkv_merged")
"""Two or more linears; three or more with biases, which is what attention has."""

UNKNOWN_ROWS = (1, 16, 256)
"""Rows that are timed when the graph does not tell how many there are."""

SPARSE = 0.2
"""At most this density sites become sparse, and merged ones save calls without adding an entry or an operation."""

FEW_ROWS = 64
"""Up to here a call costs a sparse linear a good part of its time: merged QKV of width 384 at 90 % zeros measured
1.4x to 1.8x at 1 to 32 rows (fp32, two threads); at a thousand rows nothing was gained."""

SIMILAR = 0.1
"""Densities of merged weights differ by at most this much: one format has to suit them all."""


def merge(gm: fx.GraphModule, ctx: Context, log: Log, rules: Sequence[str] = RULES) -> None:
    """`linear(x, a), linear(x, b) --> split(linear(x, cat(a, b)), widths)`."""
    for group in _groups(gm):
        names = [place(n) for n in group]
        biased = len(group) > 2 and arguments(group[0])["bias"] is not None
        name = RULES[1] if biased and RULES[1] in rules else RULES[0]
        if name not in rules:
            continue
        reason = _refusal(gm, ctx, group)
        if reason is not None:
            log.refused(name, names, reason)
            continue
        faster, detail = _timed(gm, ctx, group)
        if faster:
            _merge(gm, group)
            log.applied([name], names, detail)
        else:
            log.refused(name, names, detail)


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
    if ctx.spec is not None:
        sites = _sites(gm)
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
    whole = torch.cat(weights), None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    widths = [w.shape[0] for w in weights]
    trials = []
    for rows in _rows(arguments(group[0])["input"]):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, weights[0].shape[1], generator=generator).to(weights[0])
        apart = _ways(gm, ctx, group[0], list(zip(weights, biases)), x)
        merged = [_split(way, widths) for way in _ways(gm, ctx, group[0], [whole], x)]
        trials.append((f" at {rows} rows", apart, merged))
    return judged(ctx, f"{len(group)} linears as one", trials)


Way = Callable[[], list[torch.Tensor]]


def _ways(
    gm: fx.GraphModule, ctx: Context, node: fx.Node, operands: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    x: torch.Tensor,
) -> list[Way]:  # fmt: skip
    """Linears of (weight, bias) on x as torch runs them, and as each way in which `select` may run dense sites."""
    ways: list[Way] = [lambda: [F.linear(x, w, b) for w, b in operands]]
    if ctx.spec is None or not isinstance(ctx.spec.match(_sites(gm)[node]), Auto):
        return ways
    offers = [few_rows(w, b, x.shape[0], ctx.target) for w, b in operands]
    kernels = build_kernels(list(dict.fromkeys(s for offer in offers for s in offer)), ctx.target, errors={})
    op = _product.overload("linear")
    for specs in zip(*offers):  # the same choice for every linear
        if all(isinstance(kernels.get(s), Kernel) for s in specs):
            texts = [s.text() for s in specs]
            ways.append(lambda texts=texts: [op(x, [w], b, None, t) for (w, b), t in zip(operands, texts)])  # type: ignore[misc]
    return ways


def _split(way: Way, widths: Sequence[int]) -> Callable[[], object]:
    return lambda: aten.split_with_sizes.default(way()[0], widths, -1)


def _sparse(gm: fx.GraphModule, ctx: Context, group: Sequence[fx.Node], weights: Sequence[torch.Tensor]) -> bool:
    """Whether these will be sparse sites: the spec lets them, and nearly everything is zero."""
    if ctx.spec is None or ctx.spec.match(_sites(gm)[group[0]]) is None:
        return False
    return all(float((w != 0).float().mean()) <= SPARSE for w in weights)


def _sites(gm: fx.GraphModule) -> dict[fx.Node, str]:
    return site_names(n for n in gm.graph.nodes if opname(n) == "aten::linear")


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
    values = [n.meta.get("val") for n in group]
    known = [v for v in values if v is not None]
    if len(known) == len(group):
        whole.meta["val"] = torch.cat(known, -1)
    widths = [get_constant(gm, str(b["weight"].target)).shape[0] for b in bounds]
    with gm.graph.inserting_before(first):  # one call for all views: a slice each would cost as much as a small product
        parts = gm.graph.call_function(aten.split_with_sizes.default, (whole, widths, -1))
        if "val" in whole.meta:
            parts.meta["val"] = aten.split_with_sizes.default(whole.meta["val"], widths, -1)
        for at, node in enumerate(group):
            part = gm.graph.call_function(operator.getitem, (parts, at))
            part.meta = dict(node.meta)
            if "val" in parts.meta:
                part.meta["val"] = parts.meta["val"][at]
            node.replace_all_uses_with(part)
    for node in reversed(group):
        gm.graph.erase_node(node)
