"""stream: consecutive convolutions run image by image on planned memory, where it is faster. Exact to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sparsec.codegen import tune
from sparsec.codegen.kernel import DTYPES
from sparsec.driver import Context, Pass
from sparsec.graph import get_constant
from sparsec.ops import stream as op
from sparsec.schedule import STREAM, Group, candidates


class Stream(Pass):
    """y = conv(conv(x, A), B) --> the same nodes, marked to run as one op that keeps what lies between them in cache.

    Only in inference on the CPU, and where the clock agrees, if it is asked. Threads are dealt whole images.
    """

    name = "stream"
    requires = ("lowered",)
    ensures: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.options.training or ctx.target.kind != "cpu":
            return 0
        changes = 0
        for number, group in enumerate(candidates(gm.graph)):
            with torch.inference_mode():
                stream, single = _contenders(gm, group)
                if not all(map(_same, stream(), single())):  # the first call loads the kernels and admits the stream
                    continue
            timed = ""
            if ctx.options.tune == "measure":
                ours, theirs = tune.measure([stream, single]).us
                if ours > theirs:
                    continue
                timed = f", {ours:.0f} us instead of {theirs:.0f}"
            for node in group.nodes:
                node.meta[STREAM] = number
            changes += len(group.nodes)
            arena = group.stream.arena_bytes / 2**20
            ctx.report.note(f"{len(group.nodes)} kernels run as one stream on {arena:.1f} MiB a thread{timed}")
        return changes


Call = Callable[[], list[torch.Tensor]]


def _contenders(gm: fx.GraphModule, group: Group) -> tuple[Call, Call]:
    """The group as a stream and node by node, on inputs of the batch that the graph was captured with."""
    stream, generator = group.stream, torch.Generator().manual_seed(0)
    value = group.nodes[0].meta["val"]
    batch = value.shape[0] if isinstance(value.shape[0], int) else 1
    shapes = [(batch, *shape) for shape in stream.shapes[: stream.inputs]]
    inputs = [torch.randn(shape, generator=generator).to(DTYPES[stream.dtype]) for shape in shapes]
    operands = [get_constant(gm, str(node.target)) for node in group.operands]
    env: dict[fx.Node, torch.Tensor] = dict(zip((*group.inputs, *group.operands), (*inputs, *operands), strict=True))
    last = _last_uses(group)
    text = stream.text()

    def single() -> list[torch.Tensor]:
        seen = dict(env)
        for node in group.nodes:
            seen[node] = node.target(*fx.map_arg(node.args, seen.__getitem__))  # type: ignore[operator]
            for read in last.get(node, ()):
                del seen[read]
        return [seen[node] for node in group.outputs]

    return lambda: op.OVERLOAD(inputs, operands, text), single


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _last_uses(group: Group) -> dict[fx.Node, list[fx.Node]]:
    """Of every node, the values that nobody reads behind it: they are dropped there, as in the code of a graph."""
    last: dict[fx.Node, fx.Node] = {}
    for node in group.nodes:
        last.update(dict.fromkeys((n for n in node.all_input_nodes if n in group.nodes), node))
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if value not in group.outputs:
            found.setdefault(node, []).append(value)
    return found
