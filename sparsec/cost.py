"""The cost model: a roofline in closed form, used to order candidates and, with tune="model", to decide.

Time is max(work / rate, bytes / bandwidth) plus the cost of a call. The rates are shares of the FMA peak that a routine
sustains; they were fitted to measurements of `benchmarks/linear.py` and only their ratios matter for a decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.target import ISAS, Target

if TYPE_CHECKING:
    from sparsec.codegen.kernel import KernelSpec, Problem
    from sparsec.formats import Format

CLOCK = 3.0e9  # hertz; a nominal value, cancels in every ratio
CALL_US = 5.0  # dispatcher, checks and allocation of one op
BANDWIDTH = {"l2": 60e9, "l3": 25e9, "memory": 12e9}  # bytes a second and core
DENSE_SHARE = 0.65  # of the FMA peak that a library matmul sustains at large batch
DENSE_HALF_BATCH = 6.0  # rows at which it sustains half of that
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Rate:
    """What a sparse routine sustains: `share` of the FMA peak on the columns it computes, padding included."""

    share: float
    per_value: float = 0.0  # extra cycles for every stored value: index decoding, mask expansion
    per_entry: float = 0.0  # extra cycles for every matrix position, stored or not (bitmasks)


RATES: dict[str, Rate] = {
    "gemv": Rate(share=1.0, per_value=1.3),
    "panel": Rate(share=0.55, per_value=0.3),
}
_UNKNOWN = Rate(share=0.3, per_value=1.0)


def peak(target: Target) -> float:
    """fp32 flops a second of one core: two FMA pipes, or one when vectors are 512 bits wide."""
    lanes = max(ISAS[target.isas[0]].lanes, 4)
    return CLOCK * 2 * lanes * (1 if lanes == 16 else 2)


def dense_us(problem: Problem, batch: int, target: Target) -> float:
    """Microseconds of the library's dense linear, (batch, in) by (out, in)."""
    share = DENSE_SHARE * batch / (batch + DENSE_HALF_BATCH)
    work = 2.0 * problem.out_features * problem.in_features * batch / (peak(target) * share)
    size = problem.out_features * problem.in_features * ITEMSIZE.get(problem.dtype, 4)
    return CALL_US / 2 + 1e6 * max(work, size / _bandwidth(size, target)) / _threads(problem)


def sparse_us(problem: Problem, fmt: Format, spec: KernelSpec, batch: int, target: Target) -> float:
    """Microseconds of a candidate kernel at `batch` rows."""
    routine, columns = _routine(spec, batch)
    rate = RATES.get(routine, _UNKNOWN)
    stored = max(problem.nnz, 1)
    padded = -(-batch // columns) * columns if columns > 1 else batch
    panels = max(1, padded // max(columns, 1))
    work = 2.0 * stored * padded / (peak(target) * rate.share) if routine != "gemv" else 0.0
    work += (rate.per_value * stored + rate.per_entry * problem.out_features * problem.in_features) * panels / CLOCK
    size = fmt.nbytes(problem.out_features, problem.in_features, stored, ITEMSIZE.get(problem.dtype, 4))
    return CALL_US + 1e6 * max(work, size / _bandwidth(size, target)) / _threads(problem)


def _routine(spec: KernelSpec, batch: int) -> tuple[str, int]:
    for largest, name, columns in spec.plan:
        if largest == 0 or batch <= largest:
            return name, columns
    return "panel", 16


def _bandwidth(size: int, target: Target) -> float:
    if size <= target.l2:
        return BANDWIDTH["l2"]
    return BANDWIDTH["l3"] if size <= target.l3 else BANDWIDTH["memory"]


def _threads(problem: Problem) -> int:
    return max(1, problem.threads)
