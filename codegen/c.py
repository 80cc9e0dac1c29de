"""The C backend: templates to C, a compiler of the machine, tvm-ffi to call it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path

from sparsec.codegen import headers, render, toolchain
from sparsec.codegen.backend import Backend
from sparsec.codegen.cache import Cache, open_cache
from sparsec.codegen.kernel import Kernel, KernelSpec, Source
from sparsec.errors import LoadError, ToolchainError
from sparsec.target import ISAS, Target


class CBackend(Backend):
    """Builds C11 with gcc or clang. The exported function is `__tvm_ffi_<symbol>`, the symbol that of the spec."""

    name = "c"

    def available(self) -> str | None:
        try:
            toolchain.find()
        except ToolchainError as error:
            return str(error)
        return None

    def render(self, spec: KernelSpec) -> Source:
        return render.render(spec)

    def build(self, source: Source, target: Target) -> Path:
        """The library for `source`: from the cache when it is whole there, else compiled.

        Raises ToolchainError with the command, the end of the compiler's output and the path of the saved source.
        """
        tools, isa = toolchain.find(), source.spec.isa
        if not tools.accepts(isa):
            flags = " ".join(ISAS[isa].flags)
            raise ToolchainError(f"{tools.version} does not know {flags}; update it, or compile for a lesser target")
        cache, key = open_cache(), build_key(source, tools)
        if (entry := cache.lookup(key)) is not None:
            return entry.library
        with cache.lock(key):
            if (entry := cache.lookup(key)) is None:  # still none after whoever held the lock
                return _compile(cache, key, source, tools)
        return entry.library

    def load(self, path: Path, source: Source) -> Kernel:
        """Open a built library. Raises LoadError, and forgets the entry, when it does not hold the kernel."""
        from tvm_ffi import load_module

        spec = source.spec
        if missing := Target.probe().lacks(spec.isa):
            raise LoadError(
                f"kernel {spec.symbol} is built for {spec.isa} and this processor lacks {', '.join(missing)}; "
                "compile the model on this machine"
            )
        try:
            call = load_module(str(path))[spec.symbol]
        except (RuntimeError, AttributeError, OSError) as error:
            open_cache().drop(path.name.partition("-")[0])
            raise LoadError(f"{path} does not load as kernel {spec.symbol}: {error}") from error
        return Kernel(spec, call, source.text, toolchain.find().command(spec.isa), str(path))


def build_key(source: Source, tools: toolchain.Toolchain) -> str:
    """The cache key: source, full command, compiler, processor features, package version; never a site or a path."""
    isa = ISAS[source.spec.isa]
    parts = [source.text, *tools.command(isa.name), tools.fingerprint(), *isa.features, package_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def package_version() -> str:
    """The version of the installed package; "0" in a bare source tree."""
    try:
        return importlib.metadata.version("sparsec")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _compile(cache: Cache, key: str, source: Source, tools: toolchain.Toolchain) -> Path:
    root = cache.root
    try:
        return _compile_once(cache, key, source, tools)
    except ToolchainError as error:
        full = "No space left on device" in str(error)
        if full and cache.fall_back(root, "No space left on device"):
            return _compile_once(cache, key, source, tools)
        saved = cache.keep_source(key, source.text)
        raise ToolchainError(
            f"kernel {source.spec.symbol} ({source.spec.variant}): {error}\nsource: {saved}"
        ) from error


def _compile_once(cache: Cache, key: str, source: Source, tools: toolchain.Toolchain) -> Path:
    spec = source.spec
    with cache.workspace() as folder:
        place, output = folder / f"{spec.symbol}.c", folder / f"{spec.symbol}.so"
        try:
            place.write_text(source.text)
        except OSError as error:
            raise ToolchainError(f"cannot write {place}: {error.strerror}") from error
        header = headers.prepared(cache, tools, spec.isa, source.text)
        try:
            tools.compile(place, output, spec.isa, include=header)
        except ToolchainError:
            if header is None:
                raise
            tools.compile(place, output, spec.isa)  # says what is wrong, unless it was the header
            headers.forget(cache, tools, spec.isa)
        facts = {"spec": spec.text(), "command": list(tools.command(spec.isa)), "compiler": tools.version}
        return cache.store(key, output, source.text, facts).library


BACKEND = CBackend()
