"""Rung 3: compile the largest submodules that a graph can hold, in place, inside a copy of the caller's model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sparsec.aten import operands, opname
from sparsec.call import MISMATCH, same
from sparsec.capture import Captured, blame_inputs, capture_export, normalise_inputs
from sparsec.capture_export import changed_attributes
from sparsec.capture_trace import OWNING, capture_trace
from sparsec.errors import InputError
from sparsec.failures import explain_failure
from sparsec.flatten import prefix_sites, tensor_names
from sparsec.module import CompiledModule
from sparsec.private import check_hooks, privatise, shadow, storages

CHILD = "sparsec_region"
"""Name under which a module holds its compiled graph."""

NEVER = "never called"

_PLAIN = (torch.Tensor, type(None), bool, int, float, complex, str, torch.dtype, torch.device)


@dataclass
class RegionPlan:
    """A private copy of the model, the submodules of it that were captured, and why others were not.

    `skipped` names modules whose own weights stay dense, with a reason.
    """

    root: nn.Module
    regions: list[tuple[str, Captured]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Seen:
    """The calls that one module got while the model ran on the example inputs."""

    calls: list[tuple[pytree.TreeSpec, tuple[Any, ...]]] = field(default_factory=list)  # tensors as meta tensors
    problem: str = ""  # why no graph can stand for these calls
    assigns: str = ""  # the same, for every module around this one too


def capture_regions(
    model: nn.Module, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None
) -> RegionPlan:
    """Capture the largest submodules of a copy of `model`; the caller's model is only read.

    With example inputs the model runs once so that every submodule's calls are known; a submodule qualifies when its
    arguments and results are plain tensors and constants which it does not change, so a module that writes a key-value
    cache is entered and its parts are captured. Symbolic tracing goes first because its graphs take any shape. Without
    example inputs only tracing is tried, on modules all of whose parameters are required.

    Raises InputError when the model itself fails on the example inputs, CaptureError when it cannot be copied.
    """
    example = normalise_inputs(model, example_inputs, example_kwargs)
    seen = None
    if example is not None:
        seen = observe(model, example)
    root = shadow(model, False)
    privatise(root, storages(model))
    plan = RegionPlan(root)
    _Planner(plan, seen).visit("", root)
    if example is not None:
        _attach_inputs(model, example, plan)
    _guard_root(root)
    return plan


# Watching the calls


def observe(model: nn.Module, example: Any) -> dict[str, Seen]:
    """Path -> the calls a module got, for one run of a private copy of the model. InputError when that run fails."""
    probe = shadow(model, False, buffers=True)
    seen = {path: Seen() for path, _ in probe.named_modules()}
    for path, module in probe.named_modules():
        watcher = _Watcher(seen[path])
        module.register_forward_pre_hook(watcher.before, with_kwargs=True)
        module.register_forward_hook(watcher.after, with_kwargs=True)
    with blame_inputs(model):
        _run(probe, example)
    return seen


class _Watcher:
    """Hooks of one module: notes its arguments, and whether the call changed them or returned something opaque."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.open: list[Any] = []
        self.state: list[dict[str, Any]] = []

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        opaque = next((leaf for leaf in leaves if not isinstance(leaf, _PLAIN)), None)
        if opaque is not None:
            self.seen.problem = f"an argument is a {type(opaque).__name__}, which no graph can carry"
        self.state.append(dict(vars(module)))
        self.seen.calls.append((spec, tuple(_metadata(leaf) for leaf in leaves)))
        self.open.append((leaves, [_version(leaf) for leaf in leaves], spec))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        leaves, versions, spec = self.open.pop()
        assigned = next(changed_attributes(module, self.state.pop()), None)
        if assigned:
            self.seen.assigns = f"it assigns self.{assigned}"
        now, found = pytree.tree_flatten((args, kwargs))
        changed = found != spec or any(a is not b for a, b in zip(leaves, now))
        if changed or versions != [_version(leaf) for leaf in leaves]:
            self.seen.problem = self.seen.problem or "it changes its arguments"
        opaque = next((x for x in pytree.tree_leaves(output) if not isinstance(x, _PLAIN)), None)
        if opaque is not None:
            self.seen.problem = self.seen.problem or f"it returns a {type(opaque).__name__}, which no graph can carry"


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, torch.Tensor) else 0


