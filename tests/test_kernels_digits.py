"""Kernels of number formats (pairs, codes, tiles), run: against what their format stores, and at the edges."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from test_kernels_linear import ISAS, _Fence

from sparsec import verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec, Plan, Problem, Step
from sparsec.codegen.render import render
from sparsec.errors import SpecError
from sparsec.formats import (
    BSR,
    CSR,
    SELL,
    Bitmask,
    CSRGroups,
    Format,
    GroupInt4,
    Pairs,
    Picks,
    Quantized,
    SpQR,
    Tiles,
)
from sparsec.target import Target

HERE = Target.probe()
BATCHES = (1, 2, 5, 8, 9, 16, 17, 33)
CASES: tuple[tuple[str, Format, int, int], ...] = (
    ("linear_sell_dots", SELL(16, 8), 37, 53),
    ("linear_sell_dots", SELL(), 34, 300),
    ("linear_pairs", Pairs(CSRGroups(16)), 37, 53),
    ("linear_pairs", Pairs(), 34, 600),
    ("linear_csr_fp16", CSR(), 37, 53),
    ("linear_csr_groups_fp16", CSRGroups(16), 37, 53),
    ("linear_sell_fp16", SELL(16, 8), 37, 53),
    ("linear_bsr_fp16", BSR(4, 1), 34, 53),
    ("linear_picks", Quantized(Picks()), 37, 301),
    ("linear_picks", Quantized(Picks()), 16, 3),
    ("linear_bitmask_codes", Quantized(Bitmask(64)), 37, 301),
    ("linear_bitmask_codes", Quantized(Bitmask(64)), 3, 64),
    ("linear_tiles", Tiles(), 37, 53),
    ("linear_tiles_bf16", Tiles(), 37, 150),
    ("linear_tiles_bf16", Tiles(), 16, 300),
    ("linear_tiles_codes", Quantized(Tiles()), 37, 301),
    ("linear_group_int4", GroupInt4(), 37, 53),
    ("linear_group_int4_bf16", GroupInt4(), 34, 64),
    ("linear_spqr", SpQR(40), 37, 53),
    ("linear_spqr_bf16", SpQR(40), 34, 64),
)


def _spec(name: str, fmt: Format, out: int, inp: int, isa: str, dtype: str) -> KernelSpec:
    """The catalogue's first kernel on an instruction set, which starts threads early."""
    problem = Problem("linear", out, inp, dtype, out * inp // 3, True, (Step("relu"),))
    target = HERE if isa == HERE.isas[0] else HERE.limit(isa)
    spec = catalog.variant(name).specs(problem, fmt, target)[0]
    return dataclasses.replace(spec, tile=(*spec.tile, ("one_thread", 500)))


def _grid() -> list[tuple[Format, KernelSpec]]:
    """Every case on its best instruction set, the first of each variant on all that it has here."""
    found, seen = [], set()
    for name, fmt, out, inp in CASES:
        variant = catalog.variant(name)
        isas = [isa for isa in variant.isas if isa in HERE.isas]
        for isa in isas[:1] if name in seen else (isas[0], isas[-1]) if name.endswith("_fp16") else isas:
            found += [(fmt, _spec(name, fmt, out, inp, isa, dtype)) for dtype in variant.dtypes]
        seen.add(name)
    return found


def _name(value: object) -> str:
    return f"{value.variant}-{value.isa}" if isinstance(value, KernelSpec) else value.text()  # type: ignore[attr-defined]


@functools.cache
def _built() -> dict[KernelSpec, Kernel]:
    return build_kernels([spec for _, spec in _grid()], HERE)


def _weight(spec: KernelSpec, density: float) -> torch.Tensor:
    """Random entries, the first and the last row empty, one row full."""
    kept = torch.rand(spec.out_features, spec.in_features) < density
    kept[0], kept[-1] = False, False
    kept[kept.shape[0] // 2] = True
    weight = torch.randn(spec.out_features, spec.in_features)
    return torch.where(kept, weight + weight.sign(), torch.zeros(())).to(DTYPES[spec.dtype])


@pytest.mark.parametrize(("fmt", "spec"), _grid(), ids=_name)
def test_kernel_equals_what_is_stored_at_every_batch_and_reads_nothing_past_an_end(
    fmt: Format, spec: KernelSpec
) -> None:
    kernel, dtype, fence = _built()[spec], DTYPES[spec.dtype], _Fence()
    shape = spec.out_features, spec.in_features
    resolved, bias = fmt.resolve(*shape), fence.copy(torch.randn(spec.out_features).to(dtype))
    for density in (0.0, 0.3, 1.0):
        weight = _weight(spec, density)
        if density:
            weight[-1, -1] = 1.5
        packed = resolved.pack(weight)
        buffers = [fence.copy(b) if b.numel() else b for b in packed.values()]
        stored, again = resolved.positions(packed, *shape), resolved.unpack(packed, *shape)
        for batch in BATCHES:
            x = fence.copy(torch.randn(batch, spec.in_features).to(dtype))
            y = fence.copy(torch.full((batch, spec.out_features), float("nan"), dtype=dtype))
            kernel.call(x, y, bias, None, *buffers)
            verdict = verify.check(y, x, again, bias, spec.epilogue, None, stored, resolved.blur(x))
            assert verdict.ok, (density, batch, verdict.sentence)
    empty = torch.empty(0, spec.out_features, dtype=dtype)
    kernel.call(torch.empty(0, spec.in_features, dtype=dtype), empty, bias, None, *buffers)


@pytest.mark.parametrize(("fmt", "spec"), _grid(), ids=_name)
def test_stored_positions_pass_inf_and_nan_on_and_others_ignore_them(fmt: Format, spec: KernelSpec) -> None:
    kernel, dtype = _built()[spec], DTYPES[spec.dtype]
    shape, column = (spec.out_features, spec.in_features), spec.in_features // 2
    if min(shape) < 16:
        pytest.skip("the other case of this variant is large enough to tell columns apart")
    weight, bias = _weight(spec, 0.1), torch.zeros(spec.out_features, dtype=dtype)
    weight[:, column // 16 * 16 : column // 16 * 16 + 16] = 0
    weight[3, column] = 2.0
    resolved = fmt.resolve(*shape)
    packed = resolved.pack(weight)
    stored, again = resolved.positions(packed, *shape), resolved.unpack(packed, *shape)
    for batch in (1, 5, 40):
        x = torch.randn(batch, spec.in_features).to(dtype)
        x[:, column] = float("nan")
        x[0, column] = float("-inf")
        y = torch.empty(batch, spec.out_features, dtype=dtype)
        kernel.call(x, y, bias, None, *packed.values())
        verdict = verify.check(y, x, again, bias, spec.epilogue, None, stored, resolved.blur(x))
        assert verdict.ok, (batch, verdict.sentence)
        if resolved.blur(x) is None:
            assert y[1:, 3].isnan().all() and y[:, ~stored[:, column]].isfinite().all()


def test_one_thread_and_more_give_the_same_bits() -> None:
    before = torch.get_num_threads()
    try:
        for fmt, spec in _grid()[:: max(1, len(_grid()) // 4)]:
            dtype = DTYPES[spec.dtype]
            buffers = fmt.resolve(spec.out_features, spec.in_features).pack(_weight(spec, 0.4)).values()
            x, bias = torch.randn(41, spec.in_features).to(dtype), torch.zeros(spec.out_features, dtype=dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(torch.empty(41, spec.out_features, dtype=dtype))
                _built()[spec].call(x, results[-1], bias, None, *buffers)
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), spec.variant
    finally:
        torch.set_num_threads(before)


PLANS: dict[str, Plan] = dict.fromkeys(("linear_picks", "linear_bitmask_codes"), ((0, "gemv", 1),))
REFUSED: tuple[tuple[str, Format, dict[str, object], str], ...] = (
    ("linear_sell_dots", SELL(), {"plan": ((0, "gemv", 1),)}, "runs in panels only"),
    ("linear_sell_dots", SELL(), {"plan": ((0, "panel", 64),)}, "8, 16 or 32 wide"),
    ("linear_sell_dots", SELL(), {"isa": "portable"}, "by AVX-512"),
    ("linear_sell_dots", SELL(), {"dtype": "float32"}, "are of bfloat16"),
    ("linear_pairs", Pairs(), {"plan": ((0, "gemv", 1),)}, "run in panels only"),
    ("linear_pairs", Pairs(), {"dtype": "float32"}, "are of bfloat16"),
    ("linear_pairs", Pairs(), {"fields": (("block", 256),)}, "1 to 255 columns"),
    ("linear_bsr_fp16", BSR(4, 1), {"dtype": "int8"}, "and float16, not int8"),
    ("linear_picks", Quantized(Picks()), {"dtype": "bfloat16"}, "go with float32"),
    ("linear_picks", Quantized(Picks()), {"plan": ((1, "gemv", 1), (0, "panel", 8))}, "one routine"),
    ("linear_picks", Quantized(Picks()), {"in_features": 65537}, "may overflow"),
    ("linear_bitmask_codes", Quantized(Bitmask(64)), {"dtype": "bfloat16"}, "go with float32"),
    ("linear_bitmask_codes", Quantized(Bitmask(64)), {"plan": ((0, "panel", 8),)}, "one routine"),
    ("linear_bitmask_codes", Quantized(Bitmask(32)), {}, "by masks of 64 inputs"),
    ("linear_bitmask_codes", Quantized(Bitmask(64)), {"in_features": 65537}, "in one block"),
)


@pytest.mark.parametrize(("name", "fmt", "change", "words"), REFUSED)
def test_templates_refuse_specs_they_cannot_print(
    name: str, fmt: Format, change: dict[str, object], words: str
) -> None:
    resolved = fmt.resolve(20, 40)
    spec = KernelSpec(
        "linear", name, resolved.text(), catalog.variant(name).dtypes[0], 20, 40, "avx512bf16",
        plan=PLANS.get(name, ((0, "panel", 16),)), fields=catalog.fields_of(resolved),
    )  # fmt: skip
    if change:
        render(spec)
    with pytest.raises(SpecError, match=words):
        render(dataclasses.replace(spec, **change))  # type: ignore[arg-type]


def test_catalogue_offers_them_where_they_win() -> None:
    """Pairs from a third of nonzeros on, dots up to 60 %, both only where the processor multiplies pairs."""
    bf16 = Target("x86_64", ("avx512_bf16",)) if "avx512bf16" not in HERE.isas else HERE.limit("avx512bf16")
    for density, names in ((0.1, {"sell"}), (0.5, {"sell", "pairs"}), (0.65, {"pairs"})):
        problem = Problem("linear", 64, 256, "bfloat16", round(64 * 256 * density))
        both = [catalog.variant(name) for name in ("linear_sell_dots", "linear_pairs")]
        found = {f.name for variant in both for f in variant.formats(problem, bf16)}
        assert found == (names if "avx512bf16" in bf16.isas else set())
    assert ISAS[0] == "avx512bf16" or not catalog.variant("linear_pairs").formats(problem, HERE)


def test_quantised_formats_go_to_their_kernels_and_the_clock_sees_all_of_them() -> None:
    problem = Problem("linear", 64, 256, "float32", 64 * 128)
    kinds = {
        "linear_quantized": CSRGroups(), "linear_picks": Picks(), "linear_bitmask_codes": Bitmask(64),
        "linear_tiles_codes": Tiles(),
    }  # fmt: skip
    for name, inner in kinds.items():
        for other in kinds.values():
            reason = catalog.variant(name).refuse(problem, Quantized(other), HERE)
            assert (reason is None) == (other is inner), (name, other, reason)
            assert reason is None or "it reads codes in" in reason or "masks of 64" in reason
    wide = dataclasses.replace(problem, in_features=65537)
    assert "may overflow" in str(catalog.variant("linear_bitmask_codes").refuse(wide, Quantized(Bitmask(64)), HERE))
    with pytest.raises(SpecError, match="by CSRGroups \\(or None\\), Picks, Bitmask or Tiles"):
        Quantized(CSR())
    fast = HERE if "avx512vbmi2" not in HERE.isas else HERE.limit("avx512vbmi2")
    offered = [f for name in kinds for f in catalog.variant(name).formats(problem, fast)]
    assert len(offered) == (2 if "avx512vbmi2" in HERE.isas else 0)
