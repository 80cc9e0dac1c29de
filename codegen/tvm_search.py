"""Schedules found by MetaSchedule: the choices of the rules drawn, built, timed, and kept in the tile of a KernelSpec.

What a search finds is a KernelSpec like any other: it is cached, saved and rendered without MetaSchedule.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.codegen import build, cache, tune, tvm, tvm_compat, tvm_rules, tvm_shape
from sparsec.codegen.kernel import DTYPES, Kernel, KernelSpec
from sparsec.errors import SparsecError
from sparsec.target import Target

EACH = 8  # schedules that are built and timed together
GAIN = 0.98  # a schedule is better when it takes less than this share of the time of the best so far


@dataclass(frozen=True)
class Found:
    """The best kernel of a search; `gain` is the time of the usual schedule over its own, `trials` what was timed."""

    spec: KernelSpec
    gain: float
    trials: int


def functions_of(spec: KernelSpec, batches: Sequence[int]) -> dict[str, list[str]]:
    """The blocks that run for some numbers of rows: the others keep their usual schedule."""
    wanted = set()
    for batch in batches:
        _, routine, width = next(line for line in spec.plan if line[0] == 0 or batch <= line[0])
        wanted.add("gemv" if routine == "gemv" else str(width))
    blocks: dict[str, list[str]] = tvm.texts(spec).blocks_of(spec)
    return {name: found for name, found in blocks.items() if name.rpartition("_")[2] in wanted}


def space_of(spec: KernelSpec, batches: Sequence[int], module: Any = None) -> dict[str, tuple[int, ...]]:
    """Every choice of the rules that matters for `batches`, in the order in which they are asked for.

    `module` is the parsed text of the spec, for who has it.
    """
    space: dict[str, tuple[int, ...]] = {}

    def note(name: str, values: tuple[int, ...], usual: int) -> int:
        if len(values) > 1:
            space[name] = values
        return usual

    if module is None:
        module = tvm_compat.parse(tvm.texts(spec).text_of(spec))
    schedule = tvm_compat.new_schedule(module)
    tvm_rules.schedule(schedule, functions_of(spec, batches), tvm_shape.lanes_of(spec), note)
    return space


def search(
    spec: KernelSpec, buffers: Mapping[str, torch.Tensor], batches: Sequence[int], trials: int, seed: int = 0
) -> Found:
    """The fastest of `trials` schedules and the usual one, for a packed weight and some numbers of rows.

    Activations are random. The result is stored with the machine and the number of threads, unless the clock was
    disturbed. Raises DependencyError where MetaSchedule cannot search, ToolchainError when it fails.
    """
    key = _key(spec, buffers, batches, trials, seed)
    known = _recall(spec, key)
    if known is not None:
        return known
    module = tvm_compat.searchable(tvm.texts(spec).text_of(spec))
    space = space_of(spec, batches, module)
    race = _Race(spec, buffers, batches)

    def rules(schedule: object, sample: tvm_compat.Sample) -> None:
        def pick(name: str, values: tuple[int, ...], usual: int) -> int:
            return sample(name, values, usual) if len(values) > 1 else usual

        tvm_rules.schedule(schedule, functions_of(spec, batches), tvm_shape.lanes_of(spec), pick)

    def measure(draws: list[tuple[int, ...]]) -> list[float]:
        tiles = [
            tuple((name, values[at]) for (name, values), at in zip(space.items(), draw, strict=True)) for draw in draws
        ]
        return race.run([dataclasses.replace(spec, tile=tile) for tile in tiles])

    tvm_compat.search(
        module, rules, spec.isa, trials=min(trials, math.prod(map(len, space.values()))), each=EACH, seed=seed + 1,
        measure=measure,
    )  # fmt: skip
    found = race.confirmed()
    if race.steady:
        record = {"tile": [list(pair) for pair in found.spec.tile], "gain": found.gain, "trials": found.trials}
        cache.store_json("tvm_schedules", key, record)
    return found


class _Race:
    """Rounds of kernels against the best one so far, interleaved, so that a drift of the machine hits all alike."""

    def __init__(self, spec: KernelSpec, buffers: Mapping[str, torch.Tensor], batches: Sequence[int]) -> None:
        self.usual = self.best = spec
        self.steady = True
        self.buffers, self.batches = tuple(buffers.values()), batches
        self.seconds: dict[KernelSpec, float] = {}

    def run(self, specs: Sequence[KernelSpec]) -> list[float]:
        """Seconds of each over all batches; infinite for one that cannot be built."""
        new = [s for s in dict.fromkeys(specs) if s not in self.seconds]
        errors: dict[KernelSpec, SparsecError] = {}
        kernels = build.build_kernels([self.best, *new], dataclasses.replace(Target.probe(), kind="tvm"), errors=errors)
        self.seconds |= dict.fromkeys(errors, math.inf)
        if self.best not in kernels:
            raise errors[self.best]
        timed = [kernels[s] for s in new if s in kernels]
        if timed:
            self._judge(kernels[self.best], timed)
        return [self.seconds[s] for s in specs]

    def confirmed(self) -> Found:
        """The best kernel against the usual one alone: the least of many times is less than it would be again."""
        if self.best == self.usual:
            return Found(self.usual, 1.0, len(self.seconds))
        usual, best = self._time([build.get_kernel(spec.text()) for spec in (self.usual, self.best)])
        if best < GAIN * usual:
            return Found(self.best, usual / best, len(self.seconds))
        return Found(self.usual, 1.0, len(self.seconds))

    def _judge(self, best: Kernel, timed: Sequence[Kernel]) -> None:
        limit, *totals = self._time((best, *timed))
        self.seconds |= {k.spec: total for k, total in zip(timed, totals, strict=True)}
        fastest = min(range(len(timed)), key=totals.__getitem__)
        if totals[fastest] < GAIN * limit:
            self.best = timed[fastest].spec

    def _time(self, kernels: Sequence[Kernel]) -> list[float]:
        """Seconds of each over all batches."""
        totals = [0.0] * len(kernels)
        for batch in self.batches:
            timing = tune.measure([self._call(kernel, batch) for kernel in kernels])
            self.steady &= timing.steady
            totals = [total + us * 1e-6 for total, us in zip(totals, timing.us, strict=True)]
        return totals

    def _call(self, kernel: Kernel, batch: int) -> Callable[[], object]:
        spec, dtype = kernel.spec, DTYPES[kernel.spec.dtype]
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, spec.in_features, generator=generator).to(dtype)
        y = torch.empty(batch, spec.out_features, dtype=dtype)
        bias = torch.zeros(spec.out_features, dtype=dtype) if spec.bias else None
        adds = any(step.name == "add" for step in spec.epilogue)
        residual = torch.zeros_like(y) if adds else None
        return lambda: kernel.call(x, y, bias, residual, *self.buffers)


def _key(spec: KernelSpec, buffers: Mapping[str, torch.Tensor], batches: Sequence[int], trials: int, seed: int) -> str:
    """What a stored search depends on: the kernel, how much is stored, the rows, and the machine with its threads."""
    sizes = [list(buffer.shape) for buffer in buffers.values()]
    facts = [
        spec.text(), sizes, list(batches), trials, seed, torch.get_num_threads(), Target.probe().machine_id(),
        tvm_compat.version(), tvm.generator(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _recall(spec: KernelSpec, key: str) -> Found | None:
    record = cache.load_json("tvm_schedules", key)
    try:
        tile = tuple((str(name), int(value)) for name, value in record["tile"])
        return Found(dataclasses.replace(spec, tile=tile), float(record["gain"]), int(record["trials"]))
    except (TypeError, KeyError, ValueError):
        return None
