"""What goes wrong around a compile: each fault ends dense or in a typed error, and the next run is clean."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sanitizer import build, cases, problems, run, supported
from torch import nn

import sparsec
from sparsec.codegen import build as builds
from sparsec.codegen import catalog, toolchain
from sparsec.codegen.kernel import KernelSpec
from sparsec.target import Target

TARGET = Target.probe()
QUICK = sparsec.Window()  # its kernel is the one that compiles fastest


def _model(width: int) -> tuple[nn.Module, torch.Tensor]:
    layer = nn.Linear(width, width).eval()
    with torch.no_grad():
        layer.weight[torch.rand(width, width) < 0.8] = 0
    return layer, torch.randn(3, width)


def _compile(width: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A compiled layer of a width that no other test uses, its input and what it should give."""
    layer, x = _model(width)
    cm = sparsec.compile(layer, QUICK, (x,), target="cpu:portable", tune="off", min_speedup=0, capture="trace")
    with torch.no_grad():
        return cm, cm(x), layer(x)


def _decision(cm: nn.Module) -> str:
    (row,) = sparsec.report(cm).rows
    return f"{row.decision}: {row.reason}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and a process that has loaded nothing and asked no compiler."""
    place = tmp_path / "cache"
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(place))
    monkeypatch.setattr(builds, "_loaded", {})
    toolchain._find.cache_clear()
    toolchain._accepts.cache_clear()
    yield place
    toolchain._find.cache_clear()
    toolchain._accepts.cache_clear()


# Compilers

