"""What surrounds CUDA kernels: stream, device, scratch memory, the clock, selection, and what has no kernel; no GPU."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm_ffi
from cuda_emulation import available, build, compile_text
from cuda_problems import Case, cases, first_spec, spec_of, weight_of

import sparsec
from sparsec import codes, cost, verify
from sparsec.codegen import build as build_module
from sparsec.codegen import catalog, cuda, cuda_variants, render, tune
from sparsec.codegen.kernel import Kernel, KernelSpec, Problem, Source, Step
from sparsec.errors import DeviceError, PassError, ToolchainError
from sparsec.formats import BSR, CSR, NM, Bitmask, Permuted, Sum
from sparsec.passes import _propose
from sparsec.target import Target

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
TARGET = Target.parse("cuda:sm_90")
STREAM = 0x5EED
emulates = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sparsec-cuda-") as name:
        yield Path(name)


def _operands(case: Case, batch: int) -> list[Any]:
    """x, y, bias, residual and buffers of a case."""
    x = torch.randn(batch, case.cols, generator=torch.Generator().manual_seed(3)).to(getattr(torch, case.dtype))
    y = torch.full((batch, case.rows), float("nan"), dtype=x.dtype)
    residual = torch.zeros_like(y) if any(step.name == "add" for step in case.steps) else None
    return [x, y, torch.zeros(case.rows, dtype=x.dtype), residual, *case.packed(weight_of(case, 0.4)).values()]


# -- launching ---------------------------------------------------------------------------------------------------------


@emulates
def test_kernels_run_on_the_current_stream_and_the_device_of_their_inputs(folder: Path) -> None:
    """Another device than the inputs' is current: the launch makes theirs current, and puts the other one back."""
    case = cases("linear_csr_merge")[0]
    emulated = build([spec_of(case)], folder)
    call, operands = emulated.kernels[spec_of(case).text()], _operands(case, 33)
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cpu:0"), STREAM):
        call(*operands)
        assert emulated.stream() == STREAM and emulated.launches() == 3, "transpose, merge, finish: all on the stream"
    assert emulated.misplaced() == 0
    emulated.set_device(1)
    call(*operands)
    assert emulated.set_device(0) == 1 and emulated.misplaced() == 0
    assert verify.check(operands[1], operands[0], weight_of(case, 0.4), None, case.steps).ok


@emulates
def test_scratch_memory_that_cannot_be_had_is_said(folder: Path) -> None:
    case = cases("linear_csr_merge")[0]
    emulated = build([spec_of(case)], folder)
    call, operands = emulated.kernels[spec_of(case).text()], _operands(case, 33)
    emulated.set_memory(False)
    emulated.set_device(1)
    try:
        with pytest.raises(RuntimeError, match="out of device memory for scratch; free some or use a smaller batch"):
            call(*operands)
        assert emulated.set_device(1) == 1, "the current device is put back after a failure, too"
    finally:
        emulated.set_memory(True)
        emulated.set_device(0)
    assert emulated.misplaced() == 0 and bool(torch.isnan(operands[1]).all())
    call(*operands)
    assert not torch.isnan(operands[1]).any()


@emulates
def test_inputs_are_split_where_one_block_a_tile_would_leave_the_device_idle(folder: Path) -> None:
    """The emulated device has 4 multiprocessors: 2 row tiles of 10 tiles each are split in 3, 9 row panels are not."""
    case = cases("linear_tiled_csl_mma")[-1]
    assert case.shape == (136, 600)
    emulated = build([spec_of(case)], folder)
    call = emulated.kernels[spec_of(case).text()]
    for batch, launches in ((8, 2), (64 * 4, 1)):
        operands = _operands(case, batch)
        emulated.launches()
        call(*operands)
        assert emulated.launches() == launches, f"batch {batch}: the tiles, and what adds their sums"
        x, y, bias, residual = operands[:4]
        assert verify.check(y, x, weight_of(case, 0.4), bias, case.steps, residual).ok


