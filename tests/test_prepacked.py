"""Dense sites on oneDNN's prepacked weights: when they are chosen, what the op computes, and what it survives."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec import codes
from sparsec.codegen import tune
from sparsec.codegen.kernel import STEPS, KernelSpec, Step
from sparsec.errors import InputError, LoadError
from sparsec.formats import CSR
from sparsec.graph import fact
from sparsec.ops import prepacked
from sparsec.ops.prepacked import PREPACKED
from sparsec.save_kernels import bind
from sparsec.verify import apply_steps, check

pytestmark = pytest.mark.skipif(not prepacked.available(torch.float32), reason="this build of torch has no oneDNN")

PARAMS = {"clamp": (-0.5, 0.5), "scale": (-1.5,)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x))) + x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Set what contenders take: "dense", "sparse" (every kernel) and "prepacked", microseconds at any batch."""

    def fix(us: dict[str, float]) -> None:
        def measure(contenders: list[Callable[[], object]]) -> tune.Timing:
            for run in contenders:
                run()
            inner = [us["sparse"]] * (len(contenders) - 2)
            return tune.Timing((us["dense"], *inner, us["prepacked"]), 1, steady=False)

        monkeypatch.setattr(tune, "recall", lambda key, count: None)
        monkeypatch.setattr(tune, "measure", measure)

    return fix


def model(zeros: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    return sparsec.sparsify(net, sparsec.sparsifiers.Magnitude(zeros)) if zeros else net


@pytest.fixture
def x() -> torch.Tensor:
    """More rows than `linear_dense` is for, so that oneDNN is the only other way to run a dense site."""
    return torch.randn(20, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cm(clock: Callable[[dict[str, float]], None], x: torch.Tensor) -> nn.Module:
    clock({"dense": 30.0, "sparse": 25.0, "prepacked": 20.0})
    return sparsec.compile(model(), None, (x,))


def text(weight: torch.Tensor, bias: bool, steps: tuple[Step, ...] = (), batch: int = 5) -> str:
    return KernelSpec(
        "linear", "linear_prepacked", "dense", str(weight.dtype).removeprefix("torch."), *weight.shape, "portable",
        bias, steps, tile=(("batch", batch),),
    ).text()  # fmt: skip


def test_a_dense_model_is_prepacked_where_that_is_faster(cm: nn.Module, x: torch.Tensor) -> None:
    rows = sparsec.report(cm).rows
    assert [(r.decision, r.code, r.variant, r.format) for r in rows] == [
        ("dense", codes.PREPACKED, "linear_prepacked", "dense")
    ] * 2
    assert [r.reason for r in rows] == ["stays dense; its weight is prepacked for oneDNN: 1.50x"] * 2
    assert all(r.nbytes == 2 * r.dense_nbytes and r.us == 20.0 for r in rows)
    torch.testing.assert_close(cm(x), model()(x))
    with pytest.raises(sparsec.SpecError, match="no generated kernel"):
        sparsec.source(cm, "up")


def test_the_tail_is_fused(cm: nn.Module) -> None:
    calls = [n for n in cm.graph.nodes if n.target is PREPACKED]  # type: ignore[union-attr]
    assert len(calls) == 2
    assert [s.name for n in calls for s in KernelSpec.parse(n.args[4]).epilogue] == ["gelu", "add"]
    assert not [n for n in cm.graph.nodes if "gelu" in str(n.target) or "aten.add" in str(n.target)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("us", "decision"),
    [
        ({"dense": 30.0, "sparse": 15.0, "prepacked": 20.0}, (codes.INSTALLED, "sparse")),
        ({"dense": 30.0, "sparse": 25.0, "prepacked": 20.0}, (codes.PREPACKED, "dense")),
        ({"dense": 30.0, "sparse": 40.0, "prepacked": 29.5}, (codes.DENSE_FASTER, "dense")),
        ({"dense": 30.0, "sparse": 40.0, "prepacked": 31.0}, (codes.DENSE_FASTER, "dense")),
    ],
    ids=["sparse wins", "prepacked wins", "not by min_speedup", "slower"],
)
def test_the_fastest_of_three_is_taken(
    us: dict[str, float], decision: tuple[str, str], clock: Callable[[dict[str, float]], None], x: torch.Tensor
) -> None:
    clock(us)
    report = sparsec.analyze(model(0.8), CSR(), (x,))
    assert {(r.code, r.decision) for r in report.rows} == {decision}


def test_too_dense_stays_the_reason_where_prepacking_loses(
    clock: Callable[[dict[str, float]], None], x: torch.Tensor
) -> None:
    clock({"dense": 30.0, "sparse": 1.0, "prepacked": 31.0})
    assert {r.code for r in sparsec.analyze(model(), None, (x,)).rows} == {codes.TOO_DENSE}


@pytest.mark.parametrize("options", [{"tune": "off"}, {"tune": "model"}, {"min_speedup": 0}])
def test_only_the_clock_can_prepack(options: dict[str, object], x: torch.Tensor) -> None:
    assert {r.code for r in sparsec.analyze(model(), None, (x,), **options).rows} == {codes.TOO_DENSE}


def test_none_in_a_spec_stays_plain(clock: Callable[[dict[str, float]], None], x: torch.Tensor) -> None:
    clock({"dense": 30.0, "sparse": 30.0, "prepacked": 10.0})
    made = sparsec.compile(model(), {"up": None, "_default": sparsec.Auto()}, (x,))
    assert {r.site: r.code for r in sparsec.report(made).rows} == {"up": codes.SPEC_DENSE, "down": codes.PREPACKED}


def test_a_prepacked_product_that_is_wrong_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[dict[str, float]], None], x: torch.Tensor
) -> None:
    clock({"dense": 30.0, "sparse": 30.0, "prepacked": 10.0})
    monkeypatch.setattr(
        "sparsec.passes._prepacked.call", lambda found, w, b, x, r: lambda: torch.zeros(x.shape[0], w.shape[0])
    )
    assert {r.code for r in sparsec.analyze(model(), None, (x,)).rows} == {codes.TOO_DENSE}


