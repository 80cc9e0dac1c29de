"""Values in the JSON of a saved model: arguments of calls, trees of outputs, names and size expressions."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import keyword
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any
from unicodedata import normalize

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparsec.errors import LoadError, SpecError

DEPTH = 64  # nesting of arguments and trees
TEXT = 100_000  # longest string

_TORCH_VALUES: dict[str, type] = {
    "dtype": torch.dtype, "layout": torch.layout, "memory": torch.memory_format,
}  # fmt: skip
_CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "odict": OrderedDict}
_MODULE = re.compile(r"transformers(\.[a-z_][a-z0-9_]*){1,8}")
_CALLS = ("max", "min", "abs")
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div)
_COMPARE = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def encode(value: Any) -> Any:
    """The JSON form of an argument; SpecError for a value that has none."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _TORCH_VALUES.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise SpecError(f"{value!r:.80} ({type(value).__name__}) has no form in a saved model")


def decode(data: Any, nodes: Callable[[str], Any], depth: int = 0) -> Any:
    """The inverse of `encode`; `nodes` gives the node of a name. LoadError for anything else."""
    if depth > DEPTH:
        raise LoadError(f"arguments nest deeper than {DEPTH}")
    if data is None or type(data) in (bool, int, float):
        return data
    if type(data) is str:
        return text(data)
    if isinstance(data, list):
        return [decode(v, nodes, depth + 1) for v in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise LoadError(f"{data!r:.80} is no argument")
    ((kind, inner),) = data.items()
    if kind == "node" and isinstance(inner, str):
        return nodes(inner)
    if kind == "tuple" and isinstance(inner, list):
        return tuple(decode(v, nodes, depth + 1) for v in inner)
    if kind == "slice" and isinstance(inner, list) and len(inner) == 3:
        return slice(*(decode(v, nodes, depth + 1) for v in inner))
    if kind == "ellipsis" and inner is True:
        return Ellipsis
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "complex" and isinstance(inner, list) and len(inner) == 2:
        parts = [decode(v, nodes, depth + 1) for v in inner]
        if all(isinstance(p, (int, float)) for p in parts):
            return complex(*parts)
    if kind == "device" and isinstance(inner, str):
        return device(inner)
    if kind in _TORCH_VALUES:
        return torch_value(kind, inner)
    raise LoadError(f"{data!r:.80} is no argument")


def torch_value(kind: str, name: Any) -> Any:
    """`torch.<name>` if it is a dtype, layout or memory format, whichever `kind` says."""
    if isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name):
        found = getattr(torch, name, None)
        if isinstance(found, _TORCH_VALUES[kind]):
            return found
    raise LoadError(f"{name!r:.60} is no {kind} of this torch")


def device(name: Any) -> torch.device:
    """A CPU or CUDA device."""
    if isinstance(name, str) and re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        return torch.device(name)
    raise LoadError(f"{name!r:.40} is no device that a saved model may name; they are cpu, cuda and cuda:N")


def text(value: Any, what: str = "a text", longest: int = TEXT) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise LoadError(f"{what} is {value!r:.60}, expected at most {longest} characters")
    return value


def integer(value: Any, what: str, low: int = 0, high: int = 2**63 - 1) -> int:
    if type(value) is not int or not low <= value <= high:
        raise LoadError(f"{what} is {value!r:.40}, expected an integer from {low} to {high}")
    return value


def table(value: Any, what: str, keys: Iterable[str]) -> dict[str, Any]:
    """`value` as an object with exactly these keys."""
    wanted = list(keys)
    if not isinstance(value, dict) or sorted(value) != sorted(wanted):
        raise LoadError(f"{what} is not an object with the keys {', '.join(wanted)}")
    return value


