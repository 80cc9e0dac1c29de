"""Precompiled headers: they change what a build costs and nothing else, and a bad one is never read."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsec.codegen import build, c, catalog, headers, toolchain
from sparsec.codegen.cache import Cache
from sparsec.codegen.kernel import KernelSpec, Problem, Source
from sparsec.errors import ToolchainError
from sparsec.formats import CSR
from sparsec.target import ISAS, Target

AVX2 = Target("x86_64", ISAS["avx2"].features)
TOOLS = toolchain.find()

pytestmark = [
    pytest.mark.skipif(not set(ISAS["avx2"].features) <= set(Target.probe().features), reason="no AVX2 here"),
    pytest.mark.skipif("gcc" not in TOOLS.version.lower(), reason="headers are prepared for gcc only"),
]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache in which the header of AVX2 was prepared."""
    box = Cache(tmp_path_factory.mktemp("headers") / "cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        forget(monkeypatch)
        assert [prepare(box) is None for _ in range(headers.WORTH + 1)] == [True] * headers.WORTH + [False]
    return box


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has compiled nothing."""
    for name, empty in (("_compiled", {}), ("_ready", {}), ("_useless", set())):
        monkeypatch.setattr(headers, name, empty)


def spec(rows: int = 24) -> KernelSpec:
    problem = Problem("linear", rows, 32, "float32", 40, True, ())
    return catalog.variant("linear_csr").specs(problem, CSR().resolve(rows, 32), AVX2)[0]


def source(rows: int = 24) -> Source:
    return c.BACKEND.render(dataclasses.replace(spec(rows), isa="avx2"))


def prepare(box: Cache) -> Path | None:
    return headers.prepared(box, TOOLS, "avx2", source().text)


def file_of(name: Path | None) -> Path:
    assert name is not None
    return name.with_suffix(".gch")


def test_only_what_begins_with_the_same_includes_takes_it() -> None:
    text = source().text
    assert headers.fits(text)
    for other in ("#define _GNU_SOURCE\n" + text, text.replace("stdlib", "stdio", 1), "", "/* a\n" + text):
        assert not headers.fits(other)
    assert not headers.fits(c.BACKEND.render(dataclasses.replace(spec(), isa="portable")).text)


def test_a_process_that_builds_few_kernels_prepares_none_but_takes_what_is_there(box: Cache, tmp_path: Path) -> None:
    assert prepare(box) is not None
    assert prepare(Cache(tmp_path / "empty")) is None


def test_the_library_has_the_bytes_of_a_plain_build(box: Cache, tmp_path: Path) -> None:
    place = tmp_path / "kernel.c"
    place.write_text(source().text)
    libraries = []
    for include in (None, prepare(box)):
        TOOLS.compile(place, tmp_path / "kernel.so", "avx2", include=include)
        libraries.append((tmp_path / "kernel.so").read_bytes())
    assert libraries[0] == libraries[1]


def test_the_compiler_really_reads_it(box: Cache, tmp_path: Path) -> None:
    """`-include` names a file that does not exist: without its precompiled form nothing compiles."""
    name, place = prepare(box), tmp_path / "kernel.c"
    assert name is not None and not name.exists()
    place.write_text("__m256i one(__m256i a) { return a; }\n")
    TOOLS.compile(place, tmp_path / "a.so", "avx2", include=name)
    with pytest.raises(ToolchainError, match="nowhere"):
        TOOLS.compile(place, tmp_path / "b.so", "avx2", include=tmp_path / "nowhere")


def test_it_is_stored_as_privately_as_libraries(box: Cache) -> None:
    found = file_of(prepare(box))
    assert found.is_relative_to(box.root) and found.stat().st_uid == os.geteuid()
    for path in box.root.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
    assert list((box.root / "tmp").iterdir()) == []


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1000)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(10_000_000)
        byte = file.read(1)[0]
        file.seek(10_000_000)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def copy(box: Cache, tmp_path: Path) -> Cache:
    shutil.copytree(box.root, tmp_path / "copy")
    return Cache(tmp_path / "copy")


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, lambda path: path.chmod(0o666)])
@pytest.mark.parametrize("seen", [True, False])
def test_damaged_headers_are_not_read(copy: Cache, harm: Callable[[Path], None], seen: bool) -> None:
    """Neither by a process that has used the file before, nor by a new one."""
    found = file_of(prepare(copy))
    if not seen:
        headers._ready.clear()
    harm(found)
    assert prepare(copy) is None


def test_a_damaged_header_is_made_again(copy: Cache) -> None:
    found = file_of(prepare(copy))
    content = found.read_bytes()
    cut(found)
    assert [prepare(copy) for _ in range(headers.WORTH - 1)] == [None] * (headers.WORTH - 1)
    assert file_of(prepare(copy)).read_bytes()[:4] == content[:4] == b"gpch"


def test_while_one_prepares_it_nobody_waits(tmp_path: Path) -> None:
    box = Cache(tmp_path / "cache")
    with box.lock(headers._key(TOOLS, "avx2")):
        assert [prepare(box) for _ in range(headers.WORTH + 2)] == [None] * (headers.WORTH + 2)


def wrapper(folder: Path, condition: str) -> toolchain.Toolchain:
    """gcc, but for commands that meet a condition of the shell, which it counts and refuses."""
    script = folder / "gcc"
    script.write_text(f'#!/bin/sh\ncase "$*" in {condition}) echo x >> {folder}/count; exit 1;; esac\nexec gcc "$@"\n')
    script.chmod(0o755)
    return toolchain.Toolchain((str(script),), TOOLS.version)


def test_a_compiler_that_cannot_make_headers_is_asked_once(tmp_path: Path) -> None:
    box, tools, text = Cache(tmp_path / "cache"), wrapper(tmp_path, "*c-header*"), source().text
    assert [headers.prepared(box, tools, "avx2", text) for _ in range(9)] == [None] * 9
    assert (tmp_path / "count").read_text() == "x\n"


def test_a_compiler_that_prints_something_else_is_asked_once(tmp_path: Path) -> None:
    script = tmp_path / "gcc"
    script.write_text(f"#!/bin/sh\necho x >> {tmp_path}/count\necho garbage > kernel.gch\n")
    script.chmod(0o755)
    box, tools = Cache(tmp_path / "cache"), toolchain.Toolchain((str(script),), TOOLS.version)
    assert [headers.prepared(box, tools, "avx2", source().text) for _ in range(9)] == [None] * 9
    assert (tmp_path / "count").read_text() == "x\n"
    assert list((box.root / "kernels").iterdir()) == []


def test_a_kernel_whose_header_is_refused_is_built_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others after it, without a second try."""
    tools = wrapper(tmp_path, "*-include*")
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "find", lambda: tools)
    monkeypatch.setattr(headers, "WORTH", 0)
    first, second = (c.BACKEND.build(source(rows), AVX2) for rows in (25, 26))
    assert toolchain.is_library(first) and toolchain.is_library(second)
    assert (tmp_path / "count").read_text() == "x\n"


def test_an_error_of_a_kernel_names_the_plain_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not count against the header."""
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(headers, "WORTH", 0)
    wrong = dataclasses.replace(source(), text=source().text + "int wrong(void) { return nothing; }\n")
    with pytest.raises(ToolchainError, match="nothing.*undeclared") as caught:
        c.BACKEND.build(wrong, AVX2)
    assert "-include" not in str(caught.value) and not headers._useless


def test_kernels_that_are_built_at_once_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into an empty cache: some are built before the header is ready, and some after."""
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", {})
    specs = [dataclasses.replace(spec(rows), isa="avx2") for rows in range(30, 35)]
    kernels = build.build_kernels(specs, Target.probe())
    assert len(kernels) == 5 and len(list((tmp_path / "cache" / "kernels").glob("*.gch"))) == 1
    assert all("-include" not in kernel.command for kernel in kernels.values())
