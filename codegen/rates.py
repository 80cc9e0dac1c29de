"""What this machine sustains, measured once and kept with its decisions: the constants of the cost model."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from sparsec.codegen import cache
from sparsec.cost import Rates
from sparsec.target import Target

_BEST_OF = 15


@functools.cache
def rates(target: Target) -> Rates:
    """The rates of the machine that `target` describes: stored ones, else measured now (about 0.3 s), one thread.

    A device's rates are not measured: only their ratios matter, and the nominal ones have those.
    """
    if target.kind == "cuda":
        return Rates.nominal(target)
    key = target.machine_id()
    record = cache.load_json("rates", key)
    whole = isinstance(record, dict) and set(record) == {field.name for field in dataclasses.fields(Rates)}
    if whole and all(isinstance(v, float) and (v > 0 or name == "matrix") for name, v in record.items()):
        return Rates(**record)
    found = measure(target)
    cache.store_json("rates", key, dataclasses.asdict(found))
    return found


def measure(target: Target) -> Rates:
    """fp32 and bf16 flops of a matmul that fits L2, and bytes a second of sums over arrays of the size of each level.

    bf16 is measured where the processor has instructions for it: a library's way round them would take seconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            a, b, out = torch.ones(192, 192), torch.ones(192, 192), torch.empty(192, 192)
            peak = 2 * 192**3 / _seconds(lambda: torch.mm(a, b, out=out), 20) / 0.85  # what a matmul leaves of it
            matrix = _matrix() if "avx512bf16" in target.isas else 0.0
            l2 = _read(target.l2 // 2, 40)
            l3 = _read(min(max(target.l3 // 2, 2 * target.l2), 16 << 20), 4)
            memory = _read(min(max(2 * target.l3, 32 << 20), 64 << 20), 1)
    finally:
        torch.set_num_threads(threads)
    return Rates(peak, max(l2, l3, memory), max(l3, memory), memory, matrix)


def _matrix() -> float:
    """bf16 flops of a matmul whose second operand the library has in the order it likes, if it has such."""
    a, b = torch.ones(256, 384, dtype=torch.bfloat16), torch.ones(384, 384, dtype=torch.bfloat16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(b, 256)
        seconds = _seconds(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""), 10)
    except (RuntimeError, AttributeError):
        seconds = _seconds(lambda: torch.mm(a, b), 10)
    return 2 * 256 * 384**2 / seconds / 0.85


def _read(size: int, repeat: int) -> float:
    data = torch.ones(max(1024, size // 4))
    return data.numel() * 4 / _seconds(data.sum, repeat)


def _seconds(run: Callable[[], object], repeat: int) -> float:
    best = float("inf")
    run()
    for _ in range(_BEST_OF):
        begin = time.perf_counter()
        for _ in range(repeat):
            run()
        best = min(best, (time.perf_counter() - begin) / repeat)
    return max(best, 1e-9)
