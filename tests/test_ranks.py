"""choose_ranks: limits are kept, the result is a spec that compiles, and what makes no sense is refused."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from torch import nn

import sparsec
from sparsec import ranks
from sparsec.errors import SpecError
from sparsec.factors import Factor, LowRank, Tucker
from sparsec.spec import Spec


def low_rank(out: int, inp: int, rank: int, noise: float) -> nn.Linear:
    layer = nn.Linear(inp, out)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, rank) @ torch.randn(rank, inp) / rank**0.5 + noise * torch.randn(out, inp))
    return layer


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        low_rank(24, 16, 2, 0.01), nn.ReLU(), low_rank(20, 24, 8, 0.01), low_rank(8, 20, 7, 1.0)
    ).eval()


def spent(model: nn.Module, spec: Spec) -> int:
    total = 0
    for site, factor in spec.entries:
        shape = tuple(model.get_submodule(site).weight.shape)
        total += prod(shape) if factor is None else sum(prod(s) for s in factor.shapes(shape).values())
    return total


def lost(model: nn.Module, spec: Spec) -> float:
    """The relative error over all layers."""
    off = whole = 0.0
    for site, factor in spec.entries:
        weight = model.get_submodule(site).weight.detach().double()
        whole += float(weight.square().sum())
        off += 0.0 if factor is None else factor.fit(weight).error ** 2 * float(weight.square().sum())
    return (off / whole) ** 0.5


def test_a_budget_of_parameters_is_kept_at_the_least_error(model: nn.Module) -> None:
    offered = (1, 2, 4, 8)
    spec = sparsec.choose_ranks(model, LowRank, parameters=600, ranks=offered)
    assert list(spec) == ["0", "2", "3"] and spent(model, spec) <= 600
    every = [Spec(dict(zip(spec, c))) for c in itertools.product([None, *map(LowRank, offered)], repeat=3)]
    assert lost(model, spec) == pytest.approx(min(lost(model, s) for s in every if spent(model, s) <= 600), rel=1e-6)
    assert spec.match("0") == LowRank(2), "the planted rank"


def test_a_share_is_of_what_dense_layers_cost(model: nn.Module) -> None:
    dense = sum(p.numel() for n, p in model.named_parameters() if "weight" in n)
    half = sparsec.choose_ranks(model, LowRank, parameters=0.5)
    assert half == sparsec.choose_ranks(model, LowRank, parameters=dense / 2)
    assert half == sparsec.choose_ranks(model, LowRank, nbytes=0.5) == sparsec.choose_ranks(model, LowRank, flops=0.5)
    assert spent(model, half) <= dense / 2


@pytest.mark.parametrize("error", [0.02, 0.2, 0.6])
def test_an_error_is_kept_at_the_fewest_parameters(model: nn.Module, error: float) -> None:
    offered = (1, 2, 4, 8)
    spec = sparsec.choose_ranks(model, LowRank, error=error, ranks=offered)
    assert lost(model, spec) <= error + 1e-9
    every = [Spec(dict(zip(spec, c))) for c in itertools.product([None, *map(LowRank, offered)], repeat=3)]
    least = min(spent(model, s) for s in every if lost(model, s) <= error)
    assert spent(model, spec) <= 1.01 * least


def test_the_spec_compiles_and_the_report_has_the_errors(model: nn.Module) -> None:
    spec = sparsec.choose_ranks(model, LowRank, parameters=0.6, where=["0", "2"])
    x = torch.randn(5, 16)
    fast = sparsec.compile(model, spec, (x,), tune="off")
    rows = {r.site: r for r in sparsec.report(fast).rows}
    for site, factor in spec.entries:
        weight = model.get_submodule(site).weight.detach()
        assert rows[site].decision == ("dense" if factor is None else "factored")
        if isinstance(factor, Factor):
            assert rows[site].error == pytest.approx(factor.fit(weight).error, rel=1e-4)
    assert any(factor is not None for _, factor in spec.entries) and rows["3"].decision == "dense"


def test_data_decides_which_errors_count(model: nn.Module) -> None:
    """Inputs that never use a direction make its loss free."""
    x = torch.zeros(200, 16)
    x[:, :2] = torch.randn(200, 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(24, 16))
    blind = sparsec.choose_ranks(model, LowRank, error=0.05, where="0")
    seeing = sparsec.choose_ranks(model, LowRank, error=0.05, where="0", data=[x])
    assert blind.match("0") is None and seeing.match("0") == LowRank(2)


def test_convolutions_take_tucker_and_calibration_sees_their_windows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, (1, 3))).eval()

    def family(rank: int) -> Tucker:
        return Tucker((rank, min(rank, 8)))

    data = [torch.randn(4, 8, 9, 9)]
    spec = sparsec.choose_ranks(model, family, parameters=0.5, data=data, ranks=(1, 2, 4, 8))
    assert spent(model, spec) <= 0.5 * (8 * 16 * 9 + 16 * 8 * 3)
    windows = torch.nn.functional.unfold(data[0], 3).transpose(1, 2).reshape(-1, 72).double()
    layers = list(ranks._grams(model, _layers(model), data).values())
    torch.testing.assert_close(layers[0].double(), windows.t() @ windows, rtol=1e-5, atol=1e-3)


def _layers(model: nn.Module) -> list[object]:
    from sparsec.sparsifiers.layers import find_layers

    return find_layers(model)  # type: ignore[return-value]


def test_milliseconds_are_those_of_compiled_layers(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compiled(self: object, shape: tuple[int, ...], factor: Factor, bias: bool) -> float:
        asked.append((shape, factor, bias))
        return float(factor.rank)  # type: ignore[attr-defined]

    monkeypatch.setattr(ranks._Clock, "_compiled", compiled)
    monkeypatch.setattr(ranks, "dense_cost", lambda weight, cost, batch: 16.0)
    twin = nn.Sequential(*model, nn.Linear(8, 16), low_rank(24, 16, 2, 0.01))
    spec = sparsec.choose_ranks(twin, LowRank, milliseconds=40.0, ranks=(1, 2, 4), batch=7)
    assert sum(16.0 if f is None else f.rank for _, f in spec.entries) <= 40.0  # type: ignore[union-attr]
    assert len(asked) == len(set(asked)) == 3 * 4, "equal shapes are measured once"


def test_a_clock_compiles_one_layer() -> None:
    clock = ranks._Clock(batch=4)
    assert clock((64, 48), LowRank(2), True) > 0 and clock((64, 48), None, True) > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "exactly one of error=.* got none"),
        ({"error": 0.1, "parameters": 0.5}, "got error, parameters"),
        ({"parameters": -1}, "must be a positive number"),
        ({"parameters": "half"}, "must be a positive number"),
        ({"parameters": True}, "must be a positive number"),
        ({"parameters": 3.0}, "below the cheapest"),
        ({"parameters": 0.5, "where": "7"}, "7"),
        ({"flops": 0.5, "batch": 0}, "batch=0"),
    ],
)
def test_what_makes_no_sense_is_refused(model: nn.Module, change: dict[str, object], says: str) -> None:
    with pytest.raises(sparsec.SparsecError, match=says):
        sparsec.choose_ranks(model, LowRank, **change)  # type: ignore[arg-type]


def test_layers_that_cannot_be_counted_are_named() -> None:
    conv = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(SpecError, match="layer '0' is a convolution, whose flops"):
        sparsec.choose_ranks(conv, LowRank, flops=0.5)
    with pytest.raises(SpecError, match="convolution of 4 groups"):
        sparsec.choose_ranks(nn.Sequential(nn.Conv2d(8, 8, 3, groups=4)), LowRank, parameters=0.5)


def test_offered_ranks_suit_the_weight() -> None:
    assert ranks._ranks(torch.empty(4, 9)) == [1, 2]
    assert ranks._ranks(torch.empty(768, 3072)) == [24, 48, 72, 96, 144, 192, 288, 384]