def _metadata(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    with torch.device("meta"):
        shape = torch.empty(leaf.shape, dtype=leaf.dtype)
    return _Shape(shape, leaf.device)


@dataclass(frozen=True)
class _Shape:
    meta: torch.Tensor
    device: torch.device

    def kind(self) -> tuple[Any, ...]:
        return (self.meta.dtype, self.meta.dim(), self.device)

    def make(self) -> torch.Tensor:
        if self.meta.is_floating_point() or self.meta.is_complex():
            return torch.randn(self.meta.shape, dtype=self.meta.dtype, device=self.device)
        return torch.zeros(self.meta.shape, dtype=self.meta.dtype, device=self.device)


def _run(model: nn.Module, example: Any) -> None:
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, example)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it reads weights of modules that it never calls
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# Choosing


class _Planner:
    """Walks the modules from the top and captures the first on every path that a graph can hold."""

    def __init__(self, plan: RegionPlan, seen: dict[str, Seen] | None) -> None:
        self.plan = plan
        self.seen = seen
        names = tensor_names(plan.root)
        self.ties = {name: tuple(group) for group in names.values() for name in group}
        self.done: dict[int, str] = {}

    def visit(self, path: str, module: nn.Module) -> None:
        if id(module) in self.done or not _owns_weights(module):
            return
        self.done[id(module)] = path
        reason = self.try_capture(path, module) if path else "the root keeps its class; only parts of it are compiled"
        if reason is None:
            return
        if _own_weights(module):
            self.plan.skipped.append((path, reason))
        for name, child in module.named_children():
            self.visit(f"{path}.{name}" if path else name, child)

    def try_capture(self, path: str, module: nn.Module) -> str | None:
        """None when the module became a region, else the reason."""
        calls = None
        if self.seen is not None:
            known = self.seen[path]
            if not known.calls:
                return NEVER
            if known.problem:
                return f"{type(module).__name__}: {known.problem}"
            for name, part in module.named_modules():
                below = self.seen[f"{path}.{name}" if name else path].assigns
                if below:
                    return f"{type(part).__name__}: {below}, a side effect that no graph can hold"
            calls = _variants(module, known)
        elif not _callable_blind(module):
            return f"{type(module).__name__} takes optional arguments; give example inputs so that its calls are known"
        reasons = []
        for rung in _rungs(module, calls):
            try:
                captured = rung()
            except Exception as error:
                reasons.append(explain_failure(error, module))
                continue
            if not _has_site(captured):
                return "no product with a constant weight was found in it"
            prefix_sites(captured.gm, path, self.ties)
            self.plan.regions.append((path, captured))
            return None
        return "; ".join(dict.fromkeys(reasons))


def _rungs(module: nn.Module, calls: Any) -> Iterator[Callable[[], Captured]]:
    example, shapes = calls or (None, None)
    yield lambda: capture_trace(_bare(module), example, None, False, guard_shapes=False)
    if example is not None:
        yield lambda: capture_export(_bare(module), example, shapes, False)


def _bare(module: nn.Module) -> nn.Module:
    """A private copy without the module's own hooks: those still run around the compiled graph."""
    copied = shadow(module, False)
    copied._forward_pre_hooks.clear()
    copied._forward_hooks.clear()
    check_hooks(copied)
    return copied


def _variants(module: nn.Module, known: Seen) -> tuple[Any, Any]:
    """An example for the commonest kind of call, and dynamic shapes for the sizes that differ between such calls."""
    groups: list[list[tuple[pytree.TreeSpec, tuple[Any, ...]]]] = []
    for call in known.calls:
        group = next((g for g in groups if _alike(g[0], call)), None)
        if group is None:
            groups.append([call])
        else:
            group.append(call)
    group = max(groups, key=len)
    spec, leaves = max(group, key=lambda call: sum(x.meta.numel() for x in call[1] if isinstance(x, _Shape)))
    example = pytree.tree_unflatten([x.make() if isinstance(x, _Shape) else x for x in leaves], spec)
    columns = list(zip(*(call[1] for call in group)))
    dynamic = [_differing(column) for column in columns]
    if not any(dynamic):
        return example, None
    args, kwargs = pytree.tree_unflatten(dynamic, spec)
    shapes = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    for name, param in inspect.signature(module.forward).parameters.items():
        if param.kind is param.VAR_KEYWORD:
            shapes.update(shapes.pop(name, {}))
    return example, shapes


def _alike(a: Any, b: Any) -> bool:
    if a[0] != b[0]:
        return False
    return all(
        x.kind() == y.kind() if isinstance(x, _Shape) and isinstance(y, _Shape) else same(x, y)
        for x, y in zip(a[1], b[1])
    )


