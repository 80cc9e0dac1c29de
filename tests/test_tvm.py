"""The TVM back end: the battery of the C kernels, texts, schedules, threads, refusals, life without gcc."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'sparsec[tvm]'")

import sparsec
from sparsec import testing
from sparsec.codegen import build, cache, catalog, tvm, tvm_compat, tvm_rules, tvm_text, tvm_variants
from sparsec.codegen.kernel import STEPS, Kernel, KernelSpec, Problem, Source, Step
from sparsec.errors import DependencyError, LoadError, SpecError, ToolchainError
from sparsec.formats import BSR, CSR, NM, FanIn, Format
from sparsec.target import Target

HERE = Target.parse("tvm")
LINEAR = [v for v in tvm_variants.VARIANTS if v.op == "linear"]
STEP = {name: Step(name, (-0.5, 0.75)[:count]) for name, count in STEPS.items()}
BATTERY = [
    ("csr", CSR(block=64), "avx512", (70, 257), True, ("gelu",)),
    ("csr", CSR(index_bits=32, block=16), "portable", (47, 65), False, ("scale", "silu", "add")),
    ("bsr", BSR(3, 5), "avx2", (64, 33), True, ("tanh", "clamp")),
    ("nm", NM(2, 4), "avx512", (33, 70), False, ("gelu_tanh",)),
    ("fan_in", FanIn(7), "avx2", (65, 128), True, ("hardswish", "relu")),
]


def spec_of(name: str, fmt: Format, isa: str, size: tuple[int, int], bias: bool, steps: tuple[str, ...]) -> KernelSpec:
    epilogue = tuple(STEP[s] for s in steps)
    case = testing.Case(f"linear_{name}_tvm", isa, fmt.resolve(*size), "float32", *size, bias, epilogue)
    target = HERE if isa in HERE.isas else pytest.skip(f"this processor has no {isa}")
    spec = case.spec(target)
    assert spec is not None
    return spec


@pytest.fixture(scope="module")
def small() -> tuple[Kernel, list[torch.Tensor], torch.Tensor]:
    """A CSR kernel with bias, its buffers and its weight."""
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).relu()
    fmt = CSR().resolve(40, 24)
    kernel = build.get_kernel(spec_of("csr", fmt, "portable", (40, 24), True, ()).text())
    return kernel, list(fmt.pack(weight).values()), weight


# -- results -----------------------------------------------------------------------------------------------------------


def test_the_battery_covers_every_variant_and_step():
    assert {f"linear_{row[0]}_tvm" for row in BATTERY} == {v.name for v in LINEAR}
    assert {step for row in BATTERY for step in row[5]} == set(STEPS)


@pytest.mark.parametrize("row", BATTERY, ids=lambda row: f"{row[0]}-{row[2]}")
def test_kernels_agree_with_float64(row: tuple):
    name, fmt, isa, size, bias, _ = row
    spec = spec_of(*row)
    if name != "csr":  # every width is generated for the first format, and fewer are quicker to build
        spec = dataclasses.replace(spec, plan=((1, "gemv", 1), (16, "panel", 16), (0, "panel", 32)))
    case = testing.Case(spec.variant, isa, fmt.resolve(*size), "float32", *size, bias, spec.epilogue)
    rng = np.random.default_rng(sum(map(ord, name + isa)))
    seen = set()
    for batch in (0, 1, 2, 7, 16, 17, 33, 63, 64, 100, 129):
        for _ in range(2):
            data = dataclasses.replace(testing.draw_data(rng), batch=batch)
            seen.add((data.layout, data.values))
            assert testing.failures(case, data, spec.text()) == [], (case, data)
    assert len(seen) > 10


# -- texts -------------------------------------------------------------------------------------------------------------


def test_sources_are_scheduled_scripts_that_say_what_they_are(small: tuple):
    kernel, _, _ = small
    text = kernel.source
    for words in ("@T.prim_func", "def rows_16", "def gemv", "T.vectorized(4)", "T.parallel(", kernel.spec.symbol):
        assert words in text
    assert kernel.command[0] == "tvm" and "llvm" in kernel.command[2] and kernel.path.endswith(".ll")
    assert tvm_compat.script(tvm_compat.parse(text)) == text, "what is shown is what is built"


def test_every_block_is_scheduled_by_the_first_rule_that_applies(small: tuple):
    spec = small[0].spec
    schedule = tvm_compat.new_schedule(tvm_compat.parse(tvm_text.text_of(spec)))
    done = tvm_rules.schedule(schedule, tvm_text.blocks_of(spec), 4, tvm_rules.Tile(()))
    assert [line for line in done if line[0].endswith(("_16", "gemv"))] == [
        ("pack_16", "edge", "plain"), ("pack_16", "ragged", "plain"), ("rows_16", "fma", "contract"),
        ("rows_16", "keep", "vectors"), ("finish_16", "store", "vectors"), ("finish_16", "edge", "plain"),
        ("gemv", "dot", "contract"),
    ]  # fmt: skip
    assert len(done) == 3 * 6 + 1, "three widths of panels"
    edge = tvm_rules.Block(schedule, "finish_16", "edge", 4, tvm_rules.Tile(()))
    assert tvm_rules.RULES[-1](edge) is None, "the last rule always applies"
    refusals = [rule(edge) for rule in tvm_rules.RULES[:-1]]
    assert all(isinstance(reason, str) and reason for reason in refusals)


def test_a_script_made_once_is_not_parsed_again(small: tuple, monkeypatch: pytest.MonkeyPatch):
    def never(text: str) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(tvm_compat, "parse", never)
    assert tvm.BACKEND.render(small[0].spec).text == small[0].source


# -- calls -------------------------------------------------------------------------------------------------------------


def test_bad_operands_are_refused_before_the_kernel_runs(small: tuple):
    kernel, buffers, weight = small
    values, indices, pointers = buffers
    x, y, bias = torch.randn(3, 24), torch.full((3, 40), 7.0), torch.zeros(40)
    wrong = [
        ((x, y, None, None, *buffers), "compiled with bias: pass a tensor"),
        ((x, y, bias, y, *buffers), "compiled without residual: pass None"),
        ((x, y, bias, None, values, indices), "reads 3 buffers"),
        ((x, y, bias, None, values[:-1], indices[:-1], pointers), "last pointer does not match the size of values"),
        ((x, y, bias, None, values, indices[:-1], pointers), "shape"),
        ((x, y, bias, None, values, indices, pointers[:-1]), "shape"),
        ((x.double(), y, bias, None, *buffers), "float32"),
        ((x, y, bias, None, values, indices.int(), pointers), "int16"),
        ((x[:2], y, bias, None, *buffers), "shape"),
        ((x[:, :23], y, bias, None, *buffers), "shape"),
        ((torch.randn(24, 3).t(), y, bias, None, *buffers), "compact|contiguous|strides"),
        ((x, y, bias[:39], None, *buffers), "shape"),
    ]
    for operands, message in wrong:
        with pytest.raises(ValueError, match=message):
            kernel.call(*operands)
    assert bool((y == 7).all()), "nothing was written"
    kernel.call(x, y, bias, None, *buffers)
    assert torch.allclose(y, x @ weight.t(), atol=1e-5)


def test_parallel_loops_are_sized_to_torch_at_every_call(small: tuple):
    kernel, buffers, _ = small
    seen = []
    call = tvm.bind(lambda *operands: seen.append(operands[-1]), kernel.spec)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            call(torch.randn(1, 24), torch.empty(1, 40), torch.zeros(40), None, *buffers)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3, 2]


def test_threads_are_those_of_torch(small: tuple):
    text = Path(small[0].path).read_text()
    assert "call void @GOMP_parallel" in text and "@__TVMBackendParallelLaunch = internal constant" in text
    with pytest.raises(ToolchainError, match="prints no single @__TVMBackendParallelLaunch"):
        tvm_compat.with_torch_threads("define i32 @other() {\n}\n")


# -- without a C compiler ----------------------------------------------------------------------------------------------

_ALONE = """
import hashlib, json, os, pathlib, sys, torch
from torch import nn
import sparsec
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(96, 64), nn.GELU()).eval()
with torch.no_grad(): model[0].weight.mul_(torch.rand(64, 96) < 0.1)
x, cpus, place = torch.randn(80, 96), sorted(os.sched_getaffinity(0)), pathlib.Path(sys.argv[1])
torch.set_num_threads(3)
cm = sparsec.compile(model, None, (x,), tune="off", capture="trace")
with torch.no_grad(): y = cm(x); error = float((y - model(x)).abs().max())
report = sparsec.report(cm)
told = {"variants": [r.variant for r in report.rows], "notes": report.notes, "error": error,
        "bound": sorted(os.sched_getaffinity(0)) != cpus}
