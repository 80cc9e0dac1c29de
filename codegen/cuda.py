"""The CUDA backend: templates to CUDA C++, nvcc on PATH, the same cache and the same tvm-ffi call as the C backend."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from sparsec.codegen import cache, render, toolchain
from sparsec.codegen.backend import Backend
from sparsec.codegen.c import package_version
from sparsec.codegen.cache import Cache, open_cache
from sparsec.codegen.kernel import Kernel, KernelSpec, Source
from sparsec.errors import DeviceError, LoadError, ToolchainError
from sparsec.target import Target, instruction_set

FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden")
INSTALL = (
    "install the CUDA toolkit, 12.0 or later (Debian 13/Ubuntu 24.04: apt install nvidia-cuda-toolkit; or pip install "
    "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl), with nvcc on PATH"
)
COMPILE_SECONDS = 600.0


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its path, and the last line of `nvcc --version`, which names the build."""

    program: str
    version: str

    def command(self, isa: str, source: str = "<source>", output: str = "<output>") -> tuple[str, ...]:
        """The full command for one translation unit, the same in every process with the default placeholders."""
        flags = instruction_set(isa).flags
        return (self.program, *FLAGS, *flags, f"-I{toolchain.include_path()}", "-o", output, source)

    def fingerprint(self) -> str:
        """What a built library depends on besides its source and command: nvcc, its host compiler, tvm-ffi."""
        import tvm_ffi

        host = shutil.which(os.environ.get("NVCC_CCBIN", "g++")) or ""
        flags = [f"{name}={os.environ.get(name, '')}" for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
        return "\n".join([self.version, host, f"tvm-ffi {tvm_ffi.__version__}", *flags])

    def compile(self, source: Path, output: Path, isa: str) -> None:
        """Compile `source` into a shared library. Raises ToolchainError with the command and the compiler's words."""
        command = self.command(isa, str(source), str(output))
        code, text = toolchain.run(command, output.parent, COMPILE_SECONDS)
        if code is None:
            raise ToolchainError(f"nvcc did not finish within {COMPILE_SECONDS:g} s\n{shlex.join(command)}")
        if code != 0:
            raise ToolchainError(f"nvcc failed with status {code}\n{shlex.join(command)}\n{toolchain.tail(text)}")
        if not toolchain.is_library(output):
            raise ToolchainError(f"nvcc succeeded but wrote no shared library\n{shlex.join(command)}")


def find() -> Nvcc:
    """nvcc on PATH, asked for its version once. Raises ToolchainError that says what to install."""
    return _find(os.environ.get("PATH", ""))


@functools.cache
def _find(path: str) -> Nvcc:
    found = shutil.which("nvcc", path=path)
    if found is None:
        raise ToolchainError(f"no CUDA compiler: nvcc is not on PATH; {INSTALL}, or compile with target='cpu'")
    program = os.path.abspath(found)
    code, text = toolchain.run((program, "--version"), None, toolchain.VERSION_SECONDS)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code != 0 or not lines:
        raise ToolchainError(f"{program} --version failed with status {code}\n{toolchain.tail(text)}\n{INSTALL}")
    return Nvcc(program, " ".join(lines[-2:])[:200])


class CudaBackend(Backend):
    """Builds CUDA C++ with nvcc for one architecture. The exported function is `__tvm_ffi_<symbol>`."""

    name = "cuda"

    def available(self) -> str | None:
        try:
            find()
        except ToolchainError as error:
            return str(error)
        return None

    def render(self, spec: KernelSpec) -> Source:
        return render.render(spec)

    def build(self, source: Source, target: Target) -> Path:
        """The library for `source`: from the cache when it is whole there, else compiled. Raises ToolchainError."""
        nvcc = find()
        store, key = open_cache(), build_key(source, nvcc)
        if (entry := store.lookup(key)) is not None:
            return entry.library
        with store.lock(key):
            if (entry := store.lookup(key)) is None:  # still none after whoever held the lock
                return _compile(store, key, source, nvcc)
        return entry.library

    def load(self, path: Path, source: Source) -> Kernel:
        """Open a built library on this machine's device.

        Raises DeviceError when there is no device or an older one, LoadError, which forgets the entry, when the library
        does not hold the kernel.
        """
        from tvm_ffi import load_module

        spec = source.spec
        check_device(spec)
        try:
            call = load_module(str(path))[spec.symbol]
        except (RuntimeError, AttributeError, OSError) as error:
            cache.open_cache().drop(path.name.partition("-")[0])
            raise LoadError(f"{path} does not load as kernel {spec.symbol}: {error}") from error
        return Kernel(spec, call, source.text, find().command(spec.isa), str(path))


def check_device(spec: KernelSpec) -> None:
    """Raise DeviceError unless the current CUDA device can run a kernel built for `spec.isa`."""
    here = Target.parse("cuda")
    if not here.detail:
        raise DeviceError(
            f"kernel {spec.symbol} is built for {spec.isa}, but torch sees no CUDA device: install a torch build with "
            "CUDA and a driver, move to a machine with a GPU, or compile with target='cpu'"
        )
    if here.lacks(spec.isa):
        raise DeviceError(
            f"kernel {spec.symbol} is built for {spec.isa} and {here.name} is {here.detail}; "
            f"compile with target='cuda:{here.detail}'"
        )


def build_key(source: Source, nvcc: Nvcc) -> str:
    """The cache key: source, full command, compilers, package version; never a site or a path."""
    parts = [source.text, *nvcc.command(source.spec.isa), nvcc.fingerprint(), package_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _compile(store: Cache, key: str, source: Source, nvcc: Nvcc) -> Path:
    spec = source.spec
    try:
        with store.workspace() as folder:
            place, output = folder / f"{spec.symbol}.cu", folder / f"{spec.symbol}.so"
            try:
                place.write_text(source.text)
            except OSError as error:
                raise ToolchainError(f"cannot write {place}: {error.strerror}") from error
            nvcc.compile(place, output, spec.isa)
            facts = {"spec": spec.text(), "command": list(nvcc.command(spec.isa)), "compiler": nvcc.version}
            return store.store(key, output, source.text, facts).library
    except ToolchainError as error:
        saved = store.keep_source(key, source.text)
        raise ToolchainError(f"kernel {spec.symbol} ({spec.variant}): {error}\nsource: {saved}") from error


BACKEND = CudaBackend()
