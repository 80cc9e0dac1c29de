"""The public functions: compile a model, look at the result, and carry weights in and out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import fx, nn

from sparsec import codes, install
from sparsec.capture import Captured, capture_whole
from sparsec.codegen import build, cache
from sparsec.draw import draw as picture  # now, not lazily: a later import would put the module over our function
from sparsec.driver import Context, Options, Pass, run_passes
from sparsec.errors import CaptureError, SpecError, nearest
from sparsec.graph import KEY
from sparsec.history import History
from sparsec.module import CompiledModule
from sparsec.passes import DEFAULT
from sparsec.passes.annotate import check_spec
from sparsec.private import privatise, storages
from sparsec.regions import capture_regions, install_region
from sparsec.report import Report, Row
from sparsec.spec import Spec
from sparsec.target import Target

CAPTURES = ("auto", "export", "trace", "regions")
_RESULT = "_sparsec"  # attribute of a region result's root; whole results keep their record in gm.meta


@dataclass
class Result:
    """What a compile result remembers beside its graphs: report, history, and the keys of the original state dict."""

    report: Report
    keys: tuple[str, ...] = ()
    histories: dict[str, History] = field(default_factory=dict)


def compile(
    model: nn.Module,
    spec: Any = None,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Sequence[Pass] | None = None,
    target: str | Target = "cpu",
    capture: str = "auto",
    training: bool = False,
    tune: str = "measure",
    min_speedup: float = 1.05,
    tolerance: float | None = None,
    fallback: str = "dense",
    keep_originals: bool = True,
) -> nn.Module:
    """Return a copy of `model` whose sparse layers run on kernels generated for their weights and this machine.

    `spec` says what each site becomes: a Spec, a mapping from site patterns to formats, one format for all, or None for
    `Auto()`. `example_inputs` is a tuple of positional arguments (or one tensor), `example_kwargs` the keyword ones;
    sites are timed and verified on them. The model itself is never changed.

    A site is installed when it is at least `min_speedup` times as fast as its dense original (0 forces it) and agrees
    with a float64 product within the bound of `sparsec.verify`. `sparsec.report(result)` says what was done and why.

    Raises SpecError, CaptureError, PassError, and with fallback="error" ToolchainError and VerifyError.
    """
    job = _Job(model, spec, example_inputs, example_kwargs, dynamic_shapes, passes, target, capture, training)
    job.options(tune, min_speedup, tolerance, fallback, keep_originals)
    return job.run(install_it=True)


def analyze(model: nn.Module, spec: Any = None, example_inputs: Any = None, **keywords: Any) -> Report:
    """The report that `compile` with the same arguments would give; nothing is installed and the model is unchanged."""
    options = {k: keywords.pop(k) for k in list(keywords) if k in _OPTION_DEFAULTS}
    unknown = [k for k in keywords if k not in _JOB_DEFAULTS]
    if unknown:
        raise SpecError(
            f"analyze has no argument {unknown[0]!r}; {nearest(unknown[0], [*_JOB_DEFAULTS, *_OPTION_DEFAULTS])}"
        )
    job = _Job(model, spec, example_inputs, **{**_JOB_DEFAULTS, **keywords})
    job.options(**{**_OPTION_DEFAULTS, **options})
    return _result(job.run(install_it=False)).report


_JOB_DEFAULTS: dict[str, Any] = {
    "example_kwargs": None, "dynamic_shapes": None, "passes": None, "target": "cpu", "capture": "auto",
    "training": False,
}  # fmt: skip
_OPTION_DEFAULTS: dict[str, Any] = {
    "tune": "measure", "min_speedup": 1.05, "tolerance": None, "fallback": "dense", "keep_originals": True,
}  # fmt: skip


class _Job:
    """One compile: checked arguments, then capture, passes and installation."""

    def __init__(
        self, model: nn.Module, spec: Any, example_inputs: Any, example_kwargs: Mapping[str, Any] | None,
        dynamic_shapes: Any, passes: Sequence[Pass] | None, target: str | Target, capture: str, training: bool,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise SpecError(f"compile takes an nn.Module, got {type(model).__name__}")
        if training:
            raise SpecError("training=True is not available in this version: compile after training, in eval() mode")
        self.model = model
        self.spec = Spec.of(spec)
        self.example = example_inputs
        self.kwargs = example_kwargs
        self.dynamic_shapes = dynamic_shapes
        self.passes = list(DEFAULT if passes is None else passes)
        self.target, note = build.usable(Target.parse(target))
        self.capture = _one_of("capture", capture, CAPTURES)
        self.report = Report(machine=self.target.name, threads=torch.get_num_threads(), dtype=_dtype(model))
        if note:
            self.report.note(note)

    def options(
        self, tune: str, min_speedup: float, tolerance: float | None, fallback: str, keep_originals: bool
    ) -> None:
        self.settings = Options(
            tune=tune, min_speedup=min_speedup, tolerance=tolerance, fallback=fallback, keep_originals=keep_originals
        )  # fmt: skip

    def run(self, install_it: bool) -> nn.Module:
        begin = perf_counter()
        captured = self._capture_whole()
        self.report.timings["capture_s"] = perf_counter() - begin
        result = Result(self.report, tuple(self.model.state_dict(keep_vars=True)))
        if captured is not None:
            result.histories[""] = self._passes(captured)
            compiled = CompiledModule.wrap(captured.gm, captured.call)
            compiled.meta[KEY]["result"] = result
            root: nn.Module = compiled
        else:
            root = self._regions(result, install_it)
        if install_it:
            self._keep(root)
        for line in cache.notes():
            self.report.note(line)
        self.report.timings["total_s"] = perf_counter() - begin
        return root

    def _capture_whole(self) -> Captured | None:
        """The model as one graph, or None when it is to be compiled by regions."""
        self.report.capture = {"rung": "regions", "reason": ""}
        if self.capture == "regions":
            return None
        try:
            captured = capture_whole(self.model, self.example, self.kwargs, self.dynamic_shapes, self.capture)
        except CaptureError as error:
            if self.capture != "auto":
                raise
            self.report.capture["reason"] = str(error)
            return None
        self.report.capture = {"rung": captured.call.rung, "reason": captured.reason}
        for line in captured.notes:
            self.report.note(line)
        return captured

    def _passes(self, captured: Captured) -> History:
        example = captured.example
        context = Context(
            spec=self.spec, target=self.target, report=self.report, options=self.settings, capture=captured.call.rung,
            example_inputs=captured.call.flatten(*example) if example is not None else (),
            has_examples=example is not None,
        )  # fmt: skip
        return run_passes(captured.gm, self.passes, context)

    def _regions(self, result: Result, install_it: bool) -> nn.Module:
        begin = perf_counter()
        plan = capture_regions(self.model, self.example, dict(self.kwargs) if self.kwargs else None)
        self.report.timings["capture_s"] += perf_counter() - begin
        for path, captured in plan.regions:
            captured.gm.meta.setdefault(KEY, {})["region"] = path
            result.histories[path] = self._passes(captured)
            if install_it:
                install_region(plan.root, path, CompiledModule.wrap(captured.gm, captured.call))
        for path, reason in plan.skipped:
            code = codes.NEVER_CALLED if reason == "never called" else codes.NOT_CAPTURED
            self.report.put(
                Row(site=path or "<root>", op="module", code=code, reason=codes.sentence(code, detail=reason))
            )
        check_spec(self.spec, [c.gm for _, c in plan.regions], [path or "<root>" for path, _ in plan.skipped])
        setattr(plan.root, _RESULT, result)
        return plan.root

    def _keep(self, root: nn.Module) -> None:
        """Check the buffers, and keep the originals that no buffer can give back."""
        state = self.model.state_dict()
        total = 0
        graphs = dict(install.compiled_graphs(root))
        for gm in graphs.values():
            install.validate(gm)
            total += install.keep_originals(gm, state, folded=self.settings.keep_originals)
        if "" in graphs:  # a whole result also carries the entries that its graph never reads
            total += install.keep_unread(graphs[""], state)
            privatise(root, storages(self.model))
        self.report.kept_nbytes = total


def report(cm: nn.Module) -> Report:
    """The Report of a compile result or of a model returned by `sparsify`."""
    record = getattr(cm, "_sparsec_report", None)
    if isinstance(record, list) and _record(cm) is None:
        return Report([Row.from_dict(row) for row in record])
    return _result(cm).report


def source(cm: nn.Module, site: str) -> str:
    """The generated text of the kernel that runs `site`. Raises SpecError when the site is dense or unknown."""
    return build.get_kernel(install.find_kernel(cm, site)).source


def graphs(cm: nn.Module) -> list[tuple[str, str]]:
    """(pass, code of the graph after it) in order, the captured graph first; regions put their path before the name."""
    found = []
    for path, history in _result(cm).histories.items():
        found += [(f"{path}: {entry.name}" if path else entry.name, entry.code) for entry in history]
    return found


def draw(cm: nn.Module, path: str | Path) -> Path:
    """Write a picture of the compiled graph, coloured by decision: HTML when `path` ends in .html, else SVG."""
    result = _result(cm)
    return picture([(name, gm) for name, gm in install.compiled_graphs(cm)], result.report, Path(path))


def dense_state_dict(cm: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the original model: its keys, shapes and order, with the weights of the compiled one.

    Exact sites are bit-equal (a pruned -0.0 comes back as 0.0). Loads into the caller's model with strict=True.
    """
    result = _result(cm)
    found = install.plain_entries(cm)
    for _, gm in install.compiled_graphs(cm):
        found.update(install.dense_entries(gm))
    lost = [key for key in result.keys if key not in found]
    if lost:
        raise SpecError(
            f"{lost[0]!r} was folded into other weights and its original was not kept ({len(lost)} such entries); "
            "compile with keep_originals=True"
        )
    return {key: install.private(found[key]) for key in result.keys}


def load_dense_state_dict(cm: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a compiled model the weights of a state dict of the original: patterns are rebuilt, kernels stay.

    Raises InputError for missing or unknown keys and changed shapes, FormatError for a weight that its site's format
    cannot hold; the model is unchanged then.
    """
    graphs = [gm for _, gm in install.compiled_graphs(cm)]
    install.check_state(state, dense_state_dict(cm))
    prepared = [install.prepare(gm, state) for gm in graphs]
    for gm, fresh in zip(graphs, prepared, strict=True):
        install.commit(gm, fresh, state)
    install.load_plain(cm, state)


def _record(cm: nn.Module) -> Any:
    record = getattr(cm, _RESULT, None)
    if record is None and isinstance(cm, fx.GraphModule):
        record = cm.meta.get(KEY, {}).get("result")
    return record


def _result(cm: nn.Module) -> Result:
    record = _record(cm)
    if not isinstance(record, Result):
        raise SpecError(f"{type(cm).__name__} is no result of sparsec.compile or sparsec.sparsify")
    return record


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise SpecError(f"{name}={value!r}; valid: {', '.join(map(repr, valid))}")
    return value


def _dtype(model: nn.Module) -> str:
    return next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "")
