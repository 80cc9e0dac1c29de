"""FX graphs as JSON of our own: nodes whose calls are named through fixed tables, and recipes of constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsec.codegen.kernel import Step
from sparsec.errors import LoadError, SparsecError, SpecError
from sparsec.graph import KEY, Fact, fact
from sparsec.recipes import Constant
from sparsec.save_ops import ATTRIBUTES, WRITE_BACK, name_of, target_of
from sparsec.save_values import decode, encode, identifier, integer, sequence, table, text
from sparsec.schedule import STREAM

NODES = 1_000_000
_CALLS = ("call_function", "call_method")


def encode_graph(graph: fx.Graph) -> list[Any]:
    """[op, name, target, args, kwargs, about] of every node; SpecError names a node that no table knows."""
    return [_encode_node(node) for node in graph.nodes]


def _encode_node(node: fx.Node) -> list[Any]:
    if node.op == "call_module":
        raise SpecError(
            f"node {node.name!r} calls the module {node.target!r}, whose code is Python and cannot be saved; compile "
            "with capture='export', or save sparsec.dense_state_dict(cm)"
        )
    try:
        target = name_of(node.op, node.target) if node.op in _CALLS else str(node.target)
        kwargs = {key: encode(value) for key, value in node.kwargs.items()}
        args = [] if node.op == "placeholder" else [encode(a) for a in node.args]
    except SpecError as error:
        raise SpecError(f"node {node.name!r}: {error}") from error
    return [node.op, node.name, target, args, kwargs, _about(node)]


def _about(node: fx.Node) -> dict[str, Any]:
    """What pictures and site names need: the owning module and the site's fact."""
    about: dict[str, Any] = {}
    stack = node.meta.get("nn_module_stack")
    if stack:
        key, (path, kind) = list(stack.items())[-1]
        about["module"] = [str(key), str(path), kind if isinstance(kind, str) else kind.__name__]
    known = fact(node)
    if known is not None:
        about["site"] = {
            "site": known.site, "op": known.op, "module": known.module, "weight": known.weight, "bias": known.bias,
            "shape": list(known.shape), "dtype": known.dtype, "nnz": known.nnz,
            "epilogue": [[s.name, [encode(float(p)) for p in s.params]] for s in known.epilogue],
        }  # fmt: skip
    if STREAM in node.meta:
        about["stream"] = node.meta[STREAM]
    return about


def decode_graph(data: Any, *, inputs: int, has: Callable[[str], bool], pure: bool = False) -> fx.Graph:
    """The inverse of `encode_graph`: `inputs` placeholders, then calls, then one output.

    `has` says whether the root has an attribute; with `pure` there are neither attributes nor sparsec calls (recipes).
    """
    if len(sequence(data, "a graph")) > NODES:
        raise LoadError(f"a graph has {len(data)} nodes; at most {NODES}")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def node_of(name: str) -> fx.Node:
        if name not in nodes:
            raise LoadError(f"{name!r:.60} is read before it is computed, or does not exist")
        return nodes[name]

    for item in data:
        if not isinstance(item, list) or len(item) != 6:
            raise LoadError("a node is not a list of six parts")
        name = identifier(item[1], "node")
        if name in nodes or (nodes and next(reversed(nodes.values())).op == "output"):
            raise LoadError(f"node {name!r} appears twice, or behind the output")
        try:
            made = _decode_node(graph, item, node_of, has, pure)
        except LoadError as error:
            raise LoadError(f"node {name!r}: {error}") from error
        nodes[name] = made
    ops = [n.op for n in nodes.values()]
    if ops.count("placeholder") != inputs or ops.count("output") != 1:
        raise LoadError(f"a graph has {ops.count('placeholder')} inputs, expected {inputs}, and one output")
    return graph


def _decode_node(graph: fx.Graph, item: list[Any], node_of: Any, has: Callable[[str], bool], pure: bool) -> fx.Node:
    op, name, spelled, args_data, kwargs_data, about = item
    text(spelled, "target", 1000)
    args = tuple(decode(a, node_of) for a in sequence(args_data, "args"))
    if not isinstance(kwargs_data, dict):
        raise LoadError("kwargs is not an object")
    kwargs = {identifier(k, "keyword"): decode(v, node_of) for k, v in kwargs_data.items()}
    target: Any = spelled
    if op == "placeholder":
        if args or kwargs or identifier(spelled, "input") != spelled:
            raise LoadError("an input takes no arguments")
    elif op == "get_attr":
        if pure or args or kwargs or not has(identifier(spelled, "attribute")):
            raise LoadError(f"the model has no tensor {spelled!r:.60}")
    elif op == "output":
        if spelled != "output" or kwargs or len(args) != 1 or (pure and not isinstance(args[0], fx.Node)):
            raise LoadError("the output takes one argument")
    elif op in _CALLS:
        target = target_of(op, spelled)
        _check_call(op, spelled, target, args, kwargs, pure)
    else:
        raise LoadError(f"{op!r:.40} is no kind of node in a saved graph")
    node = graph.create_node(op, target, args, kwargs, name)
    _read_about(node, about)
    return node


