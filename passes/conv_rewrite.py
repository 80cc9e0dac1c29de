"""conv_rewrite: convolutions that are something cheaper. Each rewrite is exact in meaning and says no with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsec.aten import arguments, opname
from sparsec.driver import Context, Pass
from sparsec.graph import KEY, constant_nodes, fold_constants, get_constant, move_to_front, owner
from sparsec.passes.rewrite_graph import give_value

aten = torch.ops.aten
_RANKS = {"aten::conv1d": 1, "aten::conv2d": 2, "aten::conv3d": 3}
_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
MAX_GROWTH = 4
"""A convolution over a constant is folded if its result is at most this often as large as what it is computed from."""


@dataclass(frozen=True)
class Rewrite:
    """One convolution and one rule: applied when `reason` is empty, else why not."""

    site: str
    rule: str
    reason: str = ""


class ConvRewrite(Pass):
    """Convolution --> what computes the same with less.

    - constant: `conv(constant) --> constant`, when it does not grow much.
    - stride: `pool(conv(x))` with windows of one pixel --> `conv(x, stride=stride * pool)`.
    - pool: `avg_pool(conv1x1(x)) --> conv1x1(avg_pool(x))`, for global pooling too: both are linear, on different axes.
    - merge: `avg_pool(conv(x, w)) --> conv(x, w * box, stride)` for pooling without overlap, when that multiplies less.
    - depth: a kernel as deep as its input --> one dimension less, with the depth among the channels (SparseSSP).
    - matmul: a kernel that covers its input, or one of one pixel over channels_last images --> linear, without a copy.

    Sums are taken in another order, nothing else changes. `rewrites(gm)` lists what was done and what was refused. A
    training capture is left alone.
    """

    name = "conv_rewrite"
    requires = ("normalised",)
    ensures = ("conv_rewritten",)

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.options.training:
            return 0
        records: dict[tuple[str, str], Rewrite] = {}
        changes = _constants(gm, records)
        for rule, apply in _RULES.items():
            for node in [n for n in gm.graph.nodes if opname(n) in _RANKS]:
                conv = _read(gm, node)
                outcome = apply(conv) if conv is not None else None
                if outcome is not None:
                    changes += not outcome
                    _note(records, node, rule, outcome)
        if changes:
            fold_constants(gm)
        gm.meta.setdefault(KEY, {})["conv_rewrites"] = list(records.values())
        return changes


def rewrites(gm: fx.GraphModule) -> tuple[Rewrite, ...]:
    """What the pass did and refused, rule by rule, in graph order."""
    return tuple(gm.meta.get(KEY, {}).get("conv_rewrites", ()))


def _note(records: dict[tuple[str, str], Rewrite], node: fx.Node, rule: str, reason: str) -> None:
    site = owner(node)[0] or "<root>"
    records[site, rule] = Rewrite(site, rule, reason)


Outcome = str | None
"""None: the rule does not concern this convolution. "": applied. Else why it was not."""


@dataclass(frozen=True)
class _Conv:
    """A convolution with constant weight and known sizes."""

    gm: fx.GraphModule
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    kernel: tuple[int, ...]
    space: tuple[Any, ...]  # of x; may be symbolic
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def pointwise(self) -> bool:
        return set(self.kernel) == {1} and set(self.padding) == {0}

    def image(self) -> torch.Tensor:
        value: torch.Tensor = self.x.meta["val"]
        return value


def _read(gm: fx.GraphModule, node: fx.Node) -> _Conv | None:
    bound, rank = arguments(node), _RANKS[opname(node)]
    x, weight, padding = bound["input"], bound["weight"], bound["padding"]
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if weight.op != "get_attr" or not isinstance(value, torch.Tensor) or value.dim() != rank + 2:
        return None
    kernel = tuple(get_constant(gm, str(weight.target)).shape[2:])
    dilation = _list(bound["dilation"], rank)
    if isinstance(padding, str):
        sides = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel)]
        if any(s % 2 for s in sides):
            return None
        padding = [s // 2 for s in sides]
    geometry = kernel, tuple(value.shape[2:]), _list(bound["stride"], rank), _list(padding, rank), dilation
    return _Conv(gm, node, x, weight, bound["bias"], *geometry, bound["groups"])


def _list(value: Any, rank: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _put(gm: fx.GraphModule, like: fx.Node, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call before a node, with the shape that follows from its inputs and the module of `like`."""
    with before.graph.inserting_before(before):
        new = before.graph.call_function(target, args)
    new.meta = {k: v for k, v in like.meta.items() if k not in (KEY, "val")}
    give_value(gm, new)
    return new


