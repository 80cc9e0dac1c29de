"""pool: max pooling between sparse convolutions on a generated kernel, where it is faster. Exact to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sparsec.aten import arguments, opname
from sparsec.codegen import tune
from sparsec.driver import Context, Pass
from sparsec.ops import pool as op


class Pool(Pass):
    """aten.max_pool2d(x, kernel, stride, padding, dilation) --> sparsec.max_pool(x, ...)

    torch pools planes one number at a time, which in a network of sparse convolutions takes longer than most of them.
    Only for static shapes on the CPU, and where nothing is trained.
    """

    name = "pool"
    requires = ("selected",)
    ensures: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.options.training or ctx.options.tune != "measure" or ctx.target.kind != "cpu":
            return 0
        changes = 0
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.max_pool2d.default):
            numbers, shape = _numbers(node), _shape(node)
            if numbers is None or shape is None or not _faster(shape, numbers, ctx.options.min_speedup):
                continue
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(op.OVERLOAD, (node.args[0], *map(list, numbers)))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            changes += 1
        if changes:
            ctx.report.note(f"{changes} max pooling on a generated kernel")
        return changes


def _numbers(node: fx.Node) -> tuple[tuple[int, ...], ...] | None:
    """Kernel, stride, padding and dilation, two numbers each; None for a pooling that rounds its output size up."""
    bound = arguments(node)
    if bound.get("ceil_mode", False):
        return None
    kernel = bound["kernel_size"]
    lists = (kernel, bound.get("stride") or kernel, bound.get("padding", 0), bound.get("dilation", 1))
    spread = [(n, n) if isinstance(n, int) else tuple(n) * (2 // len(n)) for n in lists]
    return tuple(spread) if all(isinstance(n, int) for values in spread for n in values) else None


def _shape(node: fx.Node) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """dtype and shape of what is pooled, where that is static images that a sparse kernel or an input hands over."""
    read = node.args[0]
    value = read.meta.get("val") if isinstance(read, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.device.type != "cpu":
        return None
    if not all(isinstance(n, int) for n in value.shape[1:]) or opname(node) != "aten::max_pool2d":
        return None
    batch = value.shape[0]
    return value.dtype, (batch if isinstance(batch, int) else 1, *value.shape[1:])


def _faster(
    shape: tuple[torch.dtype, tuple[int, ...]], numbers: tuple[tuple[int, ...], ...], min_speedup: float
) -> bool:
    dtype, sizes = shape
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    call: Callable[[], torch.Tensor] = lambda: op.OVERLOAD(x, *map(list, numbers))  # noqa: E731
    plain: Callable[[], torch.Tensor] = lambda: torch.ops.aten.max_pool2d.default(x, *numbers)  # noqa: E731
    with torch.inference_mode():
        if op.find(sizes[1:], str(dtype).removeprefix("torch."), *numbers) is None or not torch.equal(call(), plain()):
            return False
    ours, dense = tune.measure([call, plain]).us
    return dense > min_speedup * ours