def sequence(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise LoadError(f"{what} is not a list")
    return value


def identifier(name: Any, what: str) -> str:
    """A name that may stand in generated Python: an identifier, no keyword, none of the generated ones.

    Python reads identifiers in their NFKC form, so that only names in it mean what they say.
    """
    plain = isinstance(name, str) and len(name) <= 1000 and name.isidentifier()
    if not plain or keyword.iskeyword(name) or name.startswith(("__", "_sc_")) or normalize("NFKC", name) != name:
        raise LoadError(f"{what} {name!r:.60} is not a usable identifier")
    return str(name)


def expression(source: Any, symbols: Iterable[str]) -> str:
    """Arithmetic over the named sizes: integers, + - * / // %, comparisons, and, or, not, max, min, abs; nothing else.

    The binder of a compiled module evaluates these texts, so that the grammar is closed here.
    """
    known = frozenset(symbols)
    try:
        tree = ast.parse(text(source, "a size expression", 2000), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LoadError(f"{source!r:.80} is no size expression") from error
    if "\n" in source or "\r" in source or "#" in source:
        raise LoadError(f"{source!r:.80} is no size expression: it spans lines or holds a comment")
    for node in ast.walk(tree.body):
        _part(node, known, source)
    return str(source)


def _part(node: ast.AST, known: frozenset[str], source: str) -> None:
    if isinstance(node, ast.Constant):
        good = type(node.value) is int and abs(node.value) < 2**63
    elif isinstance(node, ast.Name):
        good = node.id in known or node.id in _CALLS
    elif isinstance(node, ast.Call):
        good = isinstance(node.func, ast.Name) and node.func.id in _CALLS and not node.keywords
    elif isinstance(node, ast.BinOp):
        good = isinstance(node.op, _OPERATORS)
    elif isinstance(node, ast.Compare):
        good = all(isinstance(op, _COMPARE) for op in node.ops)
    else:
        plain = (ast.BoolOp, ast.UnaryOp, ast.boolop, ast.unaryop, ast.operator, ast.cmpop, ast.expr_context)
        good = isinstance(node, plain)
    if not good:
        raise LoadError(f"{source!r:.80} is no size expression: {type(node).__name__} is not allowed in one")


# Trees


def encode_tree(spec: pytree.TreeSpec) -> Any:
    """The JSON form of a tree of inputs or outputs; SpecError for containers that a file cannot hold."""
    if spec.is_leaf():
        return "*"
    children = [encode_tree(c) for c in spec.children()]
    for name, kind in _CONTAINERS.items():
        if spec.type is kind:
            keys = list(spec.context) if name in ("dict", "odict") else None
            if keys is not None and not all(type(k) in (str, int) for k in keys):
                raise SpecError(f"a dict with the keys {keys!r:.80} has no form in a saved model; use str or int keys")
            return {name: children} if keys is None else {name: children, "keys": keys}
    if model_output(spec.type) and all(isinstance(k, str) for k in spec.context):
        where = f"{spec.type.__module__}:{spec.type.__qualname__}"
        return {"output": where, "keys": list(spec.context), "children": children}
    raise SpecError(
        f"the model takes or returns a {spec.type.__name__}, which a saved model cannot hold: tuples, lists, dicts and "
        "the outputs of transformers can; wrap the model so that it returns one of them"
    )


def decode_tree(data: Any, depth: int = 0) -> pytree.TreeSpec:
    """The inverse of `encode_tree`. An output class that is not installed here becomes a dict of its fields."""
    if depth > DEPTH:
        raise LoadError(f"a tree nests deeper than {DEPTH}")
    if data == "*":
        return pytree.treespec_leaf()
    if not isinstance(data, dict):
        raise LoadError(f"{data!r:.60} is no tree")
    if "output" in data:
        table(data, "a tree", ("output", "keys", "children"))
        children = [decode_tree(c, depth + 1) for c in sequence(data["children"], "children of a tree")]
        keys = [identifier(k, "output field") for k in sequence(data["keys"], "keys of a tree")]
        _count(keys, children)
        kind = _output_class(data["output"], keys)
        return pytree.TreeSpec(kind, keys, children)
    name = next((n for n in _CONTAINERS if n in data), None)
    if name is None:
        raise LoadError(f"{data!r:.60} is no tree")
    table(data, "a tree", (name, "keys") if name in ("dict", "odict") else (name,))
    children = [decode_tree(c, depth + 1) for c in sequence(data[name], "children of a tree")]
    if "keys" not in data:
        return pytree.TreeSpec(_CONTAINERS[name], None, children)
    keys = sequence(data["keys"], "keys of a tree")
    if any(type(k) not in (int, str) or len(str(k)) >= 1000 for k in keys):
        raise LoadError("keys of a dict in a tree are texts and integers")
    _count(keys, children)
    return pytree.TreeSpec(_CONTAINERS[name], list(keys), children)


def _count(keys: list[Any], children: list[Any]) -> None:
    if len(set(map(repr, keys))) != len(keys) or len(keys) != len(children):
        raise LoadError(f"a tree has {len(keys)} keys for {len(children)} children, or one key twice")


def model_output(kind: Any) -> bool:
    """Whether a class is an output dataclass of transformers itself."""
    if not isinstance(kind, type) or not _MODULE.fullmatch(kind.__module__):
        return False
    from transformers.utils.generic import ModelOutput

    return issubclass(kind, ModelOutput) and dataclasses.is_dataclass(kind)


def _output_class(where: Any, keys: list[str]) -> type:
    """The class of a saved output: only of transformers, only a ModelOutput with these fields; otherwise dict."""
    module, _, name = text(where, "an output class", 300).partition(":")
    if not _MODULE.fullmatch(module) or not re.fullmatch(r"[A-Z][A-Za-z0-9]{0,120}", name):
        raise LoadError(f"{where!r:.80} is no output class: a saved model names those of transformers only")
    try:
        found: Any = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return dict
    if not model_output(found) or not set(keys) <= {f.name for f in dataclasses.fields(found)}:
        return dict
    kind: type = found
    return kind
