"""The C compiler: found through CC and PATH when a model is compiled, tried once, and started without a shell."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsec.codegen import cache
from sparsec.errors import ToolchainError
from sparsec.target import ISAS, Target

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno")
NAMES = ("gcc", "clang", "cc")
COMPILE_SECONDS = 300.0
VERSION_SECONDS = 20.0
INSTALL = "install one (Debian/Ubuntu: apt install gcc; Fedora: dnf install gcc) or set CC to its path"

_SEARCH_PATHS = (
    "CPATH",
    "C_INCLUDE_PATH",
    "LIBRARY_PATH",
    "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
)  # change what a build means

_SMOKE = """\
#include <stdint.h>
#include <tvm/ffi/c_api.h>

TVM_FFI_DLL_EXPORT int __tvm_ffi_smoke(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* ret) {
  ret->type_index = kTVMFFIInt;
  ret->zero_padding = 0;
  ret->v_int64 = n == 1 ? args[0].v_int64 * 2 : -1;
  return 0;
}
"""


@dataclass(frozen=True)
class Toolchain:
    """A compiler that works: `program` is the command to start it, `version` its own first line."""

    program: tuple[str, ...]
    version: str

    def command(self, isa: str, source: str = "<source>", output: str = "<output>") -> tuple[str, ...]:
        """The full command for one translation unit. With the default placeholders it is the same in every process."""
        return (*self.program, *FLAGS, *ISAS[isa].flags, f"-I{include_path()}", "-o", output, source)

    def fingerprint(self) -> str:
        """What a built library depends on besides its source and command."""
        import tvm_ffi

        searched = [f"{name}={os.environ[name]}" for name in _SEARCH_PATHS if name in os.environ]
        return "\n".join([self.version, f"tvm-ffi {tvm_ffi.__version__}", *searched])

    def compile(
        self, source: Path, output: Path, isa: str, seconds: float | None = None, include: Path | None = None
    ) -> None:
        """Compile `source` into the shared library `output`, with `include` read before its first line.

        Raises ToolchainError with the command and the end of the compiler's output.
        """
        ahead = () if include is None else ("-include", str(include))
        command = (*self.command(isa, str(source), str(output)), *ahead)
        code, text = run(command, output.parent, seconds or COMPILE_SECONDS)
        if code is None:
            raise ToolchainError(
                f"compiler did not finish within {seconds or COMPILE_SECONDS:g} s\n{shlex.join(command)}"
            )
        if code != 0:
            raise ToolchainError(f"compiler failed with status {code}\n{shlex.join(command)}\n{tail(text)}")
        if not is_library(output):
            raise ToolchainError(f"compiler succeeded but wrote no shared library\n{shlex.join(command)}\n{tail(text)}")

    def accepts(self, isa: str) -> bool:
        """Whether this compiler knows the flags of an instruction set; an old one may not. Asked once, kept on disk."""
        return not ISAS[isa].flags or _accepts(self, isa)

    def narrow(self, target: Target) -> Target:
        """`target` without the features that only kernels beyond this compiler would use."""
        best = next(isa for isa in target.isas if self.accepts(isa))
        beyond = {f for isa in target.isas for f in ISAS[isa].features} - set(ISAS[best].features)
        return dataclasses.replace(target, features=tuple(f for f in target.features if f not in beyond))


def find() -> Toolchain:
    """The compiler that `CC` names, else the first of gcc, clang and cc on PATH that works.

    The answer is kept per (CC, PATH). Raises ToolchainError that says what was tried and what to install.
    """
    with _LOCK:
        return _find(os.environ.get("CC", ""), os.environ.get("PATH", ""))


@functools.cache
def _find(cc: str, path: str) -> Toolchain:
    if cc.strip():
        try:
            words = shlex.split(cc)
        except ValueError as error:
            raise ToolchainError(f"CC={cc!r} is not a command ({error}); {INSTALL}") from error
        program = _which(words[0], path)
        if program is None:
            raise ToolchainError(f"CC={cc!r}: there is no program {words[0]!r} on PATH; {INSTALL}, or unset CC")
        return _try((program, *words[1:]))
    failures = []
    for name in NAMES:
        if program := _which(name, path):
            try:
                return _try((program,))
            except ToolchainError as error:
                failures.append(str(error))
    if failures:
        raise ToolchainError("no C compiler that works:\n" + "\n".join(failures) + f"\n{INSTALL}")
    raise ToolchainError(f"no C compiler: neither {', '.join(NAMES[:-1])} nor {NAMES[-1]} is on PATH; {INSTALL}")


_LOCK = threading.Lock()


def _which(name: str, path: str) -> str | None:
    found = shutil.which(name, path=path)
    return os.path.abspath(found) if found else None  # commands run in a folder of their own


def _try(program: tuple[str, ...]) -> Toolchain:
    code, text = run((*program, "--version"), None, VERSION_SECONDS)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code is None:
        raise ToolchainError(f"{shlex.join(program)} --version did not finish within {VERSION_SECONDS:g} s")
    if code != 0 or not lines:
        raise ToolchainError(f"{shlex.join(program)} --version failed with status {code}\n{tail(text)}")
    found = Toolchain(program, lines[0][:200])
    key = hashlib.sha256(
        f"{found.command('portable')}\n{found.fingerprint()}\n{_stamp(program[0])}".encode()
    ).hexdigest()
    if cache.load_json("toolchain", key) != {"works": True}:
        _smoke(found)
        cache.store_json("toolchain", key, {"works": True})
    return found


def _smoke(found: Toolchain) -> None:
    """Compile, load and call one function, so that a broken compiler is found here and not at the first kernel."""
    from tvm_ffi import load_module

    with cache.open_cache().workspace() as folder:
        source, output = folder / "smoke.c", folder / "smoke.so"
        try:
            source.write_text(_SMOKE)
        except OSError as error:
            raise ToolchainError(f"cannot write to {folder} ({error}); free space or set SPARSEC_CACHE_DIR") from error
        try:
            found.compile(source, output, "portable", seconds=60.0)
            answer = load_module(str(output))["smoke"](21)
        except ToolchainError as error:
            raise ToolchainError(f"{shlex.join(found.program)} cannot build a test function: {error}") from error
        except (RuntimeError, AttributeError, OSError) as error:
            raise ToolchainError(
                f"{shlex.join(found.program)} built a test library that does not load: {error}"
            ) from error
    if answer != 42:
        raise ToolchainError(
            f"{shlex.join(found.program)} built a test function that returned {answer!r} instead of 42"
        )


@functools.cache
def _accepts(toolchain: Toolchain, isa: str) -> bool:
    key = hashlib.sha256(f"{toolchain.command(isa)}\n{toolchain.fingerprint()}".encode()).hexdigest()
    known = cache.load_json("isas", key)
    if isinstance(known, dict) and isinstance(known.get("accepts"), bool):
        return bool(known["accepts"])
    code, _ = run((*toolchain.program, *ISAS[isa].flags, "-fsyntax-only", "-x", "c", os.devnull), None, VERSION_SECONDS)
    cache.store_json("isas", key, {"accepts": code == 0})
    return code == 0


@functools.cache
def include_path() -> str:
    """The folder of tvm-ffi's C headers."""
    from tvm_ffi import libinfo

    return str(libinfo.find_include_path())


