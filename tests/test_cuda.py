"""CUDA kernels without a GPU: emulated against the float64 oracle, compiled for two architectures, and kept as text."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulation import Emulated, available, build, compile_text
from cuda_problems import (
    FORMATS,
    SHAPES,
    STEPS,
    Case,
    battery,
    cases,
    first_spec,
    gradient_spec,
    guarded,
    spec_of,
    weight_of,
)

from sparsec import verify
from sparsec.codegen import build as builder
from sparsec.codegen import catalog, cuda, cuda_variants, render, toolchain
from sparsec.codegen.kernel import DTYPES, KernelSpec
from sparsec.errors import DeviceError, LoadError, SpecError, ToolchainError
from sparsec.formats import CSR
from sparsec.target import ARCHITECTURES, Target

TARGET = Target.parse("cuda:sm_90")
VARIANTS = cuda_variants.VARIANTS
NAMES = [v.name for v in VARIANTS if v.op == "linear"]
EVERY = [v.name for v in VARIANTS]
emulates = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sparsec-cuda-") as name:
        yield Path(name)


@functools.cache
def _emulated(folder: Path, name: str, thorough: bool = False) -> tuple[Emulated, tuple[Case, ...]]:
    chosen = tuple(cases(name, thorough))
    return build([spec_of(case) for case in chosen], folder), chosen


# -- what kernels compute ----------------------------------------------------------------------------------------------


@emulates
@pytest.mark.parametrize("name", NAMES)
def test_battery(name: str, folder: Path) -> None:
    """Odd sizes, empty rows, all zero, full; batches around the panel widths; every tensor ends at a guard page."""
    emulated, chosen = _emulated(folder, name)
    for case in chosen:
        assert battery(emulated, case) == []
    assert emulated.conflicts() == 0, "ldmatrix reads without bank conflicts"


@emulates
@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_battery_of_all_shapes_and_steps(name: str, folder: Path) -> None:
    emulated, chosen = _emulated(folder, name, thorough=True)
    for case in chosen:
        assert battery(emulated, case, thorough=True) == []


@emulates
@pytest.mark.parametrize("name", NAMES)
def test_threads_in_reverse_order_give_the_same(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier that is missing shows when threads run in another order."""
    emulated, chosen = _emulated(folder, name)
    case = chosen[-1]
    weight = weight_of(case, 0.4)
    buffers = [*case.packed(weight).values()]
    x = torch.randn(33, case.cols).to(DTYPES[case.dtype])
    answers = []
    for reverse in (False, True):
        if reverse:
            monkeypatch.setenv("SPARSEC_EMULATION_REVERSE", "1")
        answers.append(case.run(emulated, x, buffers))
    assert torch.equal(*answers)


@emulates
@pytest.mark.parametrize("name", NAMES)
def test_pruned_entries_never_meet_infinite_inputs(name: str, folder: Path) -> None:
    emulated, chosen = _emulated(folder, name)
    case = chosen[0]
    weight = weight_of(case, 0.3)
    packed = case.packed(weight)
    x = torch.randn(9, case.cols).to(DTYPES[case.dtype])
    x[2, 1], x[5, case.cols - 1] = float("inf"), float("nan")
    y = case.run(emulated, x, [*packed.values()])
    kept = case.format.positions(packed, case.rows, case.cols)
    met = (~torch.isfinite(x.float())).float() @ kept.float().t() > 0
    assert met[2].any() and not met.all()
    assert torch.isfinite(y[~met].float()).all(), "a pruned position met an infinite or NaN input"


