"""The cost model: closed forms that agree with their numbers, limits that follow, and machine rates that are kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec import cost
from sparsec.codegen import catalog, rates
from sparsec.codegen.kernel import KernelSpec, Problem
from sparsec.cost import Rates
from sparsec.formats import BSR, CSR, SELL, CSRGroups, Format, Pairs, Permuted, Quantized, Tiles
from sparsec.sparsifiers import Magnitude
from sparsec.target import ISAS, Target

TARGET = Target.probe()
RATES = Rates(2e11, 6e10, 2.5e10, 1.2e10)


def problem(out: int = 1024, inp: int = 768, density: float = 0.1, threads: int = 1) -> Problem:
    return Problem("linear", out, inp, "float32", round(out * inp * density), threads=threads)


def spec(fmt: Format, of: Problem) -> KernelSpec:
    variants = [v for v in catalog.variants_for("linear", fmt.name, TARGET) if v.refuse(of, fmt, TARGET) is None]
    return variants[0].specs(of, fmt, TARGET)[0]


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
@pytest.mark.parametrize("fmt", [CSR(), BSR(16, 1), Permuted(BSR(16, 1))], ids=lambda f: f.text())
def test_expressions_give_the_numbers(fmt: Format, batch: int) -> None:
    of = problem(threads=2)
    kernel = spec(fmt, of)
    routine = "gemv" if batch == 1 else "panel"
    rate, columns = cost.RATES["bsr" if fmt.name != "csr" else "csr"], cost._routine(kernel, batch)[1]
    size = fmt.nbytes(1024, 768, of.nnz, 4)
    values: dict[str, Any] = {
        "out": 1024, "inp": 768, "batch": batch, "density": of.density, "itemsize": 4, "nbytes": size, "threads": 2,
        "columns": columns, "share": rate.share, "per_value": rate.per_value, "gemv": rate.gemv,
        "per_entry": rate.per_entry, "gemv_entry": rate.gemv_entry, "worked": of.density, "top": RATES.peak,
        "clock": RATES.peak / cost.flops_per_cycle(TARGET),
        "l2": RATES.l2, "l3": RATES.l3, "memory": RATES.memory, "l2_bytes": TARGET.l2, "l3_bytes": TARGET.l3,
    }  # fmt: skip
    for name, number in (
        (routine, cost.sparse_us(of, fmt, kernel, batch, TARGET, RATES)),
        ("dense", cost.dense_us(of, batch, TARGET, RATES)),
    ):
        found = cost.expression(name)
        assert {s.name for s in found.free_symbols} <= set(cost.SYMBOLS)
        assert float(found.subs({s: values[s.name] for s in found.free_symbols})) == pytest.approx(number, rel=1e-9)


def test_the_model_follows_density_threads_and_the_levels_of_memory() -> None:
    fmt = CSR()
    at = [cost.sparse_us(problem(density=d), fmt, spec(fmt, problem(density=d)), 64, TARGET) for d in (0.05, 0.2, 0.8)]
    assert at == sorted(at)
    one, two = (cost.dense_us(problem(threads=t), 64, TARGET, RATES) - cost.CALL_US / 2 for t in (1, 2))
    assert one == pytest.approx(2 * two)
    slow = Rates(1e15, 6e10, 2.5e10, 1e9)  # arithmetic for nothing: bytes alone count
    large = problem(8192, 8192, 0.5)
    assert cost.dense_us(large, 1, TARGET, slow) > 8192 * 8192 * 4 / 6e10 * 1e6


def test_tiles_cost_what_a_dense_product_does_and_less_where_the_weight_streams() -> None:
    """A tile is multiplied whole however few values it holds; blocks in tile registers cost by their number."""
    amx = Target("x86_64", ISAS["amx"].features, l2=1 << 20, l3=32 << 20)
    fast = Rates(1e11, 6e10, 2.5e10, 1.2e10, 6e11)
    none = dataclasses.replace(fast, matrix=0.0)
    at = {}
    for density in (0.1, 0.5):
        for name, fmt in (("linear_tiles_bf16", Tiles()), ("linear_bsr_amx", BSR(32, 32).resolve(1024, 768))):
            of = dataclasses.replace(problem(density=density), dtype="bfloat16")
            kernel = catalog.variant(name).specs(of, fmt, amx)[0]
            at[name, density] = cost.sparse_us(of, fmt, kernel, 512, amx, fast)
            assert cost.sparse_us(of, fmt, kernel, 512, amx, none) > 2 * at[name, density]
    assert at["linear_tiles_bf16", 0.1] == pytest.approx(at["linear_tiles_bf16", 0.5], rel=1e-6)
    assert at["linear_bsr_amx", 0.1] < 0.4 * at["linear_bsr_amx", 0.5]
    of = dataclasses.replace(problem(8192, 8192, 0.5), dtype="bfloat16")
    streamed = cost.sparse_us(
        of, Tiles(), catalog.variant("linear_tiles_bf16").specs(of, Tiles(), amx)[0], 16, amx, fast
    )
    assert streamed < cost.dense_us(of, 16, amx, fast)
    codes = Quantized(Tiles())
    kernel = catalog.variant("linear_tiles_codes").specs(problem(), codes, amx)[0]
    assert cost.sparse_us(problem(), codes, kernel, 512, amx, fast) < at["linear_tiles_bf16", 0.5]
    assert Rates.nominal(amx).matrix > Rates.nominal(amx.limit("avx512bf16")).matrix > 0
    assert Rates.nominal(amx.limit("avx2")).matrix == 0


def test_variants_with_rates_of_their_own_and_panels_that_leave_the_nearest_cache() -> None:
    bf16 = Target("x86_64", ISAS["avx512bf16"].features, l1d=32 << 10, l2=1 << 20, l3=32 << 20)
    of = dataclasses.replace(problem(768, 768, 0.2), dtype="bfloat16")
    times = {}
    for name, fmt in (("linear_sell_bf16", SELL(255)), ("linear_sell_dots", SELL(255))):
        times[name] = cost.sparse_us(of, fmt, catalog.variant(name).specs(of, fmt, bf16)[0], 64, bf16, RATES)
    assert times["linear_sell_dots"] < times["linear_sell_bf16"]
    fmt, pairs = Pairs(CSRGroups(255)), catalog.variant("linear_pairs")
    near, far = (dataclasses.replace(problem(768, n, 0.5), dtype="bfloat16") for n in (768, 4096))
    a, b = (cost.sparse_us(of, fmt, pairs.specs(of, fmt, bf16)[0], 16, bf16, RATES) for of in (near, far))
    assert b - cost.CALL_US > 1.5 * 4096 / 768 * (a - cost.CALL_US)


def test_rates_are_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(rates.cache, "load_json", lambda kind, key: kept.get(f"{kind}/{key}"))
    monkeypatch.setattr(rates.cache, "store_json", lambda kind, key, value: kept.update({f"{kind}/{key}": value}))
    rates.rates.cache_clear()
    first = rates.rates(TARGET)
    assert first.peak > 1e9 and first.l2 >= first.l3 >= first.memory > 1e8
    monkeypatch.setattr(rates, "measure", lambda target: pytest.fail("measured again"))
    rates.rates.cache_clear()
    assert rates.rates(TARGET) == first
    (key,) = kept
    kept[key] = {"peak": -1.0}
    monkeypatch.setattr(rates, "measure", lambda target: RATES)
    rates.rates.cache_clear()
    assert rates.rates(TARGET) == RATES, "a record that is not whole is measured again"
    rates.rates.cache_clear()
    assert rates.rates(Target.parse("cuda:sm_90")) == Rates.nominal(Target.parse("cuda:sm_90"))


def test_the_report_shows_the_model_beside_the_clock() -> None:
    torch.manual_seed(0)
    model = sparsec.sparsify(nn.Sequential(nn.Linear(64, 64)).eval(), Magnitude(0.9))
    report = sparsec.analyze(model, None, (torch.randn(4, 64),))
    (line,) = [n for n in report.notes if "cost model" in n]
    assert "of 1 sites; it expected" in line
    modelled = sparsec.analyze(model, None, (torch.randn(4, 64),), tune="model").row("0")
    assert modelled.code in (sparsec.codes.INSTALLED_MODEL, sparsec.codes.MODEL_SAYS_DENSE)
    assert modelled.dense_us and modelled.sparse_us
