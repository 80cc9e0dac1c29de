"""Building: parallel, cached, checked before every load, and unharmed by processes that die."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_kernel
import torch

from sparsec.codegen import build, c, cache, catalog, toolchain
from sparsec.codegen.backend import Backend
from sparsec.codegen.kernel import Kernel, KernelSpec, Source
from sparsec.errors import LoadError, SparsecError, SpecError, ToolchainError
from sparsec.target import Target

HERE = Target.probe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.fixture(autouse=True)
def fresh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of this module, and a process that has loaded nothing; what is on disk stays from test to test."""
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setattr(build, "_loaded", {})
    yield
    assert build._pending == {}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The symbols that were really compiled."""
    seen: list[str] = []
    real = toolchain.Toolchain.compile

    def spy(self: toolchain.Toolchain, source: Path, *args: object, **more: object) -> None:
        if source.stem != "smoke":  # the toolchain's own trial
            seen.append(source.stem)
        real(self, source, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(toolchain.Toolchain, "compile", spy)
    return seen


def run(kernel: Kernel) -> list[float]:
    x = torch.arange(4.0)
    y = torch.empty(4)
    kernel.call(x, y, None, None)
    return y.tolist()


def test_kernels_are_built_once_and_found_again(
    compiled: list[str], user_flags: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [tiny_kernel.spec(n) for n in (100, 101, 102, 100)]
    steps: list[int] = []
    kernels = build.build_kernels(specs, HERE, progress=lambda: steps.append(1))
    assert list(kernels) == specs[:3] and len(steps) == 3 and len(compiled) == 3
    assert run(kernels[specs[1]]) == [101.0, 101.5, 102.0, 102.5]
    kernel = build.get_kernel(specs[0].text())
    assert kernel is kernels[specs[0]] is build.build_kernels(specs, HERE)[specs[0]]
    assert kernel.source == kernel.source.strip() + "\n" and "-O3" in kernel.command and kernel.dtype == torch.float32
    monkeypatch.setattr(build, "_loaded", {})  # another process: from disk, not compiled again
    assert run(build.get_kernel(specs[2].text())) == [102.0, 102.5, 103.0, 103.5]
    assert len(compiled) == 3


def test_builds_are_reproducible(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.get_kernel(tiny_kernel.spec(7).text())
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(folder / "second"))
    monkeypatch.setattr(build, "_loaded", {})
    second = build.get_kernel(tiny_kernel.spec(7).text())
    assert first.path != second.path and Path(first.path).name == Path(second.path).name  # key and content hash


def test_the_key_holds_what_the_library_depends_on() -> None:
    tools, source = toolchain.find(), c.BACKEND.render(tiny_kernel.spec(5))
    avx2 = c.BACKEND.render(tiny_kernel.spec(5, isa="avx2"))
    keys = [
        c.build_key(source, tools),
        c.build_key(dataclasses.replace(source, text=source.text + " "), tools),
        c.build_key(dataclasses.replace(avx2, text=source.text), tools),
        c.build_key(source, dataclasses.replace(tools, version="gcc 99")),
        c.build_key(source, dataclasses.replace(tools, program=("/other/gcc",))),
    ]
    assert len(set(keys)) == len(keys) and c.build_key(source, tools) == keys[0]


HARMS = ("truncate", "flip", "owner", "swap")


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_libraries_are_built_again(harm: str, compiled: list[str]) -> None:
    spec = tiny_kernel.spec(200 + HARMS.index(harm))
    source = c.BACKEND.render(spec)
    path = c.BACKEND.build(source, HERE)  # not loaded: writing to a mapped library would kill this process
    whole = path.read_bytes()
    if harm == "truncate":
        path.write_bytes(whole[:5000])
    elif harm == "flip":
        path.write_bytes(whole[:6000] + bytes([whole[6000] ^ 1]) + whole[6001:])
    elif harm == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(path, 12345, -1)
    else:
        path.write_bytes(c.BACKEND.build(c.BACKEND.render(tiny_kernel.spec(100)), HERE).read_bytes())
    before = len(compiled)
    assert run(build.get_kernel(spec.text()))[0] == spec.out_features
    assert len(compiled) == before + 1 and path.read_bytes() == whole and path.stat().st_uid == os.geteuid()


def test_a_library_without_the_kernel_is_forgotten(compiled: list[str]) -> None:
    spec, other = tiny_kernel.spec(300), tiny_kernel.spec(301)
    source = c.BACKEND.render(spec)
    key = c.build_key(source, toolchain.find())
    with cache.open_cache().workspace() as place:
        shutil.copy(c.BACKEND.build(c.BACKEND.render(other), HERE), place / "wrong.so")
        wrong = cache.open_cache().store(key, place / "wrong.so", source.text, {}).library
    with pytest.raises(LoadError, match="does not load as kernel"):
        c.BACKEND.load(wrong, source)
    assert cache.open_cache().lookup(key) is None
    assert run(build.get_kernel(spec.text()))[0] == 300


def test_compile_errors_carry_command_output_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.c.jinja"
    bad.write_text("${ require(true, '') }\nint broken(void) { return no_such_thing; }\n")
    monkeypatch.setattr(catalog, "_user_variants", dict(catalog._user_variants))
    catalog.register(dataclasses.replace(tiny_kernel.TINY, name="bad", template=str(bad)))
    good, spec = tiny_kernel.spec(100), dataclasses.replace(tiny_kernel.spec(100), variant="bad")
    with pytest.raises(ToolchainError) as error:
        build.build_kernels([spec], HERE)
    text = str(error.value)
    assert "status 1" in text and "-fvisibility=hidden" in text and "no_such_thing" in text and "(bad)" in text
    assert Path(text.rpartition("source: ")[2]).read_text().startswith("int broken")
    errors: dict[KernelSpec, SparsecError] = {}
    kernels = build.build_kernels([spec, good], HERE, errors=errors)
    assert list(kernels) == [good] and isinstance(errors[spec], ToolchainError) and list(errors) == [spec]
    assert not list((cache.open_cache().root / "tmp").iterdir())


def test_a_disk_that_fills_while_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "small"))
    toolchain.find()
    real = toolchain.Toolchain.compile

    def compile(self: toolchain.Toolchain, source: Path, output: Path, isa: str, **more: object) -> None:
        if source.is_relative_to(tmp_path):
            raise ToolchainError("compiler failed with status 1\nas: out.o: No space left on device")
        real(self, source, output, isa)

    monkeypatch.setattr(toolchain.Toolchain, "compile", compile)
    kernel = build.get_kernel(tiny_kernel.spec(100).text())
    assert run(kernel)[0] == 100.0 and not Path(kernel.path).is_relative_to(tmp_path)
    assert "No space left on device" in cache.notes()[0] and str(tmp_path / "small") in cache.notes()[0]


def test_threads_that_want_one_kernel_build_it_once(compiled: list[str]) -> None:
    text, barrier = tiny_kernel.spec(400).text(), threading.Barrier(4)

    def get(_: int) -> Kernel:
        barrier.wait(60)
        return build.get_kernel(text)

    with ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(get, range(4)))
    assert all(kernel is kernels[0] for kernel in kernels) and len(compiled) == 1


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "apt install gcc" in (c.BACKEND.available() or "")
    with pytest.raises(ToolchainError, match="apt install gcc"):
        build.build_kernels([tiny_kernel.spec(1), tiny_kernel.spec(2)], HERE)


def test_flags_that_the_compiler_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.Toolchain, "accepts", lambda self, isa: False)
    with pytest.raises(ToolchainError, match=r"does not know -mavx2 .*update it"):
        c.BACKEND.build(c.BACKEND.render(tiny_kernel.spec(isa="avx2")), HERE)


def test_a_kernel_never_runs_on_a_processor_that_lacks_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Target(HERE.arch)
    spec = tiny_kernel.spec(100, isa="avx2")
    with pytest.raises(LoadError, match=r"needs avx2, but cpu lacks avx2, fma"):
        build.build_kernels([spec], plain)
    monkeypatch.setattr(Target, "probe", classmethod(lambda cls: plain))
    with pytest.raises(LoadError, match="needs avx2"):
        build.get_kernel(spec.text())
    with pytest.raises(LoadError, match="this processor lacks avx2"):
        c.BACKEND.load(Path("never-opened.so"), c.BACKEND.render(spec))


def test_texts_that_no_kernel_has() -> None:
    for text in ("", "[]", "{}", '["x"]'):
        with pytest.raises(SpecError, match="not the text of a KernelSpec"):
            build.get_kernel(text)
    with pytest.raises(SpecError, match="no kernel variant 'nowhere'"):
        build.get_kernel(dataclasses.replace(tiny_kernel.spec(), variant="nowhere").text())
    with pytest.raises(SpecError, match="unknown instruction set 'mmx'"):
        build.get_kernel(dataclasses.replace(tiny_kernel.spec(), isa="mmx").text())
    with pytest.raises(LoadError, match="version 0, this sparsec prints"):
        build.get_kernel(dataclasses.replace(tiny_kernel.spec(), version=0).text())


def test_a_backend_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    class Eager(Backend):
        name = "eager"

        def render(self, spec: KernelSpec) -> Source:
            return Source(spec, self.name, "y = x")

        def build(self, source: Source, target: Target) -> Path:
            return Path("nothing")

        def load(self, path: Path, source: Source) -> Kernel:
            return Kernel(source.spec, lambda x, y, *rest: y.copy_(x), source.text, ())

    monkeypatch.setattr(catalog, "_user_backends", {})
    monkeypatch.setattr(catalog, "_user_variants", dict(catalog._user_variants))
    catalog.register(Eager())
    catalog.register(dataclasses.replace(tiny_kernel.TINY, name="eager_tiny", language="eager"))
    kernel = build.get_kernel(dataclasses.replace(tiny_kernel.spec(), variant="eager_tiny").text())
    assert run(kernel) == [0.0, 1.0, 2.0, 3.0]


CHILD = """
import sys, pathlib, tiny_kernel
from sparsec.codegen import build
from sparsec.target import Target
specs = [tiny_kernel.spec(n) for n in range(8)]
pathlib.Path(sys.argv[1]).touch()
kernels = build.build_kernels(specs, Target.probe())
print(sum(k.call is not None for k in kernels.values()))
"""

STALLING_CC = """#!/bin/sh
if [ -n "$STALL" ] && [ "$(ls "$SPARSEC_CACHE_DIR"/kernels/*.so 2>/dev/null | wc -l)" -ge 3 ]; then
  for last; do :; done
  while [ "$#" -gt 0 ]; do [ "$1" = -o ] && echo half > "$2"; shift; done
  echo $$ >> "$STALL"
  exec sleep 300
