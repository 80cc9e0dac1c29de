"""annotate: every site gets a fact with its name, structures and refusal; patterns that match nothing are errors."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from sparsec import codes
from sparsec.capture import capture_whole
from sparsec.driver import Context, run_passes
from sparsec.errors import SpecError
from sparsec.formats import CSR
from sparsec.graph import KEY, Fact, Structure, fact, sites, update
from sparsec.passes import annotate
from sparsec.passes.annotate import Annotate, check_spec, opaque_modules
from sparsec.passes.normalise import Normalise
from sparsec.report import Report
from sparsec.spec import Spec


def annotated(
    model: nn.Module, *inputs: torch.Tensor, mode: str = "export", spec: Spec | None = None
) -> tuple[fx.GraphModule, dict[str, Fact], Report]:
    captured = capture_whole(model.eval(), inputs, mode=mode)
    ctx = Context(spec=spec or Spec(), report=Report(), capture=mode)
    run_passes(captured.gm, [Normalise(), Annotate()], ctx)
    return captured.gm, {f.site: f for _, f in sites(captured.gm)}, ctx.report


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(50, 16)
        self.a = nn.Linear(16, 32)
        self.b = nn.Linear(16, 32, bias=False)
        self.b.weight = self.a.weight
        self.conv = nn.Conv1d(32, 8, 3, groups=2)
        self.free = nn.Parameter(torch.randn(8, 4))
        self.last = nn.Linear(4, 4)
        with torch.no_grad():
            self.a.weight.view(32, 4, 4)[:, :, 2:] = 0  # 2:4
            self.last.weight[1] = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        y = self.a(x) + self.b(x) + self.a(2 * x)
        y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        y = torch.relu(y @ self.free)
        scores = y @ y.transpose(1, 2)  # two activations: no site
        return self.last(scores @ y)


IDS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("mode", ["export", "trace"])
def test_every_site_has_a_fact(mode: str) -> None:
    _, facts, _ = annotated(Net(), IDS, mode=mode)
    assert list(facts) == ["emb", "a", "b", "a#2", "conv", "<root>", "last"]
    a = facts["a"]
    assert (a.op, a.module, a.shape, a.dtype, a.nnz, a.refusal) == ("linear", "Linear", (32, 16), "float32", 256, None)
    assert a.bias is not None and facts["b"].bias is None
    assert a.weight == facts["b"].weight == facts["a#2"].weight
    assert a.structures == facts["b"].structures and Structure("fan_in", (8,)) in a.structures
    assert facts["emb"].op == "embedding" and facts["emb"].refusal == (
        codes.NO_KERNEL,
        "there are no kernels for embedding yet",
    )
    assert facts["conv"].shape == (8, 16, 3) and facts["conv"].matrix == (8, 48)
    assert facts["conv"].refusal is None
    assert Structure("zero_rows", (1,)) in facts["last"].structures
    assert facts["last"].nnz == 12


def test_a_product_with_a_parameter_is_measured_as_out_by_in() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.rand(8, 6) + 0.5
            weight.view(2, 4, 6)[:, 2:] = 0  # 2:4 along the 8 inputs of each of the 6 outputs
            self.weight = nn.Parameter(weight)
            self.table = torch.ones(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    _, facts, _ = annotated(Product(), torch.rand(3, 8))
    assert Structure("nm", (2, 4)) in facts["<root>"].structures


def test_tied_weights_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    measure = annotate.measure
    monkeypatch.setattr(annotate, "measure", lambda w, k: calls.append(tuple(w.shape)) or measure(w, k))
    annotated(Net(), IDS)
    assert sorted(calls) == [(4, 4), (4, 8), (8, 48), (32, 16), (50, 16)]


def test_convolution_groups_run_along_channels() -> None:
    conv = nn.Conv2d(16, 4, 3)
    with torch.no_grad():
        conv.weight.fill_(1.0).view(4, 4, 4, 9)[:, :, 1:] = 0  # one channel of four, at every offset
    _, facts, _ = annotated(conv, torch.rand(1, 16, 8, 8))
    assert Structure("nm", (1, 4)) in facts["<root>"].structures


def test_a_computed_weight_is_refused() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.linear(x, self.inner.weight * x.mean())
            return nn.functional.linear(y, self.inner.weight, x.mean(0))

    _, facts, _ = annotated(Computed(), torch.rand(3, 4))
    refusals = [f.refusal for f in facts.values()]
    assert all(r is not None and r[0] == codes.NOT_CONSTANT for r in refusals) and len(refusals) == 2
    assert "weight is computed at run time: it comes from 'mul'" in refusals[0][1]  # type: ignore[index]
    assert "the bias comes from" in refusals[1][1]  # type: ignore[index]
    assert facts["<root>"].shape == (4, 4)


@pytest.mark.parametrize(
    ("dtype", "code", "word"),
    [(torch.complex64, codes.COMPLEX, "complex64"), (torch.float64, codes.DTYPE, "float64")],
)
def test_dtypes_without_kernels_are_refused(dtype: torch.dtype, code: str, word: str) -> None:
    model = nn.Linear(8, 8, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight[0] = 0
    _, facts, _ = annotated(model, torch.rand(2, 8).to(dtype))
    known = facts["<root>"]
    assert known.refusal is not None and known.refusal[0] == code and word in known.refusal[1]
    assert known.nnz == 56


def test_nan_and_empty_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    with torch.no_grad():
        model[0].weight.zero_()[1, 2] = float("nan")
    _, facts, _ = annotated(model, torch.rand(2, 4))
    assert facts["0"].nnz == 1 and facts["0"].refusal is None
    assert facts["1"].nnz == 0 and facts["1"].structures == ()


def test_modules_and_calls_that_stay_whole_have_rows() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 4, 3)
            self.gru = nn.GRU(4, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.gru(self.up(x.transpose(1, 2)).transpose(1, 2))[0])

    x = torch.rand(2, 5, 4)
    for mode in ("export", "trace"):
        gm, facts, report = annotated(Whole(), x, mode=mode, spec=Spec({"gru": None, "head": CSR()}))
        assert list(facts) == ["head"]
        row = report.row("gru")
        assert row.decision == "dense" and row.code == codes.NO_KERNEL and row.nbytes == 4 * (2 * 48 + 2 * 12)
        assert report.row("up").code == codes.NO_KERNEL
        assert [m.path for m in opaque_modules(gm)] == ["up", "gru"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_have_rows() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    _, facts, report = annotated(quantised, torch.rand(2, 8), mode="trace")
    assert facts == {}
    assert [r.code for r in report.rows] == [codes.QUANTISED] * 2 and "quantised already" in report.row("0").reason


def test_patterns_are_checked_against_the_sites() -> None:
    with pytest.raises(SpecError, match="'lst' matches no site; nearest: 'last'"):
        annotated(Net(), IDS, spec=Spec({"lst": CSR()}))
    with pytest.raises(SpecError, match="module types that have sites: Embedding, Linear, Conv1d, Net"):
        annotated(Net(), IDS, spec=Spec({nn.Conv2d: CSR()}))
    annotated(Net(), IDS, spec=Spec({nn.Linear: CSR(), "a": None, "re:conv": None}))


def test_regions_are_checked_together() -> None:
    graphs = []
    for path in ("left", "right"):
        captured = capture_whole(nn.Linear(4, 4), (torch.rand(2, 4),))
        captured.gm.meta.setdefault(KEY, {})["region"] = path
        for node in captured.gm.graph.nodes:
            node.meta["nn_module_stack"] = {path: (path, "Linear")}
        run_passes(captured.gm, [Normalise(), Annotate()], Context(spec=Spec({"right": CSR()}), report=Report()))
        graphs.append(captured.gm)
    check_spec(Spec({"right": CSR()}), graphs)
    with pytest.raises(SpecError, match="'middle' matches no site"):
        check_spec(Spec({"middle": CSR()}), graphs)


def test_facts_of_other_passes_survive_a_second_run() -> None:
    gm, _, _ = annotated(Net(), IDS)
    node = next(n for n, f in sites(gm) if f.site == "last")
    update(node, residual="x", choice="mine")
    before = {f.site: f for _, f in sites(gm)}
    assert Annotate().run(gm, Context(spec=Spec(), report=Report())) == 0
    assert {f.site: f for _, f in sites(gm)} == before
    known = fact(node)
    assert known is not None
    node.meta[KEY] = known.__class__(**{**known.__dict__, "weight": "old", "nnz": 1})
    assert Annotate().run(gm, Context(spec=Spec(), report=Report())) == 1
    again = fact(node)
    assert again is not None and (again.choice, again.nnz, again.site) == ("mine", 12, "last")
