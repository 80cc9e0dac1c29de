"""The IR contract as one table: what must hold for each kind of node, checked around every pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sparsec.aten import WEIGHT_OPS, operands, opname
from sparsec.errors import PassError
from sparsec.graph import constant_nodes

WEIGHT_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_WEIGHT_NAMES = frozenset(name.removeprefix("aten::") for name in WEIGHT_OPS)

_IN_PLACE_OPERATORS = frozenset(
    name for name in dir(operator) if name[0] == "i" and {name[1:], name[1:] + "_"} & {*dir(operator)}
)


@dataclass
class View:
    """What the rules look at beside the node: the graph, the rung it came from, what passes have ensured."""

    gm: fx.GraphModule
    rung: str
    ensured: frozenset[str] = frozenset()
    training: bool = False
    constant: dict[fx.Node, None] = field(default_factory=dict)
    started: bool = False  # a call has been seen
    outputs: int = 0


@dataclass(frozen=True)
class Rule:
    """One line of the contract. `broken` says what is wrong with a node, or None."""

    name: str
    op: str  # the node.op it speaks of
    sentence: str
    broken: Callable[[fx.Node, View], str | None]


@dataclass(frozen=True)
class Violation:
    """A node that breaks a rule."""

    node: fx.Node
    rule: Rule
    detail: str

    def __str__(self) -> str:
        place = _model_line(self.node)
        line = f"node {self.node.name!r} breaks {self.rule.name!r} ({self.rule.sentence}): {self.detail}"
        return f"{line}\n    {code_line(self.node)}" + (f"\n    from {place}" if place else "")


def _placeholder_late(node: fx.Node, view: View) -> str | None:
    return "it stands behind a call" if view.started else None


def _output_again(node: fx.Node, view: View) -> str | None:
    view.outputs += 1
    if view.outputs > 1:
        return f"it is output number {view.outputs}"
    return "nodes follow it" if node.next.op != "root" else None


def _bad_attribute(node: fx.Node, view: View) -> str | None:
    name = str(node.target)
    if "." in name:
        return f"{name!r} is a dotted name; register the tensor flat with graph.add_constant"
    value = getattr(view.gm, name, None)
    if value is None:
        return f"the root has no {name!r}"
    if not isinstance(value, torch.Tensor):
        return f"{name!r} is a {type(value).__name__}, not a tensor"
    if name not in view.gm._parameters and name not in view.gm._buffers:
        return f"{name!r} is a plain attribute, neither parameter nor buffer: .to() and deepcopy would miss it"
    return None


def _in_place(node: fx.Node, view: View) -> str | None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if not target._schema.is_mutable or _write_back(node):
            return None
        return f"{target} writes its argument"
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS:
        return f"operator.{name} works in place on tensors; write operator.{name[1:]}"
    if node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__")):
        return f"{name} works in place"
    return None


def _write_back(node: fx.Node) -> bool:
    """`copy_` onto an input or a root buffer whose result nobody reads: how export spells a buffer's new value."""
    source = node.args[0] if node.args else None
    known = isinstance(source, fx.Node) and source.op in ("get_attr", "placeholder")
    return opname(node) == "aten::copy_" and known and not [u for u in node.users if u.op != "output"]


def _higher_order(node: fx.Node, view: View) -> str | None:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"{node.target} hides the ops of a subgraph"
    return None


def _weight_not_read(node: fx.Node, view: View) -> str | None:
    if "normalised" not in view.ensured or view.training or node in view.constant:
        return None
    for operand in operands(node):
        if operand in view.constant and operand.op != "get_attr":
            return f"operand {operand.name!r} is computed from constants; fold it with graph.fold_constants"
    return None


def _weight_not_aten(node: fx.Node, view: View) -> str | None:
    if opname(node) or node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    if name in _WEIGHT_NAMES and any(n.op == "get_attr" for n in node.all_input_nodes):
        return f"{name} has a constant operand but is no torch.ops.aten call"
    return None


def _buffer_not_read(node: fx.Node, view: View) -> str | None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "sparsec":
        return None
    for value in (*node.args, *node.kwargs.values()):
        for item in value if isinstance(value, list | tuple) else ():
            if isinstance(item, fx.Node) and item.op != "get_attr":
                return f"buffer {item.name!r} is a {item.op}"
    return None


