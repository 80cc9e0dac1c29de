"""Exact rewrite rules as small values: what is matched, what it becomes, when it does not hold, and a way to prove it.

A rule never looks at values, only at shapes and structure, except where its condition says so. `rules()` lists them;
`sparsec.algebra.proof.prove` checks one on random shapes in exact arithmetic.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparsec.algebra.ring import LINEAR, Ring
from sparsec.algebra.terms import Term
from sparsec.errors import SpecError, nearest

EXACT, REASSOCIATION, CONDITIONAL = "exact", "reassociation", "exact under a condition"
KINDS = (EXACT, REASSOCIATION, CONDITIONAL)


@dataclass(frozen=True)
class Refusal:
    """The pattern is there, the condition is not: why the rule was not applied."""

    reason: str


Outcome = Term | Refusal | None


@dataclass(frozen=True)
class Rule:
    """`before --> after`, as a function on terms that gives None where the pattern is not.

    `kind`: exact (the same operations on the same numbers, or none), reassociation (the same polynomial in another
    order, so that floats round differently), or exact under a condition. `whole` rules look at all of a term at once.
    `sample` makes a term that the rule rewrites, `refused` one that it refuses, both on random shapes.
    """

    name: str
    statement: str
    kind: str
    rewrite: Callable[[Term], Outcome] = field(compare=False)
    sample: Callable[[random.Random], Term] = field(compare=False)
    condition: str = ""
    refused: Callable[[random.Random], Term] | None = field(default=None, compare=False)
    ring: Ring = LINEAR
    whole: bool = False
    values: Callable[[str, Any], Any] | None = field(default=None, compare=False)  # what a condition asks of values
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecError(f"rule {self.name!r}: kind {self.kind!r} is none of {', '.join(map(repr, KINDS))}")
        if "-->" not in self.statement:
            raise SpecError(f"rule {self.name!r}: its statement reads `before --> after`, got {self.statement!r}")
        if (self.kind == CONDITIONAL) != bool(self.condition):
            raise SpecError(f"rule {self.name!r}: a condition belongs to the kind {CONDITIONAL!r} and to no other")
        object.__setattr__(self, "__doc__", f"{self.statement}\n\n{self.kind}. {self.condition}".strip())

    def __str__(self) -> str:
        return f"{self.name}: {self.statement}"


def rules() -> tuple[Rule, ...]:
    """Every rule, in the order in which searches try them."""
    from sparsec.algebra import rules_layers, rules_linear, rules_structure

    return (*rules_linear.RULES, *rules_structure.RULES, *rules_layers.RULES)


def rule(name: str) -> Rule:
    """One rule by name. Raises SpecError with the nearest names."""
    table = {r.name: r for r in rules()}
    if name not in table:
        raise SpecError(f"no rule is called {name!r}; {nearest(name, table)}")
    return table[name]
