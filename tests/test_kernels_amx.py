"""Kernels of AMX tiles: emulated where there are none, looked at as they are built, and run where there are some."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path

import amx_emulation
import pytest
import torch
from test_kernels_linear import _Fence

from sparsec import target, verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, KernelSpec, Plan, Problem, Step
from sparsec.codegen.render import render
from sparsec.errors import SpecError
from sparsec.formats import BSR, Format, Quantized, Tiles
from sparsec.target import ISAS, Target

AMX = Target("x86_64", ISAS["amx"].features)
BATCHES = (1, 2, 15, 16, 17, 31, 33, 64, 65, 130)
TAILS = ((Step("relu"),), (Step("scale", (0.5,)), Step("add"), Step("gelu")), ())
CASES: tuple[tuple[str, Format, int, int], ...] = (
    ("linear_tiles_bf16", Tiles(), 37, 150),
    ("linear_tiles_bf16", Tiles(), 3, 7),
    ("linear_tiles_codes", Quantized(Tiles()), 37, 301),
    ("linear_bsr_amx", BSR(16, 32), 37, 151),
    ("linear_bsr_amx", BSR(32, 32), 70, 64),
    ("linear_bsr_amx", BSR(48, 64), 100, 260),
)


def _spec(number: int, plan: Plan | None = None) -> KernelSpec:
    """The catalogue's kernel of a case, which starts threads early; cases have epilogues in turn."""
    name, fmt, out, inp = CASES[number]
    dtype = catalog.variant(name).dtypes[0]
    problem = Problem("linear", out, inp, dtype, out * inp // 3, number % 2 == 0, TAILS[number % len(TAILS)])
    spec = catalog.variant(name).specs(problem, fmt, AMX)[0]
    assert spec.isa == "amx"
    return dataclasses.replace(spec, tile=(*spec.tile, ("one_thread", 500)), plan=plan or spec.plan)


def _weight(spec: KernelSpec, density: float) -> torch.Tensor:
    """Random entries with the first and the last row empty, tiles without any, and one that is full."""
    kept = torch.rand(spec.out_features, spec.in_features) < density
    kept[0], kept[-1] = False, False
    kept[16:32, 64:128] = False
    if density:
        kept[:16, :64] = True
    weight = torch.randn(spec.out_features, spec.in_features)
    return torch.where(kept, weight + weight.sign(), torch.zeros(())).to(DTYPES[spec.dtype])


def _battery(spec: KernelSpec, fmt: Format, call: Callable[..., object]) -> None:
    """Every batch and density against float64, with infinities and NaN, between unreadable pages."""
    shape, dtype, fence = (spec.out_features, spec.in_features), DTYPES[spec.dtype], _Fence()
    bias = fence.copy(torch.randn(shape[0]).to(dtype)) if spec.bias else None
    adds = any(step.name == "add" for step in spec.epilogue)
    resolved = fmt.resolve(*shape)
    for density in (0.0, 0.3, 1.0):
        packed = resolved.pack(_weight(spec, density))
        buffers = [fence.copy(b) if b.numel() else b for b in packed.values()]
        stored, again = resolved.positions(packed, *shape), resolved.unpack(packed, *shape)
        for batch in (0, *BATCHES):
            x, y = torch.randn(batch, shape[1]).to(dtype), torch.full((batch, shape[0]), float("nan"), dtype=dtype)
            if batch % 2 == 1:
                x[0, 0], x[-1, shape[1] // 2], x[batch // 2, -1] = float("inf"), float("nan"), float("-inf")
            residual = fence.copy(torch.randn(batch, shape[0]).to(dtype)) if adds and batch else torch.empty_like(y)
            x, y = (fence.copy(t) if batch else t for t in (x, y))
            call(x, y, bias, residual if adds else None, *buffers)
            if batch:
                parts = (bias, spec.epilogue, residual if adds else None, stored, resolved.blur(x))
                verdict = verify.check(y, x, again, *parts)
                assert verdict.ok, (density, batch, verdict.sentence)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := amx_emulation.missing():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("amx")


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join((CASES[n][0], CASES[n][1].text())))
def test_emulated_kernel_equals_what_is_stored_and_uses_tiles_as_the_processor_demands(
    number: int, folder: Path
) -> None:
    spec = _spec(number)
    kernel = amx_emulation.build(spec, folder)
    _battery(spec, CASES[number][1], kernel.call)
    assert kernel.fault() == "" and kernel.open() == 0
    assert kernel.products() >= 30 and kernel.asked() == 1


def test_one_wide_plan_serves_few_rows_and_threads_give_the_same_bits(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        for number in (0, 2, 4):
            spec, fmt = _spec(number, ((0, "panel", 32),)), CASES[number][1]
            kernel = amx_emulation.build(spec, folder)
            shape, dtype = (spec.out_features, spec.in_features), DTYPES[spec.dtype]
            buffers = fmt.resolve(*shape).pack(_weight(spec, 0.4)).values()
            for batch in (3, 70):
                x, bias = torch.randn(batch, shape[1]).to(dtype), torch.zeros(shape[0], dtype=dtype)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(torch.empty(batch, shape[0], dtype=dtype))
                    rest = torch.zeros_like(results[0]) if any(s.name == "add" for s in spec.epilogue) else None
                    kernel.call(x, results[-1], bias if spec.bias else None, rest, *buffers)
                assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
                assert results[0].isfinite().all() and kernel.fault() == "" and kernel.open() == 0
    finally:
        torch.set_num_threads(before)


def test_full_tiles_are_multiplied_where_they_lie_and_empty_ones_passed_over(folder: Path) -> None:
    """One product for each tile of 16 tokens and stored tile of the weight."""
    spec = _spec(0)
    kernel, dtype = amx_emulation.build(spec, folder), torch.bfloat16
    weight = torch.zeros(37, 150, dtype=dtype)
    weight[:16, 32:96] = torch.randn(16, 64).to(dtype).abs() + 1
    weight[36, 149] = 1.0
    x, y = torch.randn(40, 150).to(dtype), torch.empty(40, 37, dtype=dtype)
    kernel.products()
    kernel.call(x, y, torch.zeros(37, dtype=dtype), None, *Tiles().pack(weight).values())
    assert kernel.products() == 3 * 4 and kernel.fault() == ""  # 40 rows run as a panel of 64, four tiles wide


@pytest.mark.parametrize("number", (0, 2, 3), ids=lambda n: CASES[n][0])
def test_a_system_that_lends_no_tiles_is_a_refusal(number: int, folder: Path) -> None:
    spec = _spec(number, ((0, "panel", 16),))
    kernel = amx_emulation.build(spec, folder)
    kernel.refuse()
    buffers = CASES[number][1].resolve(spec.out_features, spec.in_features).pack(_weight(spec, 0.5)).values()
    x = torch.zeros(2, spec.in_features, dtype=DTYPES[spec.dtype])
    with pytest.raises(ValueError, match=r"does not lend AMX tile registers .* target cpu:avx512fp16"):
        kernel.call(x, torch.empty(2, spec.out_features, dtype=x.dtype), None, None, *buffers)
    assert kernel.products() == 0 and kernel.fault() == ""


FAULTS = (
    ("tiles_begin(", "(void)(", "not configured"),
    ("_tile_release();", "_tile_release(); _tile_zero(0);", "not configured"),
    ("config.rows[t] = (uint8_t)(whole ? 16 : rows);", "config.rows[t] = 17;", "out of range"),
    ("(uint16_t)(whole ? 64 : bytes)", "(uint16_t)(t == 4 ? 32 : bytes)", "shapes do not agree"),
    ("if (!tiles_lent())", "if (0)", "without permission"),
)


@pytest.mark.parametrize(("old", "new", "words"), FAULTS)
def test_the_emulation_sees_what_a_processor_would_not_do(
    old: str, new: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(_spec(0, ((0, "panel", 16),)), tile=(("one_thread", 1 << 30),))
    source = render(spec)
    assert old in source.text
    at = source.text.rindex(old)  # the last one: a call, not the definition
    broken = dataclasses.replace(source, text=source.text[:at] + new + source.text[at + len(old) :])
    monkeypatch.setattr(amx_emulation.render, "render", lambda _: broken)
    kernel = amx_emulation.build(spec, tmp_path)
    x, y = torch.zeros(4, 150, dtype=torch.bfloat16), torch.empty(4, 37, dtype=torch.bfloat16)
    kernel.call(x, y, y[0].clone(), None, *Tiles().pack(_weight(spec, 0.5)).values())
    assert words in kernel.fault()


@pytest.mark.parametrize("number", (0, 2, 4), ids=lambda n: CASES[n][0])
def test_built_for_amx_without_a_warning_and_with_its_instructions(number: int, tmp_path: Path) -> None:
    if reason := amx_emulation.missing():
        pytest.skip(reason)
    spec = _spec(number)
    text = amx_emulation.native(spec, tmp_path)
    product = "tdpbusd" if spec.dtype == "float32" else "tdpbf16ps"
    for word in (product, "ldtilecfg", "tileloadd", "tilestored", "tilezero", "tilerelease", "syscall"):
        assert word in text, word
    if spec.variant != "linear_bsr_amx":  # gcc 12 must not take the lines that only tiles read for dead stores
        assert text.count("vpexpand") >= 32


def test_text_of_blocks_in_tile_registers(golden: Callable[[str], None]) -> None:
    """As it is printed, since no machine of ours runs it."""
    golden(render(dataclasses.replace(_spec(3, ((0, "panel", 32),)), epilogue=())).text)


def test_text_of_masked_tiles(golden: Callable[[str], None]) -> None:
    golden(render(dataclasses.replace(_spec(0, ((0, "panel", 32),)), epilogue=())).text)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join((CASES[n][0], CASES[n][1].text())))
def test_native_kernel_equals_what_is_stored(number: int) -> None:
    here = Target.probe()
    if "amx" not in here.isas:
        pytest.skip(f"{here.name} has no AMX, or the system does not lend it: the kernel ran emulated only")
    spec = _spec(number)
    _battery(spec, CASES[number][1], build_kernels([spec], here)[spec].call)


REFUSED: tuple[tuple[int, dict[str, object], str], ...] = (
    (0, {"plan": ((0, "gemv", 1),)}, "run in panels only"),
    (0, {"plan": ((0, "panel", 48),)}, "8, 16, 32 or 64 wide"),
    (0, {"in_features": (1 << 21) + 1}, "at most 65536 tiles"),
    (2, {"dtype": "bfloat16"}, "go with float32"),
    (2, {"in_features": 65537}, "may overflow"),
    (3, {"dtype": "float32"}, "are of bfloat16, by AMX"),
    (3, {"isa": "avx512bf16"}, "by AMX"),
    (3, {"fields": (("r", 8), ("c", 32), ("index_bits", 16))}, "in whole tiles"),
    (3, {"fields": (("r", 16), ("c", 32), ("index_bits", 8))}, "16 or 32 bits"),
    (3, {"plan": ((0, "gemv", 1),)}, "run in panels only"),
    (3, {"plan": ((0, "panel", 8),)}, "panels are 16, 32 or 64 wide"),
    (4, {"plan": ((0, "panel", 64),)}, "of blocks of 32 rows 16 or 32"),
)


@pytest.mark.parametrize(("number", "change", "words"), REFUSED)
def test_templates_refuse_specs_they_cannot_print(number: int, change: dict[str, object], words: str) -> None:
    spec = _spec(number)
    render(spec)
    with pytest.raises(SpecError, match=words):
        render(dataclasses.replace(spec, **change))  # type: ignore[arg-type]


def test_catalogue_offers_tiles_where_they_can_run() -> None:
    problem = Problem("linear", 768, 768, "bfloat16", 768 * 768 // 2, batches=(16,))
    blocks = catalog.variant("linear_bsr_amx")
    assert blocks.refuse(problem, BSR(16, 32), AMX) is None and blocks.refuse(problem, BSR(64, 64), AMX) is None
    assert "whole tiles of 16 x 32" in str(blocks.refuse(problem, BSR(16, 16), AMX))
    assert "needs amx" in str(blocks.refuse(problem, BSR(16, 32), AMX.limit("avx512fp16")))
    for target_here, isa in ((AMX, "amx"), (AMX.limit("avx512fp16"), "avx512bf16"), (AMX.limit("avx2"), "portable")):
        assert catalog.variant("linear_tiles_bf16").specs(problem, Tiles(), target_here)[0].isa == isa
    for dtype, density, here, offered in (
        ("bfloat16", 0.1, AMX, True), ("bfloat16", 0.01, AMX, False), ("float32", 0.5, AMX, False),
        ("bfloat16", 0.5, AMX.limit("avx512bf16"), True), ("bfloat16", 0.2, AMX.limit("avx512bf16"), False),
        ("bfloat16", 0.5, AMX.limit("avx512"), False),
    ):  # fmt: skip
        of = dataclasses.replace(problem, dtype=dtype, nnz=round(768 * 768 * density))
        variant = catalog.variant("linear_tiles_bf16" if dtype == "bfloat16" else "linear_tiles")
        assert variant.formats(of, here) == ((Tiles(),) if offered else ())
        codes = catalog.variant("linear_tiles_codes").formats(dataclasses.replace(of, dtype="float32"), here)
        assert bool(codes) == (here is AMX and density > 0.05)
    small = dataclasses.replace(problem, out_features=64, nnz=64 * 768 // 2)
    assert catalog.variant("linear_tiles_bf16").formats(small, AMX.limit("avx512bf16")) == ()
    assert "more than 2097152" in str(
        catalog.variant("linear_tiles_bf16").refuse(
            dataclasses.replace(problem, in_features=(1 << 21) + 1, out_features=16), Tiles(), AMX
        )
    )


@pytest.mark.parametrize("lent", [True, False])
def test_a_processor_with_amx_counts_only_where_the_system_lends_it(
    lent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of the system decides, and without it the best of the rest is what kernels are made for."""
    calls = []

    class Library:
        def __init__(self, name: None) -> None: ...

        def syscall(self, *numbers: int) -> int:
            calls.append(numbers)
            return 0 if lent else -1

    flags = " ".join(ISAS["amx"].features)
    monkeypatch.setattr(target, "_read", lambda place: f"flags : {flags}\n" if place.name == "cpuinfo" else "")
    monkeypatch.setattr(target.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(ctypes, "CDLL", Library)
    target.tiles_lent.cache_clear()
    try:
        found = target._probe.__wrapped__()
        assert found.isas[0] == ("amx" if lent else "avx512fp16")
        assert target.tiles_lent() is lent and calls == [(158, 0x1023, 18)]
    finally:
        target.tiles_lent.cache_clear()
