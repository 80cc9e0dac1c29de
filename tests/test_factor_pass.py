"""The factor pass: what it installs, what stays dense and why, and the way of factored weights through everything."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec import CSR, DEFAULT, LowRank, Monarch, Sparse, codes
from sparsec.codegen import tune
from sparsec.driver import Options
from sparsec.errors import FormatError, LoadError, SpecError
from sparsec.factors.chain import Factored
from sparsec.passes import Factorise
from sparsec.report import Report, Row

SUM = LowRank(4) + Sparse(0.9)


class Block(nn.Module):
    """Two linears with a residual, and a head that no LowRank(8) fits."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.back(nn.functional.gelu(self.wide(x))))  # type: ignore[no-any-return]


def model() -> Block:
    torch.manual_seed(0)
    return Block().eval()


SPEC = {"wide": LowRank(8), "back": SUM, "head": None}
X = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def compiled() -> nn.Module:
    return sparsec.compile(model(), SPEC, (X,), tune="off")


def twin(cm: nn.Module) -> nn.Module:
    """The dense model with the reconstructions."""
    dense = model()
    dense.load_state_dict(sparsec.dense_state_dict(cm))
    return dense


def row(site: str, **keywords: object) -> Row:
    keywords = {"tune": "off", **keywords}
    return sparsec.analyze(model(), keywords.pop("spec", SPEC), (X,), **keywords).row(site)


@torch.no_grad()
def test_factored_sites_run_their_reconstruction(compiled: nn.Module) -> None:
    assert torch.allclose(compiled(X), twin(compiled)(X), atol=1e-5)
    calls = [n for n in compiled.graph.nodes if "sparsec" in str(n.target)]
    assert len(calls) == 2 and not [n for n in compiled.graph.nodes if "gelu" in str(n.target)], "the tail is fused"
    assert "stage0_" in sparsec.source(compiled, "wide") and "values_0" in sparsec.source(compiled, "back")
    with pytest.raises(SpecError, match="runs no generated kernel"):
        sparsec.source(compiled, "head")


def test_rows_say_error_bytes_and_flops(compiled: nn.Module) -> None:
    report = sparsec.report(compiled)
    wide = report.row("wide")
    state, rebuilt = model().state_dict(), sparsec.dense_state_dict(compiled)
    for site, factor in (("wide", LowRank(8)), ("back", SUM)):
        found, weight = report.row(site), state[f"{site}.weight"].double()
        error = float((rebuilt[f"{site}.weight"].double() - weight).norm() / weight.norm())
        assert found.decision == "factored" and found.error == pytest.approx(error, rel=1e-5)
        assert f"{2 * 24 * 48} to {factor.flops(found.shape, 1)} flops a row" in found.reason
        assert f"{found.dense_nbytes} to {found.nbytes} bytes" in found.reason
    assert wide.nbytes == 4 * 8 * (24 + 48) and wide.dense_nbytes == 4 * 24 * 48
    assert wide.format == "low_rank(rank=8)" and wide.variant == "chain" and wide.code == codes.INSTALLED_UNTIMED
    assert report.row("head").code == codes.SPEC_DENSE and report.totals().factored == 2


def timed(us: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, **keywords: object) -> Report:
    """The report of a compile whose clock says `us` of (dense, chains...)."""
    monkeypatch.setattr(tune, "recall", lambda key, count: tune.Timing((us * count)[:count], 9))
    return sparsec.analyze(model(), {"wide": LowRank(8)}, (X,), **keywords)


def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = timed((20.0, 10.0, 40.0), monkeypatch).row("wide")
    assert (faster.code, faster.variant, faster.dense_us, faster.sparse_us) == (codes.FACTORED, "chain", 20.0, 10.0)
    assert "2.00x over dense" in faster.reason and faster.reason.startswith(
        "replaced by low_rank(rank=8) with a relative"
    )
    torchs = timed((20.0, 40.0, 10.0), monkeypatch).row("wide")
    assert (torchs.decision, torchs.variant) == ("factored", "chain_torch")
    slower = timed((20.0, 21.0, 22.0), monkeypatch).row("wide")
    assert (slower.decision, slower.code, slower.nbytes) == ("dense", codes.DENSE_FASTER, slower.dense_nbytes)
    margin = timed((20.0, 19.5, 22.0), monkeypatch).row("wide")
    assert margin.code == codes.WITHIN_MARGIN
    forced = timed((20.0, 21.0, 22.0), monkeypatch, min_speedup=0).row("wide")
    assert (forced.decision, forced.code) == ("factored", codes.INSTALLED_FORCED)


@torch.no_grad()
def test_torchs_products_are_installed_where_they_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "recall", lambda key, count: tune.Timing((20.0, 40.0, 10.0)[:count], 9))
    cm = sparsec.compile(model(), {"wide": LowRank(8)}, (X,))
    assert 'einsum("zi,ri->zr", x.view(-1, 24), right.view(8, 24))' in sparsec.source(cm, "wide")
    assert torch.allclose(cm(X), twin(cm)(X), atol=1e-5)


def test_tolerance_zero_forbids_and_others_bound() -> None:
    for site, factor in (("wide", "low_rank(rank=8)"), ("back", SUM.text())):
        found = row(site, tolerance=0)
        assert (found.decision, found.code) == ("dense", codes.LOSSY)
        assert found.reason == f"{factor} is lossy, and tolerance=0 forbids that" and found.error == 0.0
    least = row("wide").error
    assert least is not None
    found = row("wide", tolerance=0.9 * least)
    assert (found.decision, found.code) == ("dense", codes.TOLERANCE)
    assert found.reason == f"low_rank(rank=8) has a relative error of {least:.2e}, over tolerance={0.9 * least:g}"
    assert row("wide", tolerance=1.1 * least).decision == "factored"