fi
exec %s "$@"
"""


def wait_for(path: Path, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert running.poll() is None and time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


def test_a_process_killed_midway_harms_nobody(
    tmp_path: Path, compiled: list[str], user_flags: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes build the same kernels; the first stalls inside the compiler, holding locks, and is killed."""
    wrapper = tmp_path / "stallcc"
    wrapper.write_text(STALLING_CC % toolchain.find().program[0])
    wrapper.chmod(0o755)
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(wrapper))
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": places}
    stall = tmp_path / "stalled"

    def start(name: str, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(tmp_path / name)]
        return subprocess.Popen(command, env={**env, **more}, stdout=subprocess.PIPE, text=True)

    first = start("first", STALL=str(stall))
    wait_for(stall, first)
    second = start("second")
    try:
        wait_for(tmp_path / "second", second)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    output, _ = second.communicate(timeout=120)
    for pid in stall.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    assert second.returncode == 0 and output.strip() == "8"
    kernels = build.build_kernels([tiny_kernel.spec(n) for n in range(8)], HERE)
    assert [run(k)[0] for k in kernels.values()] == list(range(8)) and compiled == []
    box = cache.open_cache()
    assert len(list((box.root / "kernels").glob("*.json"))) == 8
    assert all(box.lookup(p.stem) for p in (box.root / "kernels").glob("*.json"))
