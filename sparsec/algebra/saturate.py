"""Equality saturation over the linear-algebra terms with egglog, an optional package.

An e-graph holds every term that the rules reach at once; the cost of a node follows from the rows and columns of its
class, and what depends on constants alone is nearly free. Operations that egglog is not told about are variables to it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sparsec.algebra.terms import Term, v, walk
from sparsec.errors import DependencyError

ROUNDS = 5
"""How often the rules are applied: associativity and distribution grow without end."""


@dataclass(frozen=True)
class Saturated:
    """The cheapest term of the e-graph and the rules that matched on the way."""

    term: Term
    applied: tuple[str, ...]


def saturated(term: Term, constant: frozenset[str], required: bool = False) -> Saturated | None:
    """The cheapest equal term that saturation finds; None without egglog. Raises DependencyError when `required`."""
    if find_spec("egglog") is None:
        if required:
            raise DependencyError("engine='egglog' needs the egglog package: pip install egglog")
        return None
    if len(term.shape) != 2:
        return Saturated(term, ())
    import egglog

    known: Any = import_module("sparsec.algebra._egraph")
    graph = egglog.EGraph()
    leaves: dict[str, Term] = {}
    made: dict[Term, Any] = {}
    for sub in walk(term):
        if sub.op in known.OPERATIONS and all(a in made for a in sub.args):
            made[sub] = known.OPERATIONS[sub.op](*(made[a] for a in sub.args))
        elif len(sub.shape) == 2:
            name = f"leaf{len(leaves)}"
            leaves[name] = sub
            made[sub] = known.Mat(name)
            fixed = all(s.data[0] in constant for s in walk(sub) if s.op == "var")
            numbers = (known.rows, sub.shape[0]), (known.cols, sub.shape[1]), (known.live, int(not fixed))
            graph.register(*(egglog.set_(f(made[sub])).to(egglog.i64(n)) for f, n in numbers))
    root = graph.let("root", made[term])
    decls = {rule.decl: name for name, rule in known.NAMED.items()}
    fired: dict[str, None] = {}
    for _ in range(ROUNDS):
        graph.run(egglog.run(known.SHAPES).saturate())
        report: Any = graph.run(egglog.run(known.RULES))
        fired.update(dict.fromkeys(decls[d] for d, n in report.num_matches_per_rule.items() if n and d in decls))
    graph.run(egglog.run(known.SHAPES).saturate())
    graph.run(egglog.run(known.COSTS).saturate())
    best = _read(str(graph.extract(root)), leaves)
    return Saturated(best, tuple(sorted(fired)) if best != term else ())


def _read(text: str, leaves: dict[str, Term]) -> Term:
    """The term that egglog prints: assignments of shared parts, then one expression of calls."""
    known: dict[str, Term] = {}

    def read(node: ast.expr) -> Term:
        if isinstance(node, ast.Name):
            return known[node.id]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "Mat" and isinstance(node.args[0], ast.Constant):
                return leaves[str(node.args[0].value)]
            return Term(node.func.id, tuple(read(a) for a in node.args))
        raise DependencyError(f"this version of egglog prints terms in a form that is not understood: {text[:200]}")

    last = v("nothing", 1, 1)
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            known[line.targets[0].id] = read(line.value)
        elif isinstance(line, ast.Expr):
            last = read(line.value)
    return last