def _replace(old: fx.Node, new: fx.Node) -> None:
    if "val" in old.meta:
        new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _weight(conv: _Conv, target: Any, *args: Any) -> fx.Node:
    with conv.node.graph.inserting_before(conv.node):
        return conv.node.graph.call_function(target, (conv.weight, *args))


def _again(
    conv: _Conv, before: fx.Node, x: fx.Node, weight: fx.Node, stride: Any, padding: Any, dilation: Any
) -> fx.Node:
    """A convolution like `conv` over other operands; its rank follows from the strides."""
    bias = conv.bias
    move_to_front(bias)  # it may stand behind `before`
    with before.graph.inserting_before(before):
        args = (x, weight, bias, list(stride), list(padding), list(dilation), conv.groups)
        new = before.graph.call_function(_CONV[len(stride)], args)
    new.meta = dict(conv.node.meta)
    new.meta.pop("val", None)
    return new


# The rules


def _constants(gm: fx.GraphModule, records: dict[tuple[str, str], Rewrite]) -> int:
    known = constant_nodes(gm)
    folded: list[fx.Node] = []
    for node in known:
        if opname(node) not in _RANKS or node.meta.get("val") is None:
            continue
        leaves = [n for n in _leaves(node) if n.op == "get_attr"]
        given = sum(get_constant(gm, str(n.target)).numel() for n in leaves)
        made = node.meta["val"].numel()
        fits = made <= MAX_GROWTH * given
        reason = (
            "" if fits else f"the result has {made} values, {MAX_GROWTH} times the {given} it is computed from at most"
        )
        _note(records, node, "constant", reason)
        if fits:
            folded.append(node)
    if folded:
        fold_constants(gm, also=folded)
    return len(folded)


def _leaves(node: fx.Node) -> list[fx.Node]:
    seen: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        top = stack.pop()
        if top not in seen:
            seen[top] = None
            stack += top.all_input_nodes
    return list(seen)


@dataclass(frozen=True)
class _Pool:
    node: fx.Node
    average: bool
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    plain: bool  # every output is the mean of the pixels in its window
    ceil: bool


def _pool(conv: _Conv) -> _Pool | None:
    """The pooling that is all that reads a convolution."""
    if len(conv.node.users) != 1:
        return None
    node = next(iter(conv.node.users))
    name, d = opname(node), conv.rank
    if name not in (f"aten::avg_pool{d}d", f"aten::max_pool{d}d") or node.args[0] is not conv.node:
        return None
    bound = arguments(node)
    kernel, padding = _list(bound["kernel_size"], d), _list(bound["padding"], d)
    stride = _list(bound["stride"], d) if bound["stride"] else kernel
    inside = not any(padding) or bound.get("count_include_pad") is False
    plain = "avg" in name and inside and bound.get("divisor_override") is None
    return _Pool(node, "avg" in name, kernel, stride, padding, plain, bool(bound["ceil_mode"]))


def _stride(conv: _Conv) -> Outcome:
    pool = _pool(conv)
    if pool is None or set(pool.kernel) != {1}:
        return None
    if any(pool.padding) or (pool.average and not pool.plain):
        return "the pooling pads or divides by something else"
    new = _again(conv, conv.node, conv.x, conv.weight, _times(conv.stride, pool.stride), conv.padding, conv.dilation)
    _replace(pool.node, new)
    conv.node.graph.erase_node(conv.node)
    return ""


