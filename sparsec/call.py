"""How a captured model may be called: which arguments it takes, and the binder that checks and flattens them."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sparsec.errors import InputError, nearest, recall

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "<as captured>"})()
"""Default of a parameter captured with a constant other than its own default: leaving it out means "as captured"."""

MISMATCH: Any = type("Mismatch", (), {"__repr__": lambda self: "<mismatch>"})()
"""What `attempt` returns instead of raising when a call is not the captured one."""

_KINDS = inspect.Parameter
_STARRED = (_KINDS.VAR_POSITIONAL, _KINDS.VAR_KEYWORD)
_counter = 0


@dataclass(frozen=True)
class Leaf:
    """One leaf of the arguments: a tensor that feeds a placeholder, or a constant that the graph has baked in.

    `dims` are sizes in elements: an int where the capture is static, an expression over `CallInfo.symbols` where it is
    not, None when any shape is taken.
    """

    name: str  # "input_ids", "batch['mask']"
    slot: bool  # becomes an argument of the graph
    dims: tuple[int | str, ...] | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    value: Any = None  # the constant when `slot` is False
    also: tuple[Any, ...] = ()  # other values that mean the same to this capture

    def accepts(self, value: Any) -> bool:
        """Whether `value` is the constant that was captured."""
        return value is ABSENT or any(same(value, known) for known in (self.value, *self.also))


@dataclass(frozen=True)
class Argument:
    """One parameter of the signature and the leaves found under it (`spec` is None for a bare leaf)."""

    param: str
    leaves: tuple[Leaf, ...]
    spec: pytree.TreeSpec | None
    given: bool  # the example passed it

    @property
    def lone(self) -> Leaf | None:
        return self.leaves[0] if self.spec is None else None


@dataclass(frozen=True)
class CallInfo:
    """Everything about a call that the graph itself does not know; immutable, shared by copies of the module."""

    signature: inspect.Signature
    arguments: tuple[Argument, ...]
    rung: str  # "export" | "trace"
    training: bool = False
    symbols: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)  # name -> (lowest, highest size)
    conditions: tuple[str, ...] = ()  # further expressions over `symbols` that the graph relies on
    owner: str = "model"  # class name, for messages

    def __deepcopy__(self, memo: dict[int, Any]) -> CallInfo:
        return self

    @property
    def leaves(self) -> Iterator[Leaf]:
        return (leaf for argument in self.arguments for leaf in argument.leaves)

    @property
    def guards(self) -> tuple[Leaf, ...]:
        """The tensor leaves, in the order of the graph's placeholders."""
        return tuple(leaf for leaf in self.leaves if leaf.slot)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that carry at least one captured tensor."""
        return tuple(a.param for a in self.arguments if any(leaf.slot for leaf in a.leaves))

    @property
    def constants(self) -> dict[str, Any]:
        """Leaf name -> the value that was baked in."""
        return {leaf.name: leaf.value for leaf in self.leaves if not leaf.slot}

    @property
    def dynamic(self) -> bool:
        return any(leaf.dims is None or any(isinstance(d, str) for d in leaf.dims) for leaf in self.guards)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """The graph's flat arguments for a call with `args` and `kwargs`; InputError when the call does not fit."""
        bound = self.signature.bind(*args, **(kwargs or {})).arguments
        flat: list[Any] = []
        for argument in self.arguments:
            value = bound.get(argument.param, ABSENT)
            if not any(leaf.slot for leaf in argument.leaves):
                continue
            found = [value] if argument.spec is None else flatten_like(value, argument.spec)
            if found is None or value is ABSENT:
                raise InputError(explain(self, dict(bound)))
            flat.extend(v for v, leaf in zip(found, argument.leaves) if leaf.slot)
        return tuple(flat)


def same(value: Any, known: Any) -> bool:
    """Equality that never raises and never confuses 1, 1.0 and True."""
    if value is known:
        return True
    if type(value) is not type(known):
        return False
    try:
        return bool(value == known)
    except Exception:  # arrays and the like answer with something that has no truth value
        return False


