"""The battery of random kernel problems, in blocks that add up: `python -m sparsec.testing_kernels --problems 200000`.

With `--op conv` they are convolutions (`testing_conv`).

A block draws a few kernels, half of them in pairs that compute the same thing from two formats, and runs many problems
on each: the float64 oracle on every one, and a metamorphic relation.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsec import testing_conv
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import KernelSpec
from sparsec.formats import FORMATS, Format
from sparsec.target import Target
from sparsec.testing import Case, Data, draw_case, draw_data, draw_format, failures, shrink
from sparsec.testing_relations import RELATIONS
from sparsec.testing_totals import DEFAULT_PATH, Record, Totals, resume

KERNELS = 8  # of one block
TRIES = 20  # draws of a variant that may refuse them: some take one of many formats inside another


def variants(target: Target, names: Sequence[str] = ()) -> list[catalog.Variant]:
    """The variants of the catalogue that this target can run, or those of them that are named."""
    table = [v for v in catalog.variants_for("linear", target=target) if v.isa(target) and v.format in FORMATS]
    return [v for v in table if not names or v.name in names]


def draw_kernels(
    rng: np.random.Generator, target: Target, table: Sequence[catalog.Variant], count: int, first: int = 0
) -> list[tuple[Case, KernelSpec]]:
    """`count` kernels that their variants accept; half the time the next one shares all but the format.

    Variants take turns, from number `first` of the table. A turn gives two kernels at most, so that blocks which begin
    half their size apart draw all of them.
    """
    found: list[tuple[Case, KernelSpec]] = []
    for turn in itertools.count(first):
        if len(found) >= count:
            break
        tries = (draw_case(rng, target, [table[turn % len(table)]]) for _ in range(TRIES))
        case, spec = next(((c, s) for c in tries if (s := c.spec(target))), (None, None))
        if case and spec:
            found.append((case, spec))
            if rng.random() < 0.5 and (sibling := _sibling(rng, case, table)) and (spec := sibling.spec(target)):
                found.append((sibling, spec))
    return found[:count]


def _sibling(rng: np.random.Generator, case: Case, table: Sequence[catalog.Variant]) -> Case | None:
    """The same product from another format, if a variant has the dtype and the instruction set."""
    near = [v for v in table if case.dtype in v.dtypes and case.isa in v.isas and v.format != case.format.name]
    if not near:
        return None
    variant = near[int(rng.integers(len(near)))]
    fmt = draw_format(rng, variant.format, case.rows, case.cols)
    return dataclasses.replace(case, variant=variant.name, format=fmt)


def _others(kernels: Sequence[tuple[Case, KernelSpec]]) -> dict[Case, tuple[Format, str]]:
    """For each kernel that has a sibling, the sibling's format and text."""
    found: dict[Case, tuple[Format, str]] = {}
    for (one, first), (two, second) in itertools.pairwise(kernels):
        if dataclasses.replace(two, variant=one.variant, format=one.format) == one:
            found[one], found[two] = (two.format, second.text()), (one.format, first.text())
    return found


def run(
    seed: int, kernels: int, problems: int, target: Target | None = None, names: Sequence[str] = (), block: int = 0
) -> Iterator[tuple[Case, Data, list[str]]]:
    """Draw `kernels` kernels, run `problems` problems on each, and yield each with what is wrong, shrunk."""
    target = target or Target.probe()
    rng = np.random.default_rng((seed, block))
    drawn = draw_kernels(rng, target, variants(target, names), kernels, first=block * kernels // 2)
    for _, spec in drawn:
        build_kernels([spec], target)
    others = _others(drawn)
    for case, spec in drawn:
        for _ in range(problems):
            data = draw_data(rng)
            chosen = [str(name) for name in rng.choice(list(RELATIONS), 1)]
            if failures(case, data, spec.text(), others.get(case), chosen):
                data = shrink(case, data, spec.text(), others.get(case))
                yield case, data, failures(case, data, spec.text(), others.get(case))
            else:
                yield case, data, []


def block(
    seed: int, number: int, problems: int, target: Target, names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Counts and failures of one block, for Totals."""
    count: Counter[str] = Counter()
    large, wrong, kernels = 0, [], set()
    for case, data, complaints in run(seed, KERNELS, problems, target, names, number):
        count[case.variant] += 1
        large += min(case.rows, case.cols) >= 256
        kernels.add(case)
        if complaints:
            wrong.append(f"block ({seed}, {number}): {case}\n{data}\n  {'; '.join(complaints)}")
    totals = {"problems": count.total(), "large": large, "kernels": len(kernels), "variants": dict(count)}
    return totals, wrong


def summary(seed: int, record: Record) -> str:
    """One paragraph on what a record holds."""
    total = max(1, record.get("problems", 0))
    least = min(record.get("variants", {"none": 0}).items(), key=lambda item: item[1])
    return (
        f"seed {seed}: {record.get('problems', 0)} problems on {record.get('kernels', 0)} kernels of "
        f"{len(record.get('variants', {}))} variants, at least {least[1]} each ({least[0]}), "
        f"{100 * record.get('large', 0) / total:.0f} % with 256 or more inputs and outputs, "
        f"{len(record['failures'])} failures, {record.get('cpu_seconds', 0):.0f} s"
    )


def main() -> int:
    """The command; exit status 1 when the record holds a failure."""
    parser = argparse.ArgumentParser(description="Run random kernel problems against their float64 oracle.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=2000, help="in all, with those already recorded")
    parser.add_argument("--each", type=int, default=250, help="problems on one kernel (half a second to build)")
    parser.add_argument("--variant", action="append", default=[], help="only this catalogue variant; may be repeated")
    parser.add_argument("--op", choices=("linear", "conv"), default="linear", help="what the kernels compute")
    parser.add_argument("--target", default="cpu", help="cpu or tvm")
    parser.add_argument("--totals", type=Path, default=DEFAULT_PATH, help="JSON file that runs add to")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no block after this long")
    options = parser.parse_args()
    target = Target.probe() if options.target == "cpu" else Target.parse(options.target)
    kind, draw = ("kernels", block) if options.op == "linear" else ("conv", testing_conv.block)
    battery = " ".join([kind, options.target, str(options.each), *options.variant])
    record = resume(
        Totals(options.totals), battery, options.seed, options.problems, "problems",
        lambda number: draw(options.seed, number, options.each, target, options.variant), options.seconds,
    )  # fmt: skip
    print(summary(options.seed, record))
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
