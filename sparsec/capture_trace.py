"""Rung 2 at work: trace, rewrite by the table, flatten the constants, propagate fake shapes, compare with the model."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.utils.parametrize
from torch import fx, nn
from torch.utils import _pytree as pytree

from sparsec.call import CallInfo, Leaf
from sparsec.capture import Captured, describe_call, dynamic_dims, dynamic_leaves
from sparsec.capture_export import check_state
from sparsec.capture_table import ARITHMETIC, rule_of, writes_input
from sparsec.failures import quiet
from sparsec.flatten import flatten_constants
from sparsec.private import shadow

OWNING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose weight must not vanish inside an opaque call."""


def capture_trace(
    model: nn.Module, example: Any, shapes: Any, training: bool, *, guard_shapes: bool = True
) -> Captured:
    """Trace a private copy symbolically. Needs no example inputs; with them shapes are propagated and results compared.

    The graph takes any shape; `guard_shapes=False` also lets calls bring any shape (regions need that).
    """
    by_name = None
    if example is not None:
        by_name, example = dynamic_dims(model, example, shapes)
    call = describe_call(model, example, "trace", training)
    with quiet():
        graph, out_spec = _trace(model, call)
    to_aten(graph, model)
    check_coverage(graph, model)
    gm = flatten_constants(graph, model, model, out_spec, training)
    if example is not None:
        inputs = call.flatten(*example)
        dynamic = dynamic_leaves(call, by_name or {})
        fakes = [(value, dynamic.get(leaf.name, set())) for value, leaf in zip(inputs, call.guards)]
        propagate(gm, fakes)
        call = _guard(call, fakes, guard_shapes)
    arithmetic(gm)
    gm.graph.lint()
    gm.recompile()
    if example is not None and not training:
        compare(gm, model, call, example)
    return Captured(gm, call, example=example)


class _Tracer(fx.Tracer):
    """Traces `forward` with proxies for the captured tensors and plain values for everything else.

    torch's own way to fix an argument (concrete_args) renames it and inserts assertions.
    """

    def __init__(self, call: CallInfo) -> None:
        super().__init__()
        self.call = call
        self.out_spec: pytree.TreeSpec | None = None

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for argument in self.call.arguments:
            param = self.call.signature.parameters[argument.param]
            leaves = [self._leaf(leaf) for leaf in argument.leaves]
            value = leaves[0] if argument.spec is None else pytree.tree_unflatten(leaves, argument.spec)
            if param.kind is param.VAR_POSITIONAL:
                args.extend(value)
            elif param.kind is param.VAR_KEYWORD:
                kwargs.update(value)
            elif param.kind is param.KEYWORD_ONLY:
                kwargs[argument.param] = value
            else:
                args.append(value)

        def flat() -> tuple[Any, ...]:
            leaves, self.out_spec = pytree.tree_flatten(root_fn(self.root, *args, **kwargs))
            return tuple(leaves)

        return flat, []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # What computes a weight (pruning's hooks, parametrizations) runs only in a module that is entered.
        computed = bool(m._forward_pre_hooks or m._forward_hooks) or nn.utils.parametrize.is_parametrized(m)
        computed = computed or type(m).__module__.startswith("torch.nn.utils.")
        return not computed and super().is_leaf_module(m, module_qualified_name)

    def _leaf(self, leaf: Leaf) -> Any:
        if not leaf.slot:
            return leaf.value
        name = "".join(c if c.isalnum() else "_" for c in leaf.name)
        return self.create_proxy("placeholder", name, (), {})


def _trace(model: nn.Module, call: CallInfo) -> tuple[fx.Graph, pytree.TreeSpec | None]:
    before = [dict(vars(m)) for m in model.modules()]
    tracer = _Tracer(call)
    graph = tracer.trace(model)
    for module, old in zip(model.modules(), before):  # constants that the tracer itself has put there
        added = {k: v for k, v in vars(module).items() if k.startswith("_tensor_constant") and k not in old}
        old.update(added)
    check_state(model, before)
    return graph, tracer.out_spec


# The table


def to_aten(graph: fx.Graph, root: nn.Module) -> int:
    """Apply the table to every node it knows; returns how many. Writes become values that later readers see."""
    changed = 0
    for node in list(graph.nodes):
        rule = rule_of(node, root)
        writes = writes_input(node, root)
        if writes:
            _check_write(node, rule is not None)
        if rule is None:
            continue
        result = _apply(graph, root, node, rule)
        if result is NotImplemented:
            if writes:
                raise RuntimeError(f"{node.format_node()} writes its argument in place")
            continue
        target = node.args[0] if writes else None
        node.replace_all_uses_with(result)
        if isinstance(target, fx.Node) and target is not result:
            target.replace_all_uses_with(result, delete_user_cb=partial(operator.lt, node))  # those after the write
        graph.erase_node(node)
        changed += 1
    return changed


class _Appender(fx.proxy.GraphAppendingTracer):
    """Appends nodes that belong to the same module as the node they replace."""

    def __init__(self, graph: fx.Graph, meta: dict[str, Any]) -> None:
        super().__init__(graph)
        self.meta = meta

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta.update(self.meta)
        return node


