"""Small graphs for the tests of passes: captured modules, and hand-made ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from sparsec.capture import capture_whole
from sparsec.graph import Constant, constants

aten = torch.ops.aten


def captured(model: nn.Module, *args: Any, shapes: Any = None) -> fx.GraphModule:
    """`model` in eval mode as capture gives it; without arguments through symbolic_trace, which knows no shapes."""
    mode = "export" if args else "trace"
    return capture_whole(model.eval(), args or None, dynamic_shapes=shapes, mode=mode).gm


def build(body: Callable[..., Any], *inputs: str, **tensors: torch.Tensor) -> fx.GraphModule:
    """A graph made by calling `body` on proxies: the inputs, then the root tensors, which are state-dict entries."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    nodes = [graph.placeholder(name) for name in inputs] + [graph.get_attr(name) for name in tensors]
    result = body(*(fx.Proxy(n, tracer) for n in nodes))
    graph.output(fx.node.map_aggregate(result, lambda v: v.node if isinstance(v, fx.Proxy) else v))
    root = {
        name: t if isinstance(t, nn.Parameter) else nn.Parameter(t, t.is_floating_point())
        for name, t in tensors.items()
    }
    gm = fx.GraphModule(root, graph)
    constants(gm).update({name: Constant((name,)) for name in tensors})
    return gm


def shaped(gm: fx.GraphModule, *inputs: torch.Tensor) -> fx.GraphModule:
    """Give every node of a hand-made graph its `val`, as capture does."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    return gm


def calls(gm: fx.GraphModule) -> list[str]:
    """Names of the ATen calls of a graph, in order, without namespace and overload."""
    return [n.target._schema.name.split("::")[1] for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