@emulates
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients(dtype: str, folder: Path) -> None:
    """dX = dY W and the sampled dW against float64, from one packed CSR."""
    rows, cols, kind = 37, 150, DTYPES[dtype]
    fmt = CSR(block=64).resolve(rows, cols)
    specs = {op: gradient_spec(op, fmt, dtype, rows, cols) for op in ("linear_dx", "linear_dw")}
    emulated = build(list(specs.values()), folder)
    weight = (torch.randn(rows, cols) * (torch.rand(rows, cols) < 0.3)).to(kind)
    weight[3] = 0
    packed = fmt.pack(weight)
    mask = weight != 0
    for batch in (1, 8, 33, 70):
        x, dy = torch.randn(batch, cols).to(kind), torch.randn(batch, rows).to(kind)
        dx = guarded(torch.full((batch, cols), float("nan")).to(kind))
        buffers = [guarded(b) for b in packed.values()]
        emulated.kernels[specs["linear_dx"].text()](guarded(dy), dx, None, None, *buffers)
        assert verify.check(dx, dy, weight.t().contiguous(), None).ok
        dw = guarded(torch.full_like(packed["values"], float("nan")))
        emulated.kernels[specs["linear_dw"].text()](guarded(x), guarded(dy), None, None, dw, *buffers[1:])
        want, size = (dy.double().t() @ x.double())[mask], (dy.double().abs().t() @ x.double().abs())[mask]
        bound = (8 + 2 * batch**0.5) * torch.finfo(torch.float32).eps * size + 2 * torch.finfo(kind).eps * want.abs()
        assert ((dw.double() - want).abs() <= bound).all()
    empty = torch.ones_like(packed["values"])
    emulated.kernels[specs["linear_dw"].text()](x[:0], dy[:0], None, None, empty, *buffers[1:])
    assert not empty.any(), "the gradient of an empty batch is zero"


@emulates
def test_the_emulator_fails_what_hardware_leaves_undefined(folder: Path) -> None:
    """A kernel whose barrier is under a condition, and one that reads a tile before it was waited for."""
    case = cases("linear_tiled_csl_mma")[-1]
    spec = spec_of(case)
    text = render.render(spec).text
    weight = weight_of(case, 0.4)
    buffers = [*case.packed(weight).values()]
    x = torch.randn(9, case.cols).to(DTYPES[spec.dtype])
    y = torch.zeros(9, case.rows, dtype=x.dtype)
    operands = (x, y, torch.zeros(case.rows, dtype=x.dtype), torch.zeros_like(y), *buffers)

    def broken(good: str, bad: str) -> Callable[..., object]:
        assert text.count(good) == 1
        return compile_text(text.replace(good, bad), folder)[spec.symbol]  # type: ignore[no-any-return]

    call = broken("__syncthreads(); /* cleared by all */", "if (threadIdx.x % 2) __syncthreads();")
    with pytest.raises(RuntimeError, match="a barrier that not all of its threads reach"):
        call(*operands)
    broken("  copy_wait<0>();\n  __syncthreads();\n  for", "  __syncthreads();\n  for")(*operands)
    assert not verify.check(y, x, weight, None, case.steps, torch.zeros_like(y)).ok


@emulates
def test_the_entry_refuses_what_it_was_not_compiled_for(folder: Path) -> None:
    emulated, chosen = _emulated(folder, "linear_csr_cuda")
    case = chosen[0]
    call = emulated.kernels[spec_of(case).text()]
    dtype = DTYPES[case.dtype]
    buffers = [*case.packed(weight_of(case, 0.3)).values()]
    x, y = torch.randn(3, case.cols).to(dtype), torch.empty(3, case.rows, dtype=dtype)
    bias = torch.zeros(case.rows, dtype=dtype)
    call(x, y, bias, None, *buffers)
    for arguments, complaint in (
        ((x, y, bias, None), "expected x, y, bias, residual, values, indices, pointers"),
        ((x.double(), y, bias, None, *buffers), "x must be a contiguous CUDA tensor"),
        ((x[:, :-1].contiguous(), y, bias, None, *buffers), "x must hold rows of"),
        ((x, y[:2], bias, None, *buffers), "y must hold"),
        ((x, y, None, None, *buffers), "bias must hold"),
        ((x, y, bias, y, *buffers), "without a residual"),
        ((x, y, bias, None, buffers[0], buffers[1][:-1], buffers[2]), "indices has the wrong number"),
        ((x, y, bias, None, buffers[0], buffers[1].int(), buffers[2]), "indices must be a contiguous tensor of int16"),
    ):
        with pytest.raises(ValueError, match=complaint):
            call(*arguments)
    call(x[:0], y[:0], bias, None, *buffers)  # nothing to do