def _opaque_module(node: fx.Node, view: View) -> str | None:
    if view.rung != "trace":
        return "an exported graph has no module calls"
    try:
        module = view.gm.get_submodule(str(node.target))
    except AttributeError:
        return f"the root has no module {node.target!r}"
    if isinstance(module, WEIGHT_MODULES):
        return f"{type(module).__name__} carries a weight that no pass can see in it"
    return None


def _opaque_method(node: fx.Node, view: View) -> str | None:
    name = str(node.target)
    if view.rung != "trace":
        return "an exported graph has no method calls"
    if name.endswith("_") and not name.endswith("__"):
        return f".{name}() works in place"
    if name in _WEIGHT_NAMES and any(n.op == "get_attr" for n in node.all_input_nodes):
        return f".{name}() has a constant operand but is no torch.ops.aten call"
    return None


CONTRACT: tuple[Rule, ...] = (
    Rule("inputs first", "placeholder", "placeholders come before every call", _placeholder_late),
    Rule("one output", "output", "there is exactly one output node and it is the last", _output_again),
    Rule("flat constants", "get_attr", "a get_attr names a parameter or buffer of the root itself", _bad_attribute),
    Rule("functional", "call_function", "no call changes its arguments", _in_place),
    Rule("no wrappers", "call_function", "higher-order ops are inlined", _higher_order),
    Rule("weights in ATen", "call_function", "what multiplies by a constant is an ATen call", _weight_not_aten),
    Rule("weights are read", "call_function", "a constant weight of a weight op is a get_attr", _weight_not_read),
    Rule("packed buffers", "call_function", "buffers of a sparsec op are get_attr", _buffer_not_read),
    Rule("opaque modules", "call_module", "traced graphs alone call modules, without weights", _opaque_module),
    Rule("opaque methods", "call_method", "traced graphs alone call methods, no weight ops", _opaque_method),
)
"""Everything a pass may rely on and must leave true. "weights are read" holds once a pass has ensured "normalised"."""

_BY_OP: dict[str, tuple[Rule, ...]] = {rule.op: tuple(r for r in CONTRACT if r.op == rule.op) for rule in CONTRACT}


def violations(
    gm: fx.GraphModule, rung: str = "export", *, ensured: Iterable[str] = (), training: bool = False
) -> list[Violation]:
    """Every breach of the contract, in graph order. `rung` is "export" or "trace"."""
    view = View(gm, rung, frozenset(ensured), training)
    found: list[Violation] = []
    attributes = [n for n in gm.graph.nodes if n.op == "get_attr"]
    if all(_bad_attribute(n, view) is None for n in attributes):
        view.constant = constant_nodes(gm)
    for node in gm.graph.nodes:
        for rule in _BY_OP[node.op]:
            detail = rule.broken(node, view)
            if detail is not None:
                found.append(Violation(node, rule, detail))
        view.started = view.started or node.op not in ("placeholder", "get_attr")
    if not view.outputs:
        rule = _BY_OP["output"][0]
        found.append(Violation(next(reversed(gm.graph.nodes)), rule, "the graph has no output"))
    return found


def check(
    gm: fx.GraphModule,
    rung: str = "export",
    *,
    ensured: Iterable[str] = (),
    training: bool = False,
    where: str = "capture",
) -> None:
    """Raise PassError naming the first breach of the contract, its node and its line, and `where` it was found."""
    found = violations(gm, rung, ensured=ensured, training=training)
    if found:
        more = f"\n  and {len(found) - 1} more" if len(found) > 1 else ""
        raise PassError(f"after {where!r} the graph breaks the IR contract: {found[0]}{more}")


def code_line(node: fx.Node) -> str:
    """A node as the line of code that it stands for."""
    if node.op in ("placeholder", "get_attr"):
        return f"{node.name} = {node.op} {node.target!r}"
    parts = [_shown(a) for a in node.args] + [f"{k} = {_shown(v)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"return {', '.join(parts)}"
    if node.op == "call_method":
        return f"{node.name} = {parts[0]}.{node.target}({', '.join(parts[1:])})" if parts else f"{node.name} = ?"
    target = str(node.target) if node.op == "call_module" or opname(node) else _named(node.target)
    return f"{node.name} = {target}({', '.join(parts)})"


def _shown(value: Any) -> str:
    return repr(value)


def _named(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}".lstrip(".")


def _model_line(node: fx.Node) -> str:
    """Where in the model's own code a node comes from, when the capture recorded it."""
    trace = node.meta.get("stack_trace")
    lines = [line.strip() for line in str(trace).splitlines() if line.strip().startswith("File")] if trace else []
    return lines[-1] if lines else ""
