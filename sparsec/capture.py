"""From a model to a flat ATen graph: the ladder of torch.export, then symbolic_trace with a table, then regions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sparsec.call import Argument, CallInfo, Leaf
from sparsec.errors import CaptureError, InputError, SpecError, nearest
from sparsec.failures import explain_failure
from sparsec.flatten import flatten_constants
from sparsec.graph import KEY
from sparsec.private import check_hooks, shadow, storages

__all__ = ["CallInfo", "Captured", "capture_whole"]

MODES = ("auto", "export", "trace")


@dataclass
class Captured:
    """A graph on flat constants, how to call it, and why the rungs above failed ("" when none did).

    `example` holds the arguments the graph was captured with, after duplicating batches of one: (args, kwargs) or None.
    """

    gm: fx.GraphModule
    call: CallInfo
    reason: str = ""
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The example as the graph's flat arguments; empty without example inputs."""
        return self.call.flatten(*self.example) if self.example is not None else ()


def capture_whole(
    model: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    mode: str = "auto",
    *,
    training: bool = False,
) -> Captured:
    """Capture `model` as one graph; the caller's model is only read.

    `example_inputs` is a tuple of positional arguments, one tensor, or a dict of keyword arguments. `dynamic_shapes` is
    what `torch.export.export` takes, or "batch": dimension 0 of every tensor varies. `mode` picks a rung: "export",
    "trace", or "auto" for the first that works. With `training` the graph is the one of train(), else of eval().

    Constants sit flat on the root and still share storage with the caller's parameters, until `CompiledModule.wrap`.
    Raises CaptureError with the file and line that stopped each rung, InputError when the model itself cannot run on
    the example inputs, SpecError for options that mean nothing.
    """
    if mode not in MODES:
        raise SpecError(f"capture={mode!r} is no rung; {nearest(mode, (*MODES, 'regions'))}")
    example = normalise_inputs(model, example_inputs, example_kwargs)
    if example is None and mode == "export":
        raise CaptureError("capture='export' needs example_inputs; give them, or use capture='trace'")
    if dynamic_shapes is not None and example is None:
        raise SpecError("dynamic_shapes means nothing without example_inputs; give both")
    check_hooks(model)
    if example is not None:
        run_once(model, example, training)
    borrowed = storages(model)
    copied = shadow(model, training)
    reasons: list[str] = []
    if mode != "trace" and example is not None:
        try:
            return _finish(capture_export(copied, example, dynamic_shapes, training), reasons, borrowed)
        except (SpecError, InputError):
            raise
        except Exception as error:
            reasons.append(f"torch.export: {explain_failure(error, model)}")
        copied = shadow(model, training)
    if mode != "export":
        from sparsec.capture_trace import capture_trace

        try:
            return _finish(capture_trace(copied, example, dynamic_shapes, training), reasons, borrowed)
        except (SpecError, InputError):
            raise
        except Exception as error:
            reasons.append(f"symbolic_trace: {explain_failure(error, model)}")
    raise CaptureError("the model cannot be captured as one graph; " + "; ".join(reasons))


def _finish(captured: Captured, reasons: list[str], borrowed: frozenset[Any]) -> Captured:
    captured.gm.meta[KEY]["borrowed"] = borrowed
    captured.reason = "; ".join(reasons)
    return captured


# inputs


def normalise_inputs(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """(args, kwargs) as `forward` takes them, or None when there are no example inputs."""
    if not isinstance(model, nn.Module):
        raise SpecError(f"expected a torch.nn.Module, got {type(model).__name__}")
    signature = inspect.signature(model.forward)
    empty = example_inputs is None or (isinstance(example_inputs, (tuple, list, Mapping)) and not example_inputs)
    if empty and not example_kwargs and (example_inputs is None or signature.parameters):
        return None
    kwargs = dict(example_kwargs or {})
    if example_inputs is None:
        args: tuple[Any, ...] = ()
    elif isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), {**example_inputs, **kwargs}
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise InputError(
            f"example_inputs: got {type(example_inputs).__name__}, expected a tuple of arguments, a tensor, or a dict"
        )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}; "
            "example_inputs is a tuple of positional arguments, example_kwargs a dict of keywords"
        ) from None
    return bound.args, bound.kwargs