# -- text and compilation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_sources(name: str, request: pytest.FixtureRequest) -> None:
    """The text of every variant, in `golden/cuda`: `pytest --update-golden` writes it."""
    text = render.render(first_spec(name)).text
    place = Path(__file__).parent / "golden" / "cuda" / f"{name}.cu"
    if request.config.getoption("--update-golden"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    assert place.exists(), f"no golden text {place}; run pytest --update-golden and read the result"
    assert text == place.read_text(encoding="utf-8")


def _nvcc() -> cuda.Nvcc:
    try:
        return cuda.find()
    except ToolchainError as error:
        pytest.skip(str(error))


def _compile_all(specs: list[KernelSpec], folder: Path) -> str:
    """Compile sources as one unit for sm_80 and sm_90; what ptxas says about registers and local memory."""
    nvcc = _nvcc()
    source, output = folder / "all.cu", folder / "all.so"
    source.write_text("\n".join(render.render(spec).text for spec in specs))
    command = [nvcc.program, *cuda.FLAGS, "--threads", "2", "-Xptxas", "-v", "-Werror", "all-warnings"]
    for arch in ("80", "90"):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += [f"-I{toolchain.include_path()}", "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert toolchain.is_library(output)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_every_variant_compiles_for_both_architectures(tmp_path: Path) -> None:
    """One unit holds one kernel of every variant; no kernel keeps an array in local memory."""
    specs = [first_spec(name) for name in EVERY]  # the ends of each plan; the soak test compiles all of it
    ends = [dataclasses.replace(s, plan=tuple(dict.fromkeys((*s.plan[:1], *s.plan[-1:])))) for s in specs]
    text = _compile_all(ends, tmp_path)
    assert text.count("for 'sm_80'") == text.count("for 'sm_90'") >= len(NAMES)
    frames = [int(line.split()[0]) for line in text.splitlines() if "bytes stack frame" in line]
    assert len(frames) >= 2 * len(NAMES) and max(frames) <= 16


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_compiles_for_both_architectures(name: str, tmp_path: Path) -> None:
    specs = [spec_of(case) for case in cases(name, thorough=True) if case.shape == SHAPES[name][0]]
    _compile_all(list(dict.fromkeys(specs)), tmp_path)


@pytest.mark.slow
def test_the_backend_builds_and_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    _nvcc()
    spec = spec_of(cases("linear_fan_in_cuda")[0])
    source = cuda.BACKEND.render(spec)
    compiled: list[str] = []
    run = toolchain.run
    monkeypatch.setattr(toolchain, "run", lambda c, *rest: (compiled.append(c[-1]), run(c, *rest))[1])
    path = cuda.BACKEND.build(source, TARGET)
    assert toolchain.is_library(path) and path == cuda.BACKEND.build(source, TARGET) and len(compiled) == 1
    assert source.language == "cuda" and path.with_suffix(".c").read_text() == source.text
    command = cuda.find().command(spec.isa)
    assert "-arch=sm_90" in command and not any("native" in word for word in command)
    key = cuda.build_key(source, cuda.find())
    assert path.name.startswith(key)
    other = cuda.BACKEND.render(spec_of(cases("linear_fan_in_cuda")[0], Target.parse("cuda:sm_80")))
    assert cuda.build_key(other, cuda.find()) != key
    with pytest.raises(ToolchainError, match=r"nvcc failed with status(.|\n)*source: .*failed") as error:
        broken = type(source)(spec, "cuda", source.text.replace("row_begin", "row_missing", 1))
        cuda.BACKEND.build(broken, TARGET)
    assert "row_begin" in str(error.value) and spec.symbol in str(error.value)


# -- where there is no device, no compiler, another architecture -------------------------------------------------------


def test_without_nvcc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="nvcc is not on PATH; install the CUDA toolkit"):
        cuda.find()
    assert "install the CUDA toolkit" in str(cuda.BACKEND.available())
    spec = spec_of(cases("linear_csr_cuda")[0])
    with pytest.raises(ToolchainError, match="nvcc is not on PATH"):
        builder.build_kernels([spec], TARGET)
    errors: dict[KernelSpec, Exception] = {}
    assert builder.build_kernels([spec], TARGET, errors=errors) == {} and list(errors) == [spec]  # type: ignore[arg-type]


def test_a_broken_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho no licence today\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    with pytest.raises(ToolchainError, match=r"status 3\nno licence today"):
        cuda.find()


def _device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")


def test_no_device_and_an_older_device_are_typed_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(cases("linear_csr_cuda")[0])
    _device(monkeypatch, None)
    assert Target.parse("cuda").isas == () and str(Target.parse("cuda")) == "cuda"
    with pytest.raises(DeviceError, match="sees no CUDA device: install a torch build with CUDA"):
        cuda.check_device(spec)
    with pytest.raises(DeviceError, match="this process sees no CUDA device"):
        builder.get_kernel(spec.text())
    _device(monkeypatch, (8, 0))
    with pytest.raises(DeviceError, match=r"built for sm_90 and Test GPU is sm_80; compile with target='cuda:sm_80'"):
        cuda.check_device(spec)
    with pytest.raises(LoadError, match=r"needs sm_90, but cuda:sm_80 lacks sm_90"):
        builder.get_kernel(spec.text())
    _device(monkeypatch, (9, 0))
    cuda.check_device(spec)
    here = Target.parse("cuda")
    assert here.detail == "sm_90" and here.name == "Test GPU" and here.isas[0] == "sm_90"
    assert Target.parse("cuda:sm_80").machine_id() != here.machine_id()
    _device(monkeypatch, (9, 1))  # runs the machine code of its own generation, and PTX of all before
    assert Target.parse("cuda").detail == "sm_90"


def test_targets_keep_to_their_own_kernels() -> None:
    problem = cases("linear_csr_cuda")[0].problem()
    fmt = FORMATS["linear_csr_cuda"]
    here = Target.probe()
    variant = catalog.variant("linear_csr_cuda")
    assert "needs sm_120 or" in str(variant.refuse(problem, fmt, here))
    assert {v.language for v in catalog.variants_for("linear", "csr", TARGET)} == {"cuda"}
    assert {v.language for v in catalog.variants_for("linear", "csr", here)} == {"c"}
    assert variant.refuse(problem, fmt, Target.parse("cuda:sm_75")) is not None, "mma and cp.async begin with sm_80"
    assert variant.specs(problem, fmt, Target.parse("cuda:sm_87"))[0].isa == "sm_87"
    assert TARGET.lacks("portable") == () or "portable" not in TARGET.isas
    with pytest.raises(SpecError):
        Target.parse("cpu:sm_90")
    assert next(iter(ARCHITECTURES)) == "sm_120" and here.lacks("sm_80")


@pytest.mark.parametrize("name", NAMES)
def test_refusals_have_reasons(name: str) -> None:
    case = cases(name)[0]
    variant = catalog.variant(name)
    problem = case.problem()
    assert variant.refuse(problem, case.format, TARGET) is None
    assert "lacks" in str(variant.refuse(problem, case.format, Target.probe())) or "needs" in str(
        variant.refuse(problem, case.format, Target.probe())
    )
    for spec in variant.specs(problem, case.format, TARGET):
        assert KernelSpec.parse(spec.text()) == spec and spec.device == "cuda"
        assert render.render(spec).text == render.render(spec).text


def test_packing_out_of_memory_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparsec

    model = torch.nn.Linear(32, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def pack(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CSR, "pack", pack)
    with pytest.raises(DeviceError, match=r"no memory on cpu to pack a \(16, 32\) weight as csr.*out of memory"):
        sparsec.compile(model, CSR(), tune="off")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert type(model) is torch.nn.Linear


@pytest.mark.parametrize("target", ["cuda", "cuda:sm_90"])
def test_a_model_on_the_cpu_stays_dense_for_a_cuda_target(target: str) -> None:
    import sparsec

    compiled = sparsec.compile(torch.nn.Linear(32, 16).eval(), CSR(), target=target, tune="off")
    (row,) = sparsec.report(compiled).rows
    assert row.decision == "dense" and row.code == "SPC0700" and f"cpu while the target is {target}" in row.reason


def test_the_op_is_registered_for_every_device() -> None:
    import sparsec.ops.linear  # noqa: F401

    for op in ("sparsec::linear", "sparsec::linear_buckets"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CompositeExplicitAutograd")


def test_guards_are_real() -> None:
    tensor = guarded(torch.arange(5, dtype=torch.int16))
    assert tensor.tolist() == [0, 1, 2, 3, 4] and (tensor.data_ptr() + 10) % os.sysconf("SC_PAGE_SIZE") == 0
    assert STEPS and SHAPES.keys() == FORMATS.keys() == set(NAMES)
