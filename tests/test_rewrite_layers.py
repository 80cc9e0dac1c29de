"""rewrite on whole layers: gains and offsets of norms, pooled rows in blocks; what stays and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from graph_tools import calls, captured
from rewrite_tools import close, rewritten, round_trip
from torch import nn

import sparsec
from sparsec.codegen import tune
from sparsec.driver import Context, Options, run_passes
from sparsec.graph import KEY
from sparsec.passes.normalise import Normalise
from sparsec.passes.rewrite import Applied, Rewrite
from sparsec.report import Report
from sparsec.target import Target


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Normed(nn.Module):
    """A norm whose readers are two linears, or others too."""

    def __init__(self, bias: bool = True, other: bool = False, affine: bool = True) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(16, elementwise_affine=affine), other
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 4, bias)
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = torch.cat([torch.relu(self.a(y)), torch.relu(self.b(y))], -1)
        return torch.cat([z, y], -1) if self.other else z


def test_a_norms_gain_and_offset_go_into_the_linears_behind_it():
    model, x = Normed().eval(), torch.randn(3, 5, 16)
    gm, entries = rewritten(model, x, rules=["affine_through_norm"])
    (norm,) = [n for n in gm.graph.nodes if "layer_norm" in str(n.target)]
    assert norm.args[2:4] == (None, None) and calls(gm).count("linear") == 2
    assert entries == [Applied(("affine_through_norm",), ("norm", "a", "b"), "32 --> 0 flops a row")]
    close(model, gm, x)
    round_trip(model, Normed, x)


@pytest.mark.parametrize(
    ("make", "says"),
    [(lambda: Normed(other=True), "reads it too, and that is no linear"),
     (lambda: Normed(bias=False), "has no bias that could take the offset up")],
    ids=["another reader", "no bias"],
)  # fmt: skip
def test_norms_that_keep_their_gain_say_why(make: Any, says: str):
    model, x = make().eval(), torch.randn(5, 16)
    before = calls(captured(model, x))
    gm, entries = rewritten(model, x, rules=["affine_through_norm"])
    assert calls(gm) == before and [e.refused for e in entries] == [True] and says in entries[0].detail
    assert torch.equal(gm(x), model(x))


def test_a_plain_norm_is_no_candidate():
    assert rewritten(Normed(affine=False).eval(), torch.randn(5, 16), rules=["affine_through_norm"])[1] == []


@pytest.mark.parametrize(("us", "moved"), [((100.0, 90.0), True), ((100.0, 99.0), False)])
def test_the_clock_decides_about_norms(us: tuple[float, ...], moved: bool, monkeypatch: pytest.MonkeyPatch):
    def measured(contenders: Any) -> Any:
        for one, other in zip(*(c() for c in contenders)):
            torch.testing.assert_close(one, other)
        return type("Timing", (), {"us": us})

    monkeypatch.setattr(tune, "measure", measured)
    _, entries = rewritten(Normed().eval(), torch.randn(5, 16), rules=["affine_through_norm"], tune="measure")
    assert entries[0].refused != moved and f"{us[0]} --> {us[1]} us" in entries[0].detail
    keywords: dict[str, Any] = {"rules": ["affine_through_norm"], "tune": "measure", "shapes": "batch"}
    _, entries = rewritten(Normed().eval(), torch.randn(5, 16), **keywords)
    assert entries[0].refused and "not known yet" in entries[0].detail


class Pooled(nn.Module):
    def __init__(self, kind: str = "mean", dim: int = 1, function: Any = nn.functional.gelu) -> None:
        super().__init__()
        self.up, self.kind, self.dim, self.function = nn.Linear(8, 64), kind, dim, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(torch, self.kind)(self.function(self.up(x)), self.dim)


SMALL = dataclasses.replace(Target.probe(), l2=4096)


def pooled(model: nn.Module, x: torch.Tensor, tune: str = "off", target: Target = SMALL) -> Any:
    gm = captured(model, x)
    context = Context(target=target, report=Report(), options=Options(tune=tune))
    run_passes(gm, [Normalise(), Rewrite(["pooled_streamed"])], context)
    return gm, list(gm.meta[KEY].get("rewrites", ()))


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize(("shape", "dim"), [((37, 8), 0), ((2, 37, 8), 1), ((37, 2, 8), 0)])
def test_pooled_rows_are_streamed_where_they_overflow_the_cache(kind: str, shape: tuple[int, ...], dim: int):
    model, x = Pooled(kind, dim).eval(), torch.randn(shape)
    gm, entries = pooled(model, x)
    size = 4 * 64 * shape[0] * (shape[1] if len(shape) == 3 else 1)
    blocks = min(8, -(-2 * size // 4096))
    assert calls(gm).count("linear") == blocks and "gelu" in calls(gm)
    assert entries == [Applied(("pooled_streamed",), ("up",), f"{blocks} blocks of {size} bytes")]
    close(model, gm, x)


def test_pools_that_stay_say_why():
    gm, entries = pooled(Pooled().eval(), torch.randn(2, 3, 8))
    assert calls(gm).count("linear") == 1 and entries[0].refused and "fit the cache" in entries[0].detail
    gm, entries = pooled(Pooled().eval(), torch.randn(99, 1, 8))
    assert "one row" in entries[0].detail and entries[0].refused
    for model in (Pooled(dim=-1), Pooled(function=lambda y: y + 1.0)):  # over features; no function of one argument
        assert pooled(model.eval(), torch.randn(2, 99, 8))[1] == []


@pytest.mark.parametrize(("us", "cut"), [((100.0, 90.0), True), ((100.0, 99.0), False)])
def test_the_clock_decides_about_pools(us: tuple[float, ...], cut: bool, monkeypatch: pytest.MonkeyPatch):
    def measured(contenders: Any) -> Any:
        torch.testing.assert_close(*(c() for c in contenders))
        return type("Timing", (), {"us": us})

    monkeypatch.setattr(tune, "measure", measured)
    _, entries = pooled(Pooled().eval(), torch.randn(2, 99, 8), "measure")
    assert entries[0].refused != cut and f"{us[0]} --> {us[1]} us" in entries[0].detail


def test_streamed_pools_round_trip():
    model, x = Pooled("sum").eval(), torch.randn(2, 99, 8)
    target = dataclasses.replace(Target.probe(), l2=1024)
    passes = sparsec.DEFAULT.insert_before("annotate", Rewrite(["pooled_streamed"]))
    cm = sparsec.compile(model, None, (x,), passes=passes, tune="off", target=target)
    assert [r.site for r in sparsec.report(cm).rows] == ["up", *(f"up#{n}" for n in range(2, 9))]
    torch.testing.assert_close(cm(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, sparsec.dense_state_dict(cm)[k]) for k, v in model.state_dict().items())