def _apply(graph: fx.Graph, root: nn.Module, node: fx.Node, rule: Callable[..., Any]) -> Any:
    tracer = _Appender(graph, {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta})
    proxy: Any = lambda n: fx.Proxy(n, tracer)  # noqa: E731
    args, kwargs = cast(Any, fx.map_arg((node.args, dict(node.kwargs)), proxy))
    with graph.inserting_before(node):
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))

            def constant(name: str) -> Any:
                if getattr(module, name) is None:
                    return None
                return tracer.create_proxy("get_attr", f"{node.target}.{name}", (), {})

            result = rule(module, constant, *args, **kwargs)
        else:
            result = rule(*args, **kwargs)
    return result.node if isinstance(result, fx.Proxy) else result


_FRESH = ("linear", "conv1d", "conv2d", "conv3d", "addmm", "mm", "bmm", "matmul", "relu", "gelu", "silu", "layer_norm")


def _check_write(node: fx.Node, known: bool) -> None:
    """Refuse a write that somebody outside the later readers of this very value could see: an input, a view, a base."""
    target = node.args[0] if node.args else None
    if known and isinstance(target, fx.Node) and _fresh(target):
        earlier = [u for u in target.users if u < node]
        if all(_fresh(u) for u in earlier):
            return
    raise RuntimeError(f"{node.format_node()} writes in place what may be shared; only torch.export can capture that")


def _fresh(node: fx.Node) -> bool:
    """Whether a node surely makes a new tensor, no view of another one."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target.is_view and not node.target._schema.is_mutable
    if node.target is getattr:
        return False
    first = node.args[0] if node.args else None
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(first, fx.Node):
        return _fresh(first) and "batch_norm" in str(first.target)
    return node.target in ARITHMETIC


def check_coverage(graph: fx.Graph, root: nn.Module) -> None:
    """RuntimeError when every weight of the model hides inside modules that the trace took as opaque."""
    from sparsec.aten import WEIGHT_OPS, opname

    if any(opname(node) in WEIGHT_OPS for node in graph.nodes):
        return
    for node in graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if any(isinstance(m, OWNING) for m in module.modules()):
                raise RuntimeError(f"the weights of {node.target} ({type(module).__name__}) are out of a trace's reach")


def arithmetic(gm: fx.GraphModule) -> int:
    """`a + b` on a tensor --> aten.add.Tensor(a, b), and so on; returns how many."""
    changed = 0
    for node in gm.graph.nodes:
        op = ARITHMETIC.get(node.target) if node.op in ("call_function", "call_method") else None
        if op is None or node.kwargs or len(node.args) != 2 or not _surely_tensor(node.args[0]):
            continue
        node.op, node.target = "call_function", op
        changed += 1
    return changed


def _surely_tensor(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    if "val" in value.meta:
        return isinstance(value.meta["val"], torch.Tensor)
    if value.op == "get_attr":
        return True
    if not isinstance(value.target, torch._ops.OpOverload):
        return False
    returns = value.target._schema.returns
    return len(returns) == 1 and str(returns[0].type) == "Tensor"


# Shapes


def propagate(gm: fx.GraphModule, inputs: list[tuple[Any, set[int]]]) -> None:
    """Put a fake tensor under `val` of every node, with symbols for dynamic sizes; nodes it cannot reach get none."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fakes = []
    for value, dims in inputs:
        if not isinstance(value, torch.Tensor):
            fakes.append(value)
            continue
        kinds = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(value.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        fakes.append(mode.from_tensor(value.detach(), symbolic_context=context))
    with quiet(), contextlib.suppress(Exception), torch.no_grad():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(gm, node.target, None), torch.Tensor):
            node.meta["val"] = mode.from_tensor(getattr(gm, node.target).detach(), static_shapes=True)


def _guard(call: CallInfo, inputs: list[tuple[Any, set[int]]], guard_shapes: bool) -> CallInfo:
    """Guards from the example: fixed sizes, and one symbol per distinct dynamic size of the example."""
    symbols: dict[str, tuple[int, int | None]] = {}
    by_size: dict[int, str] = {}
    queue = iter(inputs)

    def guarded(leaf: Leaf) -> Leaf:
        if not leaf.slot:
            return leaf
        value, dynamic = next(queue)
        dims: list[int | str] = []
        for dim, size in enumerate(value.shape):
            if dim in dynamic:
                name = by_size.setdefault(size, f"s{len(by_size)}" if by_size else "batch")
                symbols[name] = (0, None)
                dims.append(name)
            else:
                dims.append(size)
        return replace(leaf, dims=tuple(dims) if guard_shapes else None, dtype=value.dtype, device=value.device)

    arguments = tuple(replace(a, leaves=tuple(guarded(x) for x in a.leaves)) for a in call.arguments)
    return replace(call, arguments=arguments, symbols=symbols)


def compare(gm: fx.GraphModule, model: nn.Module, call: CallInfo, example: Any) -> None:
    """RuntimeError unless graph and model agree on the example: symbolic tracing does not see in-place aliasing."""

    def own(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else value

    args, kwargs = pytree.tree_map(own, example)
    with torch.no_grad():
        got, found = pytree.tree_flatten(gm(*map(own, call.flatten(*example))))
        want, spec = pytree.tree_flatten(shadow(model, None, buffers=True)(*args, **kwargs))
    agree = found == spec
    for a, b in zip(got, want):
        if isinstance(b, torch.Tensor):
            agree = agree and isinstance(a, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
            agree = agree and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    if not agree:
        raise RuntimeError("the traced graph disagrees with the model: its forward has effects that a trace cannot see")
