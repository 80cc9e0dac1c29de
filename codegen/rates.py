"""What this machine sustains, measured once and kept with its decisions: the constants of the cost model."""

from __future__ import annotations

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
    whole = isinstance(record, dict) and set(record) == {"peak", "l2", "l3", "memory"}
    if whole and all(isinstance(value, float) and value > 0 for value in record.values()):
        return Rates(**record)
    found = measure(target)
    cache.store_json("rates", key, {"peak": found.peak, "l2": found.l2, "l3": found.l3, "memory": found.memory})
    return found


def measure(target: Target) -> Rates:
    """fp32 flops of a matmul that fits L2, and bytes a second of sums over arrays of the size of each level."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            a, b, out = torch.ones(192, 192), torch.ones(192, 192), torch.empty(192, 192)
            peak = 2 * 192**3 / _seconds(lambda: torch.mm(a, b, out=out), 20) / 0.85  # what a matmul leaves of it
            l2 = _read(target.l2 // 2, 40)
            l3 = _read(min(max(target.l3 // 2, 2 * target.l2), 16 << 20), 4)
            memory = _read(min(max(2 * target.l3, 32 << 20), 64 << 20), 1)
    finally:
        torch.set_num_threads(threads)
    return Rates(peak, max(l2, l3, memory), max(l3, memory), memory)


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
