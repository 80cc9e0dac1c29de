"""Totals of long batteries, kept in a JSON file so that runs add up and go on where they were stopped."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEFAULT_PATH = Path("out/fuzz.json")

Record = dict[str, Any]


class Totals:
    """`{battery: {seed: {"blocks": done, counts..., "failures": [...]}}}` in a file.

    A battery is a sequence of blocks, each of which follows from (seed, number) alone. A block is added when it is
    complete, under a lock and by renaming, so a killed run loses at most the block it was in.
    """

    def __init__(self, path: Path = DEFAULT_PATH) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, dict[str, Record]]:
        """Everything that was recorded; empty when there is no file yet."""
        try:
            found: dict[str, dict[str, Record]] = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        return found

    def record(self, battery: str, seed: int) -> Record:
        """The record of one battery and seed, as far as it got."""
        return self.read().get(battery, {}).get(str(seed), {"blocks": 0, "failures": []})

    def add(self, battery: str, seed: int, counts: Mapping[str, Any], failures: list[str]) -> None:
        """Count one more block: numbers are added, mappings of numbers entry by entry, failures appended."""
        with self._locked():
            everything = self.read()
            record = everything.setdefault(battery, {}).setdefault(str(seed), {"blocks": 0, "failures": []})
            _merge(record, {"blocks": 1, **counts})
            record["failures"] = [*record["failures"], *failures]
            self._write(everything)

    def _write(self, everything: dict[str, dict[str, Record]]) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".totals")
        with os.fdopen(handle, "w") as draft:
            json.dump(everything, draft, indent=1, sort_keys=True)
        os.replace(name, self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _merge(into: Record, counts: Mapping[str, Any]) -> None:
    for name, value in counts.items():
        if isinstance(value, Mapping):
            _merge(into.setdefault(name, {}), value)
        else:
            into[name] = round(into.get(name, 0) + value, 3)


def resume(
    totals: Totals,
    battery: str,
    seed: int,
    wanted: int,
    unit: str,
    block: Callable[[int], tuple[Mapping[str, Any], list[str]]],
    seconds: float = float("inf"),
) -> Record:
    """Run blocks until `wanted` of `unit` are recorded or `seconds` have passed; failures are printed as they come."""
    import time

    start = time.monotonic()
    record = totals.record(battery, seed)
    while record.get(unit, 0) < wanted and time.monotonic() - start < seconds:
        began = time.process_time()
        counts, failures = block(record["blocks"])
        for line in failures:
            print(line, flush=True)
        totals.add(battery, seed, {**counts, "cpu_seconds": time.process_time() - began}, failures)
        record = totals.record(battery, seed)
    return record