@emulates
@pytest.mark.parametrize("name", ["linear_group_int4_cuda", "linear_csr_merge"])
def test_work_is_cut_evenly_however_it_lies_in_rows(name: str, folder: Path) -> None:
    """GQSA's even splitting, and the merge path: a row that holds everything is cut into as many pieces as two halves.

    A block has four warps: one that stayed within its row would leave two rows to a single block.
    """
    case = dataclasses.replace(next(c for c in cases(name) if c.dtype == "float32"), shape=(2, 16384), steps=())
    emulated = build([spec_of(case)], folder)
    x = torch.randn(1, 16384, generator=torch.Generator().manual_seed(1))
    values = torch.randn(16384, generator=torch.Generator().manual_seed(2))
    groups = torch.arange(16384) // 16 % 2
    seen = []
    for skewed in (True, False):
        rows = torch.zeros_like(groups) if skewed else groups
        weight = torch.zeros(2, 16384).index_put_((rows, torch.arange(16384)), values)
        packed = case.packed(weight)
        emulated.blocks()
        y = case.run(emulated, x, [*packed.values()])
        seen.append(emulated.blocks())
        assert verify.check(y, x, case.format.unpack(packed, 2, 16384), None).ok
    assert seen[0] == seen[1] >= 6


# -- the clock ---------------------------------------------------------------------------------------------------------


class _Event:
    """A CUDA event of a device on which every call takes 2 ms."""

    calls = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.calls

    def synchronize(self) -> None:
        self.seen = True

    def elapsed_time(self, stop: _Event) -> float:
        assert stop.seen, "the device may still be at work"
        return 2.0 * (stop.at - self.at)


class _OnDevice(torch.Tensor):
    is_cuda = True  # type: ignore[assignment]


def test_device_work_is_timed_with_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock would see the launch alone."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)

    def run() -> torch.Tensor:
        _Event.calls += 1
        return torch.empty(1).as_subclass(_OnDevice)

    timing = tune.measure([run, run])
    assert timing.us == (2000.0, 2000.0) and timing.steady


# -- selection ---------------------------------------------------------------------------------------------------------