def test_a_bias_that_folding_added_is_kept(clock: Callable[[dict[str, float]], None], x: torch.Tensor) -> None:
    clock({"dense": 100.0, "sparse": 90.0, "prepacked": 50.0})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32)).eval().requires_grad_(False)
    net[1].bias.copy_(torch.randn(32))  # type: ignore[operator,union-attr]
    compiled = sparsec.compile(net, example_inputs=(x,))
    assert [row.variant for row in sparsec.report(compiled).rows] == [prepacked.VARIANT]
    torch.testing.assert_close(compiled(x), net(x))


def test_it_survives_deepcopy_state_dicts_and_files(cm: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    want = cm(x)
    assert torch.equal(copy.deepcopy(cm)(x), want)
    dense = sparsec.dense_state_dict(cm)
    assert all(torch.equal(dense[k], v) for k, v in model().state_dict().items()) and len(dense) == 4
    sparsec.save(cm, tmp_path / "m.sparsec")
    loaded = sparsec.load(tmp_path / "m.sparsec")
    assert torch.equal(loaded(x), want)
    assert [r.code for r in sparsec.report(loaded).rows] == [codes.PREPACKED] * 2
    doubled = {k: 2 * v for k, v in dense.items()}
    fresh = model()
    fresh.load_state_dict(doubled)
    sparsec.load_dense_state_dict(cm, doubled)
    torch.testing.assert_close(cm(x), fresh(x))


def test_it_survives_compile_and_export(cm: nn.Module, x: torch.Tensor) -> None:
    want = cm(x)
    torch.testing.assert_close(torch.compile(cm, fullgraph=True)(x), want)
    torch.testing.assert_close(torch.export.export(cm, (x,)).module()(x), want)


@pytest.mark.parametrize("dtype", [d for d in (torch.float32, torch.bfloat16) if prepacked.available(d)], ids=str)
@pytest.mark.parametrize("step", [None, *STEPS])
def test_every_step_agrees_with_float64(step: str | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x = (torch.randn(*s, generator=generator).to(dtype) for s in ((33, 47), (6, 47)))
    bias, residual = (torch.randn(*s, generator=generator).to(dtype) for s in ((33,), (6, 33)))
    steps = (Step(step, PARAMS.get(step, ())),) if step else ()
    for chain in (steps, (*steps, Step("scale", (2.0,)))):
        y = PREPACKED(x, weight, bias, residual if step == "add" else None, text(weight, True, chain))
        verdict = check(y, x, weight, bias, chain, residual, torch.ones_like(weight, dtype=torch.bool))
        assert verdict.ok, verdict.sentence


def test_odd_shapes_and_layouts() -> None:
    weight = torch.randn(31, 48, generator=torch.Generator().manual_seed(3)).t()
    key = text(weight, False, (Step("relu"),))
    wide = torch.randn(9, 62)
    for x in (wide[:0, :31], wide[:, :31].reshape(3, 3, 31), wide[0, :31], wide[:, ::2], torch.randn(31, 4).t()):
        want = apply_steps((Step("relu"),), torch.nn.functional.linear(x, weight), None)
        torch.testing.assert_close(PREPACKED(x, weight, None, None, key), want)


def test_a_changed_weight_is_packed_again() -> None:
    weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)
    x, key = torch.randn(3, 16), text(torch.empty(16, 16), False)

    def agrees() -> bool:
        return torch.allclose(PREPACKED(x, weight, None, None, key), x @ weight.t(), atol=1e-5)

    assert agrees()
    weight.mul_(2)
    assert agrees(), "written in place"
    weight.data = torch.randn(16, 16)
    assert agrees(), "given other storage"
    weight.data.mul_(3)
    prepacked.forget()
    assert agrees(), "forget() makes up for writes that torch does not count"


def test_packed_memory_is_counted_once_and_goes_with_the_weight() -> None:
    gc.collect()
    before = prepacked.nbytes()
    weight = torch.randn(32, 16)
    for _ in range(3):
        PREPACKED(torch.randn(2, 16), weight, None, None, text(weight, False))
    assert prepacked.nbytes() == before + 32 * 16 * 4
    del weight
    assert prepacked.nbytes() == before


def test_wrong_operands_are_input_errors(cm: nn.Module, x: torch.Tensor) -> None:
    weight = torch.randn(16, 16)
    key = text(weight, False, (Step("add"),))
    with pytest.raises(InputError, match=r"input has shape \(2, 15\); this site was compiled for \(..., 16\)"):
        PREPACKED(torch.randn(2, 15), weight, None, None, key)
    with pytest.raises(InputError, match=r"input is torch.float64 and the weight torch.float32"):
        PREPACKED(torch.randn(2, 16).double(), weight, None, None, key)
    with pytest.raises(InputError, match=r"residual has shape None, the output \(2, 16\)"):
        PREPACKED(torch.randn(2, 16), weight, None, None, key)
    with pytest.raises(InputError, match="a gradient is wanted"):
        cm(x.clone().requires_grad_())
    with pytest.raises(InputError, match="cast the model before"):
        PREPACKED(torch.randn(2, 16), weight.half(), None, None, key)


def test_autocast_casts_the_activations_to_the_dtype_of_the_weight() -> None:
    weight, x = torch.randn(16, 16), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = PREPACKED(x.bfloat16(), weight, None, None, text(weight, False))
    torch.testing.assert_close(y, x.bfloat16().float() @ weight.t())


def test_a_file_cannot_name_another_plan(cm: nn.Module) -> None:
    graph = copy.deepcopy(cm).graph  # type: ignore[union-attr]
    node = next(n for n in graph.nodes if n.target is PREPACKED)
    good = node.args
    bind(graph, [], {})
    for bad, words in (
        ((*good[:4], "{}"), "not the text of a KernelSpec"),
        ((*good[:4], good[4].replace("linear_prepacked", "linear_csr")), "not the plan of a prepacked site"),
        ((good[0], good[0], *good[2:]), "an attribute of the model"),
        (good[:4], "by position"),
    ):
        node.args = bad
        with pytest.raises(LoadError, match=words):
            bind(graph, [], {})


def test_facts_stay_on_the_new_node(cm: nn.Module) -> None:
    sites = [fact(n).site for n in cm.graph.nodes if n.target is PREPACKED]  # type: ignore[union-attr]
    assert sites == ["up", "down"]
