"""All that depends on the version of apache-tvm: which ones work, what things are called, how text becomes code.

TVM is imported here only, and only when a kernel needs it: the import costs a second.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsec.errors import DependencyError, SparsecError, SpecError, ToolchainError, nearest
from sparsec.target import ISAS, Target

SERIES = ("0.27",)  # others name modules and script functions differently
INSTALL = "pip install 'sparsec[tvm]'"
SEARCHES = ((0, 1, 14), (0, 1, 15))  # releases of apache-tvm-ffi that `search` was tried with
_LOCK = threading.RLock()  # the script parser and the pass pipeline keep global state


def version() -> str:
    """The installed version, without importing it. Raises DependencyError for none and for one that does not suit."""
    try:
        found = _installed() if importlib.util.find_spec("tvm") is not None else ""
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if not found:
        raise DependencyError(f"TVM kernels need the package apache-tvm, which is not installed: {INSTALL}")
    if not found.startswith(tuple(f"{series}." for series in SERIES)):
        raise DependencyError(
            f"apache-tvm {found} is installed; these kernels are written for {' and '.join(SERIES)}: {INSTALL}"
        )
    return found


@functools.cache
def _installed() -> str:
    return importlib.metadata.version("apache-tvm")


def unsearchable() -> str | None:
    """Why MetaSchedule cannot search here, with what to install; None where it can.

    With 0.1.15 whatever replays traces ends the process, `tune_tir` among it; `search` does without.
    """
    ffi = _ffi()
    if tuple(int(part) for part in re.findall(r"[0-9]+", ffi)[:3]) in SEARCHES:
        return None
    known = " and ".join(".".join(map(str, release)) for release in SEARCHES)
    return (
        f"apache-tvm-ffi {ffi} is installed, and MetaSchedule, which crashes with releases that it was not built "
        f"for, was tried with {known}: pip install 'apache-tvm-ffi~={'.'.join(map(str, SEARCHES[-1]))}'"
    )


def _ffi() -> str:
    return importlib.metadata.version("apache-tvm-ffi")


@functools.cache
def modules() -> Any:
    """The tvm package, with LLVM in it. Raises DependencyError."""
    version()
    try:
        import tvm
        import tvm.s_tir
        import tvm.script
    except ImportError as error:
        raise DependencyError(f"apache-tvm {version()} does not import ({error}); reinstall it: {INSTALL}") from error
    if not tvm.runtime.enabled("llvm"):
        raise DependencyError(f"apache-tvm {version()} is built without LLVM; install the published wheel: {INSTALL}")
    return tvm


def parse(text: str) -> Any:
    """The IRModule of a TVMScript text. Raises SpecError with the parser's complaint."""
    tvm = modules()
    with _LOCK:
        try:
            return tvm.script.from_source(text)
        except Exception as error:  # the parser lets through whatever a script makes it do
            raise SpecError(f"TVM does not read this script: {error}") from error


def new_schedule(module: Any) -> Any:
    return modules().s_tir.Schedule(module)