def _device(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """A machine with a GPU, as far as `compile` can tell: weights say they are on it, kernels run emulated."""

    class Weight:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.device, self.detach, self.reshape = torch.device("cuda", 0), tensor.detach, tensor.reshape

    built: list[str] = []
    real = _propose.get_constant
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    monkeypatch.setattr(_propose, "get_constant", lambda gm, name: Weight(real(gm, name)))
    monkeypatch.setattr(cuda.CudaBackend, "available", lambda self: None)

    def make(self: cuda.CudaBackend, source: Source, target: Target) -> Path:
        built.append(source.spec.variant)
        compile_text(source.text, folder)
        return folder

    def load(self: cuda.CudaBackend, path: Path, source: Source) -> Kernel:
        return Kernel(source.spec, compile_text(source.text, folder)[source.spec.symbol], source.text, ("nvcc",))

    monkeypatch.setattr(cuda.CudaBackend, "build", make)
    monkeypatch.setattr(cuda.CudaBackend, "load", load)
    return built


@emulates
def test_sites_are_timed_verified_and_reported_as_on_processors(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    built = _device(monkeypatch, folder)
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(51, 70).eval(), torch.randn(9, 51)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(70, 51) < 0.2)
    compiled = sparsec.compile(layer, CSR(), (x,), target="cuda", min_speedup=0)
    (row,) = sparsec.report(compiled).rows
    assert sorted(built) == ["linear_csr_cuda", "linear_csr_merge"] and row.variant in built
    assert row.decision == "sparse" and row.dense_us and row.sparse_us, "both were timed"
    with torch.no_grad():
        assert verify.check(compiled(x), x, layer.weight, layer.bias).ok
    assert "__global__" in sparsec.source(compiled, row.site)

    monkeypatch.setattr(verify, "check", lambda *_: verify.Verdict(False, 2.0, "off by twice the bound"))
    (row,) = sparsec.report(sparsec.compile(layer, CSR(), (x,), target="cuda", min_speedup=0)).rows
    assert row.decision == "dense" and "off by twice the bound" in row.reason, "never wrong"
    monkeypatch.setattr(tune, "measure", lambda runs: tune.Timing((1.0, *(5.0 for _ in runs[1:])), 9))
    monkeypatch.setattr(tune, "recall", lambda *_: None)
    (row,) = sparsec.report(sparsec.compile(layer, CSR(), (x,), target="cuda")).rows
    assert row.decision == "dense" and row.dense_us == 1.0 and row.sparse_us == 5.0, "never slower"


@emulates
def test_what_cannot_be_built_or_run_stays_dense_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """No nvcc, a device older than the target, an architecture without kernels: a row, or an error where asked for.

    A model that was saved for CUDA asks for a device when it is loaded.
    """
    _device(monkeypatch, folder)
    layer, x = torch.nn.Linear(51, 70).eval(), torch.randn(9, 51)
    made, loaded = cuda.CudaBackend.build, cuda.CudaBackend.load

    def built_for(target: str, fallback: str = "dense") -> Any:
        compiled = sparsec.compile(layer, CSR(), (x,), target=target, tune="off", fallback=fallback)
        (row,) = sparsec.report(compiled).rows
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x)) == (row.decision == "dense")
        if row.decision == "sparse":
            sparsec.save(compiled, tmp_path / "cuda.sparsec")
        return row

    assert built_for("cuda").decision == "sparse"
    row = built_for("cuda:sm_75")
    assert row.decision == "dense" and "needs sm_120 or" in row.reason
    monkeypatch.setattr(build_module, "_loaded", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))

    def load(self: cuda.CudaBackend, path: Path, source: Source) -> Kernel:
        cuda.check_device(source.spec)
        return loaded(self, path, source)

    monkeypatch.setattr(cuda.CudaBackend, "load", load)
    row = built_for("cuda:sm_90")
    assert row.decision == "dense" and "Test GPU is sm_80; compile with target='cuda:sm_80'" in row.reason
    with pytest.raises(DeviceError, match="compile with target='cuda:sm_80'"):
        built_for("cuda:sm_90", "error")
    assert built_for("cuda").decision == "sparse"
    monkeypatch.setattr(build_module, "_loaded", {})
    monkeypatch.setattr(cuda.CudaBackend, "available", lambda self: "no CUDA compiler: install the CUDA toolkit")
    row = built_for("cuda")
    assert row.decision == "dense" and row.code == codes.NO_TOOLCHAIN and "install the CUDA toolkit" in row.reason
    with pytest.raises(ToolchainError, match="install the CUDA toolkit"):
        built_for("cuda", "error")
    assert cuda.CudaBackend.build is made
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="saved for CUDA, and this process sees no CUDA device"):
        sparsec.load(tmp_path / "cuda.sparsec")


