"""Tensor algebra: contraction plans over structured operands, exact rewrite rules, and searches over both."""

from __future__ import annotations

from sparsec.algebra.operands import (
    Circulant,
    Delta,
    Diagonal,
    Hankel,
    Identity,
    KhatriRao,
    Kron,
    Operand,
    Sparse,
    Symmetric,
    Toeplitz,
)
from sparsec.algebra.plan import Plan, plan
from sparsec.algebra.rules import Rule, rule, rules
from sparsec.algebra.sharing import plan_many

__all__ = [
    "Circulant",
    "Delta",
    "Diagonal",
    "Hankel",
    "Identity",
    "KhatriRao",
    "Kron",
    "Operand",
    "Plan",
    "Rule",
    "Sparse",
    "Symmetric",
    "Toeplitz",
    "plan",
    "plan_many",
    "rule",
    "rules",
]