COMPILERS = {
    "fails": ("echo 'internal compiler error: in fold' >&2; exit 1", "status 1"),
    "crashes": ("kill -SEGV $$", "status -11"),
    "prints garbage": ("head -c 100000 /dev/urandom; exit 1", "status 1"),
    "writes garbage": ('for o; do last=$out; out=$o; done; echo "$@" | grep -o "[^ ]*[.]so" | while read f; do '
                       "echo garbage > $f; done", "no shared library"),
    "writes nothing": ("exit 0", "no shared library"),
    "hangs": ("sleep 60", "did not finish within"),
    "cuts its output": ('REAL "$@"; f=$(echo "$@" | grep -o "[^ ]*[.]so"); truncate -s 64 $f; exit 3', "status 3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPILERS)
def test_a_bad_compiler_leaves_the_site_dense_and_the_next_run_clean(
    kind: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes the first trial, then misbehaves for kernels; the answer is right throughout."""
    body, message = COMPILERS[kind]
    real = toolchain.find().program[0]
    script = tmp_path / "cc"
    sane = f'case "$*" in *smoke*|*--version*|*fsyntax*) exec {real} "$@";; esac\n'
    script.write_text(f"#!/bin/sh\n{sane}{body.replace('REAL', real)}\n")
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    if kind == "hangs":
        monkeypatch.setattr(toolchain, "COMPILE_SECONDS", 0.5)
    cm, found, wanted = _compile(34)
    assert _decision(cm).startswith("dense") and message in _decision(cm), _decision(cm)
    torch.testing.assert_close(found, wanted)
    assert not list((cache / "kernels").iterdir()) and not list((cache / "tmp").iterdir())
    monkeypatch.delenv("CC")
    monkeypatch.setattr(toolchain, "COMPILE_SECONDS", 300.0)
    cm, found, wanted = _compile(34)
    assert _decision(cm).startswith("sparse")
    torch.testing.assert_close(found, wanted)


# The cache


def _flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("suffix", [".so", ".json", ".c"])
@pytest.mark.parametrize("harm", ["cut", "empty", "flip", "removed"])
def test_damaged_entries_are_built_again(harm: str, suffix: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cm, _, _ = _compile(35)
    assert _decision(cm).startswith("sparse")
    (victim,) = (cache / "kernels").glob(f"*{suffix}")
    data = victim.read_bytes()
    victim.unlink()
    if harm != "removed":
        content = {"cut": data[: len(data) // 2], "empty": b"", "flip": _flip(data)}[harm]
        victim.write_bytes(content)
        victim.chmod(0o700)
    monkeypatch.setattr(builds, "_loaded", {})
    torch.manual_seed(0)
    cm, second, wanted = _compile(35)
    assert _decision(cm).startswith("sparse")
    torch.testing.assert_close(second, wanted)


def test_a_cache_that_cannot_be_made_is_replaced_by_a_private_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    cm, found, wanted = _compile(36)
    assert _decision(cm).startswith("sparse")
    torch.testing.assert_close(found, wanted)
    assert "kernels of this process live in" in str(sparsec.report(cm)) + repr(sparsec.report(cm).to_json())


# Whole processes

PROGRAM = """
import os, resource, signal, sys
import torch
from torch import nn
import sparsec
torch.manual_seed(0)
layer = nn.Linear(37, 37).eval()
with torch.no_grad():
    layer.weight[torch.rand(37, 37) < 0.8] = 0
x = torch.randn(3, 37)
torch.set_num_threads(1)
{before}
cm = sparsec.compile(
    layer, sparsec.Window(), (x,), target="cpu:portable", tune="off", min_speedup=0, capture="trace"
)
with torch.no_grad():
    assert torch.allclose(cm(x), layer(x), atol=1e-5)
{after}
print(sparsec.report(cm).rows[0].decision)
"""


def _program(cache: Path, before: str = "", after: str = "", **environment: str) -> subprocess.Popen[str]:
    text = PROGRAM.format(before=textwrap.dedent(before), after=textwrap.dedent(after))
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "SPARSEC_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.strip(), err


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    """No file may grow: the compiler and the cache fail, the model stays dense, and the next process builds."""
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    status, out, err = _finish(_program(tmp_path / "cache", before=limit))
    assert (status, out) == (0, "dense"), err
    status, out, err = _finish(_program(tmp_path / "cache"))
    assert (status, out) == (0, "sparse"), err


def test_a_fork_after_load_computes_the_same(tmp_path: Path) -> None:
    fork = """
        with torch.no_grad():
            wanted = cm(x)
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(cm(x), wanted) else 9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    status, out, err = _finish(_program(tmp_path / "cache", after=fork))
    assert (status, out) == (0, "sparse"), err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_compile_that_is_interrupted_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """The compiler hangs in a kernel when the signal comes; no child stays, and the next process is clean."""
    real, mark = toolchain.find().program[0], tmp_path / "started"
    script = tmp_path / "cc"
    sane = f'case "$*" in *smoke*|*--version*|*fsyntax*) exec {real} "$@";; esac\n'
    script.write_text(f"#!/bin/sh\n{sane}echo $$ > {mark}.new; mv {mark}.new {mark}; sleep 300\n")
    script.chmod(0o700)
    cache = tmp_path / "cache"
    heeded = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs ignore SIGINT
    process = _program(cache, before=heeded, CC=str(script))
    deadline = time.monotonic() + 100
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    compiler = int(mark.read_text())
    process.send_signal(number)
    status, _, err = _finish(process)
    if number == signal.SIGINT:
        assert status != 0 and "KeyboardInterrupt" in err
        assert not list((cache / "tmp").iterdir()) and not _alive(compiler)
    else:
        assert status == -signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.killpg(compiler, signal.SIGKILL)  # nobody can clean up behind a SIGKILL
    assert not list((cache / "kernels").iterdir())
    status, out, err = _finish(_program(cache))
    assert (status, out) == (0, "sparse"), err


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


# Memory

LARGE = {"rows": 300, "cols": 2000}
VARIANTS = [v for v in catalog.variants_for("linear", target=TARGET) if v.language == "c" and v.isa(TARGET) is not None]


def _starving(variant: catalog.Variant, dtype: str) -> tuple[object, KernelSpec]:
    """A kernel of the variant that is too large for scratch on the stack."""
    (case, _) = cases(variant, variant.isa(TARGET) or "portable", 5, 1)[0]
    case = dataclasses.replace(case, dtype=dtype, format=type(case.format)(**_open(case.format)), **LARGE)
    case = dataclasses.replace(case, format=case.format.resolve(LARGE["rows"], LARGE["cols"]))
    spec = case.spec(TARGET)
    assert spec is not None
    return case, dataclasses.replace(
        spec, tile=(*((k, v) for k, v in spec.tile if k != "one_thread"), ("one_thread", 0))
    )


def _open(fmt: sparsec.Format) -> dict[str, object]:
    """The fields of a format that do not depend on the size of the weight."""
    return {k: v for k, v in fmt.fields().items() if k not in ("index_bits", "block")}


@pytest.mark.parametrize("name", ["linear_csr", "linear_bitmask_bf16"])
def test_a_kernel_without_memory_refuses_at_every_allocation(name: str, tmp_path: Path) -> None:
    if reason := supported("address", tmp_path):
        pytest.skip(reason)
    variant = catalog.variant(name)
    case, spec = _starving(variant, variant.dtypes[0])
    program = build(spec, "address", tmp_path, ("-DFAIL_ALLOCATIONS",))
    data = dataclasses.replace(problems(4, 1)[0], pattern="uniform", density=0.1, values="normal", batch=70)
    refused = 0
    for number in range(1, 100):
        wrong = run(program, case, data, 3, False, FAIL_AT=str(number))  # type: ignore[arg-type]
        if not wrong:
            break
        assert wrong == ["status 5: ValueError: out of memory for scratch\n"], wrong
        refused += 1
    assert 1 <= refused < 99


STARVED = """
#include <stdio.h>
#include <stdlib.h>
#include "model.h"
static long count, at;
void *__real_malloc(size_t bytes);
void *__real_aligned_alloc(size_t align, size_t bytes);
static int fails(void) { return __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED) == at; }
void *__wrap_malloc(size_t bytes) { return fails() ? NULL : __real_malloc(bytes); }
void *__wrap_aligned_alloc(size_t align, size_t bytes) { return fails() ? NULL : __real_aligned_alloc(align, bytes); }
int main(int argc, char **argv) {
  static float x[70 * MODEL_INPUTS], y[70 * MODEL_OUTPUTS];
  at = atol(argv[2]);
  model_t *model = model_open(argv[1]);
  if (!model) return 10;
  const int status = model_run(model, x, 70, y);
  model_close(model);
  return status ? 11 : argc != 3;
}
"""


def test_an_exported_model_without_memory_says_so_at_every_allocation(tmp_path: Path) -> None:
    if reason := supported("address", tmp_path):
        pytest.skip(reason)
    model = nn.Sequential(nn.Linear(400, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    cm = sparsec.compile(
        model, sparsec.CSR(), (torch.randn(4, 400),), dynamic_shapes="batch", tune="off", min_speedup=0
    )
    folder = sparsec.export_c(cm, tmp_path / "model")
    (tmp_path / "main.c").write_text(STARVED)
    flags = [f for isa in TARGET.isas[:1] for f in _flags(isa)]
    command = [
        "gcc", "-std=gnu11", "-O0", "-g1", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        *flags, f"-I{folder}", f"-I{folder / 'include'}", *map(str, sorted(folder.glob("*.c"))),
        str(tmp_path / "main.c"),
        "-Wl,--wrap=malloc,--wrap=aligned_alloc", "-fopenmp", "-lm", "-o", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statuses = []
    for number in range(1, 200):
        done = subprocess.run(
            [str(tmp_path / "run"), str(folder / "weights.bin"), str(number)], capture_output=True, text=True
        )
        statuses.append(done.returncode)
        if done.returncode == 0:
            break
        said = done.stderr.strip()
        assert done.returncode in (10, 11) and said in ("", "ValueError: out of memory for scratch"), done.stderr
    assert statuses.count(10) >= 2 and statuses.count(11) >= 2 and statuses[-1] == 0


def _flags(isa: str) -> tuple[str, ...]:
    from sparsec.target import ISAS

    return ISAS[isa].flags
