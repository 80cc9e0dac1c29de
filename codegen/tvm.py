"""The TVM backend: scheduled TVMScript, compiled by TVM's own LLVM and loaded by its JIT: no C compiler, no linker.

What is cached is LLVM's text of the kernel. It is called through tvm-ffi like the C kernels, and its parallel loops run
on torch's threads.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsec.codegen import cache, tvm_chain, tvm_compat, tvm_epilogue, tvm_rules, tvm_shape, tvm_text
from sparsec.codegen.backend import Backend
from sparsec.codegen.c import package_version
from sparsec.codegen.kernel import Kernel, KernelSpec, Source
from sparsec.errors import DependencyError, LoadError, SpecError, ToolchainError
from sparsec.target import Target

_LOCK = threading.Lock()
_scheduled: dict[str, Any] = {}  # text of a script rendered in this process -> its module, until it is built


class TvmBackend(Backend):
    """Renders with `tvm_text` and `tvm_rules`, and builds LLVM text whose entry is the symbol of the spec."""

    name = "tvm"

    def available(self) -> str | None:
        try:
            tvm_compat.version()
        except DependencyError as error:
            return str(error)
        return None

    def render(self, spec: KernelSpec) -> Source:
        """The scheduled script. Scripts are kept on disk: parsing them is most of the time of a compile."""
        printer = texts(spec)
        text = printer.text_of(spec)
        key = hashlib.sha256(json.dumps([text, spec.isa, tvm_compat.version(), generator()]).encode()).hexdigest()
        known = cache.load_json("tvm_script", key)
        if isinstance(known, str):
            return Source(spec, self.name, known)
        schedule = tvm_compat.new_schedule(tvm_compat.parse(text))
        tile = tvm_rules.Tile(spec.tile)
        tvm_rules.schedule(schedule, printer.blocks_of(spec), tvm_shape.lanes_of(spec), tile)
        tile.finish()
        script = tvm_compat.script(schedule.mod)
        cache.store_json("tvm_script", key, script)
        with _LOCK:
            _scheduled[script] = schedule.mod
        return Source(spec, self.name, script)

    def build(self, source: Source, target: Target) -> Path:
        """The LLVM text of `source`: from the cache when it is whole there, else compiled. Raises ToolchainError."""
        store, key = cache.open_cache(), build_key(source)
        if (entry := store.lookup(key)) is not None:
            return entry.library
        with store.lock(key):
            if (entry := store.lookup(key)) is None:  # still none after whoever held the lock
                return _compile(store, key, source)
        return entry.library

    def load(self, path: Path, source: Source) -> Kernel:
        """Hand the LLVM text to the JIT. Raises LoadError, and forgets the entry, when it does not hold the kernel."""
        spec = source.spec
        if missing := Target.probe().lacks(spec.isa):
            raise LoadError(
                f"kernel {spec.symbol} is built for {spec.isa} and this processor lacks {', '.join(missing)}; "
                "compile the model on this machine"
            )
        try:
            function = tvm_compat.load_text(path)[spec.symbol]
        except (RuntimeError, AttributeError, OSError) as error:
            cache.open_cache().drop(path.name.partition("-")[0])
            raise LoadError(f"{path} does not load as kernel {spec.symbol}: {error}") from error
        return Kernel(spec, bind(function, spec), source.text, command(spec), str(path))


def texts(spec: KernelSpec) -> Any:
    """The module that prints the op of a spec: `shape_of`, `text_of` and `blocks_of`."""
    return tvm_chain if spec.op == "chain" else tvm_text


def command(spec: KernelSpec) -> tuple[str, ...]:
    """What stands for a compiler command: TVM, its version and the LLVM target."""
    return ("tvm", tvm_compat.version(), json.dumps(tvm_compat.llvm_target(spec.isa)))


def build_key(source: Source) -> str:
    """The cache key: script, TVM and its target, the launch of threads, package version; never a site or a path."""
    parts = [source.text, *command(source.spec), tvm_compat.LAUNCH, package_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def bind(function: Callable[..., Any], spec: KernelSpec) -> Callable[..., None]:
    """`call(x, y, bias, residual, *buffers)` of a loaded function; ValueError for what it was not compiled for.

    The function itself checks the types, sizes and strides of every tensor before it computes.
    """
    inputs, outputs, biased = spec.in_features, spec.out_features, spec.bias
    adds = any(step.name == "add" for step in spec.epilogue)
    count = len(texts(spec).shape_of(spec).arguments)
    threads = torch.get_num_threads

    def call(
        x: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        *buffers: torch.Tensor,
    ) -> None:
        if (bias is not None) is not biased or (residual is not None) is not adds or len(buffers) != count:
            raise ValueError(_wrong(spec, bias, residual, buffers, count))
        flat = [x, y]
        if bias is not None:
            flat.append(bias)
        if residual is not None:
            flat.append(residual)
        flat += buffers
        try:
            if x.dim() != 2:
                flat[0], flat[1] = x.view(-1, inputs), y.view(-1, outputs)
                if adds:
                    flat[2 + biased] = flat[2 + biased].view(-1, outputs)
            function(*flat, threads())
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            _again(function, spec, flat, threads(), error)

    return call


def _again(
    function: Callable[..., Any], spec: KernelSpec, tensors: list[torch.Tensor], threads: int, error: Exception
) -> None:
    """A dimension of one element may have any stride, which TVM refuses: call once more with the usual strides."""
    try:
        whole = [t for t in tensors if t.is_contiguous()]
        plain = [t.as_strided(t.shape, torch.empty(t.shape, device="meta").stride()) for t in whole]
        if [t.stride() for t in plain] == [t.stride() for t in tensors] or len(plain) < len(tensors):
            raise ValueError(f"kernel {spec.symbol}: {error}") from error
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"kernel {spec.symbol}: {error}") from error
    try:
        function(*plain, threads)
    except (RuntimeError, TypeError, ValueError) as second:
        raise ValueError(f"kernel {spec.symbol}: {second}") from second


def _wrong(spec: KernelSpec, bias: Any, residual: Any, buffers: tuple[Any, ...], count: int) -> str:
    if len(buffers) != count:
        return f"kernel {spec.symbol} reads {count} buffers of {spec.format}, got {len(buffers)}"
    for name, given, wanted in (
        ("bias", bias is not None, spec.bias),
        ("residual", residual is not None, any(step.name == "add" for step in spec.epilogue)),
    ):
        if given != wanted:
            return f"kernel {spec.symbol} was compiled {'with' if wanted else 'without'} {name}: pass " + (
                "a tensor" if wanted else "None"
            )
    return f"kernel {spec.symbol}: unexpected arguments"


@functools.cache
def generator() -> str:
    """Changes when the rules that turn a text into a script change."""
    files = (tvm_rules.__file__, tvm_compat.__file__, tvm_epilogue.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def _compile(store: cache.Cache, key: str, source: Source) -> Path:
    spec = source.spec
    with _LOCK:
        module = _scheduled.pop(source.text, None)
    try:
        text = tvm_compat.compile_module(module if module is not None else tvm_compat.parse(source.text), spec.isa)
        with store.workspace() as folder:
            place = folder / f"{spec.symbol}.ll"
            try:
                place.write_text(text)
            except OSError as error:
                raise ToolchainError(f"cannot write {place}: {error.strerror}") from error
            facts = {"spec": spec.text(), "command": list(command(spec)), "compiler": f"tvm {tvm_compat.version()}"}
            return store.store(key, place, source.text, facts).library
    except (ToolchainError, SpecError) as error:
        saved = store.keep_source(key, source.text)
        raise ToolchainError(f"kernel {spec.symbol} ({spec.variant}): {error}\nsource: {saved}") from error


BACKEND = TvmBackend()