def isa_of(detail: str) -> str:
    """The instruction set that a target string allows: the name of one, or LLVM options such as "llvm -mcpu=znver4".

    Raises SpecError for a string that names no processor of LLVM's.
    """
    if detail in ISAS:
        return detail
    options = re.fullmatch(r"llvm((?: -[a-z-]+=\S+)*)", detail)
    given = dict(o[1:].split("=", 1) for o in options[1].split()) if options else {}
    if options is None or not set(given) <= {"mcpu", "mtriple", "num-cores"} or "mcpu" not in given:
        raise SpecError(
            f"target 'tvm:{detail}': write an instruction set ({', '.join(ISAS)}) or 'tvm:llvm -mcpu=<processor>'"
        )
    tvm = modules()
    from tvm.target import codegen

    known, wanted = sorted(codegen.llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm"}))), given["mcpu"]
    if wanted not in known:
        raise SpecError(f"target 'tvm:{detail}': LLVM knows no processor {wanted!r}; {nearest(wanted, known)}")
    has = codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": wanted}))
    arch = Target.probe().arch
    return next(n for n, i in ISAS.items() if i.arch in ("", arch) and all(_feature(f) in has for f in i.features))


def _feature(name: str) -> str:
    """LLVM's name of a feature of /proc/cpuinfo."""
    return {"bmi1": "bmi"}.get(name, name.replace("avx512_", "avx512"))


def llvm_target(isa: str) -> dict[str, Any]:
    """TVM's description of an instruction set: the baseline of the architecture and exactly the features of `isa`."""
    need = ISAS[isa]
    base: dict[str, Any] = {"kind": "llvm"}
    if Target.probe().arch == "x86_64":
        base["mcpu"] = "x86-64"
    if need.features:
        base["mattr"] = [f"+{_feature(f)}" for f in need.features]
    return base


# -- search ------------------------------------------------------------------------------------------------------------

_ENTRY = """
    @T.prim_func(s_tir=True)
    def whole():
        T.func_attr({"global_symbol": "whole", "tirx.is_entry_func": True})
        T.evaluate(0)
"""
"""An entry without arguments: MetaSchedule describes those of a module's entry, and fails where a shape has symbols."""

Sample = Callable[[str, tuple[int, ...], int], int]
Measure = Callable[[list[tuple[int, ...]]], list[float]]


def searchable(text: str) -> Any:
    """The module of a TVMScript text as `search` takes it. Raises SpecError."""
    return parse(text + _ENTRY)


def search(
    module: Any, rules: Callable[[Any, Sample], None], isa: str, *, trials: int, each: int, seed: int, measure: Measure
) -> None:
    """MetaSchedule's search (Shao et al., Tensor Program Optimization with Probabilistic Programs, NeurIPS 2022).

    `rules(schedule, sample)` schedules the `searchable` module and asks `sample(name, values, usual)` for its choices;
    `measure` is handed up to `each` draws at a time, as positions in those values in the order they were asked for, and
    answers in seconds. Raises DependencyError, ToolchainError.
    """
    if reason := unsearchable():
        raise DependencyError(f"schedules cannot be searched: {reason}")
    tvm = modules()
    from tvm.s_tir import meta_schedule

    def program(schedule: Any) -> None:
        def sample(name: str, values: tuple[int, ...], usual: int) -> int:
            drawn = schedule.sample_categorical(list(values), [1.0 / len(values)] * len(values))
            return int(schedule.get(drawn))

        rules(schedule, sample)

    try:
        context = _context(tvm, meta_schedule, module, program, isa, seed)
        context.pre_tuning(trials, each, context.generate_design_space(), None, None)
        while True:
            with _LOCK:
                candidates = context.generate_measure_candidates()
            if not candidates:
                break
            seconds = measure([_drawn(c.sch.trace) for c in candidates])
            results = [meta_schedule.runner.RunnerResult([s], None) for s in seconds]
            context.notify_runner_results(candidates, results)
        context.post_tuning()
    except SparsecError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ToolchainError(f"TVM {version()}: MetaSchedule's search failed: {str(error)[-2000:]}") from error


def _context(tvm: Any, meta_schedule: Any, module: Any, program: Callable[[Any], None], isa: str, seed: int) -> Any:
    """A tuning context, made as its class does but for one import: the tensor intrinsics of every processor, which
    take a minute to parse and which these schedules do not use. The function is run anew for every candidate
    ("replay-func"): replayed traces crash with apache-tvm-ffi 0.1.15."""
    from tvm.s_tir.meta_schedule import _ffi_api

    space = meta_schedule.space_generator.ScheduleFn(program, sch_rules=[], postprocs=[], mutator_probs={})
    strategy = meta_schedule.search_strategy.ReplayFunc()
    context = meta_schedule.TuneContext.__new__(meta_schedule.TuneContext)
    target = tvm.target.Target({**llvm_target(isa), "num-cores": 1})
    context.__init_handle_by_constructor__(
        _ffi_api.TuneContext, module, target, space, strategy, "kernel", 1, seed, None
    )
    _ffi_api.TuneContextInitialize(context)
    return context


def _drawn(trace: Any) -> tuple[int, ...]:
    return tuple(int(trace.decisions[i]) for i in trace.insts if i.kind.name == "SampleCategorical")


def script(module: Any) -> str:
    """The text of a module, which `parse` reads back."""
    with _LOCK:
        return str(module.script())


def compile_module(module: Any, isa: str) -> str:
    """LLVM's text of a scheduled module, optimised, with torch's threads in its parallel loops. Raises ToolchainError.

    Storage rewriting is off: it forgets which buffers belong on the stack.
    """
    tvm = modules()
    with _LOCK:
        try:
            with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_storage_rewrite": True}):
                built = tvm.compile(module, target=tvm.target.Target(llvm_target(isa)))
            return with_torch_threads(str(built.mod.inspect_source("ll")))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ToolchainError(f"TVM {version()} cannot compile the kernel: {str(error)[-2000:]}") from error


def load_text(path: Path) -> Any:
    """The module in a file of LLVM text, compiled by LLVM's JIT, which needs no linker. Raises RuntimeError."""
    modules()
    from tvm_ffi import get_global_func

    return get_global_func("ffi.Module.load_from_file.ll")(str(path), "ll")


# -- threads -----------------------------------------------------------------------------------------------------------

FENCE = "sparsec_fence"
_POINTER = "__TVMBackendParallelLaunch"
LAUNCH = """
; Parallel loops run on the OpenMP threads of torch, not on TVM's own pool, which would take half of the processors,
; bind the calling thread to them, and spin beside torch's threads. `launch` has the signature of
; TVMBackendParallelLaunch. `fence` does nothing, which the optimiser could not know.
%sparsec_job = type { ptr, ptr }
%sparsec_env = type { ptr, i32 }
declare void @GOMP_parallel(ptr, ptr, i32, i32)
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()

define internal i32 @sparsec_fence() {
  ret i32 0
}

define internal void @sparsec_thread(ptr %job) {
  %loop = load ptr, ptr %job
  %place = getelementptr %sparsec_job, ptr %job, i32 0, i32 1
  %data = load ptr, ptr %place
  %number = call i32 @omp_get_thread_num()
  %count = call i32 @omp_get_num_threads()
  %env = alloca %sparsec_env
  store ptr null, ptr %env
  %tasks = getelementptr %sparsec_env, ptr %env, i32 0, i32 1
  store i32 %count, ptr %tasks
  %status = call i32 %loop(i32 %number, ptr %env, ptr %data)
  ret void
}

define internal i32 @sparsec_launch(ptr %loop, ptr %data, i32 %tasks) {
  %job = alloca %sparsec_job
  store ptr %loop, ptr %job
  %place = getelementptr %sparsec_job, ptr %job, i32 0, i32 1
  store ptr %data, ptr %place
  call void @GOMP_parallel(ptr @sparsec_thread, ptr %job, i32 0, i32 0)
  ret i32 0
}
"""


def with_torch_threads(text: str) -> str:
    """LLVM text whose parallel loops start through torch's OpenMP runtime. Raises ToolchainError where TVM differs."""
    definition = re.compile(rf"^@{_POINTER} = .*$", re.MULTILINE)
    changed, count = definition.subn(f"@{_POINTER} = internal constant ptr @sparsec_launch", text)
    if count != 1:
        raise ToolchainError(f"TVM {version()} prints no single @{_POINTER}, through which parallel loops are started")
    changed = re.sub(rf"^declare .*@{FENCE}\(.*$", "", changed, flags=re.MULTILINE)
    # LLVM prints this storage class also for local functions, and does not read it back there.
    return changed.replace(" dllexport ", " ") + LAUNCH
