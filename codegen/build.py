"""Building many kernels at once, and the table of those that this process has loaded."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from sparsec.codegen import catalog, dispatch, toolchain
from sparsec.codegen.kernel import VERSION, Kernel, KernelSpec
from sparsec.errors import DeviceError, LoadError, SparsecError, ToolchainError
from sparsec.target import Target, instruction_set

_LOCK = threading.Lock()
_loaded: dict[str, Kernel] = {}
_pending: dict[str, Future[Kernel]] = {}


def usable(target: Target) -> tuple[Target, str]:
    """What kernels can really be built for, and a sentence for the report when that is not what was asked for.

    Instruction sets that the C compiler is too old for are left out. Where there is no C compiler, TVM takes over if it
    is installed. A `tvm` target needs it: DependencyError.
    """
    if target.kind == "tvm":
        from sparsec.codegen import tvm_compat

        tvm_compat.version()
        return (target.limit(tvm_compat.isa_of(target.detail)) if target.detail else target), ""
    if target.kind != "cpu":
        return target, ""
    try:
        return toolchain.find().narrow(target), ""
    except ToolchainError as error:
        if (missing := catalog.backend("tvm").available()) is not None:  # `error` comes again with the kernels
            return target, f"TVM could take the place of a C compiler: {missing}"
        note = f"kernels are built by TVM, because there is no C compiler: {str(error).splitlines()[0]}"
        return dataclasses.replace(target, kind="tvm"), note


def get_kernel(text: str) -> Kernel:
    """The kernel of a KernelSpec's text: from this process, else from the cache, else built now.

    Raises SpecError for text that is no KernelSpec, ToolchainError when it cannot be built, LoadError when it cannot
    run on this processor or was written by another version.
    """
    kernel = _loaded.get(text)
    return kernel if kernel is not None else _obtain(spec := KernelSpec.parse(text), _here(spec))


def _here(spec: KernelSpec) -> Target:
    return Target.parse("cuda") if spec.device == "cuda" else Target.probe()


def build_kernels(
    specs: Sequence[KernelSpec],
    target: Target,
    progress: Callable[[], object] | None = None,
    errors: dict[KernelSpec, SparsecError] | None = None,
) -> dict[KernelSpec, Kernel]:
    """Build and load every kernel, as many at a time as there are processors; equal specs are built once.

    `progress` is called once per finished kernel, from any thread. With `errors`, a kernel that fails is recorded there
    and left out of the result; without it the first failure, in the order of `specs`, is raised when all have finished.
    """
    wanted = list(dict.fromkeys(specs))
    failed: dict[KernelSpec, SparsecError] = {}

    def one(spec: KernelSpec) -> Kernel | None:
        try:
            return _obtain(spec, target)
        except SparsecError as error:
            failed[spec] = error
            return None
        finally:
            if progress is not None:
                progress()

    missing = [spec for spec in wanted if spec.text() not in _loaded]
    if len(missing) < 2:
        kernels = [one(spec) for spec in wanted]
    else:
        with ThreadPoolExecutor(min(len(wanted), workers()), thread_name_prefix="sparsec-build") as pool:
            try:
                kernels = list(pool.map(one, wanted))
            except BaseException:  # Ctrl-C reaches this thread only: the others would wait for their compilers
                pool.shutdown(wait=False, cancel_futures=True)
                toolchain.interrupt(pool._threads)
                raise
    if failed and errors is None:
        raise next(failed[spec] for spec in wanted if spec in failed)
    if errors is not None:
        errors.update((spec, failed[spec]) for spec in wanted if spec in failed)
    return {spec: kernel for spec, kernel in zip(wanted, kernels, strict=True) if kernel is not None}


def adopt(spec: KernelSpec, kernel: Kernel) -> None:
    """Use a kernel that was loaded from elsewhere, unless this process has one for the spec already."""
    with _LOCK:
        _loaded.setdefault(spec.text(), kernel)
    dispatch.admit(kernel)


def workers() -> int:
    """Processors that this process may use."""
    count = getattr(os, "process_cpu_count", None)
    return max(1, count() or 1) if count is not None else max(1, len(os.sched_getaffinity(0)))


def _obtain(spec: KernelSpec, target: Target) -> Kernel:
    """The kernel of a spec; a second thread that wants the same one waits for the first."""
    text = spec.text()
    with _LOCK:
        if text in _loaded:
            return _loaded[text]
        future = _pending.get(text)
        first = future is None
        if future is None:
            future = _pending[text] = Future()
    if not first:
        return future.result()
    try:
        kernel = _make(spec, target)
        dispatch.admit(kernel)
    except BaseException as error:
        with _LOCK:
            del _pending[text]
        future.set_exception(error)
        raise
    with _LOCK:
        _loaded[text] = kernel
        del _pending[text]
    future.set_result(kernel)
    return kernel


def _make(spec: KernelSpec, target: Target) -> Kernel:
    if spec.version != VERSION:
        raise LoadError(
            f"kernel text of version {spec.version}, this sparsec prints {VERSION}; compile the model again"
        )
    instruction_set(spec.isa)
    if spec.device == "cuda" and target.kind == "cuda" and not target.detail:
        raise DeviceError(f"kernel {spec.symbol} is CUDA for {spec.isa} and this process sees no CUDA device")
    if missing := target.lacks(spec.isa):
        raise LoadError(
            f"kernel {spec.symbol} needs {spec.isa}, but {target} lacks {', '.join(missing)}; compile for this machine"
        )
    found = catalog.backend(catalog.variant(spec.variant).language)
    if reason := found.available():
        raise ToolchainError(reason)
    source = found.render(spec)
    try:
        return found.load(found.build(source, target), source)
    except LoadError:  # the entry was evicted or damaged between its check and dlopen; `load` has forgotten it
        return found.load(found.build(source, target), source)
