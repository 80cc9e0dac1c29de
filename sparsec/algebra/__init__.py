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
from sparsec.algebra.store import from_dict

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
    "from_dict",
    "plan",
    "plan_many",
    "rule",
    "rules",
]
