"""Epilogue steps as statements of TVMScript on one fp32 value; TVM vectorises them with the loop around.

The functions are those of the C templates (`_epilogue.c.jinja`, where the fits are described), not TVM's intrinsics:
its tanh loses the digits of small arguments, and its erf and exp become one call of libm per value.

Values that are used more than once go through a small buffer, which LLVM keeps in registers: TVM's analyzer would write
a bound variable out at every use, and those of a polynomial have uses in uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsec.codegen.kernel import Step
from sparsec.errors import SpecError

_ERF = (
    3.925,
    (1.1283791084263697, 0.20035207400641522, 0.05062944445177319, 0.0037185948383334807, 0.0001421550527971274,
     -1.9564873171715994e-06, 1.9869138958727925e-08),
    (0.5108890380792847, 0.11517454263722238, 0.014388874287678563, 0.0009598181244206282),
)  # fmt: skip
_TANH = (
    9.02,
    (0.9999999791410863, 0.13379708727272036, 0.0034940234996942445, 2.058329986930892e-05, 1.3318827239118544e-08),
    (0.46713024006373877, 0.02587103132910613, 0.00032830747309898063, 7.761917657748027e-07),
)
_EXP = (
    0.0013814613000996232, 0.008368709843188582, 0.04166838736671369, 0.166665206896282, 0.4999999345168096, 1.0, 1.0,
)  # fmt: skip


SLOTS = 4
"""Values of one lane that the steps keep."""

Slot = Callable[[int], str]


def steps(epilogue: Sequence[Step], slot: Slot, residual: str) -> list[str]:
    """Statements that apply the steps to the value in slot 0.

    `slot(i)` is where value i < SLOTS of this lane is kept, `residual` the value that "add" adds.
    """
    lines: list[str] = []
    for step in epilogue:
        if step.name == "add":
            lines.append(f"{slot(0)} = {slot(0)} + {residual}")
        elif step.name in _STEPS:
            lines += _STEPS[step.name](slot, step.params)
        else:
            raise SpecError(f"TVM kernels have no epilogue {step.name!r}; known: {', '.join([*_STEPS, 'add'])}")
    return lines


def const(value: float) -> str:
    """A float32 literal; infinities are spelled so that the parser reads them."""
    if value in (float("inf"), float("-inf")):
        return f'T.float32("{value}")'
    return f"T.float32({value!r})"


def _low(x: str, bound: float) -> str:
    """max(x, bound) that hands a NaN on."""
    return f"T.Select({x} < {const(bound)}, {const(bound)}, {x})"


def _high(x: str, bound: float) -> str:
    """min(x, bound) that hands a NaN on."""
    return f"T.Select({const(bound)} < {x}, {const(bound)}, {x})"


def _clip(at: str, value: str, low: float, high: float) -> list[str]:
    return [f"{at} = {value}", f"{at} = {_low(at, low)}", f"{at} = {_high(at, high)}"]


def _horner(x: str, coefficients: Sequence[float]) -> str:
    """A polynomial, highest power first."""
    text = const(coefficients[0])
    for c in coefficients[1:]:
        text = f"({text} * {x} + {const(c)})"
    return text


def _odd_rational(slot: Slot, value: str, fit: tuple[float, tuple[float, ...], tuple[float, ...]]) -> list[str]:
    """slot 1 = x P(x^2) / Q(x^2) of x = value, with Q(0) = 1, held within -1 and 1."""
    limit, p, q = fit
    ratio = f"{slot(1)} * {_horner(slot(2), p[::-1])} / {_horner(slot(2), (*q[::-1], 1.0))}"
    square = f"{slot(2)} = {slot(1)} * {slot(1)}"
    return [*_clip(slot(1), value, -limit, limit), square, *_clip(slot(1), ratio, -1.0, 1.0)]


def _gate(slot: Slot) -> str:
    return f"{slot(0)} = {const(0.5)} * {slot(0)} * ({const(1.0)} + {slot(1)})"


def _relu(slot: Slot, params: Sequence[float]) -> list[str]:
    return [f"{slot(0)} = {_low(slot(0), 0.0)}"]


def _gelu(slot: Slot, params: Sequence[float]) -> list[str]:
    return [*_odd_rational(slot, f"{slot(0)} * {const(0.7071067811865476)}", _ERF), _gate(slot)]


def _gelu_tanh(slot: Slot, params: Sequence[float]) -> list[str]:
    x = slot(0)
    cubic = f"{const(0.7978845608028654)} * ({x} * {x} * {x} * {const(0.044715)} + {x})"
    return [*_odd_rational(slot, cubic, _TANH), _gate(slot)]


def _tanh(slot: Slot, params: Sequence[float]) -> list[str]:
    return [*_odd_rational(slot, slot(0), _TANH), f"{slot(0)} = {slot(1)}"]


def _silu(slot: Slot, params: Sequence[float]) -> list[str]:
    """x / (1 + exp(-x)), with exp(x) = 2^n p(x - n ln 2)."""
    x, t, r, n = (slot(i) for i in (0, 1, 2, 3))
    magic = const(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
    scale = f'T.reinterpret("float32", T.shift_left(T.reinterpret("int32", {t}), T.int32(23)) + T.int32(1065353216))'
    return [
        *_clip(r, f"{const(0.0)} - {x}", -87.0, 89.0),
        f"{t} = {r} * {const(1.4426950408889634)} + {magic}",
        f"{n} = {t} - {magic}",
        f"{r} = {n} * {const(-0.693359375)} + {r}",
        f"{r} = {n} * {const(0.00021219444005469058)} + {r}",
        f"{x} = {x} / ({const(1.0)} + {_horner(r, _EXP)} * {scale})",
    ]


def _hardswish(slot: Slot, params: Sequence[float]) -> list[str]:
    return [*_clip(slot(1), f"{slot(0)} + {const(3.0)}", 0.0, 6.0), f"{slot(0)} = {slot(0)} * {slot(1)} / {const(6.0)}"]


def _clamp(slot: Slot, params: Sequence[float]) -> list[str]:
    return _clip(slot(0), slot(0), params[0], params[1])[1:]


def _scale(slot: Slot, params: Sequence[float]) -> list[str]:
    return [f"{slot(0)} = {slot(0)} * {const(params[0])}"]


_STEPS = {
    "relu": _relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu, "tanh": _tanh, "hardswish": _hardswish,
    "clamp": _clamp, "scale": _scale,
}  # fmt: skip
