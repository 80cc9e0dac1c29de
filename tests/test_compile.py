"""The public path end to end on small models: results, reports, state dicts, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import sparsec
from sparsec import verify
from sparsec.errors import FormatError, InputError, SpecError
from sparsec.sparsifiers import Magnitude


class Net(nn.Module):
    """Two linears with an activation between and a residual add behind: every epilogue path of the fuse pass."""

    def __init__(self, width: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        y = self.down(torch.nn.functional.gelu(self.up(x))) + x
        return {"out": self.norm(y) * scale}


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    torch.manual_seed(0)
    return sparsec.sparsify(Net().eval(), Magnitude(0.8))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cm(pruned: nn.Module, x: torch.Tensor) -> nn.Module:
    return sparsec.compile(pruned, None, (x,), tune="off")


@pytest.fixture
def grad_off() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("grad_off")
class TestResult:
    def test_equals_the_pruned_model(self, pruned: nn.Module, cm: nn.Module, x: torch.Tensor) -> None:
        torch.testing.assert_close(cm(x), pruned(x))

    def test_every_site_is_sparse_and_has_source(self, cm: nn.Module) -> None:
        report = sparsec.report(cm)
        assert [row.site for row in report.rows] == ["up", "down"]
        for row in report.rows:
            assert row.decision == "sparse" and row.format.startswith("csr") and row.code == "SPC0001"
            assert 0.19 < row.density < 0.21
            assert row.nbytes < row.dense_nbytes
            assert "__tvm_ffi_" in sparsec.source(cm, row.site)

    def test_epilogues_are_fused(self, cm: nn.Module) -> None:
        code = dict(sparsec.graphs(cm))["lower"]
        assert code.count("sparsec.linear") == 2
        assert "aten.gelu" not in code and "aten.add" not in code

    def test_history_has_every_pass(self, cm: nn.Module) -> None:
        names = [name for name, _ in sparsec.graphs(cm)]
        assert names == ["capture", *sparsec.DEFAULT.names]

    def test_the_callers_model_is_untouched(self, pruned: nn.Module, x: torch.Tensor) -> None:
        before = {k: v.clone() for k, v in pruned.state_dict().items()}
        pointers = {k: v.data_ptr() for k, v in pruned.state_dict().items()}
        made = sparsec.compile(pruned, None, (x,), tune="off")
        assert {k: v.data_ptr() for k, v in pruned.state_dict().items()} == pointers
        assert all(torch.equal(before[k], v) for k, v in pruned.state_dict().items())
        own = {t.data_ptr() for t in made.state_dict().values() if t.numel()}
        assert not own & set(pointers.values())

    def test_wrong_shape_and_dtype_are_input_errors(self, cm: nn.Module, x: torch.Tensor) -> None:
        with pytest.raises(InputError, match="shape"):
            cm(x[:2])
        with pytest.raises(InputError, match="float64"):
            cm(x.double())
        with pytest.raises(InputError, match="cast the original model"):
            cm.to(torch.bfloat16)

    def test_dynamic_batch(self, pruned: nn.Module, x: torch.Tensor) -> None:
        made = sparsec.compile(pruned, None, (x,), dynamic_shapes="batch", tune="off")
        for batch in (1, 2, 5):
            part = torch.randn(batch, 7, 64)
            torch.testing.assert_close(made(part), pruned(part))

    def test_without_example_inputs(self, pruned: nn.Module, x: torch.Tensor) -> None:
        made = sparsec.compile(pruned, tune="off")
        assert sparsec.report(made).capture["rung"] == "trace"
        torch.testing.assert_close(made(x), pruned(x))
        assert {r.decision for r in sparsec.report(made).rows} == {"sparse"}

    def test_non_contiguous_and_empty_inputs(self, pruned: nn.Module, x: torch.Tensor) -> None:
        made = sparsec.compile(pruned, None, (x,), dynamic_shapes="batch", tune="off")
        wide = torch.randn(64, 7, 4).permute(2, 1, 0)
        torch.testing.assert_close(made(wide), pruned(wide))

    def test_torch_compile_has_no_graph_breaks(self, pruned: nn.Module, cm: nn.Module, x: torch.Tensor) -> None:
        torch._dynamo.reset()
        fast = torch.compile(cm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(fast(x), pruned(x))

    def test_export_again_and_run(self, pruned: nn.Module, cm: nn.Module, x: torch.Tensor) -> None:
        again = torch.export.export(cm, (x,))
        assert any("sparsec.linear" in str(n.target) for n in again.graph.nodes)
        torch.testing.assert_close(again.module()(x), pruned(x))

    def test_deepcopy_is_independent(self, cm: nn.Module, pruned: nn.Module, x: torch.Tensor) -> None:
        twin = copy.deepcopy(cm)
        for parameter in twin.parameters():
            parameter.zero_()
        torch.testing.assert_close(cm(x), pruned(x))
        assert sparsec.report(twin).row("up").decision == "sparse"

    def test_packed_state_dict_round_trip(self, cm: nn.Module, x: torch.Tensor) -> None:
        twin = copy.deepcopy(cm)
        state = {k: v.clone() for k, v in cm.state_dict().items()}
        for parameter in twin.parameters():
            parameter.zero_()
        twin.load_state_dict(state)
        torch.testing.assert_close(twin(x), cm(x), rtol=0, atol=0)


class TestStateDicts:
    def test_dense_state_dict_is_the_original(self, pruned: nn.Module, cm: nn.Module) -> None:
        state = sparsec.dense_state_dict(cm)
        assert list(state) == list(pruned.state_dict())
        for key, value in pruned.state_dict().items():
            assert torch.equal(state[key], value), key
        copy.deepcopy(pruned).load_state_dict(state, strict=True)

    def test_load_dense_state_dict_rebuilds_patterns(self, pruned: nn.Module, cm: nn.Module, x: torch.Tensor) -> None:
        torch.manual_seed(7)
        other = sparsec.sparsify(Net().eval(), Magnitude(0.6))
        made = copy.deepcopy(cm)
        sparsec.load_dense_state_dict(made, other.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(made(x), other(x))
        assert all(
            torch.equal(a, b) for a, b in zip(sparsec.dense_state_dict(made).values(), other.state_dict().values())
        )

    def test_shape_changes_and_missing_keys_are_refused_and_lose_nothing(self, cm: nn.Module) -> None:
        made = copy.deepcopy(cm)
        before = sparsec.dense_state_dict(made)
        wrong = dict(before)
        wrong["up.weight"] = torch.zeros(3, 3)
        with pytest.raises(InputError, match=r"up\.weight.*\(3, 3\)"):
            sparsec.load_dense_state_dict(made, wrong)
        del wrong["up.weight"]
        with pytest.raises(InputError, match=r"lacks 'up\.weight'"):
            sparsec.load_dense_state_dict(made, wrong)
        with pytest.raises(InputError, match="unknown key 'extra'"):
            sparsec.load_dense_state_dict(made, {**before, "extra": torch.zeros(1)})
        assert all(torch.equal(a, b) for a, b in zip(before.values(), sparsec.dense_state_dict(made).values()))

    def test_damaged_buffers_are_refused_on_load(self, cm: nn.Module) -> None:
        made = copy.deepcopy(cm)
        state = {k: v.clone() for k, v in made.state_dict().items()}
        name = next(k for k in state if k.endswith("_indices"))
        state[name][0] = 9999
        with pytest.raises((FormatError, RuntimeError), match="indices"):
            made.load_state_dict(state)


class TestSpecs:
    def test_none_leaves_a_site_dense(self, pruned: nn.Module, x: torch.Tensor) -> None:
        report = sparsec.analyze(pruned, {"up": None, "_default": sparsec.CSR()}, (x,), tune="off")
        assert report.row("up").code == "SPC0200" and report.row("up").decision == "dense"
        assert report.row("down").decision == "sparse"

    def test_a_pattern_that_matches_nothing(self, pruned: nn.Module, x: torch.Tensor) -> None:
        with pytest.raises(SpecError, match="'upp'.*'up'"):
            sparsec.compile(pruned, {"upp": sparsec.CSR()}, (x,), tune="off")

    def test_formats_by_name(self, pruned: nn.Module, x: torch.Tensor) -> None:
        made = sparsec.compile(pruned, {"up": sparsec.Bitmask(), "down": sparsec.BSR(4, 1)}, (x,), tune="off")
        report = sparsec.report(made)
        assert report.row("up").format.startswith("bitmask") and report.row("down").format.startswith("bsr")
        with torch.no_grad():
            torch.testing.assert_close(made(x), pruned(x))

    def test_bad_options(self, pruned: nn.Module, x: torch.Tensor) -> None:
        for bad in (
            {"tune": "fast"},
            {"capture": "magic"},
            {"fallback": "x"},
            {"min_speedup": -1.0},
            {"target": "tpu"},
        ):
            with pytest.raises(SpecError, match="valid|none of|unknown|>= 0"):
                sparsec.compile(pruned, None, (x,), **bad)
        with pytest.raises(SpecError, match="nn.Module"):
            sparsec.compile(lambda x: x, None, (x,))  # type: ignore[arg-type]

    def test_dense_model_stays_dense_with_a_reason(self, x: torch.Tensor) -> None:
        torch.manual_seed(0)
        report = sparsec.analyze(Net().eval(), None, (x,), tune="off")
        assert {r.code for r in report.rows} == {"SPC0201"}


def test_dense_by_the_clock_is_reported(pruned: nn.Module, x: torch.Tensor) -> None:
    """A speed-up that no kernel reaches leaves every site dense, with the best candidate's time."""
    report = sparsec.analyze(pruned, None, (x,), min_speedup=1e9)
    for row in report.rows:
        assert row.decision == "dense" and row.code in ("SPC0100", "SPC0101")
        assert row.dense_us and row.sparse_us and row.dense_us > 0