def _differing(column: tuple[Any, ...]) -> dict[int, Any] | None:
    if not isinstance(column[0], _Shape):
        return None
    sizes = zip(*(x.meta.shape for x in column))
    return {dim: torch.export.Dim.AUTO for dim, found in enumerate(sizes) if len(set(found)) > 1} or None


def _callable_blind(module: nn.Module) -> bool:
    """Whether a module without known calls has one obvious way to be called."""
    if isinstance(module, OWNING):
        return True
    parameters = inspect.signature(module.forward).parameters.values()
    return all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _own_weights(module: nn.Module) -> bool:
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values()) and not isinstance(
        module, nn.Embedding
    )


def _owns_weights(module: nn.Module) -> bool:
    return any(_own_weights(m) for m in module.modules())


def _has_site(captured: Captured) -> bool:
    """Whether a product in the graph has an operand that is computed from constants alone."""
    fixed: set[Any] = set()
    for node in captured.gm.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op != "placeholder" and inputs and all(n in fixed for n in inputs)):
            fixed.add(node)
        elif opname(node) not in ("", "aten::embedding") and any(o in fixed for o in operands(node)):
            return True
    return False


def _attach_inputs(model: nn.Module, example: Any, plan: RegionPlan) -> None:
    """Run the model once more and keep, for every region, the arguments of a call that its graph takes.

    Tensors are kept, not cloned: most are shared between regions. What a later in-place write spoils stays random.
    """
    probe = shadow(model, False, buffers=True)
    kept: dict[str, tuple[Any, list[int]]] = {}

    def keep(path: str, captured: Captured) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in kept and _fits(captured, args, kwargs):
                kept[path] = ((args, dict(kwargs)), [_version(x) for x in pytree.tree_leaves((args, kwargs))])

        return hook

    for path, captured in plan.regions:
        probe.get_submodule(path).register_forward_pre_hook(keep(path, captured), with_kwargs=True)
    _run(probe, example)
    for path, captured in plan.regions:
        if path in kept and kept[path][1] == [_version(x) for x in pytree.tree_leaves(kept[path][0])]:
            captured.example = kept[path][0]


def _fits(captured: Captured, args: Any, kwargs: Any) -> bool:
    from sparsec.call import make_binders

    attempt = make_binders(captured.call)[1]
    return attempt(_Taker(), *args, **kwargs) is not MISMATCH


class _Taker:
    """Stands in for a compiled module: takes any flat call."""

    def run(self, *flat: Any) -> None:
        return None


# Installing


def install_region(root: nn.Module, path: str, compiled: CompiledModule) -> nn.Module:
    """Let the module at `path` run on its compiled graph, and on its own code for calls the graph was not made for.

    The module keeps its class (a subclass of it with a new `forward`), attributes and state-dict keys; its graph is the
    child `sparsec_region`. Returns the module.
    """
    module = root.get_submodule(path)
    module.__class__ = _region_class(type(module))
    module.add_module(CHILD, compiled)
    return module


_CLASSES: dict[tuple[type, str], type] = {}


def _region_class(base: type) -> type:
    """A subclass of a module's class, of the same name, whose forward tries the compiled graph first."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = self._modules[CHILD].attempt(*args, **kwargs)
        return base.forward(self, *args, **kwargs) if found is MISMATCH else found  # type: ignore[attr-defined]

    return _subclass(base, "region", {"forward": forward})


def _guard_root(root: nn.Module) -> None:
    """Refuse train() and casts before they have reached half of the modules."""
    base = type(root)

    def train(self: Any, mode: bool = True) -> Any:
        if mode and any(isinstance(m, CompiledModule) for m in self.modules()):
            raise InputError(
                f"{base.__name__} was compiled for inference; train the original model and compile it again"
            )
        return base.train(self, mode)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        for module in self.modules():
            if isinstance(module, CompiledModule):
                module.check_apply(fn)
        return base._apply(self, fn, recurse)  # type: ignore[no-untyped-call]

    root.__class__ = _subclass(base, "root", {"train": train, "_apply": _apply})


def _subclass(base: type, role: str, methods: dict[str, Any]) -> type:
    key = (base, role)
    if key not in _CLASSES:
        space = {**methods, "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _CLASSES[key] = type(base)(base.__name__, (base,), space)
    return _CLASSES[key]