def run(command: Sequence[str], folder: Path | None, seconds: float) -> tuple[int | None, str]:
    """(exit status, stdout and stderr) of a command; the status is None when it had to be killed after `seconds`.

    The command gets a process group of its own, which ends with it: a compiler driver's children do not stay behind.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    if folder is not None:
        environment["TMPDIR"] = str(folder)
    try:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            cwd=folder, start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        return 127, f"cannot start {command[0]}: {error}"
    thread = threading.get_ident()
    _RUNNING[thread] = process
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        return None, ""
    except BaseException:
        _kill(process)
        raise
    finally:
        del _RUNNING[thread]
    return process.returncode, text


_RUNNING: dict[int, subprocess.Popen[str]] = {}  # by the thread that waits for it


def interrupt(threads: Iterable[threading.Thread]) -> None:
    """End these threads: whatever command one of them runs is killed, until the thread is done."""
    for thread in threads:
        while thread.is_alive():
            if (process := _RUNNING.get(thread.ident or 0)) is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            thread.join(0.05)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def is_library(path: Path) -> bool:
    """Whether a file begins like an ELF shared object; anything else must not reach dlopen."""
    try:
        with path.open("rb") as file:
            head = file.read(18)
    except OSError:
        return False
    return len(head) == 18 and head[:4] == b"\x7fELF" and int.from_bytes(head[16:18], "little") == 3


def tail(text: str, lines: int = 30) -> str:
    """The end of a compiler's output, for an error message."""
    kept = text.strip().splitlines()[-lines:]
    return "\n".join(line[:400] for line in kept) if kept else "(it printed nothing)"


def _stamp(program: str) -> str:
    """Changes when a compiler is replaced under the same path and version."""
    try:
        status = os.stat(program)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"
