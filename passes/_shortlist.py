"""Which of a site's candidates are worth building and timing, and at which numbers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsec import cost
from sparsec.codegen import catalog
from sparsec.codegen.kernel import Problem
from sparsec.codegen.rates import rates
from sparsec.driver import Context
from sparsec.passes import _product
from sparsec.passes._propose import Candidate, Proposal

FEW = 2  # candidates that are timed whatever the cost model says of the others
MOST = 3  # and no more than these, however near each other it expects them
NEAR = 1.2  # times the least expected time: what the model cannot tell apart, the clock decides

LARGEST_BATCH = 1024  # dynamic sizes are timed up to here; the last bucket stands for all above it


def leading(problem: Problem, rank: int) -> int:
    """How many dimensions of an input count rows, or images."""
    if problem.op == "embedding":
        return rank
    return rank - 1 if problem.conv is None else rank - 1 - len(problem.conv.size)


def batches(value: Any, seen: int | None, dims: int) -> tuple[int, ...]:
    """The rows to time: what was seen, or for dynamic sizes the ends of the range and the powers of four between.

    `value` is what the capture recorded for the input, whose first `dims` dimensions count; `seen` its rows in the
    example inputs, or None where the capture's own hint has to do. () when neither is known.
    """
    shape = getattr(value, "shape", None)
    rows: Any = 1
    for size in (shape or ())[:dims]:
        rows = rows * size
    if not isinstance(rows, torch.SymInt):
        return () if seen is None and shape is None else (max(1, int(rows) if seen is None else seen),)
    node = rows.node
    if seen is None:
        seen = node.hint
    ranges = [node.shape_env.var_to_range[s] for s in sorted(node.expr.free_symbols, key=str)]
    low = _clip(min(_bound(r.lower) for r in ranges))
    high = _clip(max(_bound(r.upper) for r in ranges))
    sizes = {low, high, *(4**k for k in range(6) if low < 4**k < high)}
    found = {int(node.expr.subs(dict.fromkeys(node.expr.free_symbols, size))) for size in sorted(sizes)}
    known = {max(1, seen)} if seen is not None else set()
    return tuple(sorted({min(max(1, n), LARGEST_BATCH) for n in found} | known))


def expected_batches(proposal: Proposal) -> tuple[int, ...]:
    """The rows that a site will be timed at, as far as the capture tells before the model has run; else ()."""
    source: fx.Node = _product.source(proposal.node).node
    value = source.meta.get("val")
    return batches(value, None, leading(proposal.problem, len(getattr(value, "shape", ()))))


def expected_us(proposal: Proposal, candidate: Candidate, batches: Sequence[int], ctx: Context) -> float:
    """Microseconds of a candidate over all batches by the cost model."""
    target = ctx.target
    return sum(
        cost.sparse_us(proposal.problem, candidate.format, candidate.spec, b, target, rates(target)) for b in batches
    )


def shortlist(proposal: Proposal, batches: Sequence[int], ctx: Context) -> list[Candidate]:
    """The candidates to build and time, in their order; all of them when the batches are not known.

    The cost model's first choice is within a fifth of the best on almost every problem, so that a third and a fourth
    kernel mostly cost compile time. The first choice of every back end stays, in case that another fails to build.
    """
    found = proposal.candidates
    if ctx.options.tune == "off" or not batches or len(found) <= FEW:
        return found[:1] if ctx.options.tune == "off" else found
    expected = [expected_us(proposal, c, batches, ctx) for c in found]
    order = sorted(range(len(found)), key=expected.__getitem__)
    limit = NEAR * expected[order[0]]
    kept = {at for place, at in enumerate(order[:MOST]) if place < FEW or expected[at] <= limit}
    for language in dict.fromkeys(_language(c) for c in found):
        kept.add(next(at for at in order if _language(found[at]) == language))
    return [c for at, c in enumerate(found) if at in kept]


def _language(candidate: Candidate) -> str:
    return catalog.variant(candidate.spec.variant).language


def _bound(bound: Any) -> int:
    try:
        return int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):  # int_oo and sympy's infinities are no numbers
        return LARGEST_BATCH


def _clip(size: int) -> int:
    return min(max(1, size), LARGEST_BATCH)
