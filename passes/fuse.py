"""fuse: find the elementwise tail of every site, so that a kernel can apply it before it stores."""

from __future__ import annotations

from collections import deque

from torch import fx

from sparsec.aten import arguments, opname, same_shape
from sparsec.codegen.kernel import Step
from sparsec.driver import Context, Pass
from sparsec.graph import Fact, sites, update
from sparsec.passes._patterns import PATTERNS, match


class Fuse(Pass):
    """`add(gelu(linear(x, W, b)), r)`: the fact of the linear gets `epilogue=(gelu, add)`, `residual=r`.

    The graph stays as it is: `lower` puts the tail into the kernel, and a site that stays dense ignores it. A step is
    taken only if nothing else reads what is before it; a residual must have the shape and dtype of the output and be
    computed before the site. There is at most one.
    """

    name = "fuse"
    requires = ("annotated",)
    ensures = ("fused",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.options.training:  # the gradient of a fused tail would need what the kernel did not store
            return 0
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        changes = 0
        for node, known in list(sites(gm)):
            if known.refusal is None and known.op != "embedding":
                changes += _fuse(node, known, order)
        return changes


def _fuse(node: fx.Node, known: Fact, order: dict[fx.Node, int]) -> int:
    steps: list[Step] = []
    absorbed: list[fx.Node] = []
    residual: fx.Node | None = None
    end = node
    while True:
        tail = _activation(end)
        if tail is None and residual is None:
            tail, residual = _residual(end, node, order)
        if tail is None:
            break
        taken, new = tail
        absorbed += sorted(taken, key=order.__getitem__)
        steps += new
        end = absorbed[-1]
    update(
        node,
        epilogue=tuple(steps),
        absorbed=tuple(n.name for n in absorbed),
        residual=residual.name if residual is not None else None,
    )
    return int(bool(steps))


Tail = tuple[tuple[fx.Node, ...], tuple[Step, ...]]
"""Nodes that go, and the steps that replace them."""


def _activation(x: fx.Node) -> Tail | None:
    """The largest known expression over `x` that takes in every user of `x`."""
    reach = _behind(x)
    for pattern in PATTERNS:
        for end in reach:
            if opname(end) != f"aten::{pattern.tree[0]}":
                continue
            found = match(end, pattern.tree, x)
            if found is None or not _closed(x, end, found.nodes) or not _same_kind(x, end):
                continue
            steps = pattern.steps(tuple(found.numbers[i] for i in sorted(found.numbers)))
            if steps is not None:
                return tuple(found.nodes), steps
    return None


def _behind(x: fx.Node, limit: int = 12) -> list[fx.Node]:
    """The first few nodes that depend on `x`, nearest first: no pattern is larger."""
    found: dict[fx.Node, None] = {}
    queue = deque([x])
    while queue and len(found) < limit:
        for user in queue.popleft().users:
            if user not in found and opname(user):
                found[user] = None
                queue.append(user)
    return list(found)


def _closed(x: fx.Node, end: fx.Node, inside: dict[fx.Node, None]) -> bool:
    """Whether nothing outside reads `x` or an inner node."""
    return all(user in inside for n in (x, *inside) if n is not end for user in n.users)


def _same_kind(x: fx.Node, end: fx.Node) -> bool:
    """Whether shape and dtype are unchanged; elementwise calls keep them where the capture recorded no values."""
    before, after = x.meta.get("val"), end.meta.get("val")
    return before is None or after is None or same_shape(before, after)


def _residual(x: fx.Node, site: fx.Node, order: dict[fx.Node, int]) -> tuple[Tail | None, fx.Node | None]:
    """`x + r` with r of the same shape, known before the site runs."""
    if len(x.users) != 1:
        return None, None
    end = next(iter(x.users))
    if opname(end) != "aten::add":
        return None, None
    bound = list(arguments(end).values())
    pair = [n for n in bound[:2] if isinstance(n, fx.Node) and n is not x]
    if bound[2] != 1 or len(pair) != 1:
        return None, None
    other = pair[0]
    value = other.meta.get("val")
    same = same_shape(value, x.meta.get("val")) and same_shape(value, end.meta.get("val"))
    if not same or order[other] >= order[site]:
        return None, None
    return ((end,), (Step("add"),)), other