def test_min_speedup_zero_forces(pruned: nn.Module, x: torch.Tensor) -> None:
    assert {r.decision for r in sparsec.analyze(pruned, None, (x,), min_speedup=0).rows} == {"sparse"}


def test_non_finite_weights_propagate(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = sparsec.sparsify(nn.Sequential(nn.Linear(64, 32)).eval(), Magnitude(0.8))
    with torch.no_grad():
        kept = model[0].weight.nonzero()
        model[0].weight[tuple(kept[0])] = torch.nan
        model[0].weight[tuple(kept[-1])] = torch.inf
        made = sparsec.compile(model, None, (x,), tune="off")
        assert sparsec.report(made).row("0").decision == "sparse"
        y, want = made(x), model(x)
        assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())


def test_tied_weights_are_packed_once(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    model[2].weight = model[0].weight
    model = sparsec.sparsify(model, Magnitude(0.8))
    assert model[2].weight is model[0].weight
    made = sparsec.compile(model, None, (x,), tune="off")
    assert sum(name.endswith("_values") for name in made.state_dict()) == 1
    state = sparsec.dense_state_dict(made)
    assert torch.equal(state["0.weight"], model[0].weight) and torch.equal(state["2.weight"], model[0].weight)
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x))


def test_packed_bytes_follow_the_formula(cm: nn.Module, pruned: nn.Module) -> None:
    from sparsec.formats import parse

    for row in sparsec.report(cm).rows:
        weight = pruned.get_parameter(f"{row.site}.weight")
        assert row.nbytes == parse(row.format).nbytes(*weight.shape, int(weight.count_nonzero()), 4)


