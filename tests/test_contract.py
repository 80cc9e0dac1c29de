"""The IR contract: every line of the table has a graph that breaks it, and the message names node, rule and line."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_tools import aten, build, captured
from torch import fx, nn

from sparsec.contract import CONTRACT, check, code_line, violations
from sparsec.errors import PassError


def good() -> fx.GraphModule:
    return build(lambda x, w: aten.relu.default(aten.linear.default(x, w)), "x", w=torch.eye(4))


def find(gm: fx.GraphModule, op: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == op)


def late_input(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_after(find(gm, "call_function")):
        gm.graph.placeholder("late")


def two_outputs(gm: fx.GraphModule) -> None:
    gm.graph.create_node("output", "output", (find(gm, "call_function"),))


def call_behind_output(gm: fx.GraphModule) -> None:
    gm.graph.call_function(aten.relu.default, (find(gm, "call_function"),))


def no_output(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(find(gm, "output"))


def dotted(gm: fx.GraphModule) -> None:
    gm.inner = nn.Linear(4, 4)
    find(gm, "get_attr").target = "inner.weight"


def absent(gm: fx.GraphModule) -> None:
    find(gm, "get_attr").target = "nowhere"


def not_tensor(gm: fx.GraphModule) -> None:
    gm.inner = nn.Linear(4, 4)
    find(gm, "get_attr").target = "inner"


def plain(gm: fx.GraphModule) -> None:
    object.__setattr__(gm, "loose", torch.ones(4, 4))
    find(gm, "get_attr").target = "loose"


def insert(gm: fx.GraphModule, target: Any, *more: Any, op: str = "call_function", **kwargs: Any) -> fx.Node:
    """A call on the result of the linear, before the relu."""
    linear = find(gm, "call_function")
    with gm.graph.inserting_after(linear):
        return gm.graph.create_node(op, target, (linear, *more), kwargs)


def in_place(gm: fx.GraphModule) -> None:
    insert(gm, aten.add_.Tensor, 1)


def wrapper(gm: fx.GraphModule) -> None:
    insert(gm, torch.ops.higher_order.wrap_with_set_grad_enabled)


def not_aten(gm: fx.GraphModule) -> None:
    insert(gm, torch.matmul, find(gm, "get_attr"))


def module(gm: fx.GraphModule) -> None:
    gm.act = nn.GELU()
    insert(gm, "act", op="call_module")


def method(gm: fx.GraphModule) -> None:
    insert(gm, "relu", op="call_method")


EXPORT: list[tuple[Callable[[fx.GraphModule], None], str, str]] = [
    (late_input, "inputs first", "stands behind a call"),
    (two_outputs, "one output", "output number 2"),
    (call_behind_output, "one output", "nodes follow it"),
    (no_output, "one output", "the graph has no output"),
    (dotted, "flat constants", "'inner.weight' is a dotted name"),
    (absent, "flat constants", "the root has no 'nowhere'"),
    (not_tensor, "flat constants", "is a Linear, not a tensor"),
    (plain, "flat constants", "neither parameter nor buffer"),
    (in_place, "functional", "aten.add_.Tensor writes its argument"),
    (wrapper, "no wrappers", "hides the ops of a subgraph"),
    (not_aten, "weights in ATen", "matmul has a constant operand"),
    (module, "opaque modules", "an exported graph has no module calls"),
    (method, "opaque methods", "an exported graph has no method calls"),
]


@pytest.mark.parametrize(("spoil", "rule", "detail"), EXPORT, ids=lambda v: getattr(v, "__name__", None))
def test_every_breach_is_named(spoil: Callable[[fx.GraphModule], None], rule: str, detail: str) -> None:
    gm = good()
    assert violations(gm) == []
    spoil(gm)
    found = violations(gm)
    assert rule in [v.rule.name for v in found]
    with pytest.raises(PassError, match="after 'mypass' the graph breaks the IR contract: node ") as caught:
        check(gm, where="mypass")
    assert any(detail in str(v) for v in found)
    assert repr(found[0].rule.name) in str(caught.value)
    assert code_line(found[0].node) in str(caught.value)


def test_table_is_covered() -> None:
    here = {rule for _, rule, _ in EXPORT} | {"weights are read", "packed buffers"}
    assert here == {rule.name for rule in CONTRACT}


def inplace_flag(gm: fx.GraphModule) -> None:
    insert(gm, torch.nn.functional.relu, inplace=True)


def inplace_operator(gm: fx.GraphModule) -> None:
    insert(gm, operator.iadd, 1)


def inplace_method(gm: fx.GraphModule) -> None:
    insert(gm, "mul_", 2, op="call_method")


def weight_module(gm: fx.GraphModule) -> None:
    gm.fc = nn.Linear(4, 4)
    insert(gm, "fc", op="call_module")


def missing_module(gm: fx.GraphModule) -> None:
    insert(gm, "fc", op="call_module")


def weight_method(gm: fx.GraphModule) -> None:
    insert(gm, "matmul", find(gm, "get_attr"), op="call_method")


@pytest.mark.parametrize(
    ("spoil", "detail"),
    [
        (module, None),
        (method, None),
        (inplace_flag, "relu works in place"),
        (inplace_operator, "write operator.add"),
        (inplace_method, ".mul_() works in place"),
        (weight_module, "Linear carries a weight that no pass can see"),
        (missing_module, "the root has no module 'fc'"),
        (weight_method, ".matmul() has a constant operand"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_traced_graphs_may_be_opaque_but_not_about_weights(
    spoil: Callable[[fx.GraphModule], None], detail: str | None
) -> None:
    gm = good()
    spoil(gm)
    found = [str(v) for v in violations(gm, "trace")]
    assert (not found) if detail is None else (len(found) == 1 and detail in found[0])


def test_computed_weights_break_the_contract_only_once_normalised() -> None:
    gm = build(lambda x, w: aten.linear.default(x, aten.t.default(w)), "x", w=torch.eye(4))
    assert violations(gm) == []
    (found,) = violations(gm, ensured=["normalised"])
    assert found.rule.name == "weights are read"
    assert "operand 't_default' is computed from constants" in str(found)
    assert "linear_default = aten.linear.default(x, t_default)" in str(found)
    assert violations(gm, ensured=["normalised"], training=True) == []


def test_weights_from_inputs_are_no_breach() -> None:
    gm = build(lambda x, y: aten.linear.default(x, aten.t.default(y)), "x", "y")
    assert violations(gm, ensured=["normalised"]) == []


def test_export_of_a_buffer_update_is_allowed() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            return self.fc(x) + self.steps

    gm = captured(Counter(), torch.randn(2, 4))
    assert any(n.target is aten.copy_.default for n in gm.graph.nodes)
    assert violations(gm) == []


def test_sparsec_buffers_must_be_read_from_the_root() -> None:
    lib = torch.library.Library("sparsec", "FRAGMENT")
    lib.define("contract_probe(Tensor x, Tensor[] weight) -> Tensor")
    op = torch.ops.sparsec.contract_probe.default
    fine = build(lambda x, v, i: op(x, [v, i]), "x", v=torch.ones(3), i=torch.ones(3))
    assert violations(fine) == []
    (found,) = violations(
        build(lambda x, v, i: op(x, [v, aten.relu.default(i)]), "x", v=torch.ones(3), i=torch.ones(3))
    )
    assert found.rule.name == "packed buffers"
    lib._destroy()


def test_message_says_where_in_the_model() -> None:
    gm = good()
    node = insert(gm, aten.add_.Tensor, 1)
    node.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    x += 1\n'
    with pytest.raises(PassError, match=r'from File "model\.py", line 7, in forward'):
        check(gm)


def test_a_node_reads_as_the_line_that_it_stands_for() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    lines = {
        x: "x = placeholder 'x'",
        graph.call_function(operator.add, (x, 1)): "add = _operator.add(x, 1)",
        graph.call_function(aten.relu.default, (x,)): "relu_default = aten.relu.default(x)",
        graph.call_function(torch.nn.functional.relu, (x,), {"inplace": True}): (
            "relu = torch.nn.functional.relu(x, inplace = True)"
        ),
        graph.call_method("view", (x, 2, -1)): "view = x.view(2, -1)",
        graph.call_module("block.0", (x,)): "block_0 = block.0(x)",
        graph.output((x,)): "return (x,)",
    }
    assert [code_line(node) for node in lines] == list(lines.values())