def _check_call(op: str, spelled: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], pure: bool) -> None:
    if target is getattr and not (len(args) == 2 and isinstance(args[0], fx.Node) and args[1] in ATTRIBUTES):
        raise LoadError(f"getattr reads one of {', '.join(ATTRIBUTES)} of a node and nothing else")
    if op == "call_method" and not (args and isinstance(args[0], fx.Node)):
        raise LoadError(f"{spelled!r} needs a tensor")
    if pure and spelled.startswith("sparsec."):
        raise LoadError("a recipe calls ATen ops alone")
    if spelled == WRITE_BACK:
        goal = args[0] if args else None
        if pure or not isinstance(goal, fx.Node) or goal.op not in ("get_attr", "placeholder"):
            raise LoadError("copy_ writes a buffer or an input and nothing else")
    if isinstance(target, torch._ops.OpOverload):
        names = [a.name for a in target._schema.arguments]
        if len(args) > len(names) or not set(kwargs) <= set(names[len(args) :]):
            raise LoadError(f"{spelled} takes the arguments {', '.join(names)}")


def _read_about(node: fx.Node, about: Any) -> None:
    if not isinstance(about, dict) or not set(about) <= {"module", "site", "stream"}:
        raise LoadError("what is said about it is not an object with module, site and stream")
    if "stream" in about:
        node.meta[STREAM] = integer(about["stream"], "stream", high=NODES)
    if "module" in about:
        parts = sequence(about["module"], "module")
        if len(parts) != 3:
            raise LoadError("module is not a list of three texts")
        key, path, kind = (text(part, "module", 10_000) for part in parts)
        node.meta["nn_module_stack"] = {key: (path, kind)}
    if "site" in about:
        node.meta[KEY] = _read_fact(about["site"])


def _read_fact(data: Any) -> Fact:
    keys = ("site", "op", "module", "weight", "bias", "shape", "dtype", "nnz", "epilogue")
    table(data, "site", keys)
    names: dict[str, Any] = {key: text(data[key], key, 10_000) for key in ("site", "op", "module", "weight", "dtype")}
    shape = tuple(integer(s, "shape") for s in sequence(data["shape"], "shape"))
    steps = []
    for item in sequence(data["epilogue"], "epilogue"):
        if not isinstance(item, list) or len(item) != 2:
            raise LoadError("an epilogue step is a name and its parameters")
        values = [decode(p, _no_node) for p in sequence(item[1], "parameters")]
        try:
            steps.append(Step(text(item[0], "step", 100), tuple(float(v) for v in values)))
        except (SparsecError, TypeError, ValueError, OverflowError) as error:
            raise LoadError(f"epilogue step: {error!s:.200}") from error
    bias = None if data["bias"] is None else text(data["bias"], "bias", 10_000)
    nnz = integer(data["nnz"], "nnz", low=-1)
    return Fact(**names, bias=bias, shape=shape, nnz=nnz, epilogue=tuple(steps))


def _no_node(name: str) -> Any:
    raise LoadError("a number cannot be a node")


# Constants


def encode_constant(constant: Constant, literal: Callable[[torch.Tensor], str]) -> dict[str, Any]:
    """Sources, recipe and the names under which `literal` keeps the tensors it reads."""
    recipe = None if constant.recipe is None else encode_graph(constant.recipe)
    literals = [literal(t) for t in constant.literals]
    return {"sources": list(constant.sources), "recipe": recipe, "literals": literals}


def decode_constant(data: Any, literal: Callable[[Any], torch.Tensor]) -> Constant:
    """The inverse of `encode_constant`."""
    table(data, "constant", ("sources", "recipe", "literals"))
    sources = tuple(text(s, "source", 10_000) for s in sequence(data["sources"], "sources"))
    literals = tuple(literal(name) for name in sequence(data["literals"], "literals"))
    if data["recipe"] is None:
        if literals:
            raise LoadError("a constant without a recipe reads no literals")
        return Constant(sources)
    inputs = len(sources) + len(literals)
    return Constant(sources, decode_graph(data["recipe"], inputs=inputs, has=lambda _: False, pure=True), literals)
