"""Precompiled headers: what kernels include, parsed once for a compiler and instruction set instead of once a kernel.

`immintrin.h` costs gcc about 0.2 s, often more than the kernel below it. The precompiled form is an entry of the cache
like a library: stored by rename, checked by its hash before it is used, trimmed by age. gcc loads it ahead of the
source (`-include`), where the includes of the source find their guards set: text, key and library are those of a plain
build. Whenever the two do not fit together the kernel is compiled plainly.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

from sparsec.codegen import toolchain
from sparsec.codegen.cache import Cache
from sparsec.errors import ToolchainError

INCLUDES = "".join(f"#include <{name}.h>\n" for name in ("stddef", "stdint", "stdlib", "string", "immintrin"))
TEXT = INCLUDES + "#include <tvm/ffi/c_api.h>\n"
WORTH = 3  # kernels whose includes take as long as preparing the header: it is made for the one after

_MAGIC = b"gpch"  # of gcc's files. Clang's need the text they were made from, in its place and with its time
_LOCK = threading.Lock()
_compiled: dict[str, int] = {}  # kernels by key, in this process
_ready: dict[tuple[Path, str], tuple[Path, object]] = {}
_useless: set[tuple[Path, str]] = set()


def fits(text: str) -> bool:
    """Whether a source begins, behind a comment of one line, with the includes that the header holds."""
    first, _, rest = text.partition("\n")
    return first.startswith("/*") and first.endswith("*/") and rest.startswith(INCLUDES)


def prepared(cache: Cache, tools: toolchain.Toolchain, isa: str, text: str) -> Path | None:
    """The name to give to `-include` for this source: made now when it has become worth it, None without one.

    Never raises and never waits: while one thread or process prepares a header, others compile plainly.
    """
    if not fits(text):
        return None
    key, root = _key(tools, isa), cache.root
    with _LOCK:
        _compiled[key] = count = _compiled.get(key, 0) + 1
        known = _ready.get((root, key))
        if (root, key) in _useless:
            return None
    if known is not None and _signature(known[0]) == known[1]:
        return known[0].with_suffix("")
    try:
        path = _find(cache, key) or (_make(cache, key, tools, isa) if count > WORTH else None)
    except (ToolchainError, OSError):
        forget(cache, tools, isa)
        return None
    if path is None:
        return None
    with _LOCK:
        _ready[root, key] = path, _signature(path)
    return path.with_suffix("")


def forget(cache: Cache, tools: toolchain.Toolchain, isa: str) -> None:
    """Compile plainly from now on: the compiler could not make the header, or did not take it."""
    with _LOCK:
        _useless.add((cache.root, _key(tools, isa)))


def _key(tools: toolchain.Toolchain, isa: str) -> str:
    return hashlib.sha256(json.dumps([TEXT, *tools.command(isa), tools.fingerprint()]).encode()).hexdigest()


def _find(cache: Cache, key: str) -> Path | None:
    entry = cache.lookup(key)
    return entry.library if entry is not None else None


def _make(cache: Cache, key: str, tools: toolchain.Toolchain, isa: str) -> Path | None:
    with cache.lock(key, seconds=0.0) as held:
        if not held:
            return None
        if (found := _find(cache, key)) is not None:
            return found
        with cache.workspace() as folder:
            source, output = folder / "kernel.h", folder / "kernel.gch"
            source.write_text(TEXT)
            command = (*tools.command(isa, "", str(output))[:-1], "-x", "c-header", str(source))
            code, text = toolchain.run(command, folder, toolchain.VERSION_SECONDS)
            if code != 0 or not _precompiled(output):
                raise ToolchainError(f"no precompiled header: {toolchain.tail(text)}")
            return cache.store(key, output, TEXT, {"command": list(command), "compiler": tools.version}).library


def _precompiled(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def _signature(path: Path) -> object:
    """What changes when a file is written, replaced, removed or opened to others."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns
