"""The clock that all benchmarks share: one at a time, interleaved rounds, medians, polluted rounds repeated."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsec.target import Target

ROUND_S = 0.02  # a round of one contender lasts at least this long, so that /proc/stat can see who else runs
FOREIGN = 0.3  # cores that others may use during a round before it counts as polluted
PAUSE_S = 0.002  # between contenders: lets spinning threads of the last one go to sleep
HZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Times:
    """Seconds a call: median and best over the rounds, and how many rounds had to be repeated."""

    median: float
    best: float
    rounds: int
    repeated: int


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Wait until no other benchmark of this user runs, and keep the others waiting meanwhile."""
    path = Path(tempfile.gettempdir()) / f"sparsec-timing-{os.getuid()}.lock"
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def idle(limit: float = FOREIGN, patience_s: float = 60.0) -> bool:
    """Wait until other processes use less than `limit` cores; False when that did not happen in time."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        watch = _Watch()
        time.sleep(0.25)
        if watch.foreign() < limit:
            return True
    return False


def interleave(
    contenders: Mapping[str, Callable[[], Any]], rounds: int = 15, round_s: float = ROUND_S, repeats: int = 2
) -> dict[str, Times]:
    """Time the contenders in turns. A round in which others used the processor is repeated, at most `repeats` times as
    often as there are rounds; after that polluted rounds count, because a busy machine is better than none."""
    inner = {name: _calibrate(call, round_s) for name, call in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    repeated, spare = 0, repeats * rounds
    while min(map(len, taken.values())) < rounds:
        watch, turn = _Watch(), {}
        for name, call in contenders.items():
            time.sleep(PAUSE_S)
            begin = time.perf_counter()
            for _ in range(inner[name]):
                call()
            turn[name] = (time.perf_counter() - begin) / inner[name]
        if watch.foreign() > FOREIGN and spare > 0:
            repeated, spare = repeated + 1, spare - 1
            continue
        for name, seconds in turn.items():
            taken[name].append(seconds)
    return {n: Times(statistics.median(t), min(t), len(t), repeated) for n, t in taken.items()}


def machine() -> dict[str, Any]:
    """What a number means nothing without."""
    target = Target.probe()
    return {
        "processor": target.name,
        "cores": target.cores,
        "threads": torch.get_num_threads(),
        "isa": target.isas[0],
        "caches": {"l1d": target.l1d, "l2": target.l2, "l3": target.l3},
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "spinning": _spinning(),
        "load": os.getloadavg()[0],
    }


def _spinning() -> bool:
    """Whether OpenMP threads look out for the next region a while, as they do unless the environment says otherwise."""
    spins = os.environ.get("GOMP_SPINCOUNT")
    return os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive" if spins is None else spins != "0"


def headline() -> str:
    """The machine in one line."""
    m = machine()
    asleep = "" if m["spinning"] else ", threads sleep between calls: every parallel region pays for waking them"
    return f"{m['processor']}, {m['threads']} of {m['cores']} cores, {m['isa']}, torch {m['torch']}{asleep}"


def write_json(path: str | None, kind: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write rows with the machine they were taken on; nothing without a path."""
    if path:
        text = json.dumps({"benchmark": kind, "machine": machine(), **more, "rows": rows}, indent=1)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")


class _Watch:
    """How many cores other processes have used since it was made. Ticks of /proc/stat are 1/HZ seconds."""

    def __init__(self) -> None:
        self.start = (time.monotonic(), _busy(), _own())

    def foreign(self) -> float:
        began, busy, own = self.start
        wall = time.monotonic() - began
        others = (_busy() - busy) - (_own() - own)
        return max(0.0, others - 2 / HZ) / max(wall, 1 / HZ)  # two ticks of rounding


def _busy() -> float:
    """Seconds that all cores together were busy since boot."""
    with open("/proc/stat", encoding="ascii") as handle:
        user, nice, system, _idle, _wait, irq, soft, *_ = map(int, handle.readline().split()[1:])
    return (user + nice + system + irq + soft) / HZ


def _own() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _calibrate(call: Callable[[], Any], round_s: float) -> int:
    """Calls that fill a round, after warming up."""
    for _ in range(3):
        call()
    count = 1
    while True:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        took = time.perf_counter() - begin
        if took > round_s / 4:
            return max(1, round(count * round_s / took))
        count *= 4
