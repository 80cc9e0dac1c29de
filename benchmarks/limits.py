"""The machine's limits: multiply-adds a second, and bytes a second from each level of memory."""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import exclusive, headline, idle, write_json

from sparsec.codegen import toolchain
from sparsec.target import Target

MEMORY_BYTES = 256 << 20  # per thread: beyond every cache


@dataclass(frozen=True)
class Limits:
    """Best of several runs: fp32 flop/s, and bytes/s read from the cache levels and from memory, by all threads."""

    threads: int
    flops: float
    l1: float
    l2: float
    l3: float
    memory: float

    def bandwidth(self, nbytes: float, target: Target) -> float:
        """Bytes a second for a working set of this size that all threads share out."""
        mine = nbytes / self.threads
        if mine <= 0.75 * target.l1d:
            return self.l1
        if mine <= 0.75 * target.l2:
            return self.l2
        return self.l3 if nbytes <= 0.75 * target.l3 else self.memory

    def seconds(self, flops: float, nbytes: float, target: Target) -> float:
        """The least time for so much work on so many bytes."""
        return max(flops / self.flops, nbytes / self.bandwidth(nbytes, target))


def library() -> ctypes.CDLL:
    """The measuring loops, built with the best flags that compiler and processor share."""
    tools = toolchain.find()
    isa = next(i for i in Target.probe().isas if tools.accepts(i))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "limits.so"
        tools.compile(Path(__file__).with_name("limits.c"), output, isa)
        loaded = ctypes.CDLL(str(output))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    loaded.multiply_add.argtypes, loaded.read_all.argtypes = (pointer, count), (pointer, count, count, pointer)
    loaded.multiply_add.restype = loaded.read_all.restype = None
    return loaded


def fastest(threads: int, work: Callable[[int], None], runs: int) -> float:
    """The least wall seconds in which every thread has done its `work(index)`, released together."""
    best = float("inf")
    for _ in range(runs):
        gate = threading.Barrier(threads)
        spans: list[tuple[float, float]] = []

        def one(index: int, gate: threading.Barrier = gate, spans: list[tuple[float, float]] = spans) -> None:
            gate.wait()
            begin = time.perf_counter()
            work(index)
            spans.append((begin, time.perf_counter()))

        crew = [threading.Thread(target=one, args=(i,)) for i in range(threads)]
        for member in crew:
            member.start()
        for member in crew:
            member.join()
        best = min(best, max(end for _, end in spans) - min(begin for begin, _ in spans))
    return best


def measure(threads: int | None = None, runs: int = 40) -> Limits:
    """Measure with this many threads (default: as many as torch uses); about a second."""
    loops, target = library(), Target.probe()
    threads = threads or torch.get_num_threads()
    lanes = loops.lanes()
    small = [np.full(14 * 16, 0.5, np.float32) for _ in range(threads)]
    count = 1_000_000
    took = fastest(threads, lambda i: loops.multiply_add(small[i].ctypes.data, count), runs)
    flops = threads * count * 12 * lanes * 2 / took

    def bandwidth(nbytes: int, total: int) -> float:
        floats = max(8 * lanes, nbytes // 4 // (8 * lanes) * 8 * lanes)
        data = [np.zeros(floats, np.float32) for _ in range(threads)]
        repeats = max(1, total // (4 * floats))
        sinks = [d.ctypes.data for d in small]
        read = [partial(loops.read_all, data[i].ctypes.data, floats, repeats, sinks[i]) for i in range(threads)]
        seconds = fastest(threads, lambda i: read[i](), runs)
        return threads * 4 * floats * repeats / seconds

    return Limits(
        threads=threads,
        flops=flops,
        l1=bandwidth(target.l1d * 3 // 4, 1 << 27),
        l2=bandwidth(target.l2 // 2, 1 << 27),
        l3=bandwidth(max(2 * target.l2, target.l3 // 2 // threads), 1 << 27),
        memory=bandwidth(MEMORY_BYTES, MEMORY_BYTES),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", help="also write the numbers here")
    options = parser.parse_args()
    print(headline())
    print(f"{'threads':>8}{'Gflop/s':>10}{'L1 GB/s':>10}{'L2 GB/s':>10}{'L3 GB/s':>10}{'memory':>10}")
    rows = []
    with exclusive():
        idle(patience_s=5 if options.quick else 60)
        for threads in sorted({1, torch.get_num_threads()}):
            found = measure(threads, runs=5 if options.quick else 40)
            levels = (found.flops, found.l1, found.l2, found.l3, found.memory)
            print(f"{threads:>8}" + "".join(f"{v / 1e9:10.0f}" for v in levels))
            rows.append(asdict(found))
    write_json(options.json, "limits", rows)


if __name__ == "__main__":
    main()
