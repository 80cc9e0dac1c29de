"""Looking for a cheaper form of a term: equality saturation with egglog when it is installed, else a bounded search.

The search applies every rule at every place, cheapest term first, and drops terms whose fingerprint was seen: the text
with commutative arguments sorted, as derivation-based optimisers do (OLLIE, Zheng et al. 2023). The winner is chosen by
FLOPs; `fastest` lets the clock decide among the few best.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from sparsec.algebra.ring import LINEAR, TRANSFORM, Ring
from sparsec.algebra.rules import Refusal, Rule, rules
from sparsec.algebra.terms import Term, evaluate, flops, substitute, variables, walk
from sparsec.errors import SpecError, VerifyError

ENGINES = ("auto", "egglog", "search")
CHECKED = 2048
"""Terms whose variables have at most this many entries are compared in a finite field at every step."""


@dataclass(frozen=True)
class Candidate:
    """A term equal to the one that was asked for: its FLOPs and the rules that led to it, in order."""

    term: Term
    flops: int
    applied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Optimised:
    """The candidates, cheapest first, the original's FLOPs, who found them, and why rules were refused."""

    candidates: tuple[Candidate, ...]
    before: int
    engine: str
    explored: int
    complete: bool  # nothing more could be reached
    refusals: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def __str__(self) -> str:
        best = self.best
        how = " then ".join(best.applied) or "no rule"
        return f"{self.before} --> {best.flops} flops by {how} ({self.engine}, {self.explored} terms): {best.term}"


def optimise(
    term: Term, constant: Sequence[str] = (), engine: str = "auto", budget: int = 400, keep: int = 4,
    using: Sequence[Rule] | None = None,
) -> Optimised:  # fmt: skip
    """Cheaper forms of `term`. What depends on `constant` variables alone is computed ahead and costs nothing.

    `engine` "auto" saturates with egglog if that is installed and knows every operation of the term, then searches
    from its result; "search" visits at most `budget` terms. Raises SpecError for an unknown engine or one that is not
    installed, VerifyError when a rule changed a value.
    """
    if engine not in ENGINES:
        raise SpecError(f"engine={engine!r} is none of {', '.join(map(repr, ENGINES))}")
    fixed = frozenset(constant)
    start = [Candidate(term, flops(term, fixed))]
    name = "search"
    if engine != "search":
        from sparsec.algebra.saturate import saturated

        found = saturated(term, fixed, required=engine == "egglog")
        if found is not None:
            name = "egglog"
            start.append(Candidate(found.term, flops(found.term, fixed), found.applied))
            if engine == "egglog":
                budget = 0
    made = _search(start, fixed, tuple(rules() if using is None else using), budget)
    ranked = sorted(made.seen.values(), key=lambda c: (c.flops, len(c.applied), str(c.term)))
    return Optimised(tuple(ranked[:keep]), start[0].flops, name, len(made.seen), made.complete, tuple(made.refusals))


@dataclass
class _State:
    seen: dict[str, Candidate]
    refusals: dict[str, None]
    complete: bool = True


def _search(start: Sequence[Candidate], fixed: frozenset[str], using: Sequence[Rule], budget: int) -> _State:
    check = _checker(start[0].term)
    state = _State({fingerprint(c.term): c for c in start}, {})
    for c in start[1:]:
        check(c.term, c.applied[-1] if c.applied else "saturation")
    ticket = itertools.count()
    queue = [(c.flops, next(ticket), c) for c in start]
    heapq.heapify(queue)
    while queue:
        if len(state.seen) >= max(budget, len(start)):
            state.complete = False
            break
        _, _, candidate = heapq.heappop(queue)
        for name, outcome in _neighbours(candidate.term, using):
            if isinstance(outcome, Refusal):
                state.refusals[f"{name}: {outcome.reason}"] = None
                continue
            key = fingerprint(outcome)
            if key in state.seen:
                continue
            check(outcome, name)
            made = Candidate(outcome, flops(outcome, fixed), (*candidate.applied, name))
            state.seen[key] = made
            heapq.heappush(queue, (made.flops, next(ticket), made))
    return state


def _neighbours(term: Term, using: Sequence[Rule]) -> Iterator[tuple[str, Term | Refusal]]:
    """Every rule at every place."""
    for rule in using:
        for place in (term,) if rule.whole else tuple(walk(term)):
            outcome = rule.rewrite(place)
            if isinstance(outcome, Refusal):
                yield rule.name, outcome
            elif outcome is not None:
                yield rule.name, outcome if place is term else substitute(term, {place: outcome})


def fingerprint(term: Term) -> str:
    """The text of a term with the arguments of commutative operations sorted."""
    done: dict[Term, str] = {}
    for t in walk(term):
        args = [done[a] for a in t.args]
        done[t] = f"{t.op}{t.data}({','.join(sorted(args) if t.op in ('add', 'mul') else args)})"
    return done[term]


def _checker(term: Term) -> Callable[[Term, str], None]:
    """Compares terms with the first one in a finite field, if its variables are small enough for that."""
    shapes = variables(term)
    size = sum(torch.Size(s).numel() for s in shapes.values())
    ring = TRANSFORM if any(t.op in ("dft", "idft", "circulant") for t in walk(term)) else LINEAR
    if size > CHECKED or any(t.op in ("relu", "abs") for t in walk(term)):
        return lambda other, name: None
    generator = torch.Generator().manual_seed(0)
    values = {n: ring.random(s, generator) for n, s in shapes.items()}
    want = evaluate(term, values, ring)

    def check(other: Term, name: str) -> None:
        if not ring.same(evaluate(other, values, ring), want):
            raise VerifyError(f"rule {name!r} changed the value of {term} into {other}; it is wrong")

    return check


def fastest(
    candidates: Sequence[Candidate], values: Mapping[str, torch.Tensor], constant: Sequence[str] = (), rounds: int = 7
) -> tuple[Candidate, tuple[float, ...]]:
    """(the candidate with the smallest median time, seconds of each) on float tensors, run in turn.

    What depends on `constant` variables alone is computed before the clock starts.
    """
    runs = [prepared(c.term, values, frozenset(constant)) for c in candidates]
    samples: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, seen in zip(runs, samples):
            begin = perf_counter()
            run()
            if turn:  # the first call pages in
                seen.append(perf_counter() - begin)
    times = tuple(statistics.median(s) for s in samples)
    return candidates[times.index(min(times))], times


def prepared(term: Term, values: Mapping[str, torch.Tensor], constant: frozenset[str]) -> Callable[[], torch.Tensor]:
    """A function that evaluates the term with its constant part done."""
    ring = Ring(0)
    table: dict[Term, Term] = {}
    known = dict(values)
    fixed: dict[Term, bool] = {}
    for t in walk(term):
        fixed[t] = t.data[0] in constant if t.op == "var" else bool(t.args) and all(fixed[a] for a in t.args)
        if fixed[t] and t.op != "var":
            name = f"constant {len(table)}"
            known[name] = evaluate(t, values, ring)
            table[t] = Term("var", (), (name, *t.shape))
    rest = substitute(term, table)
    return lambda: evaluate(rest, known, ring)
