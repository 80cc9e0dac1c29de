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
LONG = 1e-3  # seconds: calls that take longer are cold anyway
PATIENCE = 0.5  # seconds that rounds may be added for
SPREAD = 0.15  # a median is trusted when half of the samples lie within this share of it


@dataclass(frozen=True)
class Timing:
    """Microseconds per call of each contender, in the order they were given: medians, or the best when not `steady`.

    An unsteady timing was disturbed by other processes: what was least disturbed is all it can tell.
    """

    us: tuple[float, ...]
    rounds: int
    steady: bool = True


def measure(contenders: Sequence[Callable[[], object]]) -> Timing:
    """Time all contenders in turn, round by round, so that a drift of the machine's speed hits all alike.

    The clock is the host's, or events of the current stream for contenders that answer with CUDA tensors.

    Rounds are added while the middle half of any contender's samples is wider than SPREAD of its median, up to
    MAX_ROUNDS or PATIENCE seconds.
    """
    return _measure(contenders, cold=False)


def measure_cold(contenders: Sequence[Callable[[], object]]) -> Timing:
    """`measure`, but a call has one of the first contender behind it and not its own: in a network of many short
    kernels no branch is remembered from the last time, and nothing of a weight is in L1."""
    return _measure(contenders, cold=True)


def _measure(contenders: Sequence[Callable[[], object]], cold: bool) -> Timing:
    with _CLOCK, torch.inference_mode():
        repeats = [_calibrate(run) for run in contenders]
        cold = cold and _sample(contenders[0], 1) < LONG
        samples: list[list[float]] = [[] for _ in contenders]
        rounds, steady = 0, False
        end = time.perf_counter() + PATIENCE
        while rounds < ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() < end):
            for run, repeat, seen in zip(contenders, repeats, samples, strict=True):
                if cold and run is not contenders[0]:
                    contenders[0]()
                seen.append(_sample(run, 1 if cold else repeat))
            rounds += 1
            steady = rounds >= ROUNDS and all(_steady(seen) for seen in samples)
            if steady:
                break
    pick = statistics.median if steady else min
    return Timing(tuple(pick(seen) * 1e6 for seen in samples), rounds, steady)


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
        *([] if problem.conv is None else [problem.conv.numbers()]),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()[:32]


def recall(key: str, count: int) -> Timing | None:
    """A stored timing of `count` contenders, or None when this machine has made none."""
    record = cache.load_json("decisions", key)
    if not isinstance(record, dict):
        return None
    us, rounds = record.get("us"), record.get("rounds")
    if not isinstance(us, list) or len(us) != count or not isinstance(rounds, int):
        return None
    if not all(isinstance(u, float) and u > 0 for u in us):
        return None
    return Timing(tuple(us), rounds)


def remember(key: str, timing: Timing) -> None:
    """Store a timing for later compiles on this machine, unless it was disturbed."""
    if timing.steady:
        cache.store_json("decisions", key, {"us": list(timing.us), "rounds": timing.rounds})