def _times(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x * y for x, y in zip(a, b))


def _commute(conv: _Conv) -> Outcome:
    if len(conv.node.users) != 1:
        return None
    user = next(iter(conv.node.users))
    known = _pool(conv)
    name, bound = opname(user), arguments(user) if opname(user) else {}
    spatial = list(range(2, conv.rank + 2))
    means = (
        name == "aten::mean" and "dim" in bound and sorted(d % (conv.rank + 2) for d in bound["dim"] or []) == spatial
    )
    adaptive = name == f"aten::adaptive_avg_pool{conv.rank}d"
    if not (means or adaptive or (known is not None and known.average)):
        return None
    if not conv.pointwise or set(conv.stride) != {1}:
        return None if known is not None else "the kernel reads more than one pixel, so pooling first would mix them"
    if known is not None and not known.plain and conv.bias is not None:
        return "the pooling counts padding or divides by something else, which would scale the bias"
    if means and bound.get("dtype") is not None:
        return "the mean changes the dtype"
    made, given = conv.node.meta.get("val"), user.meta.get("val")
    if made is None or given is None or not _smaller(given, made, means):
        return "pooling does not surely make the image smaller"
    rest = list(user.args[1:])
    if means:
        rest = [spatial, True]
    pooled = _put(conv.gm, user, conv.node, user.target, conv.x, *rest)
    new = _again(conv, user, pooled, conv.weight, conv.stride, conv.padding, conv.dilation)
    if means and not bound["keepdim"]:
        new.meta["val"] = made.mean(spatial, keepdim=True)
        new = _put(conv.gm, user, user, aten.squeeze.dims, new, spatial)
    _replace(user, new)
    conv.node.graph.erase_node(conv.node)
    return ""


def _smaller(after: torch.Tensor, before: torch.Tensor, whole: bool) -> bool:
    a, b = () if whole else after.shape[2:], before.shape[2:]
    if not all(isinstance(s, int) for s in (*a, *b)):
        return whole and all(isinstance(s, int) for s in b)
    return math.prod(a) < math.prod(b)


def _merge(conv: _Conv) -> Outcome:
    pool = _pool(conv)
    if pool is None or not pool.average or set(pool.kernel) == {1} or conv.pointwise:
        return None
    if pool.kernel != pool.stride or any(pool.padding) or pool.ceil or not pool.plain:
        return "the windows of the pooling overlap, pad or are cut off"
    if set(conv.stride) != {1} or set(conv.dilation) != {1}:
        return "the convolution has a stride or a dilation of its own"
    old = get_constant(conv.gm, str(conv.weight.target)).detach()
    spread = _spread(old, pool.kernel)
    before, after = int(torch.count_nonzero(old)) * math.prod(pool.kernel), int(torch.count_nonzero(spread))
    if after >= before:
        return f"the merged kernel multiplies {after} times per output, convolution and pooling {before} times"
    border = [n for k in reversed(pool.kernel) for n in (k - 1, k - 1)]
    padded = _weight(conv, aten.constant_pad_nd.default, border)
    average = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}[conv.rank]
    with conv.node.graph.inserting_before(conv.node):
        weight = conv.node.graph.call_function(average, (padded, list(pool.kernel), [1] * conv.rank))
    _replace(pool.node, _again(conv, conv.node, conv.x, weight, pool.stride, conv.padding, conv.dilation))
    conv.node.graph.erase_node(conv.node)
    return ""


