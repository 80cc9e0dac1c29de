"""Milliseconds: what a layer costs at a level by measured reports, and a budget that holds when measured again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsec.errors import InputError, SpecError
from sparsec.report import Report, Row
from sparsec.sparsifiers.layers import Where

if TYPE_CHECKING:
    from sparsec.sparsifiers.allocators import Sensitivity
    from sparsec.sparsifiers.parts import Sparsifier

Timings = Mapping[float, Report | Sequence[Report]]
"""Sparsity level -> the report, or several, that `sparsec.analyze` gave for the model pruned to it."""

TRIES = 6


def site_us(timings: Timings, site: str, level: float) -> float:
    """Microseconds of all uses of a site at a level; 0 is dense.

    A level's reports say which share of the dense time the site takes: both were timed in turns, so a phase in which
    the machine is slow cancels. The dense time is the median over all reports. Medians are taken over a level's reports
    as well. A site without a kernel takes its dense time at every level; where nobody timed even that, it cannot become
    faster and costs nothing. Raises SpecError when the reports hold no times at all.
    """
    everything = [pair for reports in timings.values() for pair in _pairs(reports, site)]
    if not everything:
        if not any(_timed(row) for reports in timings.values() for r in _listed(reports) for row in r.rows):
            raise SpecError(f"Sensitivity: the report has no time for {site!r}; analyze with example inputs")
        return 0.0
    dense = statistics.median(dense for _, dense in everything)
    return dense * statistics.median([us / own for us, own in _pairs(timings.get(level, ()), site)] or [1.0])


def taken_us(timings: Timings, report: Report) -> float:
    """Microseconds of the sites of `timings` in another report, each as its share of the dense time there; a site that
    the report did not time stayed dense."""
    rows = [row for reports in timings.values() for r in _listed(reports) for row in r.rows if _timed(row)]
    total = 0.0
    for site in dict.fromkeys(row.site.partition("#")[0] for row in rows):
        us, own = (*(_pairs(report, site) if site in report else ()), (1.0, 1.0))[0]
        total += site_us(timings, site, 0.0) * us / own
    return total


def _pairs(reports: Report | Sequence[Report], site: str) -> list[tuple[float, float]]:
    """(microseconds as decided, dense) of a site's uses together, one pair a report that timed them."""
    found = []
    for report in _listed(reports):
        uses = [report.row(site), *(r for r in report.rows if r.site.startswith(f"{site}#"))]
        if all(map(_timed, uses)):
            found.append((sum(r.us or 0.0 for r in uses), sum(r.dense_us or 0.0 for r in uses)))
    return found


def _timed(row: Row) -> bool:
    return bool(row.us and row.dense_us)


def _listed(reports: Report | Sequence[Report]) -> Sequence[Report]:
    return [reports] if isinstance(reports, Report) else reports


@dataclass(frozen=True, eq=False)
class Met:
    """A pruned model that takes its budget: what `measure` gave for it, in milliseconds, and every try as (what the
    levels were chosen for, what was measured)."""

    model: nn.Module
    budget: float
    milliseconds: float
    tries: tuple[tuple[float, float], ...]

    @property
    def ratio(self) -> float:
        """Measured over wanted."""
        return self.milliseconds / self.budget

    def __repr__(self) -> str:
        return f"<Met: {self.milliseconds:.3g} ms of {self.budget:.3g} ms after {len(self.tries)} tries>"


def meet_budget(
    model: nn.Module,
    budget: float,
    method: Callable[[Sensitivity], Sparsifier],
    timings: Timings,
    measure: Callable[[nn.Module], float | Report],
    *,
    data: Any = None,
    where: Where | Iterable[Where] | None = None,
    within: float = 0.05,
    tries: int = TRIES,
) -> Met:
    """Prune `model` so that `measure(pruned)` gives `budget` milliseconds within the share `within`.

    `method` makes a sparsifier of an allocator: `Magnitude`, `SparseGPT`, or a function. `timings` are those of
    `Sensitivity`. `measure` compiles and times the pruned model as it will be used: it returns milliseconds, or a
    Report, of which the layers count (those that it did not time stay dense, at their time in `timings`).

    Sites that were timed one by one do not take the sum of their times together, and a model has more than its layers.
    So the levels are chosen for the budget, the result is measured, and they are chosen again for as much more or less
    as it missed; between a try below and one above, in proportion. Half of `within` ends the search; after `tries`, the
    closest counts.

    Raises SpecError when no try came close enough, with what was measured; InputError when `measure` gives no time.
    """
    from sparsec.sparsifiers.allocators import Sensitivity
    from sparsec.sparsifiers.layers import find_layers
    from sparsec.sparsifiers.pruning import sparsify

    if not (math.isfinite(budget) and budget > 0 and 0 < within < 1 and tries >= 1):
        raise SpecError(
            f"meet_budget(budget={budget!r}, within={within!r}, tries={tries!r}): a budget in milliseconds and tries "
            "are positive, within is between 0 and 1"
        )
    first = Sensitivity(budget, "ms", timings=timings)
    costs = [[first.cost(layer, level) for level in first.all_levels] for layer in find_layers(model, where)]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    done: list[tuple[float, float]] = []
    best: tuple[float, nn.Module] | None = None
    aim = budget
    while len(done) < tries:
        aim = min(max(aim, least * (1 + 1e-9)), most)  # a sum in another order may be off by its rounding
        if any(math.isclose(aim, before, rel_tol=1e-3) for before, _ in done):
            break
        allocator = Sensitivity(aim, "ms", timings=timings)
        pruned = sparsify(model, method(allocator), data=data, where=where)
        taken = _milliseconds(measure(pruned), allocator)
        done.append((aim, taken))
        if best is None or abs(taken - budget) < abs(best[0] - budget):
            best = taken, pruned
        if abs(taken - budget) <= within / 2 * budget:
            break
        aim = _next(done, budget)
    if best is None or abs(best[0] - budget) > within * budget:
        seen = ", ".join(f"{taken:.4g}" for _, taken in done)
        raise SpecError(
            f"meet_budget: {budget:g} ms were not met within {within:.0%}: measured {seen} ms; the layers by "
            f"themselves take {least:.4g} to {most:.4g} ms in timings; give a budget between, or finer levels"
        )
    return Met(best[1], budget, best[0], tuple(done))


def _milliseconds(found: float | Report, allocator: Sensitivity) -> float:
    taken = allocator.taken(found) if isinstance(found, Report) else found
    if not isinstance(taken, (int, float)) or not math.isfinite(taken) or taken <= 0:
        raise InputError(f"meet_budget: measure gave {taken!r}; it returns milliseconds, or a Report with times")
    return float(taken)


def _next(done: Sequence[tuple[float, float]], budget: float) -> float:
    """What to aim for: between the nearest tries below and above, else past them all by as much as the last missed."""
    below = max((d for d in done if d[1] <= budget), default=None)
    above = min((d for d in done if d[1] > budget), default=None)
    if below is not None and above is not None and below[0] < above[0]:
        return below[0] + (above[0] - below[0]) * (budget - below[1]) / (above[1] - below[1])
    aim, taken = done[-1] if below is not None and above is not None else below or above or done[-1]
    return aim + budget - taken