told["script"] = hashlib.sha256(sparsec.source(cm, "0").encode()).hexdigest()
if place.exists():
    loaded = sparsec.load(place)
    with torch.no_grad(): told["same"] = torch.equal(loaded(x), y)
    told["loaded"] = [r.variant for r in sparsec.report(loaded).rows]
else:
    sparsec.save(cm, place)
    torch.save((x, y), place.with_suffix(".pt"))
    with torch.no_grad(): told["same"] = torch.equal(sparsec.load(place)(x), y)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes without a C compiler keep their cache and their model."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict]:
    """What two processes without a C compiler tell: the first finds an empty cache and saves, the second loads."""
    (folder / "bin").mkdir()
    env = {**os.environ, "PATH": str(folder / "bin"), "SPARSEC_CACHE_DIR": str(folder / "cache"), "PYTHONHASHSEED": "7"}
    env.pop("CC", None)
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", _ALONE, str(folder / "model.sparsec")]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        files = {f"{p.name} {p.stat().st_ino}" for p in (folder / "cache" / "kernels").glob("*.ll")}
        found.append({**json.loads(done.stdout.splitlines()[-1]), "files": files})
    return found


def test_tvm_takes_over_where_there_is_no_compiler_cold_and_warm(alone: list[dict]):
    for told in alone:
        assert told["variants"] == ["linear_csr_tvm"] and told["error"] < 1e-4 and not told["bound"]
        assert any("built by TVM, because there is no C compiler" in note for note in told["notes"])
    assert len(alone[0]["files"]) == 1 and alone[0]["files"] == alone[1]["files"], "the second process builds nothing"