def test_verification_failure_keeps_the_site_dense(
    monkeypatch: pytest.MonkeyPatch, pruned: nn.Module, x: torch.Tensor
) -> None:
    monkeypatch.setattr(verify, "check", lambda *a, **k: verify.Verdict(False, 9.0, "made to fail"))
    report = sparsec.analyze(pruned, None, (x,), tune="off")
    assert {r.code for r in report.rows} == {"SPC0500"} and {r.decision for r in report.rows} == {"dense"}
    with pytest.raises(sparsec.VerifyError, match="made to fail"):
        sparsec.compile(pruned, None, (x,), tune="off", fallback="error")


class TestBuckets:
    """A site that wins at some sizes only keeps its dense weight for the others."""

    @pytest.fixture
    def mixed(self, monkeypatch: pytest.MonkeyPatch, pruned: nn.Module, x: torch.Tensor) -> nn.Module:
        from sparsec.codegen import tune

        def scripted(contenders: list[object]) -> tune.Timing:
            batch = next(batches)
            sparse = 1.0 if batch > 64 else 20.0
            return tune.Timing((10.0, *(sparse for _ in contenders[1:])), 9, steady=False)

        def key(problem: object, batch: int, *rest: object) -> str:
            seen.append(batch)
            return f"{len(seen)}"

        seen: list[int] = []
        batches = (seen[-1] for _ in iter(int, 1))
        monkeypatch.setattr(tune, "measure", scripted)
        monkeypatch.setattr(tune, "decision_key", key)
        monkeypatch.setattr(tune, "recall", lambda *a: None)
        return sparsec.compile(pruned, None, (x,), dynamic_shapes="batch")

    def test_the_report_counts_both_weights(self, mixed: nn.Module) -> None:
        for row in sparsec.report(mixed).rows:
            assert row.code == "SPC0005" and row.decision == "sparse"
            assert isinstance(row.batch, tuple) and len(row.batch) > 2
            assert row.nbytes > row.dense_nbytes

    def test_results_and_state_dicts(self, mixed: nn.Module, pruned: nn.Module) -> None:
        assert dict(sparsec.graphs(mixed))["lower"].count("sparsec.linear_buckets") == 2
        with torch.no_grad():
            for batch in (2, 30):
                part = torch.randn(batch, 7, 64, generator=torch.Generator().manual_seed(batch))
                torch.testing.assert_close(mixed(part), pruned(part))
            state = sparsec.dense_state_dict(mixed)
            assert all(torch.equal(state[k], v) for k, v in pruned.state_dict().items())
            torch.manual_seed(9)
            other = sparsec.sparsify(Net().eval(), Magnitude(0.7))
            sparsec.load_dense_state_dict(mixed, other.state_dict())
            for batch in (2, 30):
                part = torch.randn(batch, 7, 64)
                torch.testing.assert_close(mixed(part), other(part))


def test_dense_in_a_spec_means_dense(pruned: nn.Module, x: torch.Tensor) -> None:
    report = sparsec.analyze(pruned, {"up": sparsec.Dense(), "_default": sparsec.CSR()}, (x,), tune="off")
    assert report.row("up").code == "SPC0200" and report.row("down").decision == "sparse"


def test_autocast_around_a_compiled_model(cm: nn.Module, pruned: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = cm(x)["out"]
    with torch.no_grad():
        torch.testing.assert_close(got.float(), pruned(x)["out"], rtol=5e-2, atol=5e-2)
