"""Small graphs for the tests of passes: exported modules with flat constants, and hand-made ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from sparsec.graph import Constant, constants, get_constant

aten = torch.ops.aten


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """`model` exported as capture does it: ATen, functional, constants flat on the root with their origin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, args, strict=False, **kwargs).run_decompositions({})
        raw = program.module(check_guards=False)
    saved = model.state_dict()
    root: dict[str, Any] = {}
    table: dict[str, Constant] = {}
    for node in raw.graph.nodes:
        if node.op == "get_attr":
            flat = node.target.replace(".", "_")
            root[flat] = get_constant(raw, node.target)
            table[flat] = Constant((node.target,) if node.target in saved else ())
            node.target = flat
    raw.graph._tracer_cls = None
    gm = fx.GraphModule(root, raw.graph)
    gm._in_spec, gm._out_spec = raw._in_spec, raw._out_spec
    constants(gm).update(table)
    return gm


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


def calls(gm: fx.GraphModule) -> list[str]:
    """Names of the ATen calls of a graph, in order, without namespace and overload."""
    return [n.target._schema.name.split("::")[1] for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
