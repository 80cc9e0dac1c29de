"""Finding a compiler, and what is said about those that are missing or broken."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from sparsec.codegen import toolchain
from sparsec.errors import ToolchainError
from sparsec.target import ISAS, Target

GCC = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH, a fresh cache, no CC."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return folder


def script(place: Path, body: str) -> Path:
    place.write_text(f"#!/bin/sh\n{body}\n")
    place.chmod(0o755)
    return place


def test_no_compiler_says_what_to_install(bin: Path) -> None:
    with pytest.raises(ToolchainError, match=r"neither gcc, clang nor cc is on PATH; install one .*apt install gcc"):
        toolchain.find()


def test_cc_wins_and_must_exist(bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GCC
    monkeypatch.setenv("CC", "nowhere-cc -m64")
    with pytest.raises(ToolchainError, match=r"there is no program 'nowhere-cc' on PATH.*unset CC"):
        toolchain.find()
    monkeypatch.setenv("CC", "'unclosed")
    with pytest.raises(ToolchainError, match="is not a command"):
        toolchain.find()
    wrapper = script(bin / "mycc", f'PATH=/usr/bin:/bin exec {GCC} "$@"')
    monkeypatch.setenv("CC", "mycc -DMINE=1")
    found = toolchain.find()
    assert found.program == (str(wrapper), "-DMINE=1")
    assert toolchain.find() is found


GARBAGE = 'while [ "$#" -gt 0 ]; do [ "$1" = -o ] && echo garbage > "$2"; shift; done; echo fine 1.0'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 3", "--version failed with status 3"),
        (
            '[ "$1" = --version ] && echo fine 1.0 || { echo "weird: broken pipe" >&2; exit 7; }',
            "(?s)status 7.*weird: br",
        ),
        ("echo fine 1.0", "wrote no shared library"),
        (GARBAGE, "wrote no shared library"),
    ],
)
def test_broken_compilers_are_named_with_their_output(bin: Path, body: str, message: str) -> None:
    script(bin / "gcc", body)
    with pytest.raises(ToolchainError, match=message) as error:
        toolchain.find()
    assert str(bin / "gcc") in str(error.value) and "install one" in str(error.value)


def test_the_next_compiler_is_tried(bin: Path) -> None:
    script(bin / "gcc", "exit 1")
    script(bin / "cc", f'PATH=/usr/bin:/bin exec {GCC} "$@"')
    assert toolchain.find().program == (str(bin / "cc"),)


def test_a_test_function_with_a_wrong_answer_is_refused(bin: Path) -> None:
    script(bin / "gcc", f'PATH=/usr/bin:/bin exec {GCC} -Dv_int64=zero_padding "$@"')
    with pytest.raises(ToolchainError, match=r"does not load|returned|cannot build"):
        toolchain.find()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_hanging_compiler_is_killed_with_its_children(bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "VERSION_SECONDS", 0.5)
    script(bin / "gcc", f"/bin/sleep 60 & echo $! > {bin}/child; wait")
    with pytest.raises(ToolchainError, match=r"did not finish within 0\.5 s"):
        toolchain.find()
    assert not alive(int((bin / "child").read_text()))


def test_a_compiler_that_cannot_start(tmp_path: Path) -> None:
    code, text = toolchain.run([str(tmp_path / "none")], None, 5.0)
    assert code == 127 and "cannot start" in text


def test_commands_are_explicit_and_the_same_everywhere(user_flags: None) -> None:
    tools = toolchain.Toolchain(("/usr/bin/gcc",), "gcc 12")
    for isa in ISAS.values():
        command = tools.command(isa.name)
        assert command[1:7] == toolchain.FLAGS and set(isa.flags) < set(command)
        assert not {"-march=native", "-ffast-math", "-fopenmp", "-Ofast"} & set(command)
        assert command[-3:] == ("-o", "<output>", "<source>")
    assert (Path(toolchain.include_path()) / "tvm" / "ffi" / "c_api.h").is_file()


def test_search_paths_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = toolchain.Toolchain(("gcc",), "gcc 12")
    before = tools.fingerprint()
    monkeypatch.setenv("CPATH", "/elsewhere")
    assert tools.fingerprint() != before
    assert dataclasses.replace(tools, version="gcc 13").fingerprint() != tools.fingerprint()


def test_accepts_asks_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    old = script(tmp_path / "oldcc", 'for a in "$@"; do [ "$a" = -mavx512fp16 ] && exit 1; done; exit 0')
    tools = toolchain.Toolchain((str(old),), "old 1.0")
    assert tools.accepts("portable") and tools.accepts("avx512") and not tools.accepts("avx512fp16")
    full = Target("x86_64", features=(*ISAS["avx512fp16"].features, "avx512_vnni"))
    assert full.isas[0] == "avx512fp16" and tools.narrow(full).isas == full.isas[1:]
    assert "avx512_vnni" in tools.narrow(full).features and tools.narrow(tools.narrow(full)) == tools.narrow(full)
    old.unlink()
    toolchain._accepts.cache_clear()
    assert tools.accepts("avx512") and not tools.accepts("avx512fp16")  # the answers were kept on disk


def test_errors_carry_the_end_of_the_output() -> None:
    assert toolchain.tail("") == "(it printed nothing)"
    long = "\n".join(f"line {i}" for i in range(100))
    assert toolchain.tail(long).splitlines()[0] == "line 70" and toolchain.tail("x" * 900) == "x" * 400


def test_libraries_are_told_from_other_files(tmp_path: Path) -> None:
    assert toolchain.is_library(Path(toolchain.__file__)) is False
    assert toolchain.is_library(tmp_path / "none") is False
    (tmp_path / "half").write_bytes(b"\x7fELF")
    assert toolchain.is_library(tmp_path / "half") is False
    assert os.path.exists(tmp_path / "half")
