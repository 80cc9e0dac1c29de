"""Random graphs keep their meaning through every pass and order of passes; and the checks themselves see a lie."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import sparsec
from sparsec import testing_graphs as graphs
from sparsec.driver import Context, Pass
from sparsec.errors import PassError

QUICK = 8

FOUND = (
    graphs.Plan(seed=37, depth=1, capture="trace", order=5, batch=5),  # a bias folded between two annotates was lost
)
"""Plans that failed once."""


@pytest.mark.parametrize("plan", FOUND, ids=str)
def test_what_failed_once_passes(plan: graphs.Plan) -> None:
    assert graphs.failure(plan) == ""


@pytest.mark.parametrize("number", range(QUICK))
def test_a_random_graph_keeps_its_meaning(number: int) -> None:
    plan = graphs.draw(number)
    assert graphs.failure(plan) == "", plan


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_many_random_graphs(seed: int) -> None:
    wrong = [(graphs.shrink(plan), text) for plan, text in graphs.run(seed + 1, 100) if text]
    assert wrong == []


def test_plans_and_modules_follow_from_their_seed() -> None:
    assert graphs.draw(5) == graphs.draw(5)
    one, two = (graphs.RandomNet(5, 6).state_dict() for _ in range(2))
    assert list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)
    assert {graphs.draw(n).order for n in range(60)} == set(range(len(graphs.ORDERS)))
    drawn = [graphs.draw(n) for n in range(400)]
    assert {plan.capture for plan in drawn} == set(graphs.CAPTURES)
    assert {plan.depth for plan in drawn} == set(range(1, 31)) and any(plan.dynamic for plan in drawn)


def test_a_block_counts_its_graphs_and_shrinks_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "failure", lambda plan: "wrong" if plan.depth > 2 else "")
    counts, failures = graphs.block(3, 1, graphs=12)
    assert counts["graphs"] == 12 and counts["kinds"]["trace"] + sum(
        n for kind, n in counts["kinds"].items() if kind.startswith("export")
    ) == 12  # fmt: skip
    assert failures and all("depth=3, capture=" in f and f.endswith("wrong") for f in failures)


class _Forget(Pass):
    """A miscompilation: the first bias is dropped."""

    name = "forget"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten.linear.default and len(node.args) == 3:
                node.args = node.args[:2]
                return 1
        return 0


def test_the_semantic_check_names_the_pass_that_lied() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    x = torch.randn(2, 8)
    exact, bound = graphs.oracle(net, x)
    passes = [*sparsec.DEFAULT.insert_after("normalise", _Forget()).insert_after(
        "forget", graphs.SemanticCheck("forget", 0, exact, bound)
    )]  # fmt: skip
    with pytest.raises(PassError, match="after 'forget' the graph computes something else: output 0 is off"):
        sparsec.compile(net, None, (x,), passes=passes, tune="off")


def test_compare_sees_values_shapes_and_nan() -> None:
    exact = [torch.zeros(2, dtype=torch.float64)]
    assert graphs.compare([torch.zeros(2)], exact, [1e-6]) == ""
    assert "off by" in graphs.compare([torch.full((2,), 1e-3)], exact, [1e-6])
    assert "off by" in graphs.compare([torch.full((2,), float("nan"))], exact, [1e-6])
    assert "shapes" in graphs.compare([torch.zeros(3)], exact, [1e-6])