def flatten_like(value: Any, spec: pytree.TreeSpec) -> list[Any] | None:
    """Leaves of `value` in the order of `spec`, or None when the structures differ; the order of dict keys is free."""
    leaves, found = pytree.tree_flatten(value)
    if found == spec:
        return leaves
    if spec.is_leaf():
        return None
    if isinstance(value, dict) and spec.type is type(value):
        keys = list(spec.context[1] if type(value) is not dict and isinstance(spec.context, list) else spec.context)
        if len(keys) != len(value) or any(key not in value for key in keys):
            return None
        children = [value[key] for key in keys]
    elif spec.type is type(value) and isinstance(value, (tuple, list)) and len(value) == spec.num_children:
        children = list(value)
    else:
        return None
    parts = [flatten_like(child, sub) for child, sub in zip(children, spec.children())]
    if any(part is None for part in parts):
        return None
    return [leaf for part in parts if part is not None for leaf in part]


# ---------------------------------------------------------------- the generated binder


def make_binders(call: CallInfo) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`forward`, which raises InputError on a call that was not captured, and `attempt`, which returns MISMATCH.

    Python's own argument passing does the binding: a generated function with the original signature costs about a
    microsecond, `inspect.Signature.bind` eight.
    """
    writer = _Writer(call)
    strict = writer.function("forward", "raise _sc_error(self, {names})", skip="_sc_compiling()")
    soft = writer.function("attempt", "return _sc_mismatch", skip="False")
    return _define(strict, "forward", writer.env, call), _define(soft, "attempt", writer.env, call)


def _define(source: str, name: str, env: dict[str, Any], call: CallInfo) -> Callable[..., Any]:
    global _counter
    _counter += 1
    filename = f"<sparsec binder {_counter}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = dict(env)
    exec(compile(source, filename, "exec"), scope)
    function: Any = scope[name]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    with contextlib.suppress(ValueError):  # a parameter of forward is itself called `self`
        function.__signature__ = call.signature.replace(parameters=[own, *call.signature.parameters.values()])
    return function  # type: ignore[no-any-return]


class _Writer:
    """Prints the binder. Every name it puts into the text is an identifier of the signature or one of its own."""

    def __init__(self, call: CallInfo) -> None:
        self.call = call
        self.env: dict[str, Any] = {
            "_sc_compiling": torch.compiler.is_compiling,
            "_sc_flatten": flatten_like,
            "_sc_same": same,
            "_sc_mismatch": MISMATCH,
            "_sc_recall": recall,
            "_sc_error": lambda module, values: InputError(explain(call, values)),
        }
        self.bound: set[str] = set()

    def constant(self, value: Any) -> str:
        name = f"_sc_{len(self.env)}"
        self.env[name] = value
        return name

    def function(self, name: str, reject: str, skip: str) -> str:
        self.bound = set()
        prepare: list[str] = []
        checks: list[str] = []
        passed: list[str] = []
        for argument in self.call.arguments:
            if argument.lone is not None:
                exprs = [argument.param]
            elif not argument.leaves and self.call.signature.parameters[argument.param].kind in _STARRED:
                checks.append(f"not {argument.param}")
                continue
            else:
                variable = f"_sc_t{len(prepare)}"
                prepare.append(f"{variable} = _sc_flatten({argument.param}, {self.constant(argument.spec)})")
                checks.append(f"{variable} is not None")
                exprs = [f"{variable}[{i}]" for i in range(len(argument.leaves))]
            for leaf, expr in zip(argument.leaves, exprs):
                checks.extend(self.checks(leaf, expr))
                if leaf.slot:
                    passed.append(expr)
        checks.extend(f"({text})" for text in self.call.conditions if _names(text) <= self.bound)
        names = "{" + ", ".join(f"{a.param!r}: {a.param}" for a in self.call.arguments) + "}"
        test = "\n                and ".join(checks) or "True"
        lines = [f"def {name}({self.parameters()}):", *(f"    {line}" for line in prepare)]
        lines += [
            f"    if not {skip}:",
            "        try:",
            f"            _sc_ok = ({test})",
            "        except (AttributeError, TypeError):",
            "            _sc_ok = False",
            "        if not _sc_ok:",
            f"            {reject.format(names=names)}",
            "    try:",
            f"        return self.run({', '.join(passed)})",
            "    except ValueError as _sc_raised:",
            "        _sc_recall(_sc_raised)",
            "        raise",
        ]
        return "\n".join(lines) + "\n"

    def parameters(self) -> str:
        by_name = {a.param: a for a in self.call.arguments}
        parts, star, slash = ["self"], False, False
        for name, param in self.call.signature.parameters.items():
            if slash and param.kind is not _KINDS.POSITIONAL_ONLY:
                parts.append("/")
            slash = param.kind is _KINDS.POSITIONAL_ONLY
            if param.kind is _KINDS.VAR_POSITIONAL:
                star = True
                parts.append(f"*{name}")
                continue
            if param.kind is _KINDS.VAR_KEYWORD:
                parts.append(f"**{name}")
                continue
            if param.kind is _KINDS.KEYWORD_ONLY and not star:
                star = True
                parts.append("*")
            parts.append(name if param.default is _KINDS.empty else f"{name}={self.default(param, by_name[name])}")
        if slash:
            parts.append("/")
        return ", ".join(parts)

    def default(self, param: inspect.Parameter, argument: Argument) -> str:
        leaf = argument.lone
        absent = leaf is not None and not leaf.slot and not leaf.accepts(param.default)
        return self.constant(ABSENT if absent else param.default)

    def checks(self, leaf: Leaf, expr: str) -> Iterator[str]:
        if not leaf.slot:
            known = self.constant(leaf.value)
            quick = f"{expr} is {known} or _sc_same({expr}, {known})"
            extra = f" or {self.constant(leaf.accepts)}({expr})"  # rare: values equivalent to the captured one
            yield f"({quick}{extra})"
            return
        if leaf.dims is not None:
            yield from self.shape(leaf.dims, expr)
        if leaf.dtype is not None:
            yield f"{expr}.dtype is {self.constant(leaf.dtype)}"
        if leaf.device is not None:
            cpu = leaf.device.type == "cpu"
            yield f"{expr}.is_cpu" if cpu else f"{expr}.device == {self.constant(leaf.device)}"

    def shape(self, dims: tuple[int | str, ...], expr: str) -> Iterator[str]:
        if all(isinstance(d, int) for d in dims):
            yield f"{expr}.shape == {dims!r}"
            return
        variable = f"_sc_s{len(self.env)}"
        self.env[variable] = None  # reserves the number
        yield f"len({variable} := {expr}.shape) == {len(dims)}"
        for index, dim in enumerate(dims):
            if isinstance(dim, str) and dim in self.call.symbols and dim not in self.bound:
                low, high = self.call.symbols[dim]
                self.bound.add(dim)
                bounds = f"{low} <= ({dim} := {variable}[{index}])"
                yield bounds if high is None else f"{bounds} <= {high}"
            elif isinstance(dim, int) or _names(dim) <= self.bound:
                yield f"{variable}[{index}] == {dim}"


def _names(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text)) - {"and", "or", "not", "max", "min", "abs"}


# ---------------------------------------------------------------- the words


def explain(call: CallInfo, values: Mapping[str, Any]) -> str:
    """Why a call does not fit: the first argument that is wrong, what was expected, what to do."""
    sizes: dict[str, int] = {}
    for argument in call.arguments:
        value = values.get(argument.param, ABSENT)
        if argument.spec is None:
            found: list[Any] | None = [value]
        else:
            found = flatten_like(value, argument.spec)
        if found is None:
            return _structure(call, argument, value)
        for leaf, part in zip(argument.leaves, found):
            problem = _leaf_problem(call, leaf, part, sizes)
            if problem:
                return problem
    for text in call.conditions:
        if _names(text) <= sizes.keys() and not eval(text, {"max": max, "min": min, "abs": abs}, dict(sizes)):
            return (
                f"{call.owner} was captured for sizes with {text}, got {sizes}; "
                "compile once more with example inputs of these sizes"
            )
    return f"the call to the compiled {call.owner} does not match the captured one"


def _structure(call: CallInfo, argument: Argument, value: Any) -> str:
    if call.signature.parameters[argument.param].kind is _KINDS.VAR_KEYWORD and isinstance(value, dict):
        known = list(argument.spec.context) if argument.spec is not None and not argument.spec.is_leaf() else []
        for name in value:
            if name not in known:
                return (
                    f"argument {name!r} was not captured; pass it in example_kwargs when compiling "
                    f"({nearest(name, known)})"
                )
    return (
        f"{argument.param}: the structure of this argument differs from the captured one; got "
        f"{_describe(value)}, expected {argument.spec}; compile with example inputs of this structure"
    )


def _leaf_problem(call: CallInfo, leaf: Leaf, value: Any, sizes: dict[str, int]) -> str | None:
    if not leaf.slot:
        if leaf.accepts(value):
            return None
        if isinstance(value, torch.Tensor):
            return (
                f"{leaf.name}: got {_describe(value)}, but this argument was not captured (it was {leaf.value!r}); "
                "pass it in the example inputs when compiling"
            )
        return (
            f"{leaf.name}: got {value!r}, but the graph was captured with {leaf.value!r}; "
            "compile once more with this value, or leave the argument out"
        )
    if leaf.dtype is None:
        return None
    if not isinstance(value, torch.Tensor):
        got = "nothing" if value is ABSENT else _describe(value)
        return f"{leaf.name}: got {got}, expected a tensor of shape {_shape_text(leaf)} and dtype {leaf.dtype}"
    if leaf.dims is not None and not _shape_fits(call, leaf.dims, tuple(value.shape), sizes):
        fix = "compile with dynamic_shapes (for example dynamic_shapes='batch') or with example inputs of this shape"
        return f"{leaf.name}: got shape {tuple(value.shape)}, expected {_shape_text(leaf, call)}; {fix}"
    if value.dtype is not leaf.dtype:
        fix = "convert the input, or cast the model before compiling"
        return f"{leaf.name}: got dtype {value.dtype}, expected {leaf.dtype}; {fix}"
    if value.device != leaf.device and not (value.is_cpu and leaf.device is not None and leaf.device.type == "cpu"):
        return f"{leaf.name}: got a tensor on {value.device}, expected {leaf.device}; move the input there"
    return None


def _shape_fits(call: CallInfo, dims: tuple[int | str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    if len(dims) != len(shape):
        return False
    for dim, size in zip(dims, shape):
        if isinstance(dim, int):
            if dim != size:
                return False
        elif dim in call.symbols and dim not in sizes:
            low, high = call.symbols[dim]
            if size < low or (high is not None and size > high):
                return False
            sizes[dim] = size
        elif _names(dim) <= sizes.keys() and eval(dim, {"max": max, "min": min, "abs": abs}, dict(sizes)) != size:
            return False
    return True


def _shape_text(leaf: Leaf, call: CallInfo | None = None) -> str:
    if leaf.dims is None:
        return "(any)"
    text = "(" + ", ".join(map(str, leaf.dims)) + ("," if len(leaf.dims) == 1 else "") + ")"
    if call is not None and call.symbols and any(isinstance(d, str) for d in leaf.dims):
        used = set().union(*(_names(d) for d in leaf.dims if isinstance(d, str)))
        limits = [
            f"{low} <= {name}" + ("" if high is None else f" <= {high}")
            for name, (low, high) in call.symbols.items()
            if name in used
        ]
        text += f" with {', '.join(limits)}" if limits else ""
    return text


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if value is ABSENT:
        return "nothing"
    return f"{type(value).__name__} {value!r:.60}"
