"""MetaSchedule's search for TVM schedules: what is drawn, kept, cached and saved, and where it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'sparsec[tvm]'")

import sparsec
from sparsec import testing
from sparsec.codegen import build, cache, catalog, tune, tvm, tvm_compat, tvm_rules, tvm_search, tvm_shape, tvm_variants
from sparsec.codegen.kernel import KernelSpec, Plan, Problem
from sparsec.errors import DependencyError, SpecError, ToolchainError
from sparsec.formats import BSR, CSR
from sparsec.passes import MetaSchedule
from sparsec.target import Target

HERE = Target.parse("tvm").limit("portable")
ONE: Plan = ((0, "panel", 16),)
searches = pytest.mark.skipif(tvm_compat.unsearchable() is not None, reason=str(tvm_compat.unsearchable()))


def spec_of(fmt: CSR | BSR = CSR(), plan: Plan = ONE) -> KernelSpec:  # noqa: B008
    problem = Problem("linear", 40, 24, "float32", 300, True)
    spec = catalog.variant(f"linear_{fmt.name}_tvm").specs(problem, fmt, HERE)[0]
    return dataclasses.replace(spec, plan=plan)


def sparse(out: int = 40, inp: int = 24) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inp, out).eval()
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    return layer


def clock(monkeypatch: pytest.MonkeyPatch, us: Callable[[int], float]) -> list[int]:
    """A clock that runs every contender and says that contender i took us(i); how many it was handed each time."""
    seen: list[int] = []

    def measure(contenders: Sequence[Callable[[], object]]) -> tune.Timing:
        seen.append(len(contenders))
        for run in contenders:
            run()
        return tune.Timing(tuple(us(i) for i in range(len(contenders))), 9)

    monkeypatch.setattr(tune, "measure", measure)
    return seen


# -- the space ---------------------------------------------------------------------------------------------------------


def test_the_space_holds_what_runs_for_the_batches():
    plan: Plan = ((1, "gemv", 1), (16, "panel", 16), (0, "panel", 32))
    spec = spec_of(BSR(4, 2), plan)
    module = tvm_compat.parse(tvm.texts(spec).text_of(spec))
    assert tvm_search.space_of(spec, (8,), module) == {
        "rows_16_fma_lanes": (4, 8), "rows_16_fma_unroll": (1, 8, 64), "rows_16_keep_lanes": (4, 8),
        "rows_16_keep_unroll": (1, 8, 64), "finish_16_store_unroll": (1, 8, 64),
    }  # fmt: skip
    assert tvm_search.functions_of(spec, (1,)) == {"gemv": ["dot"]}
    assert tvm_search.space_of(spec, (1,), module) == {}, "four sums in one vector of four lanes"
    assert {name.split("_")[1] for name in tvm_search.space_of(spec, (2, 100), module)} == {"16", "32"}


def test_a_tile_changes_the_schedule_and_not_the_results():
    spec = spec_of()
    tiled = dataclasses.replace(spec, tile=(("rows_16_fma_lanes", 8), ("finish_16_store_unroll", 64)))
    usual, other = (tvm.BACKEND.render(s).text for s in (spec, tiled))
    assert "T.vectorized(8)" in other and "T.vectorized(8)" not in usual
    assert KernelSpec.parse(tiled.text()) == tiled and tiled.symbol != spec.symbol
    layer, x = sparse(), torch.randn(9, 24)
    buffers = list(CSR().resolve(40, 24).pack(layer.weight.detach()).values())
    y = torch.empty(9, 40)
    build.get_kernel(tiled.text()).call(x, y, layer.bias.detach(), None, *buffers)
    with torch.no_grad():
        assert torch.allclose(y, layer(x), atol=1e-5)


def test_tiles_that_no_rule_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch):
    module = tvm_compat.parse(tvm.texts(spec_of()).text_of(spec_of()))
    monkeypatch.setattr(tvm_compat, "parse", lambda text: module)  # a schedule copies what it changes
    for tile, message in (
        ((("rows_16_fma_lanes", 3),), "rows_16.fma: 16 columns are not whole vectors of 3 lanes"),
        ((("rows_16_fma_lanes", 0),), "not whole vectors of 0 lanes"),
        ((("finish_16_store_unroll", 65),), "unrolled up to 64 times, not 65"),
        ((("rows_32_fma_lanes", 4),), "no TVM rule has a choice named 'rows_32_fma_lanes'"),
    ):
        with pytest.raises(SpecError, match=message):
            tvm.BACKEND.render(dataclasses.replace(spec_of(), tile=tile))


# -- searching ---------------------------------------------------------------------------------------------------------


@searches
def test_metaschedule_draws_the_same_schedules_for_the_same_seed():
    spec = spec_of()
    module, lanes, drawn = tvm_compat.searchable(tvm.texts(spec).text_of(spec)), tvm_shape.lanes_of(spec), []
    space = tvm_search.space_of(spec, (16,), module)

    def rules(schedule: object, sample: tvm_compat.Sample) -> None:
        blocks = tvm_search.functions_of(spec, (16,))
        tvm_rules.schedule(schedule, blocks, lanes, lambda n, v, u: sample(n, v, u) if len(v) > 1 else u)

    def measure(draws: list[tuple[int, ...]]) -> list[float]:
        drawn.append(draws)
        return [1.0] * len(draws)

    for seed in (5, 5, 6):
        tvm_compat.search(module, rules, "portable", trials=7, each=4, seed=seed, measure=measure)
    assert [len(d) for d in drawn] == [4, 3] * 3, "as many as were asked for, four at a time"
    assert drawn[:2] == drawn[2:4] != drawn[4:]
    assert all(0 <= at < len(v) for d in drawn for draw in d for at, v in zip(draw, space.values(), strict=True))
    assert len({draw for d in drawn for draw in d}) > 4


@searches
def test_the_fastest_schedule_is_installed_verified_cached_and_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tvm_variants, "_PLAN", ONE)
    seen = clock(monkeypatch, lambda i: (10.0, 9.0, 5.0, 8.0)[i])
    layer, x = sparse(), torch.randn(16, 24)
    passes = sparsec.DEFAULT.replace("select", MetaSchedule(trials=3, seed=1))
    compiled = sparsec.compile(layer, CSR(), (x,), target="tvm:portable", passes=passes)
    report = sparsec.report(compiled)
    (row,), (note,) = report.rows, [n for n in report.notes if "MetaSchedule" in n]
    assert row.decision == "sparse" and row.variant == "linear_csr_tvm"
    assert "timed 3 schedules of linear_csr_tvm, and the best was 1.11x as fast" in note
    assert seen == [4, 2, 4], "usual and three drawn; usual and best; dense, usual, searched, prepacked"
    (text,) = {a for n in compiled.graph.nodes for a in n.args if isinstance(a, str)}
    assert KernelSpec.parse(text).tile and row.sparse_us == 5.0 and row.dense_us == 10.0
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(tvm_compat, "search", never)
    again = sparsec.compile(layer, CSR(), (x,), target="tvm:portable", passes=passes)
    assert sparsec.source(again, row.site) == sparsec.source(compiled, row.site)
    assert note in sparsec.report(again).notes
    monkeypatch.setattr(tvm_compat, "unsearchable", lambda: "no search here")
    sparsec.save(compiled, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(sparsec.load(tmp_path / "m")(x), compiled(x)), "a found schedule needs no MetaSchedule"


@searches
def test_nothing_changes_where_no_schedule_is_better_and_broken_ones_are_passed_over(monkeypatch: pytest.MonkeyPatch):
    spec = spec_of()
    buffers = CSR().resolve(40, 24).pack(sparse().weight.detach())
    clock(monkeypatch, lambda i: 1.0)
    found = tvm_search.search(spec, buffers, (16,), trials=2, seed=1)
    assert found == tvm_search.Found(spec, 1.0, 2)
    real = build.build_kernels

    def some(specs: Sequence[KernelSpec], target: Target, **keywords: dict[KernelSpec, Exception]) -> object:
        keywords["errors"].update({s: ToolchainError("broken") for s in specs if s.tile})
        return real([s for s in specs if not s.tile], target)

    monkeypatch.setattr(build, "build_kernels", some)
    assert tvm_search.search(spec, buffers, (16,), trials=2, seed=2).spec == spec
    monkeypatch.setattr(tune, "measure", lambda runs: tune.Timing(tuple(2.0 - i for i, _ in enumerate(runs)), 9, False))
    monkeypatch.setattr(build, "build_kernels", real)
    assert tvm_search.search(spec, buffers, (15,), trials=1, seed=1).spec != spec
    monkeypatch.setattr(cache, "load_json", lambda kind, key: None if kind != "tvm_schedules" else {"tile": 3})
    assert tvm_search.search(spec, buffers, (15,), trials=1, seed=1).spec != spec, "a damaged record is searched anew"


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_releases_that_were_not_tried_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for ffi in ("0.1.13", "0.1.16", "0.2.0rc1"):
        monkeypatch.setattr(tvm_compat, "_ffi", lambda ffi=ffi: ffi)
        with pytest.raises(DependencyError, match=rf"apache-tvm-ffi {ffi} is installed.*0.1.14 and 0.1.15: pip"):
            sparsec.compile(sparse(), CSR(), (torch.randn(2, 24),), target="tvm", passes=_searching())
        with pytest.raises(DependencyError, match="schedules cannot be searched"):
            tvm_compat.search("", lambda *_: None, "portable", trials=1, each=1, seed=1, measure=lambda d: [])
    for ffi in ("0.1.14.post1", "0.1.15.post2"):
        monkeypatch.setattr(tvm_compat, "_ffi", lambda ffi=ffi: ffi)
        assert tvm_compat.unsearchable() is None


def _searching() -> object:
    return sparsec.DEFAULT.replace("select", MetaSchedule(trials=1))


def test_other_targets_tunings_and_numbers_are_refused():
    layer, x = sparse(), (torch.randn(2, 24),)
    with pytest.raises(SpecError, match="the target is cpu; write target='tvm'"):
        sparsec.compile(layer, CSR(), x, target=Target.probe(), passes=_searching())
    for how in ("off", "model"):
        with pytest.raises(SpecError, match=f"tune='{how}' forbids; use 'measure'"):
            sparsec.compile(layer, CSR(), x, target="tvm", tune=how, passes=_searching())
    for keywords in ({"trials": 0}, {"trials": 1025}, {"trials": True}, {"trials": 2.0}):
        with pytest.raises(SpecError, match="from 1 to 1024"):
            MetaSchedule(**keywords)
    for seed in (-1, 2**31, None):
        with pytest.raises(SpecError, match="MetaSchedule.seed="):
            MetaSchedule(seed=seed)


@searches
def test_a_search_that_fails_is_noted_and_the_usual_schedule_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tvm_variants, "_PLAN", ONE)

    def search(*_: object) -> None:
        raise ToolchainError("MetaSchedule's search failed: out of luck\nand more")

    monkeypatch.setattr(tvm_search, "search", search)
    layer, x = sparse(), torch.randn(16, 24)
    keywords = {"target": "tvm:portable", "min_speedup": 0, "passes": _searching()}
    report = sparsec.report(sparsec.compile(layer, CSR(), (x,), **keywords))
    assert report.rows[0].variant == "linear_csr_tvm"
    assert "<root>: no schedule was searched: MetaSchedule's search failed: out of luck" in report.notes
    with pytest.raises(ToolchainError, match="out of luck"):
        sparsec.compile(layer, CSR(), (x,), fallback="error", **keywords)


@searches
def test_what_metaschedule_itself_complains_of_is_a_typed_error():
    def rules(schedule: object, sample: tvm_compat.Sample) -> None:
        raise ValueError("no such loop")

    spec = spec_of()
    module = tvm_compat.searchable(tvm.texts(spec).text_of(spec))
    with pytest.raises(ToolchainError, match=r"MetaSchedule's search failed: (.|\n)*no such loop"):
        tvm_compat.search(module, rules, "portable", trials=1, each=1, seed=1, measure=lambda d: [])

    def broken(draws: list[tuple[int, ...]]) -> list[float]:
        raise SpecError("ours")

    with pytest.raises(SpecError, match="^ours$"):
        tvm_compat.search(module, lambda *_: None, "portable", trials=1, each=1, seed=1, measure=broken)


def test_searched_kernels_pass_the_checks_of_all_kernels():
    """Ends of every choice, in one kernel each, against float64 on random batches and layouts."""
    import numpy as np

    spec = spec_of()
    case = testing.Case(spec.variant, "portable", CSR().resolve(40, 24), "float32", 40, 24, True, ())
    rng = np.random.default_rng(3)
    for end in (0, -1):
        tile = tuple((name, values[end]) for name, values in tvm_search.space_of(spec, (16,)).items())
        for batch in (1, 16, 33):
            data = dataclasses.replace(testing.draw_data(rng), batch=batch)
            assert testing.failures(case, data, dataclasses.replace(spec, tile=tile).text()) == []
