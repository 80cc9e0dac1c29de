"""The clock: interleaved timing of a site's contenders, and decisions that persist with the machine that made them."""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sparsec.codegen import cache
from sparsec.codegen.kernel import VERSION, Problem

_CLOCK = threading.Lock()  # two timed runs of one process would measure each other

ROUNDS = 9
MAX_ROUNDS = 27
SAMPLE = 3e-4  # seconds: a sample repeats a contender until it is well above the timer's and the scheduler's grain
SPREAD = 0.15  # a median is trusted when half of the samples lie within this share of it


@dataclass(frozen=True)
class Timing:
    """Median microseconds per call of each contender, in the order they were given."""

    medians: tuple[float, ...]
    rounds: int


def measure(contenders: Sequence[Callable[[], object]]) -> Timing:
    """Time all contenders in turn, round by round, so that a drift of the machine's speed hits all alike.

    The clock is the host's, or events of the current stream for contenders that answer with CUDA tensors.

    Rounds are added while the middle half of any contender's samples is wider than SPREAD of its median.
    """
    with _CLOCK, torch.inference_mode():
        repeats = [_calibrate(run) for run in contenders]
        samples: list[list[float]] = [[] for _ in contenders]
        rounds = 0
        while rounds < MAX_ROUNDS:
            for run, repeat, seen in zip(contenders, repeats, samples, strict=True):
                seen.append(_sample(run, repeat))
            rounds += 1
            if rounds >= ROUNDS and all(_steady(seen) for seen in samples):
                break
    return Timing(tuple(statistics.median(seen) * 1e6 for seen in samples), rounds)


def _calibrate(run: Callable[[], object]) -> int:
    run()  # the first call pages in code and data
    once = max(_sample(run, 1), 1e-7)
    return max(1, min(200, int(SAMPLE / once)))


def _sample(run: Callable[[], object], repeat: int) -> float:
    """Seconds per call of `repeat` calls: of the device's work where there is one, else of the host's."""
    begin = time.perf_counter()
    answer = run()
    if isinstance(answer, torch.Tensor) and answer.is_cuda:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeat):
            run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3 / repeat
    for _ in range(repeat - 1):
        run()
    return (time.perf_counter() - begin) / repeat


def _steady(samples: list[float]) -> bool:
    low, middle, high = statistics.quantiles(samples, n=4)
    return high - low <= SPREAD * middle


def decision_key(problem: Problem, batch: int, contenders: Sequence[str], machine: str) -> str:
    """What a stored timing depends on: the problem with its density to a percent, the contenders, the machine."""
    facts = [
        VERSION, problem.op, problem.out_features, problem.in_features, problem.dtype, round(problem.density, 2),
        problem.bias, [s.text() for s in problem.epilogue], batch, problem.threads, list(contenders), machine,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()[:32]


def recall(key: str, count: int) -> Timing | None:
    """A stored timing of `count` contenders, or None when this machine has made none."""
    record = cache.load_json("decisions", key)
    if not isinstance(record, dict):
        return None
    medians, rounds = record.get("medians"), record.get("rounds")
    if not isinstance(medians, list) or len(medians) != count or not isinstance(rounds, int):
        return None
    if not all(isinstance(m, float) and m > 0 for m in medians):
        return None
    return Timing(tuple(medians), rounds)


def remember(key: str, timing: Timing) -> None:
    """Store a timing for later compiles on this machine."""
    cache.store_json("decisions", key, {"medians": list(timing.medians), "rounds": timing.rounds})