def test_models_saved_through_tvm_load_in_the_same_and_in_other_processes(alone: list[dict], folder: Path):
    """Also where there is a C compiler, as in this process: a model names its kernels, and TVM's stay TVM's."""
    assert [told["same"] for told in alone] == [True, True] and alone[1]["loaded"] == ["linear_csr_tvm"]
    x, y = torch.load(folder / "model.pt")
    loaded = sparsec.load(folder / "model.sparsec")
    with torch.no_grad():
        assert torch.allclose(loaded(x), y, atol=1e-6)
    (row,) = sparsec.report(loaded).rows
    assert row.variant == "linear_csr_tvm" and "@T.prim_func" in sparsec.source(loaded, row.site)
    script = hashlib.sha256(sparsec.source(loaded, row.site).encode()).hexdigest()
    assert {told["script"] for told in alone} == {script}, "equal specs print equal scripts, whatever hashes are seeded"
    weight = sparsec.dense_state_dict(loaded)["0.weight"]
    assert weight.shape == (64, 96) and int(torch.count_nonzero(weight)) == round(row.density * 64 * 96)


def test_tvm_is_a_target_and_its_sources_are_shown():
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).eval()
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    x = torch.randn(5, 24)
    compiled = sparsec.compile(layer, CSR(), (x,), target="tvm:portable", tune="off")
    row = sparsec.report(compiled).rows[0]
    assert row.variant == "linear_csr_tvm" and row.decision == "sparse"
    assert "@T.prim_func" in sparsec.source(compiled, row.site)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)


# -- versions, targets, refusals ---------------------------------------------------------------------------------------


def test_a_missing_or_foreign_tvm_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tvm_compat, "_installed", lambda: "0.31.0")
    with pytest.raises(DependencyError, match=r"apache-tvm 0.31.0 is installed.*0.27.*pip install 'sparsec\[tvm\]'"):
        tvm_compat.version()
    monkeypatch.setitem(sys.modules, "tvm", None)
    for action in (tvm_compat.version, lambda: sparsec.compile(nn.Linear(8, 8).eval(), target="tvm")):
        with pytest.raises(DependencyError, match=r"not installed: pip install 'sparsec\[tvm\]'"):
            action()
    assert "pip install" in str(tvm.BACKEND.available())


def test_target_strings_decide_the_instruction_set():
    assert tvm_compat.isa_of("avx2") == "avx2"
    if HERE.arch == "x86_64":
        assert tvm_compat.isa_of("llvm -mcpu=skylake-avx512") == "avx512"
        assert tvm_compat.isa_of("llvm -mcpu=haswell -num-cores=4") == "avx2"
        assert tvm_compat.isa_of("llvm -mcpu=x86-64") == "portable"
        with pytest.raises(SpecError, match="LLVM knows no processor 'haswel'; nearest: 'haswell'"):
            tvm_compat.isa_of("llvm -mcpu=haswel")
    for wrong in ("avx3", "c -mcpu=haswell", "llvm", "llvm -mcpu=haswell -keys=x"):
        with pytest.raises(SpecError, match="write an instruction set .* or 'tvm:llvm -mcpu=<processor>'"):
            tvm_compat.isa_of(wrong)


