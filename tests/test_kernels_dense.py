"""linear_dense: dense linears at few rows, run on every instruction set; what it refuses; and what compile does."""

from __future__ import annotations

import functools

import pytest
import torch
from test_kernels_linear import ISAS, _assert_near, _Fence
from torch import nn

import sparsec
from sparsec import codes
from sparsec.codegen import catalog, tune
from sparsec.codegen.build import build_kernels
from sparsec.codegen.dense_variants import FEW_ROWS, few_rows
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec, Problem, Step
from sparsec.codegen.render import render
from sparsec.errors import SpecError
from sparsec.formats import Dense
from sparsec.target import Target

SHAPES = ((37, 53), (16, 16), (1, 1), (34, 100))
CASES = [(isa, "float32") for isa in dict.fromkeys((*ISAS[:1], "avx512", "avx2", "portable")) if isa in ISAS]
CASES += [(ISAS[0], "bfloat16"), (ISAS[-1], "bfloat16")]
TARGET = Target.probe()


def problem(out: int, inp: int, dtype: str = "float32", **change: object) -> Problem:
    values = {"bias": True, "batches": (4,), "threads": 2, **change}
    return Problem("linear", out, inp, dtype, out * inp, **values)  # type: ignore[arg-type]


def specs(isa: str, dtype: str) -> list[KernelSpec]:
    """For each shape the kernel that shares its rows out even when they are few."""
    variant = catalog.variant("linear_dense")
    found = [variant.specs(problem(*shape, dtype), Dense(), TARGET.limit(isa)) for shape in SHAPES]
    return [KernelSpec(**{**both[1].__dict__, "tile": (("one_thread", 0),)}) for both in found]


@functools.cache
def built() -> dict[KernelSpec, Kernel]:
    return build_kernels([s for case in CASES for s in specs(*case)], TARGET)


@pytest.mark.parametrize(("isa", "dtype"), CASES)
def test_equals_float64_at_every_batch_and_reads_nothing_past_an_end(isa: str, dtype: str) -> None:
    torch.manual_seed(0)
    for spec in specs(isa, dtype):
        kernel, fence, out, inp = built()[spec], _Fence(), spec.out_features, spec.in_features
        weight, bias = (fence.copy(torch.randn(*size).to(DTYPES[dtype])) for size in ((out, inp), (out,)))
        for batch in (0, 1, 2, 3, 4, 7, 8, 13, 16, 21):
            x = torch.randn(batch, inp).to(DTYPES[dtype])
            y = torch.full((batch, out), float("nan")).to(DTYPES[dtype])
            if batch:
                x, y = fence.copy(x), fence.copy(y)
            kernel.call(x, y, bias, None, weight)
            _assert_near(y, x, weight, bias, dtype)


def test_nan_and_inf_pass_through_even_times_zero() -> None:
    (spec, *_) = specs(*CASES[0])
    weight, bias = torch.zeros(37, 53), torch.zeros(37)
    x, y = torch.randn(5, 53), torch.empty(5, 37)
    x[1, 7], x[3, 52] = float("inf"), float("nan")
    built()[spec].call(x, y, bias, None, weight)
    assert y[[1, 3]].isnan().all() and (y[[0, 2, 4]] == 0).all()


def test_one_thread_and_three_give_the_same_bits() -> None:
    spec = specs(*CASES[0])[0]
    x, weight, bias = torch.randn(7, 53), torch.randn(37, 53), torch.randn(37)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.empty(7, 37))
            built()[spec].call(x, results[-1], bias, None, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("batches", [(), (FEW_ROWS + 1,), (1, 256)])
def test_many_or_unknown_rows_are_refused(batches: tuple[int, ...]) -> None:
    reason = catalog.variant("linear_dense").refuse(problem(8, 8, batches=batches), Dense(), TARGET)
    assert reason is not None and f"at most {FEW_ROWS} rows" in reason
    assert few_rows(torch.zeros(8, 8), None, FEW_ROWS + 1, TARGET) == ()
    assert few_rows(torch.zeros(8, 8, dtype=torch.float64), None, 1, TARGET) == ()
    assert len(few_rows(torch.zeros(8, 8), None, 1, TARGET)) == (2 if torch.get_num_threads() > 1 else 1)


def test_entry_and_template_refuse_what_they_cannot_run() -> None:
    spec = specs(*CASES[0])[0]
    x, y, bias = torch.randn(2, 53), torch.empty(2, 37), torch.zeros(37)
    with pytest.raises(ValueError, match="values has the wrong number of elements"):
        built()[spec].call(x, y, bias, None, torch.zeros(36, 53))
    with pytest.raises(SpecError, match="one routine"):
        render(KernelSpec(**{**spec.__dict__, "plan": ((1, "gemv", 1), (0, "panel", 8))}))


@pytest.mark.parametrize(
    ("rows", "options", "spec", "expected"),
    [
        (4, {}, None, {codes.DENSE_KERNEL}),
        (FEW_ROWS + 1, {}, None, {codes.TOO_DENSE}),
        (4, {"tune": "off"}, None, {codes.TOO_DENSE}),
        (4, {"tune": "model"}, None, {codes.TOO_DENSE}),
        (4, {"min_speedup": 0}, None, {codes.TOO_DENSE}),
        (4, {}, {"_default": None}, {codes.SPEC_DENSE}),
    ],
    ids=["few rows", "many rows", "untimed", "modelled", "forced", "left alone"],
)
def test_dense_sites_take_it_where_the_clock_says_so(
    rows: int, options: dict[str, object], spec: object, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(contenders: list[object]) -> tune.Timing:
        return tune.Timing((30.0, *[10.0] * (len(contenders) - 2), 40.0), 1, steady=False)

    monkeypatch.setattr(tune, "recall", lambda key, count: None)
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr("sparsec.passes._prepacked.prepacked.available", lambda dtype: True)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).eval(), torch.randn(rows, 24)
    made = sparsec.compile(model, spec, (x,), **options)  # type: ignore[arg-type]
    assert {r.code for r in sparsec.report(made).rows} == expected
    torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)
    state = sparsec.dense_state_dict(made)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    if expected == {codes.DENSE_KERNEL}:
        assert "linear_dense" in sparsec.source(made, "0")


def test_epilogue_and_residual() -> None:
    steps = (Step("scale", (0.5,)), Step("add"), Step("relu"))
    spec = catalog.variant("linear_dense").specs(problem(37, 53, epilogue=steps), Dense(), TARGET)[0]
    x, weight, bias, rest = torch.randn(6, 53), torch.randn(37, 53), torch.randn(37), torch.randn(6, 37)
    y = torch.empty(6, 37)
    build_kernels([spec], TARGET)[spec].call(x, y, bias, rest, weight)
    torch.testing.assert_close(y, (0.5 * (x @ weight.T + bias) + rest).relu(), rtol=1e-5, atol=1e-5)
