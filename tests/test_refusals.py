"""What a user gets wrong, or a machine lacks: a typed error that says what to do, or a dense site with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec.codegen import catalog
from sparsec.errors import CaptureError, FormatError, InputError, SpecError, ToolchainError
from sparsec.sparsifiers import Magnitude


def pruned(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return sparsec.sparsify(
        nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 48)).eval().to(dtype), Magnitude(0.8)
    )


X = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with nothing on PATH, an empty cache and no TVM."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("sparsec.codegen.build._loaded", {})
    monkeypatch.setitem(__import__("sys").modules, "tvm", None)


@pytest.mark.usefixtures("no_compiler")
def test_no_compiler_leaves_every_site_dense_and_says_what_to_install() -> None:
    model = pruned()
    cm = sparsec.compile(model, None, (X,), tune="off")
    report = sparsec.report(cm)
    assert {r.code for r in report.rows} == {"SPC0400"} and {r.decision for r in report.rows} == {"dense"}
    assert "install" in report.rows[0].reason
    assert any("no kernel could be built" in line for line in report.notes)
    assert any("TVM could take the place" in line and "pip install 'sparsec[tvm]'" in line for line in report.notes)
    with torch.no_grad():
        assert torch.equal(cm(X), model(X))


@pytest.mark.usefixtures("no_compiler")
def test_no_compiler_is_an_error_on_request() -> None:
    with pytest.raises(ToolchainError, match="gcc.*install"):
        sparsec.compile(pruned(), None, (X,), tune="off", fallback="error")


@pytest.mark.parametrize("dtype", [torch.float64])
def test_dtypes_without_kernels_stay_dense(dtype: torch.dtype) -> None:
    report = sparsec.analyze(pruned(dtype), None, (X.to(dtype),), tune="off")
    assert {r.decision for r in report.rows} == {"dense"}
    assert {r.code for r in report.rows} <= {"SPC0300", "SPC0801"}
    assert all(str(dtype).removeprefix("torch.") in r.reason for r in report.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_sparse_and_right(dtype: torch.dtype) -> None:
    model = pruned(dtype)
    cm = sparsec.compile(model, None, (X.to(dtype),), tune="off")
    assert {r.decision for r in sparsec.report(cm).rows} == {"sparse"}
    with torch.no_grad():
        torch.testing.assert_close(cm(X.to(dtype)), model(X.to(dtype)), rtol=2e-2, atol=2e-2)


def test_complex_weights_stay_dense() -> None:
    model = nn.Linear(8, 8, dtype=torch.complex64).eval()
    report = sparsec.analyze(model, None, (torch.randn(2, 8, dtype=torch.complex64),), tune="off")
    assert [r.code for r in report.rows] == ["SPC0301"]


def test_quantised_modules_stay_as_they_are() -> None:
    if (
        "x86" not in torch.backends.quantized.supported_engines
        and "fbgemm" not in torch.backends.quantized.supported_engines
    ):
        pytest.skip("this torch build has no quantised kernels")
    model = torch.ao.quantization.quantize_dynamic(pruned(), {nn.Linear}, dtype=torch.qint8)
    cm = sparsec.compile(model, None, (X,), tune="off")
    assert {r.decision for r in sparsec.report(cm).rows} == {"dense"}
    with torch.no_grad():
        assert torch.equal(cm(X), model(X))


def test_a_device_without_kernels() -> None:
    model = pruned().to("meta")
    report = sparsec.analyze(model, None, (X.to("meta"),), tune="off")
    assert {r.code for r in report.rows} == {"SPC0700"} and "meta" in report.rows[0].reason


def test_wrong_example_inputs_name_the_argument() -> None:
    with pytest.raises(InputError, match="shapes cannot be multiplied|48"):
        sparsec.compile(pruned(), None, (X[:, :7],), tune="off")
    with pytest.raises(InputError, match="do not fit"):
        sparsec.compile(pruned(), None, (X, X), tune="off")


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum().item() > 0:  # the line that the message must name
            return x @ self.weight
        return x


def test_untraceable_models_name_file_and_line() -> None:
    line = (
        Path(__file__)
        .read_text()
        .split("\n")
        .index("        if x.sum().item() > 0:  # the line that the message must name")
    )
    with pytest.raises(CaptureError, match=rf"test_refusals\.py:{line + 1}"):
        sparsec.compile(Untraceable().eval(), None, (torch.ones(2, 4),), capture="export")


def test_a_format_that_the_weight_does_not_obey() -> None:
    with pytest.raises((SpecError, FormatError), match=r"'0'.*nm"):
        sparsec.compile(pruned(), {"0": sparsec.NM(2, 4)}, (X,), tune="off")


def test_unknown_targets_and_training() -> None:
    with pytest.raises(SpecError, match="valid: 'cpu'"):
        sparsec.compile(pruned(), None, (X,), target="gpu")
    with pytest.raises(SpecError, match="training"):
        sparsec.compile(pruned(), None, (X,), training=True)
    cm = sparsec.compile(pruned(), None, (X,), tune="off")
    with pytest.raises(InputError, match="compiled for inference"):
        cm.train()


def test_source_of_a_dense_or_unknown_site() -> None:
    cm = sparsec.compile(pruned(), {"0": None}, (X,), tune="off")
    for site in ("0", "nope"):
        with pytest.raises(SpecError, match="runs no generated kernel"):
            sparsec.source(cm, site)
    with pytest.raises(SpecError, match="no result of"):
        sparsec.report(nn.Linear(2, 2))


def test_registering_twice() -> None:
    with pytest.raises(SpecError, match="already|taken"):
        sparsec.register(catalog.CATALOG[0])
    with pytest.raises(SpecError, match="register takes"):
        sparsec.register(3)  # type: ignore[arg-type]


def test_report_of_a_pruned_model() -> None:
    report = sparsec.report(pruned())
    assert [row.site for row in report.rows] == ["0", "2"]
    assert all(abs(row.density - 0.2) < 0.01 for row in report.rows)


def test_a_compiler_that_fails_leaves_sites_dense_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.codegen import toolchain

    def broken(self: object, *args: object, **kwargs: object) -> None:
        raise ToolchainError("compiler failed with status 1\nlong output")

    monkeypatch.setattr("sparsec.codegen.build._loaded", {})
    monkeypatch.setattr(toolchain.Toolchain, "compile", broken)
    monkeypatch.setattr("sparsec.codegen.cache.Cache.lookup", lambda *a, **k: None)
    report = sparsec.analyze(pruned(), None, (X,), tune="off")
    assert {r.code for r in report.rows} == {"SPC0401"} and {r.decision for r in report.rows} == {"dense"}
    assert all("status 1" in r.reason and "long output" not in r.reason for r in report.rows)