@emulates
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("out of device memory")])
def test_memory_that_ends_while_timing_is_a_typed_error(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    _device(monkeypatch, folder)
    layer = torch.nn.Linear(51, 70).eval()

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(tune, "measure", full)
    monkeypatch.setattr(tune, "recall", lambda *_: None)
    before = layer.weight.clone()
    with pytest.raises(DeviceError, match=r"no memory on .* to time linear_csr_cuda, linear_csr_merge on 9 rows; free"):
        sparsec.compile(layer, CSR(), (torch.randn(9, 51),), target="cuda")
    assert type(layer) is torch.nn.Linear and torch.equal(layer.weight, before), "nothing is half installed"
    monkeypatch.setattr(tune, "measure", lambda runs: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(PassError, match="something else"):
        sparsec.compile(layer, CSR(), (torch.randn(9, 51),), target="cuda")


@pytest.mark.parametrize("name", [v.name for v in cuda_variants.VARIANTS if v.op == "linear"])
def test_the_cost_model_speaks_of_every_variant(name: str) -> None:
    case = cases(name)[0]
    for batch in (1, 16, 512):
        assert 0 < cost.sparse_us(case.problem(), case.format, spec_of(case), batch, TARGET) < 1e6


# -- what there is, and what there is not ------------------------------------------------------------------------------


def test_what_no_cuda_kernel_reads_is_refused_with_a_reason() -> None:
    """Sums, permuted columns, permuted formats other than BSR, and formats of the processor."""
    problem = Problem("linear", 64, 64, "float16", 400)
    variant = catalog.variant("linear_permuted_bsr_mma")
    for fmt in (Permuted(BSR(16, 16), "rcm", "rcm"), Permuted(CSR(), "length"), Permuted(BSR(16, 16), "none", "rcm")):
        assert "reads BSR with reordered rows, not" in str(variant.refuse(problem, fmt, TARGET))
    assert variant.refuse(problem, Permuted(BSR(16, 16)), TARGET) is None
    for fmt in (Sum(BSR(16, 16), CSR()), NM(2, 4), Bitmask(32)):
        found, reasons = _propose._candidates([fmt], problem, dataclasses.make_dataclass("C", ["target"])(TARGET))
        if fmt.name == "bitmask":
            assert {c.spec.variant for c in found} == {"linear_bitmask_cuda"}
        else:
            assert found == [] and reasons == [f"the catalogue has no kernel for linear with {fmt.name}"]


def test_gradients_are_ops_of_the_catalogue() -> None:
    """Whoever trains asks for them by op: one spec each, printed like any other, in every dtype."""
    for op, out, inp in (("linear_dx", 150, 37), ("linear_dw", 37, 150)):
        (variant,) = catalog.variants_for(op, "csr", TARGET)
        for dtype in ("float16", "bfloat16", "float32"):
            (spec,) = variant.specs(Problem(op, out, inp, dtype, 1000), CSR(block=128).resolve(37, 150), TARGET)
            text = render.render(spec).text
            assert KernelSpec.parse(spec.text()) == spec and f"__tvm_ffi_{spec.symbol}" in text
        assert catalog.variants_for(op, "csr", Target.probe()) == ()
        fused = Problem(op, out, inp, "float32", 1000, epilogue=(Step("relu"),))
        assert variant.refuse(fused, CSR(block=128), TARGET) == f"{variant.name} has no epilogue relu; it fuses none"


def test_every_variant_has_its_golden_text_and_no_other_is_kept() -> None:
    kept = {path.stem for path in (Path(__file__).parent / "golden" / "cuda").glob("*")}
    assert kept == {variant.name for variant in cuda_variants.VARIANTS}
    for name in sorted(kept):
        text = (Path(__file__).parent / "golden" / "cuda" / f"{name}.cu").read_text(encoding="utf-8")
        assert first_spec(name).symbol in text, f"{name}: the golden text is of another kernel"


def test_the_benchmark_judges_its_goals() -> None:
    """Rows of a run that never was: the arithmetic of the verdicts, and what it says where there is no device."""
    import gpu

    row = gpu.Row("linear_tiled_csl_mma", "tiled_csl(r=128)", 8, 8, 16, 0.8, "float16", 10.0, 25.0, 40.0, math.nan, 0.5)
    slow = dataclasses.replace(row, variant="linear_csr_cuda", format="csr", ours=20.0)
    assert list(gpu.judge([row, slow])) == [
        "tiled_csl at 80% zeros, batch 16: 2.50x of cublas, goal 2.0x, met",
        "1 of 2 rows at least 2.5x of cusparse, the least 2.00x by linear_csr_cuda, batch 16, missed",
    ]
    first, *_ = gpu.judge([dataclasses.replace(row, ours=20.0)])
    assert first.endswith("1.25x of cublas, goal 2.0x, missed")
    known = {v.format for v in cuda_variants.VARIANTS if v.op == "linear"}
    assert known - {fmt.name for fmt in gpu.formats(4096, 0.5)} == {"permuted"}, "a permuted matrix needs one to find"