def test_sites_that_stay_dense_say_why() -> None:
    spec = {"_default": LowRank(8)}
    found = row("head", spec=spec)
    assert (found.decision, found.code) == ("dense", codes.FORMAT_REFUSES)
    assert found.reason == "the weight does not fit low_rank(rank=8): rank=8 is more than its full rank of 3"
    broken = model()
    with torch.no_grad():
        broken.wide.weight[0, 0] = float("nan")
    found = sparsec.analyze(broken, {"wide": LowRank(8)}, (X,), tune="off").row("wide")
    assert found.code == codes.FORMAT_REFUSES and "NaN" in found.reason
    double = sparsec.analyze(model().double(), {"wide": LowRank(8)}, (X.double(),), tune="off").row("wide")
    assert double.code == codes.DTYPE
    images = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)).eval()
    report = sparsec.analyze(images, LowRank(2), (torch.randn(1, 8, 9, 9),), tune="off")
    assert report.row("0").code == codes.NO_VARIANT and "one group of channels" in report.row("0").reason


def test_the_pass_is_lossy_and_asked_for() -> None:
    assert DEFAULT.names[DEFAULT.find("factor") + 1] == "select" and not Factorise().exact
    with pytest.raises(SpecError, match="has no 'factor' before 'select'"):
        sparsec.compile(model(), SPEC, (X,), passes=DEFAULT.without("factor"), tune="off")
    exact = sparsec.compile(model(), {"wide": CSR()}, (X,), tune="off", min_speedup=0)
    changes = {e.name: e.changes for e in exact.meta["sparsec"]["history"]}
    assert changes["factor"] == 0 and Options().tolerance is None


def test_calibration_lowers_the_error_on_the_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, bias=False).eval()
    x = torch.randn(400, 24) * torch.linspace(0.01, 2, 24)
    off = {}
    for calibrate in (False, True):
        passes = DEFAULT.replace("factor", Factorise(calibrate))
        cm = sparsec.compile(layer, LowRank(4), (x,), passes=passes, tune="off")
        with torch.no_grad():
            off[calibrate] = float((cm(x) - layer(x)).norm())
    assert off[True] < 0.9 * off[False]


@torch.no_grad()
def test_state_dicts_go_both_ways(compiled: nn.Module) -> None:
    state = sparsec.dense_state_dict(compiled)
    assert list(state) == list(model().state_dict())
    assert torch.equal(state["head.weight"], model().head.weight) and torch.equal(state["wide.bias"], model().wide.bias)
    cm = copy.deepcopy(compiled)
    fresh = {k: torch.randn_like(v) for k, v in state.items()}
    sparsec.load_dense_state_dict(cm, fresh)
    again = sparsec.dense_state_dict(cm)
    best = LowRank(8).reconstruct(LowRank(8).fit(fresh["wide.weight"]).buffers, (48, 24))
    assert torch.allclose(again["wide.weight"], best, atol=1e-5) and torch.equal(again["head.bias"], fresh["head.bias"])
    assert torch.allclose(cm(X), twin(cm)(X), atol=1e-4)
    sparsec.load_dense_state_dict(cm, again)  # of the form already, so the refit is exact up to rounding
    assert torch.allclose(sparsec.dense_state_dict(cm)["wide.weight"], best, atol=1e-5)
    with pytest.raises(FormatError, match="site 'wide'.*NaN"):
        sparsec.load_dense_state_dict(cm, {**fresh, "wide.weight": torch.full((48, 24), float("nan"))})


@torch.no_grad()
def test_save_and_load(compiled: nn.Module, tmp_path: Path) -> None:
    path = sparsec.save(compiled, tmp_path / "model.sparsec")
    loaded = sparsec.load(path)
    assert torch.equal(loaded(X), compiled(X)) and sparsec.source(loaded, "back") == sparsec.source(compiled, "back")
    sparsec.load_dense_state_dict(loaded, model().state_dict())
    assert torch.allclose(loaded(X), compiled(X), atol=1e-4)
    (record, *_) = [r for r in compiled.meta["sparsec"]["ledger"].installed if r.kernels[0][0] == "wide"]
    broken = copy.deepcopy(compiled)
    ledger = broken.meta["sparsec"]["ledger"]
    assert isinstance(record.format, Factored)
    wrong = dataclasses.replace(record.format, factor=LowRank(9))
    ledger.installed = [dataclasses.replace(r, format=wrong) if r == record else r for r in ledger.installed]
    with pytest.raises(LoadError):
        sparsec.load(sparsec.save(broken, tmp_path / "broken.sparsec"))


@torch.no_grad()
def test_compile_and_export_take_the_result(compiled: nn.Module) -> None:
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(compiled, fullgraph=True, backend="aot_eager")(X), compiled(X), atol=1e-6)
    again = torch.export.export(compiled, (X,)).module()
    assert torch.equal(again(X), compiled(X))


@torch.no_grad()
def test_shared_weights_and_every_batch() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    tied = Tied().eval()
    x = torch.randn(6, 16)
    cm = sparsec.compile(tied, Monarch(4), (x,), tune="off", dynamic_shapes=({0: torch.export.Dim.AUTO},))
    state = sparsec.dense_state_dict(cm)
    assert torch.equal(state["a.weight"], state["b.weight"])
    tied.load_state_dict(state)
    for batch in (2, 6, 35):
        other = torch.randn(batch, 16)
        assert torch.allclose(cm(other), tied(other), atol=1e-5)
