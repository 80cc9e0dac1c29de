"""How a saved model is called: CallInfo as JSON and back, with every name and expression checked."""

from __future__ import annotations

import inspect
from typing import Any

from sparsec.call import Argument, CallInfo, Leaf
from sparsec.errors import LoadError, SpecError
from sparsec.save_values import (
    decode,
    decode_tree,
    device,
    encode,
    encode_tree,
    expression,
    identifier,
    integer,
    sequence,
    table,
    text,
    torch_value,
)  # fmt: skip

_KINDS = {kind.name: kind for kind in inspect._ParameterKind}
_RESERVED = ("self", "max", "min", "abs")


def encode_call(call: CallInfo) -> dict[str, Any]:
    """The JSON form of a CallInfo; SpecError names the argument that has none."""
    return {
        "owner": call.owner,
        "rung": call.rung,
        "parameters": [_parameter(p) for p in call.signature.parameters.values()],
        "arguments": [_argument(a) for a in call.arguments],
        "symbols": {name: list(bounds) for name, bounds in call.symbols.items()},
        "conditions": list(call.conditions),
    }


def _parameter(param: inspect.Parameter) -> dict[str, Any]:
    required = param.default is param.empty
    return {
        "name": param.name, "kind": param.kind.name, "required": required,
        "default": None if required else _constant(param.name, param.default),
    }  # fmt: skip


def _constant(name: str, value: Any) -> Any:
    try:
        return encode(value)
    except SpecError as error:
        raise SpecError(f"argument {name!r}: {error}; compile with a plain value of this argument to save") from error


def _argument(argument: Argument) -> dict[str, Any]:
    return {
        "param": argument.param, "given": argument.given,
        "tree": None if argument.spec is None else encode_tree(argument.spec),
        "leaves": [_leaf(leaf) for leaf in argument.leaves],
    }  # fmt: skip


def _leaf(leaf: Leaf) -> dict[str, Any]:
    if not leaf.slot:
        also = [_constant(leaf.name, v) for v in leaf.also]
        return {"name": leaf.name, "value": _constant(leaf.name, leaf.value), "also": also}
    return {
        "name": leaf.name, "dims": None if leaf.dims is None else list(leaf.dims),
        "dtype": None if leaf.dtype is None else encode(leaf.dtype)["dtype"],
        "device": None if leaf.device is None else str(leaf.device),
    }  # fmt: skip


def decode_call(data: Any) -> CallInfo:
    """The inverse of `encode_call`. Names and expressions become part of the binder: LoadError unless harmless."""
    table(data, "call", ("owner", "rung", "parameters", "arguments", "symbols", "conditions"))
    if data["rung"] not in ("export", "trace"):
        raise LoadError(f"call: rung {data['rung']!r:.40} is neither export nor trace")
    symbols: dict[str, tuple[int, int | None]] = {}
    if not isinstance(data["symbols"], dict):
        raise LoadError("call: symbols is not an object")
    for name, bounds in data["symbols"].items():
        low, high = _pair(bounds)
        symbols[_fresh(name, "symbol")] = (low, high)
    signature = _signature(sequence(data["parameters"], "call: parameters"))
    if clash := [n for n in signature.parameters if n in symbols]:
        raise LoadError(f"call: {clash[0]!r} names both a parameter and a size")
    arguments = tuple(_read_argument(a, symbols) for a in sequence(data["arguments"], "call: arguments"))
    if [a.param for a in arguments] != list(signature.parameters):
        raise LoadError("call: its arguments are not the parameters of its signature")
    conditions = tuple(expression(c, symbols) for c in sequence(data["conditions"], "call: conditions"))
    owner = identifier(data["owner"], "class name")
    return CallInfo(signature, arguments, data["rung"], False, symbols, conditions, owner)


def _pair(bounds: Any) -> tuple[int, int | None]:
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise LoadError(f"call: {bounds!r:.60} is no range of sizes")
    return integer(bounds[0], "lowest size"), None if bounds[1] is None else integer(bounds[1], "highest size")


def _fresh(name: Any, what: str) -> str:
    if identifier(name, what) in _RESERVED:
        raise LoadError(f"{what} {name!r} has a name of the binder's own")
    return str(name)


def _signature(data: list[Any]) -> inspect.Signature:
    parameters = []
    for item in data:
        table(item, "parameter", ("name", "kind", "required", "default"))
        if not isinstance(item["kind"], str) or item["kind"] not in _KINDS or type(item["required"]) is not bool:
            raise LoadError(f"parameter {item['name']!r:.60} has the kind {item['kind']!r:.40}")
        default = inspect.Parameter.empty if item["required"] else _value(item["default"])
        try:
            parameters.append(
                inspect.Parameter(_fresh(item["name"], "parameter"), _KINDS[item["kind"]], default=default)
            )
        except ValueError as error:
            raise LoadError(f"parameter {item['name']!r:.60}: {error}") from error
    try:
        return inspect.Signature(parameters)
    except ValueError as error:
        raise LoadError(f"the signature of the model is not valid: {error}") from error


def _value(data: Any) -> Any:
    def no_nodes(name: str) -> Any:
        raise LoadError("a captured value cannot be a node")

    return decode(data, no_nodes)


def _read_argument(data: Any, symbols: dict[str, Any]) -> Argument:
    table(data, "argument", ("param", "given", "tree", "leaves"))
    spec = None if data["tree"] is None else decode_tree(data["tree"])
    leaves = tuple(_read_leaf(leaf, symbols) for leaf in sequence(data["leaves"], "leaves"))
    if len(leaves) != (1 if spec is None else spec.num_leaves) or type(data["given"]) is not bool:
        raise LoadError(f"argument {data['param']!r:.60} has {len(leaves)} leaves, which is not what its tree says")
    return Argument(identifier(data["param"], "argument"), leaves, spec, data["given"])


def _read_leaf(data: Any, symbols: dict[str, Any]) -> Leaf:
    if isinstance(data, dict) and "value" in data:
        table(data, "leaf", ("name", "value", "also"))
        also = tuple(_value(v) for v in sequence(data["also"], "also"))
        return Leaf(text(data["name"], "leaf", 1000), False, value=_value(data["value"]), also=also)
    table(data, "leaf", ("name", "dims", "dtype", "device"))
    dims = None
    if data["dims"] is not None:
        found = sequence(data["dims"], "dims")
        dims = tuple(d if type(d) is int and d >= 0 else expression(d, symbols) for d in found)
    dtype = None if data["dtype"] is None else torch_value("dtype", data["dtype"])
    where = None if data["device"] is None else device(data["device"])
    return Leaf(text(data["name"], "leaf", 1000), True, dims, dtype, where)
