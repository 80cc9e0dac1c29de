"""The ops' way around Python: a small C++ library that answers `sparsec::linear`, `conv` and `stream` for the CPU.

`torch.library` runs an op written in Python in 3 to 4 microseconds more than one written in C++. The library is built
with the compiler that builds kernels, when that knows C++, and is kept in the same cache; without it the ops in Python
answer as they do on every other device.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import math
import shlex
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsec.codegen import toolchain
from sparsec.codegen.c import package_version
from sparsec.codegen.cache import open_cache
from sparsec.codegen.kernel import Kernel
from sparsec.codegen.render import TEMPLATES
from sparsec.codegen.stream import Stream
from sparsec.errors import SpecError, ToolchainError

_SOURCE = TEMPLATES / "dispatch.cpp"
_LOG = logging.getLogger("sparsec.build")
_LOCK = threading.Lock()
_admitted: dict[str, object] = {}  # the library borrows these functions
_state: list[ctypes.CDLL | None] = []


def admit(kernel: Kernel) -> None:
    """Let calls of the ops with this kernel's text reach it without Python, where that is possible."""
    spec = kernel.spec
    if spec.device != "cpu" or spec.op not in ("linear", "conv") or not hasattr(kernel.call, "__chandle__"):
        return
    library = _library()
    text = spec.text()
    if library is None or text in _admitted:
        return
    sizes = (spec.input_shape, spec.output_shape)  # as many of one as of the other
    encoded = text.encode()
    before, after = ((ctypes.c_int64 * len(side))(*side) for side in sizes)
    function = ctypes.c_void_p(kernel.call.__chandle__())
    if not library.sparsec_dispatch_admit(encoded, len(encoded), function, len(sizes[0]), before, after):
        _admitted.setdefault(text, kernel.call)


def admit_stream(text: str, stream: Stream, calls: Sequence[Callable[..., object]]) -> None:
    """Let calls of `sparsec::stream` with this text run its plan on these kernels, one for each step."""
    library = _library()
    if library is None or text in _admitted or not all(hasattr(call, "__chandle__") for call in calls):
        return
    sizes = [stream.shapes[i] for i in (*range(stream.inputs), *stream.outputs)]
    code, bits = {"float32": (2, 32), "bfloat16": (4, 16)}[stream.dtype]
    numbers = [
        stream.inputs, len(stream.outputs), len(stream.shapes), len(calls), code, bits, stream.arena_bytes,
        *(n for shape in sizes for n in (len(shape), *shape)),
    ]  # fmt: skip
    windows = {stream.inputs + place for place, rows in enumerate(stream.chunks) if rows}
    for value, ((kind, at), shape) in enumerate(zip(stream.places, stream.shapes, strict=True)):
        numbers += [kind, at, math.prod(shape), int(value in windows)]
    operand = 0
    for y, (step, call) in enumerate(zip(stream.steps, calls, strict=True), stream.inputs):
        function: Any = call
        rows, *size = step.spec.output_shape
        own = math.prod(step.spec.input_shape) // rows if step.own else 0
        numbers += [function.__chandle__(), step.x, step.residual, y, operand, int(step.bias), step.buffers]
        numbers += [rows, math.prod(size), own, stream.chunks[y - stream.inputs]]
        operand += step.bias + step.buffers
    encoded = text.encode()
    table = (ctypes.c_int64 * len(numbers))(*numbers)
    if not library.sparsec_dispatch_admit_stream(encoded, len(encoded), table):
        _admitted.setdefault(text, calls)


@functools.cache
def text(number: int) -> str:
    """The kernel text that the library calls by this number. Raises SpecError for one that it never gave."""
    library, size = _library(), ctypes.c_uint64()
    found = library.sparsec_dispatch_text(number, ctypes.byref(size)) if library is not None else None
    if not found:
        raise SpecError(f"no kernel text has the number {number}")
    return ctypes.string_at(found, size.value).decode()


def _library() -> ctypes.CDLL | None:
    if not _state:
        with _LOCK:
            if not _state:
                _state.append(_install())
    return _state[0]


def _install() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_build()))
        library.sparsec_dispatch_admit.argtypes = [
            ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        library.sparsec_dispatch_admit_stream.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p]
        library.sparsec_dispatch_text.argtypes = [ctypes.c_int64, ctypes.c_void_p]
        library.sparsec_dispatch_text.restype = ctypes.c_void_p
        if code := library.sparsec_dispatch_install():
            raise OSError(f"torch answers {code} to its registration")
    except (ToolchainError, OSError, AttributeError) as error:
        _LOG.info("ops are answered in Python: %s", str(error).splitlines()[0])
        return None
    return library


def _build() -> Path:
    """The library's path, from the cache or compiled now; a compiler that has failed once is not asked again."""
    tools = toolchain.find()
    source = _SOURCE.read_text()
    stamp = json.dumps([source, *_command(tools, "<source>", "<output>"), tools.fingerprint(), torch.__version__,
                        package_version()])  # fmt: skip
    key = hashlib.sha256(stamp.encode()).hexdigest()
    cache = open_cache()
    if (entry := cache.lookup(key)) is not None:
        return entry.library
    if isinstance(failed := cache.load_json("dispatch", key), dict):
        raise ToolchainError(str(failed.get("error")))
    with cache.lock(key), cache.workspace() as folder:
        if (entry := cache.lookup(key)) is not None:
            return entry.library
        output = folder / "dispatch.so"
        command = _command(tools, str(_SOURCE), str(output))
        code, text = toolchain.run(command, folder, 120.0)
        if code != 0 or not toolchain.is_library(output):
            error = f"{shlex.join(command)} failed with status {code}\n{toolchain.tail(text)}"
            cache.store_json("dispatch", key, {"error": error})
            raise ToolchainError(error)
        return cache.store(key, output, source, {"command": list(command), "compiler": tools.version}).library


def _command(tools: toolchain.Toolchain, source: str, output: str) -> tuple[str, ...]:
    torch_at, ffi = Path(torch.__file__).parent, _ffi_library()
    return (
        *tools.program, "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden",
        f"-I{torch_at / 'include'}", f"-I{toolchain.include_path()}", "-o", output, source, "-x", "none",
        f"-L{torch_at / 'lib'}", "-l:libtorch_cpu.so", f"-L{ffi.parent}", f"-l:{ffi.name}", "-lstdc++",
    )  # fmt: skip


@functools.cache
def _ffi_library() -> Path:
    from tvm_ffi import libinfo

    return Path(libinfo.find_libtvm_ffi())
