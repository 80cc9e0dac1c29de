"""Plans as JSON: made once, stored beside a model, read back without searching again.

Reading trusts nothing. Every field is checked for its type and range, and the costs of plans with unknown sizes, which
are sympy expressions, are trees of named operations: no text of a file is ever parsed as an expression.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sparsec.algebra.equation import Equation
from sparsec.algebra.network import Leaf, Network
from sparsec.algebra.operands import symbol
from sparsec.algebra.plan import Output, Plan
from sparsec.algebra.program import Step
from sparsec.errors import LoadError

VERSION = 1
MODES = ("sum", "gemm", "scale", "spmm left", "spmm right", "fft left", "fft right")
KINDS = ("dense", "sparse", "shift")
OPERANDS = ("Dense", "Delta", "Diagonal", "Kron", "KhatriRao", "Toeplitz", "Hankel", "Circulant", "Sparse")
OPERATIONS = ("Add", "Mul", "Pow", "Max", "Min", "log", "ceiling", "floor")
"""What a cost may be made of, besides integers, fractions and sizes."""

DEPTH = 64  # levels of a cost; those that plans have are below ten

Reader = Callable[[Any], Any]


def to_dict(plan: Any) -> dict[str, Any]:
    """A Plan, or the plans of a bucketed one, as numbers, text, lists and dicts that `json` writes."""
    if isinstance(plan, Plan):
        return {"version": VERSION, "plan": _write(plan)}
    return {"version": VERSION, "symbols": [s.name for s in plan.symbols], "plans": [_write(p) for p in plan.plans]}


def from_dict(data: Any) -> Any:
    """The inverse of `to_dict`. Raises LoadError for another version, or for what `to_dict` did not write."""
    if not isinstance(data, dict) or data.get("version") != VERSION:
        found = data.get("version") if isinstance(data, dict) else type(data).__name__
        raise LoadError(f"a stored plan has version {VERSION}, this is {found!r}; make the plan again")
    try:
        if "plan" in data:
            return _plan(data["plan"])
        from sparsec.algebra.buckets import from_plans

        names = _many(_name)(data["symbols"])
        plans = _many(_plan)(data["plans"])
        if not names or not plans:
            raise ValueError("no symbols or no plans")
        return from_plans(names, plans)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise LoadError(f"a stored plan is damaged: {error}; make the plan again") from error


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_write(v) for v in value]
    if dataclasses.is_dataclass(value):
        return {f.name: _write(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"cost": _tree(value)}


def _tree(value: Any) -> Any:
    """A sympy expression as nested lists, operation first; sizes are their names."""
    if value.is_Symbol:
        return value.name
    if value.is_Integer:
        return int(value)
    if value.is_Rational:
        return ["/", int(value.p), int(value.q)]
    name = type(value).__name__
    if name not in OPERATIONS:
        raise LoadError(f"a cost with {name} cannot be stored; known: {', '.join(OPERATIONS)}")
    return [name, *(_tree(a) for a in value.args)]


# -- reading -----------------------------------------------------------------------------------------------------------


def _integer(low: int | None = None) -> Reader:
    def read(value: Any) -> int:
        if type(value) is not int or (low is not None and value < low):
            raise ValueError(f"{value!r} is no integer{'' if low is None else f' from {low} on'}")
        return value

    return read


def _typed(kind: type) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{value!r} is no {kind.__name__}")
        return value

    return read


def _one_of(known: tuple[str, ...]) -> Reader:
    def read(value: Any) -> str:
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
        return str(value)

    return read


def _many(inner: Reader) -> Reader:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is no list")
        return tuple(inner(v) for v in value)

    return read


def _maybe(inner: Reader) -> Reader:
    return lambda value: None if value is None else inner(value)


def _object(cls: type, **fields: Reader) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, dict) or set(value) != set(fields):
            raise ValueError(f"no {cls.__name__} has the fields {value!r:.80}")
        return cls(**{key: inner(value[key]) for key, inner in fields.items()})

    return read


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.isidentifier() or len(value) > 64:
        raise ValueError(f"{value!r} is no name of a size")
    return value


def _number(value: Any) -> Any:
    """A size, a number of FLOPs or of entries: a number, or the tree of an expression."""
    if isinstance(value, dict):
        if set(value) != {"cost"}:
            raise ValueError(f"{value!r:.80} is no cost")
        return _expression(value["cost"], 0)
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is no number")
    return value


def _expression(tree: Any, depth: int) -> Any:
    import sympy

    if depth > DEPTH:
        raise ValueError(f"a cost is nested deeper than {DEPTH}")
    if type(tree) is int:
        return sympy.Integer(tree)
    if isinstance(tree, str):
        return symbol(_name(tree))
    if not isinstance(tree, list) or len(tree) < 2:
        raise ValueError(f"{tree!r:.80} is no cost")
    operation, *rest = tree
    if operation == "/":
        top, bottom = (_integer()(n) for n in rest)
        if bottom == 0:
            raise ValueError("a cost divides by zero")
        return sympy.Rational(top, bottom)
    name = _one_of(OPERATIONS)(operation)
    values = [_expression(t, depth + 1) for t in rest]
    if name == "Pow" and (len(values) != 2 or not values[1].is_number or abs(values[1]) > 64):
        raise ValueError("a cost has a power that no plan has")
    return getattr(sympy, name)(*values)


_ATOMS = _many(_integer(0))
_leaf = _object(
    Leaf, operand=_integer(0), path=_ATOMS, kind=_one_of(KINDS), axes=_many(_ATOMS), indices=_ATOMS,
    complex=_typed(bool), symmetric=_typed(bool), nnz=_maybe(_integer(0)), shift_flops=_many(_integer(0)),
    digits=_many(_ATOMS),
)  # fmt: skip
_network = _object(
    Network, equation=_object(Equation, inputs=_many(_typed(str)), output=_typed(str)), sizes=_many(_number),
    names=_many(_typed(str)), leaves=_many(_leaf), output=_many(_ATOMS), free=_ATOMS, notes=_many(_typed(str)),
    shapes=_many(_many(_number)), kinds=_many(_one_of(OPERANDS)),
)  # fmt: skip
_step = _object(
    Step, mode=_one_of(MODES), sources=_ATOMS, labels=_many(_ATOMS), result=_ATOMS, flops=_number, entries=_number,
    text=_typed(str),
)  # fmt: skip
_fields = _object(
    Plan, reads=_many(_leaf), steps=_many(_step),
    outputs=_many(_object(Output, value=_integer(-1), labels=_ATOMS, network=_network)),
    shapes=_many(_many(_number)), kinds=_many(_one_of(OPERANDS)), same=_ATOMS, naive=_number, order=_typed(str),
    memory=_maybe(_integer(1)), single=_typed(bool),
)  # fmt: skip


def _plan(data: Any) -> Plan:
    """A plan whose references lie in range: a step reads what was made before it."""
    plan: Plan = _fields(data)
    count = len(plan.kinds)
    if len(plan.shapes) != count or len(plan.same) != count or any(f > at for at, f in enumerate(plan.same)):
        raise ValueError("shapes, kinds and equal operands do not fit together")
    if any(leaf.operand >= count for leaf in plan.reads):
        raise ValueError(f"a read of an operand beyond the {count} there are")
    for at, step in enumerate(plan.steps):
        if len(step.sources) not in (1, 2) or len(step.labels) != len(step.sources):
            raise ValueError(f"step {at} does not take one or two values")
        if any(s >= len(plan.reads) + at for s in step.sources):
            raise ValueError(f"step {at} reads a value that is not there yet")
    made = len(plan.reads) + len(plan.steps)
    if not plan.outputs or any(out.value >= made for out in plan.outputs):
        raise ValueError("an output names a value that no step makes")
    return plan