def describe_call(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]] | None, rung: str, training: bool
) -> CallInfo:
    """The CallInfo of an example call; every tensor leaf becomes a slot whose guard is still open.

    Without an example each required parameter is a slot of any kind and the others keep their defaults.
    """
    signature = inspect.signature(model.forward)
    bound = signature.bind(*example[0], **example[1]).arguments if example is not None else {}
    arguments = []
    for name, param in signature.parameters.items():
        if name in bound:
            arguments.append(_argument(name, bound[name]))
        elif param.kind is param.VAR_POSITIONAL:
            arguments.append(_argument(name, ()))
        elif param.kind is param.VAR_KEYWORD:
            arguments.append(_argument(name, {}))
        elif param.default is param.empty:
            arguments.append(Argument(name, (Leaf(name, True),), None, True))
        else:
            arguments.append(Argument(name, (Leaf(name, False, value=param.default),), None, False))
    return CallInfo(signature, tuple(arguments), rung, training, owner=type(model).__name__)


def _argument(name: str, value: Any) -> Argument:
    found, spec = pytree.tree_flatten_with_path(value)
    leaves = tuple(
        Leaf(
            name + pytree.keystr(path),
            isinstance(leaf, torch.Tensor),
            value=None if isinstance(leaf, torch.Tensor) else leaf,
        )
        for path, leaf in found
    )
    return Argument(name, leaves, None if spec.is_leaf() else spec, True)


