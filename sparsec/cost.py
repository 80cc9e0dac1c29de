"""The cost model in closed form: it orders candidates before the clock does, and decides alone with tune="model".

Time is a call and the larger of arithmetic and traffic. Each formula below is written once and read twice: with numbers
it gives microseconds, with sympy's symbols the expression (`expression`). Machine rates are measured (see
`sparsec.codegen.rates`) or nominal; shares of the peak were set from runs of `benchmarks/linear.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sparsec.target import ISAS, Target

if TYPE_CHECKING:
    from sparsec.codegen.kernel import KernelSpec, Problem
    from sparsec.formats import Format

CALL_US = 5.0  # dispatcher, checks and allocation of one op
DENSE_SHARE = 0.8  # of the FMA peak that a library matmul sustains at large batch
DENSE_HALF_BATCH = 6.0  # rows at which it sustains half of that
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
PACK = 0.5  # cycles to bring one activation into a panel, and one result out of it


@dataclass(frozen=True)
class Rates:
    """What one core of a machine sustains: fp32 `peak` in flops a second; bytes a second from L2, L3 and memory; and
    `matrix`, flops a second in bf16 by tile registers or by dot products, 0 where the processor has neither."""

    peak: float
    l2: float = 60e9
    l3: float = 25e9
    memory: float = 12e9
    matrix: float = 0.0

    @classmethod
    def nominal(cls, target: Target) -> Rates:
        """Two FMA pipes at 3 GHz, or one when vectors are 512 bits wide: for machines that were never measured."""
        times = 6.0 if "amx" in target.isas else 2.0 if "avx512bf16" in target.isas else 0.0
        return cls(3.0e9 * flops_per_cycle(target), matrix=times * 3.0e9 * flops_per_cycle(target))


@dataclass(frozen=True)
class Rate:
    """What a format's kernels sustain: `share` of the peak on the columns they compute, padding included; cycles for
    every stored value once per panel (`per_value`) or in GEMV (`gemv`), and for every matrix position (`per_entry`,
    `gemv_entry`): what ends of rows and empty masks cost. `whole`: a tile that holds a value is multiplied whole;
    `matrix`: at the rate of matrix products, where the operands are narrow; `beyond`: cycles more for a stored value
    where rows read all activations of a panel, and these leave L1."""

    share: float = 0.74
    per_value: float = 0.5
    gemv: float = 1.0
    per_entry: float = 0.15
    gemv_entry: float = 0.0
    whole: bool = False
    matrix: bool = False
    beyond: float = 0.0


RATES: dict[str, Rate] = {  # by format, or by variant without its `linear_`
    "csr": Rate(),
    "csr_groups": Rate(share=0.93, per_value=0.4, gemv=2.0, per_entry=0.2, gemv_entry=0.25),
    "sell": Rate(share=0.85, per_value=0.4, gemv=4.0, per_entry=0.1),
    "sell_dots": Rate(share=1.6, per_value=0.14, per_entry=0.17),
    "pairs": Rate(share=1.2, per_value=0.2, gemv=4.0, per_entry=0.0, beyond=0.75),
    "window": Rate(gemv=0.25, gemv_entry=0.015),
    "bitmask": Rate(per_value=0.7, gemv=0.02, gemv_entry=0.24),
    "bsr": Rate(share=0.88, per_value=0.1, gemv=0.3, per_entry=0.0),
    "nm": Rate(share=0.68, per_value=0.2, gemv=0.4, per_entry=0.0),
    "block_nm": Rate(share=0.7, per_value=0.2, gemv=0.3, per_entry=0.0),
    "nmg": Rate(share=0.35, gemv=1.0, per_entry=0.0),
    "quantized": Rate(share=1.4, gemv=0.4, per_entry=0.0),
    "tiles": Rate(share=0.85, per_value=0.0, per_entry=0.13, whole=True, matrix=True),
    "bsr_amx": Rate(share=0.6, per_value=0.0, per_entry=0.0, matrix=True),  # never measured, with room below a library
}
TILE = 512  # entries of a tile of bf16: it is empty when all of them are zeros
_UNKNOWN = Rate(share=0.3, gemv=1.5, per_entry=0.0)


# The formulas. `s` holds numbers or symbols; `most` and `where` are max and if, or Max and Piecewise.

Most = Callable[..., Any]
Where = Callable[[Any, Any, Any], Any]


def _traffic(s: Any, size: Any, where: Where) -> Any:
    """Seconds to read `size` bytes from where they stay between calls."""
    return size / where(size <= s.l2_bytes, s.l2, where(size <= s.l3_bytes, s.l3, s.memory))


def _dense(s: Any, most: Most, where: Where, ceiling: Callable[[Any], Any]) -> Any:
    rate = s.top * DENSE_SHARE * s.batch / (s.batch + DENSE_HALF_BATCH)
    work = 2 * s.out * s.inp * s.batch / rate
    size = s.out * s.inp * s.itemsize
    return CALL_US / 2 + 1e6 * most(work, _traffic(s, size, where)) / s.threads


def _gemv(s: Any, most: Most, where: Where, ceiling: Callable[[Any], Any]) -> Any:
    cycles = (s.density * s.gemv + s.gemv_entry) * s.out * s.inp * s.batch
    return CALL_US + 1e6 * most(cycles / s.clock, _traffic(s, s.nbytes, where)) / s.threads


def _panel(s: Any, most: Most, where: Where, ceiling: Callable[[Any], Any]) -> Any:
    panels = ceiling(s.batch / s.columns)
    flops = 2 * s.worked * s.out * s.inp * panels * s.columns
    cycles = (s.density * s.per_value + s.per_entry) * s.out * s.inp * panels + PACK * (s.inp + s.out) * s.batch
    work = flops / (s.top * s.share) + cycles / s.clock
    return CALL_US + 1e6 * most(work, _traffic(s, s.nbytes, where)) / s.threads


_FORMULAS = {"dense": _dense, "gemv": _gemv, "panel": _panel}
SYMBOLS = (
    "out", "inp", "batch", "density", "itemsize", "nbytes", "threads", "columns", "share", "per_value", "gemv",
    "per_entry", "gemv_entry", "worked", "top", "clock", "l2", "l3", "memory", "l2_bytes", "l3_bytes",
)  # fmt: skip
"""What the formulas are made of: the problem, the kernel, the machine. `worked` is the share of positions multiplied,
`top` the flops a second that its instructions allow."""


def expression(routine: str) -> Any:
    """The sympy expression, in microseconds over positive SYMBOLS, of "dense", "gemv" or "panel"."""
    import sympy

    s = SimpleNamespace(**{name: sympy.Symbol(name, positive=True) for name in SYMBOLS})
    return _FORMULAS[routine](
        s, sympy.Max, lambda test, a, b: sympy.Piecewise((a, test), (b, True)), sympy.ceiling
    )  # fmt: skip


def flops_per_cycle(target: Target) -> int:
    """fp32 flops of a core in one cycle, by its vectors; of a device those of AVX-512, since only ratios matter."""
    best = ISAS.get(target.isas[0]) if target.isas else None
    lanes = max(best.lanes if best is not None else 16, 4)
    return 2 * lanes * (1 if lanes == 16 else 2)


def dense_us(problem: Problem, batch: int, target: Target, rates: Rates | None = None) -> float:
    """Microseconds of the library's dense linear, (batch, in) by (out, in)."""
    return _number("dense", _facts(problem, batch, target, rates))


