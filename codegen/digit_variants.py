"""Kernels whose point is the number format: pairs of bfloat16, codes of few bits, tiles of a matrix unit."""

from __future__ import annotations

from sparsec.codegen.catalog import Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.codegen.plans import Tile
from sparsec.formats import SELL, CSRGroups, Format, Pairs
from sparsec.formats.csr_groups import MAX_BLOCK
from sparsec.target import Target

_C = ("avx512", "avx2", "portable")


def pairs(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Panels only, two vectors wide at most: all of a panel's activations stay in L2."""
    narrow: Plan = ((4, "panel", 4), (8, "panel", 8))
    wide: Plan = ((16, "panel", 16), (0, "panel", 32)) if isa.startswith("avx512") else ((0, "panel", 16),)
    return (((*narrow, *wide), ()),)


def pair_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Where the processor multiplies pairs and a third of the entries is stored: below, single values are fewer."""
    if "avx512bf16" not in target.isas or problem.density < 0.33:
        return ()
    return (Pairs(CSRGroups(min(MAX_BLOCK, max(1, -(-problem.in_features // 2))))),)


def dots(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Panels whose activations, 16 bits each, fill a quarter of a vector, half of it, or all."""
    return ((((8, "panel", 8), (16, "panel", 16), (0, "panel", 32)), ()),)


def dots_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """The longest blocks: one of 32 columns takes 16 KiB."""
    return (SELL(min(MAX_BLOCK, max(1, problem.in_features))),) if problem.density <= 0.6 else ()


VARIANTS = (
    Variant(
        "linear_sell_dots", "linear", SELL.name, "linear_sell_dots.c.jinja", dtypes=("bfloat16",),
        isas=("avx512bf16",), choose=dots, candidates=dots_formats,
    ),
    Variant(
        "linear_pairs", "linear", Pairs.name, "linear_pairs.c.jinja", dtypes=("bfloat16",),
        isas=("avx512bf16", *_C), choose=pairs, candidates=pair_formats,
    ),
)  # fmt: skip
"""Joined to the catalogue."""