def dynamic_dims(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], shapes: Any) -> tuple[Any, Any]:
    """Resolve `dynamic_shapes` and double every dynamic dimension whose example size is 1.

    Export takes a size of 1 for a constant, so a batch of one would make a static graph.
    Returns (the shapes by parameter name, the example).
    """
    from torch.export import Dim

    if shapes is None:
        return None, example
    signature = inspect.signature(model.forward)
    bound = signature.bind(*example[0], **example[1])
    if shapes == "batch":
        tensors = [t for t in pytree.tree_leaves(bound.arguments) if isinstance(t, torch.Tensor) and t.dim()]
        batch = tensors[0].shape[0] if tensors else 0

        def batched(leaf: Any) -> Any:
            fits = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == batch
            return {0: Dim.AUTO} if fits else None

        shapes = {name: pytree.tree_map(batched, value) for name, value in _combined(signature, bound).items()}
    elif isinstance(shapes, str):
        raise SpecError(f"dynamic_shapes={shapes!r}: the one word it takes is 'batch'; else see torch.export.export")

    def double(leaf: Any, spec: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not spec:
            return leaf
        dims = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        for dim, kind in dims:
            if kind is not None and not isinstance(kind, int) and kind is not Dim.STATIC and leaf.shape[dim] == 1:
                leaf = torch.cat([leaf, leaf], dim)
        return leaf

    combined = _combined(signature, bound)
    specs = list(shapes.values()) if isinstance(shapes, Mapping) else list(shapes)
    by_name = dict(shapes) if isinstance(shapes, Mapping) else dict(zip(combined, specs))
    doubled = {name: _map_with_spec(double, value, by_name.get(name)) for name, value in combined.items()}
    for name, param in signature.parameters.items():
        if param.kind is not param.VAR_KEYWORD and name in bound.arguments:
            bound.arguments[name] = doubled[name]
        elif param.kind is param.VAR_KEYWORD and name in bound.arguments:
            bound.arguments[name] = {key: doubled[key] for key in bound.arguments[name]}
    return by_name, (bound.args, bound.kwargs)


def _combined(signature: inspect.Signature, bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments as torch.export keys them: `**kwargs` are spread, `*args` stay one tuple."""
    combined: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            combined.update(value)
        else:
            combined[name] = value
    return combined


def _map_with_spec(fn: Any, value: Any, spec: Any) -> Any:
    if isinstance(value, torch.Tensor) or spec is None:
        return fn(value, spec)
    if isinstance(value, Mapping) and isinstance(spec, Mapping):
        return type(value)((k, _map_with_spec(fn, v, spec.get(k))) for k, v in value.items())  # type: ignore[call-arg]
    if type(value) in (tuple, list) and isinstance(spec, Sequence):
        return type(value)(_map_with_spec(fn, v, s) for v, s in zip(value, spec))
    return value


def dynamic_leaves(call: CallInfo, by_name: dict[str, Any]) -> dict[str, set[int]]:
    """Leaf name -> the dimensions that were asked to vary, by the shapes of each parameter."""
    found: dict[str, set[int]] = {}
    for argument in call.arguments:
        param = call.signature.parameters[argument.param]
        spec = by_name if param.kind is param.VAR_KEYWORD else by_name.get(argument.param)
        for leaf, shapes in zip(argument.leaves, _leaf_specs(argument.spec, spec)):
            if leaf.slot and shapes:
                items = shapes.items() if isinstance(shapes, dict) else enumerate(shapes)
                found[leaf.name] = {d for d, kind in items if kind is not None and not isinstance(kind, int)}
    return found


def _leaf_specs(tree: pytree.TreeSpec | None, spec: Any) -> Iterator[Any]:
    if tree is None or tree.is_leaf():
        yield spec
        return
    keys = tree.context if isinstance(spec, dict) and tree.type is dict else range(tree.num_children)
    for key, child in zip(keys, tree.children()):
        part = spec.get(key) if isinstance(spec, dict) else spec[key] if spec else None
        yield from _leaf_specs(child, part)


def run_once(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], training: bool = False) -> None:
    """Run a private copy on the example inputs, to find early what no graph can be blamed for.

    Raises InputError when the model fails on them, CaptureError when its forward assigns attributes (export would undo
    that silently and bake in the first value).
    """
    from sparsec.capture_export import check_state

    probe = shadow(model, training, buffers=True)
    before = [dict(vars(m)) for m in probe.modules()]
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, example)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), blame_inputs(model):
        probe(*args, **kwargs)
    try:
        check_state(probe, before)
    except RuntimeError as error:
        raise CaptureError(f"the model cannot be captured as one graph; {explain_failure(error, model)}") from None


@contextlib.contextmanager
def blame_inputs(model: nn.Module) -> Iterator[None]:
    """Turn any failure of a model's own run into an InputError about the example inputs."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"the model itself fails on the example inputs: {explain_failure(error, model)}; "
            "give example inputs that the model accepts"
        ) from error


# rung 1


def capture_export(model: nn.Module, example: Any, shapes: Any, training: bool) -> Captured:
    """torch.export without strict mode, made functional, with flat constants. `model` is a private copy."""
    from sparsec.capture_export import guard, run_export

    given = describe_call(model, example, "export", training).flatten(*example)
    shapes, example = dynamic_dims(model, example, shapes)
    program, notes = run_export(model, example, shapes)
    raw = program.module(check_guards=False)
    call = describe_call(model, example, "export", training)
    call = guard(call, program, raw)
    notes += _specialised(call, dynamic_leaves(call, shapes or {}), given)
    if any("use_cache" in note for note in notes):
        call = _accept(call, "use_cache", False)
    gm = flatten_constants(raw.graph, raw, model, raw.graph._codegen.pytree_info.out_spec, training)
    return Captured(gm, call, example=example, notes=notes)


def _specialised(call: CallInfo, asked: dict[str, set[int]], given: tuple[Any, ...]) -> list[str]:
    """Notes on dimensions that were asked to vary and that the model fixed all the same.

    RuntimeError when the example had size 1 there: the graph would be for the doubled size alone.
    """
    notes = []
    for leaf, value in zip(call.guards, given):
        for dim in sorted(asked.get(leaf.name, ())):
            size = leaf.dims[dim] if leaf.dims is not None else ""
            if isinstance(size, int):
                note = f"dimension {dim} of {leaf.name} cannot vary: the forward fixes it at its example size"
                if size != value.shape[dim]:
                    raise RuntimeError(f"{note}; give example inputs of the size you need, and no dynamic shapes")
                notes.append(f"{note} of {size}")
    return notes


def _accept(call: CallInfo, name: str, value: Any) -> CallInfo:
    """Let a constant argument also be passed as `value`, which means the same to this graph."""
    arguments = tuple(
        replace(a, leaves=tuple(replace(x, also=(*x.also, value)) if x.name == name else x for x in a.leaves))
        for a in call.arguments
    )
    return replace(call, arguments=arguments)
