"""What is built and timed: few candidates, the cost model's first choices, and one of every back end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx, nn

import sparsec
from sparsec.codegen.kernel import KernelSpec, Problem
from sparsec.driver import Context, Options
from sparsec.graph import Fact
from sparsec.passes import _shortlist
from sparsec.passes._propose import Candidate, Proposal
from sparsec.passes._shortlist import MOST, NEAR, shortlist
from sparsec.report import Report
from sparsec.spec import Spec
from sparsec.target import Target

PROBLEM = Problem("linear", 64, 64, "float32", 400)


def proposal(*variants: str) -> Proposal:
    fmt = sparsec.CSR().resolve(64, 64)
    specs = [
        KernelSpec("linear", variant, fmt.text(), "float32", 64, 64, "portable", tile=(("at", at),))
        for at, variant in enumerate(variants)
    ]
    graph = fx.Graph()
    fact = Fact(site="a", op="linear", module="Linear", weight="w", bias=None, shape=(64, 64), dtype="float32")
    return Proposal(graph.placeholder("x"), fact, PROBLEM, [Candidate(fmt, spec) for spec in specs])


@pytest.fixture
def context() -> Context:
    return Context(Spec(), Target.parse("cpu"), Options(), Report())


def kept(found: Proposal, times: list[float], context: Context, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    times_of = dict(zip(found.candidates, times, strict=True))
    monkeypatch.setattr(_shortlist, "expected_us", lambda p, c, batches, ctx: times_of[c])
    return [dict(c.spec.tile)["at"] for c in shortlist(found, (16,), context)]


def test_the_nearest_are_kept_in_their_order(context, monkeypatch):
    five = proposal(*["linear_csr"] * 5)
    assert kept(five, [3.0, 1.0, 1.1, 1.15, 1.19], context, monkeypatch) == [1, 2, 3] and MOST == 3
    assert kept(five, [1.1, 5.0, 1.0, 1.0 * NEAR + 0.01, 9.0], context, monkeypatch) == [0, 2]
    assert kept(five, [9.0, 8.0, 1.0, 7.0, 10.0], context, monkeypatch) == [2, 3]  # two, however far apart


def test_every_back_end_keeps_its_first_choice(context, monkeypatch):
    mixed = proposal("linear_csr", "linear_csr", "linear_csr", "linear_csr_tvm", "linear_csr_tvm")
    assert kept(mixed, [1.0, 1.1, 1.15, 90.0, 80.0], context, monkeypatch) == [0, 1, 2, 4]


def test_without_a_clock_or_without_sizes(context):
    five = proposal(*["linear_csr"] * 5)
    assert shortlist(five, (), context) == five.candidates
    off = dataclasses.replace(context, options=dataclasses.replace(context.options, tune="off"))
    assert shortlist(five, (16,), off) == five.candidates[:1]


def test_a_site_builds_no_more_than_the_shortlist(monkeypatch):
    from sparsec.passes import select

    asked: list[KernelSpec] = []
    build = select.build_kernels
    monkeypatch.setattr(select, "build_kernels", lambda specs, *a, **k: asked.extend(specs) or build(specs, *a, **k))
    layer = nn.Linear(96, 160)
    layer.weight.data[torch.rand(160, 96) < 0.9] = 0
    sparsec.compile(layer, None, (torch.randn(24, 96),))
    assert 1 <= len(asked) <= MOST


@pytest.mark.parametrize(("dynamic", "sizes"), [(False, (24,)), (True, (2, 4, 16, 24, 64))])
def test_rows_are_known_before_the_model_runs(dynamic, sizes):
    batch = torch.export.Dim("batch", min=2, max=64) if dynamic else None
    program = torch.export.export(
        nn.Linear(8, 4), (torch.randn(24, 8),), dynamic_shapes=({0: batch},) if batch else None
    )
    value = next(n.meta["val"] for n in program.graph.nodes if n.name == "input")
    assert _shortlist.batches(value, None, 1) == _shortlist.batches(value, 24, 1) == sizes
    assert _shortlist.batches(None, None, 1) == ()
