"""Constants of a captured graph, flat on its root, with a record of where each came from."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sparsec.graph import KEY, Constant, constants
from sparsec.private import storage_of


def tensor_names(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter or buffer -> every qualified name it has, in the order of the state dict."""
    names: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
    return names


def flatten_constants(
    graph: fx.Graph, source: nn.Module, model: nn.Module, out_spec: pytree.TreeSpec | None, training: bool
) -> fx.GraphModule:
    """A module of `graph` whose constants, read from `source` so far, sit flat on the root, tied ones once.

    Where each came from is recorded by the names it has in `model`.
    Dotted attribute chains cost four microseconds apiece on every forward.
    """
    from sparsec.module import FlatCodeGen

    names, saved = tensor_names(model), set(model.state_dict(keep_vars=True))
    root: dict[str, Any] = {}
    flat_of: dict[Any, str] = {}
    first: dict[str, fx.Node] = {}
    table: dict[str, Constant] = {}
    transient: set[str] = set()
    for node in list(graph.nodes):
        if node.op not in ("call_module", "get_attr"):
            continue
        tensor = _fetch(source, node.target)
        if not isinstance(tensor, torch.Tensor):  # an opaque module, or a branch of a control-flow operator
            root[node.target] = tensor
            continue
        if not node.users:
            graph.erase_node(node)
            continue
        known = names.get(id(tensor), [])
        key = _identity(tensor)
        if key not in flat_of:
            flat = flat_name(known[0] if known else node.target, root)
            flat_of[key] = flat
            root[flat] = _constant(tensor, bool(known), training)
            sources = tuple(n for n in known if n in saved)
            table[flat] = Constant(sources)
            if not sources and not isinstance(root[flat], nn.Parameter):
                transient.add(flat)
        flat = flat_of[key]
        if flat in first:
            node.replace_all_uses_with(first[flat])
            graph.erase_node(node)
        else:
            node.target = flat
            first[flat] = node
    if out_spec is not None:
        inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
        graph.set_codegen(FlatCodeGen(inputs, out_spec))
    graph._tracer_cls = None
    result = fx.GraphModule(root, graph)
    result._non_persistent_buffers_set |= transient
    result.training = training
    constants(result).update(table)
    return result


def _fetch(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _identity(tensor: torch.Tensor) -> Any:
    if tensor.numel() == 0 or tensor.layout is not torch.strided or tensor.is_quantized:
        return id(tensor)
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _constant(tensor: torch.Tensor, known: bool, training: bool) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        wants = training and tensor.requires_grad
        return tensor if tensor.requires_grad == wants else nn.Parameter(tensor.detach(), requires_grad=wants)
    return tensor.detach() if known else tensor.detach().clone()


def flat_name(qualified: str, taken: Mapping[str, Any]) -> str:
    """`encoder.layer.0.weight` -> `encoder_layer_0_weight`: an identifier that no attribute of a module has."""
    name = re.sub(r"\W", "_", qualified)
    if not name or name[0].isdigit() or keyword.iskeyword(name) or hasattr(fx.GraphModule, name) or name == "self":
        name = f"c_{name}"
    if name in {"training", "graph", "code", "meta", "run", "attempt", "call"} or name.startswith("__"):
        name = f"c_{name}"
    candidate, ordinal = name, 1
    while candidate in taken:
        ordinal += 1
        candidate = f"{name}_{ordinal}"
    return candidate


def prefix_sites(gm: fx.GraphModule, prefix: str, ties: Mapping[str, tuple[str, ...]]) -> None:
    """Make the module paths and constant sources of a region's graph those of the whole model.

    `ties` gives, for each name of the whole state dict, all names of the same tensor.
    """
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (f"{prefix}.{path}" if path else prefix, kind) for key, (path, kind) in stack.items()
            }
        elif node.op not in ("placeholder", "output", "get_attr"):
            node.meta["nn_module_stack"] = {prefix: (prefix, "")}
    table = constants(gm)
    for name, constant in list(table.items()):
        full = [f"{prefix}.{source}" for source in constant.sources]
        everywhere = [tied for source in full for tied in ties.get(source, (source,))]
        table[name] = replace(constant, sources=tuple(dict.fromkeys(full + everywhere)))
    gm.meta[KEY]["region"] = prefix  # a part of a model: what it lacks may be in another part