def sparse_us(
    problem: Problem, fmt: Format, spec: KernelSpec, batch: int, target: Target, rates: Rates | None = None
) -> float:
    """Microseconds of a candidate kernel at `batch` rows."""
    routine, columns = _routine(spec, batch)
    rates = rates or Rates.nominal(target)
    rate = rate_of(fmt, spec)
    facts = _facts(problem, batch, target, rates)
    stored = max(problem.nnz, 1)
    far = problem.in_features * columns * facts["itemsize"] > target.l1d
    facts.update(
        worked=1 - (1 - problem.density) ** TILE if rate.whole else problem.density,
        top=_top(problem, fmt, rate, rates),
        per_value=rate.per_value + (rate.beyond if far else 0.0),
        columns=columns, share=rate.share, gemv=rate.gemv, per_entry=rate.per_entry,
        gemv_entry=rate.gemv_entry,
        nbytes=fmt.nbytes(problem.out_features, problem.in_features, stored, int(facts["itemsize"])),
    )  # fmt: skip
    return _number(routine, facts)


def _facts(problem: Problem, batch: int, target: Target, rates: Rates | None) -> dict[str, float]:
    rates = rates or Rates.nominal(target)
    return {
        "out": problem.out_features, "inp": problem.in_features, "batch": batch, "density": problem.density,
        "itemsize": ITEMSIZE.get(problem.dtype, 4), "threads": max(1, problem.threads),
        "top": rates.matrix if problem.dtype == "bfloat16" and rates.matrix else rates.peak,
        "clock": rates.peak / flops_per_cycle(target), "l2": rates.l2, "l3": rates.l3, "memory": rates.memory,
        "l2_bytes": target.l2, "l3_bytes": target.l3,
    }  # fmt: skip


def _number(routine: str, facts: dict[str, float]) -> float:
    found = _FORMULAS[routine](SimpleNamespace(**facts), max, lambda test, a, b: a if test else b, math.ceil)
    return float(found)


def _top(problem: Problem, fmt: Format, rate: Rate, rates: Rates) -> float:
    """Flops a second that a kernel's instructions allow; a matrix unit takes twice as many bytes as bf16 at a time."""
    if not (rate.matrix and rates.matrix):
        return rates.peak
    return 2 * rates.matrix if fmt.name == "quantized" else rates.matrix if problem.dtype == "bfloat16" else rates.peak


def rate_of(fmt: Format, spec: KernelSpec) -> Rate:
    """What a kernel sustains: by its variant where that has figures of its own, else by what it reads."""
    inner = fmt.fields().get("format")
    if fmt.name == "quantized" and inner is not None and inner.name == "tiles":
        return RATES["tiles"]
    return RATES.get(spec.variant.removeprefix("linear_")) or RATES.get(_innermost(fmt), _UNKNOWN)


def _innermost(fmt: Format) -> str:
    inner = fmt.fields().get("format")
    return _innermost(inner) if fmt.name == "permuted" and inner is not None else fmt.name


def _routine(spec: KernelSpec, batch: int) -> tuple[str, int]:
    for largest, name, columns in spec.plan:
        if largest == 0 or batch <= largest:
            return ("gemv", 1) if name == "gemv" else ("panel", max(1, columns))
    return "panel", 16
