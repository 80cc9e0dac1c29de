"""Proving a rule: random shapes, random elements of a finite field, equality without tolerance. And breaking it.

A mutant is the same rule with one operation of its result damaged. A proof that accepts a mutant proves nothing, so
`mutants` damages every place in every way that changes the meaning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sparsec.algebra.rules import Refusal, Rule
from sparsec.algebra.terms import Term, evaluate, substitute, variables, walk
from sparsec.errors import InputError


@dataclass(frozen=True)
class Proof:
    """What was checked: shapes, rounds of values for each, and the first few failures in words."""

    rule: str
    shapes: int
    rounds: int
    failures: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.failures


def prove(rule: Rule, shapes: int = 100, rounds: int = 3, seed: int = 0, stop: int = 5) -> Proof:
    """Apply `rule` to `shapes` random terms and compare both sides for `rounds` random assignments each."""
    rng = random.Random(f"{rule.name} {seed}")
    failures: list[str] = []
    for number in range(shapes):
        before = rule.sample(rng)
        after = rewritten(rule, before)
        if not isinstance(after, Term):
            failures.append(f"{before} was not rewritten: {after}")
        elif after.shape != before.shape:
            failures.append(f"{before} has shape {before.shape}, {after} has {after.shape}")
        else:
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            for _ in range(rounds):
                values = {n: rule.ring.random(s, generator) for n, s in variables(before).items()}
                if not rule.ring.same(evaluate(after, values, rule.ring), evaluate(before, values, rule.ring)):
                    failures.append(f"{before} and {after} differ")
                    break
        if len(failures) >= stop:
            break
    return Proof(rule.name, shapes, rounds, tuple(failures))


def rewritten(rule: Rule, term: Term) -> Term | Refusal | str | None:
    """What the rule makes of a term; the message when it builds a term that does not exist."""
    try:
        return rule.rewrite(term)
    except InputError as error:
        return str(error)


Damage = Callable[[Term], Term | None]


def _swapped(t: Term) -> Term | None:
    if all(set(a.shape) == {1} for a in t.args):  # numbers commute
        return None
    return Term(t.op, t.args[::-1], t.data) if len(t.args) == 2 and t.op not in ("add", "mul") else None


def _second_twice(t: Term) -> Term | None:
    if len(t.args) < 2 or t.args[0] == t.args[1] or t.args[0].shape != t.args[1].shape:
        return None
    return Term(t.op, (t.args[1],) * len(t.args), t.data)


def _dropped(t: Term) -> Term | None:
    return t.args[0] if t.op in ("t", "scale", "shift", "add", "mul", "map", "norm", "relu", "permute") else None


def _another(t: Term) -> Term | None:
    other = {"add": "mul", "mul": "add", "scale": "shift", "shift": "scale", "idft": "dft", "dft": "idft"}.get(t.op)
    return Term(other, t.args, t.data) if other else None


def _other_axis(t: Term) -> Term | None:
    return Term(t.op, t.args, (1 - t.data[0],)) if t.op in ("scale", "concat") and t.data[0] in (0, 1) else None


def _shifted(t: Term) -> Term | None:
    if t.op != "slice":
        return None
    axis, start, stop = t.data
    if stop < t.args[0].shape[axis]:
        return Term("slice", t.args, (axis, start + 1, stop + 1))
    return Term("slice", t.args, (axis, start - 1, stop - 1)) if start else None


def _reordered(t: Term) -> Term | None:
    if t.op == "permute":
        return Term("permute", t.args, t.data[::-1])
    return Term("concat", t.args[::-1], t.data) if t.op == "concat" else None


def _transposed(t: Term) -> Term | None:
    if t.op == "reshape" and len(t.shape) == 2 and t.shape[0] > 1 and t.shape[1] > 1:
        return Term("reshape", (t.T,), t.shape)
    return t.T if t.op in ("var", "matmul") and len(t.shape) == 2 and t.shape[0] == t.shape[1] > 1 else None


DAMAGE: dict[str, Damage] = {
    "arguments swapped": _swapped, "second argument twice": _second_twice, "operation dropped": _dropped,
    "another operation": _another, "another axis": _other_axis, "slice moved": _shifted, "order reversed": _reordered,
    "transposed": _transposed,
}  # fmt: skip


def mutants(rule: Rule, attempts: int = 40, seed: int = 1) -> Iterator[tuple[str, Rule]]:
    """(what is broken, broken rule) for every operation of the rule's results and every damage that fits there.

    Damage that gives a term in fewer than two of `attempts` samples (all sizes equal, say) is left out.
    """
    rng = random.Random(f"{rule.name} {seed}")
    places: dict[tuple[int, str, str], int] = {}
    for _ in range(attempts):
        after = rewritten(rule, rule.sample(rng))
        if isinstance(after, Term):
            for position, node in enumerate(walk(after)):
                for name in [n for n, damage in DAMAGE.items() if _tried(damage, node) is not None]:
                    place = position, name, node.op
                    places[place] = places.get(place, 0) + (_damaged(after, *place) != after)
    for position, name, op in sorted(p for p, seen in places.items() if seen > 1):
        yield f"{op} at {position}: {name}", _broken(rule, position, name, op)


def _broken(rule: Rule, position: int, name: str, op: str) -> Rule:
    def rewrite(term: Term) -> Term | Refusal | None:
        after = rule.rewrite(term)
        return _damaged(after, position, name, op) if isinstance(after, Term) else after

    return Rule(rule.name, rule.statement, rule.kind, rewrite, rule.sample, rule.condition, rule.refused, rule.ring,
                rule.whole)  # fmt: skip


def _tried(damage: Damage, node: Term) -> Term | None:
    try:
        return damage(node)
    except InputError:
        return None


def _damaged(term: Term, position: int, name: str, op: str) -> Term:
    """The term with its distinct subterm number `position` damaged, if it is such a node and leaves a term."""
    node = next((t for i, t in enumerate(walk(term)) if i == position), None)
    if node is None or node.op != op:
        return term
    try:
        made = DAMAGE[name](node)
        return term if made is None else substitute(term, {node: made})
    except InputError:
        return term
