"""Random graphs keep their meaning through every pass and order of passes; and the checks themselves see a lie."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import sparsec
from sparsec import testing_graphs as graphs
from sparsec.driver import Context, Pass
from sparsec.errors import PassError
from sparsec.passes import Factorise
from sparsec.passes.restructure import Restructure
from sparsec.passes.rewrite import Rewrite

QUICK = 8

class _FoldedBias(nn.Module):
    """What seed 37 drew: `fold` between two runs of `annotate` makes a bias that the first did not see."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) * (torch.rand(32, 32) < 0.2))
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.weight.transpose(0, 1).contiguous()) + self.bias


def test_a_residual_that_was_renamed_behind_fuse_is_found() -> None:
    """`fold` between `fuse` and `select` puts another node in the place of the one that a tail adds."""
    assert graphs.failure(graphs.Plan(22001554, 6, "trace", False, 64476, 8, False)) == ""


def test_a_bias_that_was_folded_between_two_annotates_is_seen() -> None:
    model, x = _FoldedBias().eval(), torch.randn(5, 6, 32)
    passes = [kind() for kind in graphs.ORDERS[5]]
    cm = sparsec.compile(model, None, (x,), capture="trace", passes=passes, tune="off", min_speedup=0)
    torch.testing.assert_close(cm(x), model(x))


def test_parts_whose_shapes_were_recorded_apart_are_multiplied() -> None:
    """`rewrite` joins two weights of which one was given its shape by another run of the tracer."""
    plan = graphs.Plan(21000181, 17, "trace", order=65428, batch=2, writes=False)
    assert graphs.failure(plan) == ""


def test_random_orders_are_allowed_and_differ() -> None:
    drawn = [graphs.passes_of(len(graphs.ORDERS) + n) for n in range(200)]
    assert len(set(drawn)) > 100
    assert {kind for order in drawn for kind in order} == {
        *(type(p) for p in sparsec.DEFAULT), Restructure, Rewrite,
    } - {Factorise}  # fmt: skip


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
    drawn = [graphs.draw(n) for n in range(400)]
    assert {plan.order for plan in drawn} > set(range(len(graphs.ORDERS)))
    assert all(plan.writes for plan in drawn if plan.capture == "export")
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