def _spread(weight: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    """Where the merged kernel is nonzero, as counts: cancellation is not looked for."""
    border = [n for k in reversed(window) for n in (k - 1, k - 1)]
    pool: Any = {
        1: torch.nn.functional.max_pool1d,
        2: torch.nn.functional.max_pool2d,
        3: torch.nn.functional.max_pool3d,
    }
    nonzero = torch.nn.functional.pad((weight != 0).float(), border)
    found: torch.Tensor = pool[len(window)](nonzero, window, 1)
    return found


def _depth(conv: _Conv) -> Outcome:
    if conv.rank == 1 or (conv.kernel[0] == 1 and conv.space[0] != 1):
        return None
    if _covers(conv, 1):
        return None  # the whole kernel does: that is a product
    if not isinstance(conv.space[0], int) or conv.kernel[0] != conv.space[0] or conv.padding[0]:
        return "the kernel is not as deep as its input" if conv.rank == 3 else None
    if conv.dilation[0] != 1 and conv.kernel[0] != 1:
        return None
    if not conv.image().is_contiguous():
        return "channels come last in memory: moving the depth among them would copy"
    out, inp, *kernel = get_constant(conv.gm, str(conv.weight.target)).shape
    flat = _put(conv.gm, conv.node, conv.node, aten.flatten.using_ints, conv.x, 1, 2)
    weight = _weight(conv, aten.view.default, [out, inp * kernel[0], *kernel[1:]])
    new = _again(conv, conv.node, flat, weight, conv.stride[1:], conv.padding[1:], conv.dilation[1:])
    value = conv.node.meta.get("val")
    if value is not None:
        new.meta["val"] = value.squeeze(2)
    _replace(conv.node, _put(conv.gm, conv.node, conv.node, aten.unsqueeze.default, new, 2))
    return ""


def _covers(conv: _Conv, least: int) -> bool:
    """Whether the kernel covers its whole input, which has at least `least` pixels."""
    whole = all(isinstance(s, int) and s == k for s, k in zip(conv.space, conv.kernel)) and not any(conv.padding)
    undilated = all(d == 1 or k == 1 for d, k in zip(conv.dilation, conv.kernel))
    return whole and undilated and math.prod(conv.kernel) >= least


def _matmul(conv: _Conv) -> Outcome:
    whole = _covers(conv, 1)
    if not whole and not (conv.pointwise and set(conv.stride) == {1}):
        return "every second pixel of 1 x 1 would have to be copied" if conv.pointwise else None
    if conv.groups != 1:
        return f"{conv.groups} groups are as many products"
    image, d = conv.image(), conv.rank
    out = get_constant(conv.gm, str(conv.weight.target)).shape[0]
    weight_size = [out, get_constant(conv.gm, str(conv.weight.target)).numel() // out]
    if whole:
        if not image.is_contiguous():
            return "channels come last in memory: one row per image would be a copy"
        rows = _put(conv.gm, conv.node, conv.node, aten.flatten.using_ints, conv.x, 1)
    else:
        if not image.movedim(1, -1).is_contiguous():
            return "channels come first in memory: rows of pixels would be a copy, planes are what convolutions read"
        rows = _put(conv.gm, conv.node, conv.node, aten.permute.default, conv.x, [0, *range(2, d + 2), 1])
    weight = _weight(conv, aten.view.default, weight_size)
    with conv.node.graph.inserting_before(conv.node):
        new = conv.node.graph.call_function(aten.linear.default, (rows, weight, conv.bias))
    new.meta = dict(conv.node.meta)
    value = conv.node.meta.get("val")
    if value is not None:
        new.meta["val"] = value.flatten(1) if whole else value.movedim(1, -1)
    if whole:
        for _ in range(d):
            new = _put(conv.gm, conv.node, conv.node, aten.unsqueeze.default, new, -1)
    else:
        new = _put(conv.gm, conv.node, conv.node, aten.permute.default, new, [0, d + 1, *range(1, d + 1)])
    _replace(conv.node, new)
    return ""


_RULES: dict[str, Callable[[_Conv], Outcome]] = {
    "stride": _stride,  # before the others: what is pooled away is not computed at all
    "pool": _commute,
    "merge": _merge,
    "depth": _depth,
    "matmul": _matmul,  # last: a kernel that has lost a dimension may cover its input now
}