def test_what_tvm_has_no_rule_for_is_refused_with_a_reason():
    problem = Problem("linear", 64, 64, "bfloat16", 400)
    for variant in LINEAR:
        fmt = {"csr": CSR(), "bsr": BSR(4, 4), "nm": NM(2, 4), "fan_in": FanIn(3)}[variant.format]
        reason = variant.refuse(problem, fmt, HERE)
        assert reason == f"{variant.name} computes in float32, not bfloat16"
        assert not variant.serves(Target.probe()), "the C kernels are what a processor gets where there is a compiler"
    assert catalog.variants_for("linear", "bitmask", HERE) == ()
    own = catalog.Variant("linear_own", "linear", "nm", language="own")
    assert own.serves(HERE) and own.serves(Target.probe()), "a user's back end needs no C compiler of ours"
    assert not any(dataclasses.replace(own, language=other).serves(HERE) for other in ("c", "pair", "cuda"))
    good = spec_of("csr", CSR(), "portable", (8, 8), False, ())
    for change, message in (
        ({"dtype": "bfloat16"}, "float32, not bfloat16"), ({"op": "conv2d"}, "computes linear, not conv2d"),
        ({"format": "bitmask(width=16)"}, "no TVM kernel reads bitmask"), ({"plan": ()}, "last line of a plan"),
        ({"plan": ((0, "panel", 6),)}, "panels with a multiple of 4 columns"),
        ({"epilogue": (STEP["add"],) * 2}, "one residual"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=message):
            tvm_text.text_of(dataclasses.replace(good, **change))


def test_whatever_else_the_catalogue_computes_is_refused_with_a_reason():
    """(op, format, dtype) of every variant: TVM has a rule for it, or each variant says why it cannot."""
    served, refused = set(), {}
    for variant in catalog.builtin():
        fmt = SimpleNamespace(name=variant.format, text=lambda name=variant.format: name)
        for dtype in variant.dtypes:
            mine = [v for v in catalog.variants_for(variant.op, variant.format, HERE) if v.language == "tvm"]
            if any(dtype in v.dtypes for v in mine):
                served.add((variant.op, variant.format, dtype))
            elif not variant.serves(HERE):
                refused[variant.name, dtype] = variant.refuse(Problem(variant.op, 64, 64, dtype, 400), fmt, HERE)
    chain = catalog.variant("chain_tvm")
    assert served == {("linear", v.format, "float32") for v in LINEAR} | {("chain", chain.format, "float32")}
    assert len(refused) > 40 and all(reason and " needs " in reason for reason in refused.values())


def test_broken_texts_are_errors_and_damaged_files_are_forgotten(small: tuple, tmp_path: Path):
    spec = small[0].spec
    for text in ("nonsense(\n", "@T.prim_func\n    def main(x: T.handle):\n        nonsense(x)\n"):
        with pytest.raises(ToolchainError, match=r"TVM does not read this script(.|\n)*source: .*failed"):
            tvm.BACKEND.build(Source(spec, "tvm", "@I.ir_module\nclass Module:\n    " + text), HERE)
    store, key = cache.open_cache(), "0" * 40
    with store.workspace() as folder:
        (folder / "k.ll").write_text("define nothing")
        entry = store.store(key, folder / "k.ll", "", {})
    assert entry.library.suffix == ".ll" and store.lookup(key) is not None
    content = entry.library.read_bytes()
    entry.library.chmod(0o600)
    entry.library.write_bytes(content[:-1] + b"!")
    assert store.lookup(key) is None, "texts are checked against their hash as libraries are"
    with store.workspace() as folder:
        (folder / "k.ll").write_bytes(content)
        entry = store.store(key, folder / "k.ll", "", {})
    with pytest.raises(LoadError, match="does not load as kernel"):
        tvm.BACKEND.load(entry.library, Source(spec, "tvm", ""))
    assert store.lookup(key) is None


def test_features_are_spelled_as_llvm_does():
    from tvm.target import Target as Theirs
    from tvm.target import codegen

    assert "mattr" not in tvm_compat.llvm_target("portable")
    has = codegen.llvm_get_cpu_features(Theirs({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}))
    for isa in HERE.isas:
        assert {f.removeprefix("+") for f in tvm_compat.llvm_target(isa).get("mattr", [])} <= set(has)
