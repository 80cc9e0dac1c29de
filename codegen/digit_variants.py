"""Kernels whose point is the number format: pairs of bfloat16, codes of few bits, tiles of a matrix unit."""

from __future__ import annotations

from sparsec.codegen import plans
from sparsec.codegen.catalog import Candidates, Choose, Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.codegen.plans import Tile, codes_in
from sparsec.formats import SELL, Bitmask, CSRGroups, Format, GroupInt4, Pairs, Picks, Quantized, SpQR
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


def once(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """One routine, which takes tokens as they come."""
    return ((((0, "gemv", 1),), ()),)


def groups(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """GEMV for few rows of x, each of which decodes for itself in whole vectors; a panel decodes once for all."""
    return ((((8, "gemv", 1), (16, "panel", 16), (0, "panel", 32)), ()),)


def picks_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Where a byte permutation looks up activations."""
    return (Quantized(Picks()),) if "avx512vbmi2" in target.isas else ()


def picks_inside(problem: Problem, fmt: Format, target: Target) -> str | None:
    """The format of the codes must be the template's."""
    return codes_in(Picks.name, problem, fmt)


def mask_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Where codes are expanded by a mask, and so many are stored that looking up their activations takes as long."""
    return (Quantized(Bitmask(64)),) if "avx512vbmi2" in target.isas and problem.density > 0.25 else ()


def mask_inside(problem: Problem, fmt: Format, target: Target) -> str | None:
    """The format of the codes must be the template's, with masks of the width it expands."""
    if fmt.fields()["format"].fields().get("width") not in (None, 64):
        return f"it expands masks of 64 inputs, not {fmt.text()}"
    return codes_in(Bitmask.name, problem, fmt)


_BYTES = ("avx512vbmi2", *_C)


def _half(fmt: str, choose: Choose, candidates: Candidates) -> Variant:
    """A kernel of fp32 sums whose operands are stored as float16: conversions come with every vector since AVX2."""
    return Variant(
        f"linear_{fmt}_fp16", "linear", fmt, f"linear_{fmt}.c.jinja", dtypes=("float16",),
        isas=_C, choose=choose, candidates=candidates,
    )  # fmt: skip


def _digits(name: str, fmt: str) -> tuple[Variant, ...]:
    """Kernels of groups in few bits, in fp32 and in bf16; the formats are lossy, so that only a spec asks for them."""
    return tuple(
        Variant(name + tail, "linear", fmt, f"{name}.c.jinja", dtypes=(dtype,), isas=_C, choose=groups)
        for tail, dtype in (("", "float32"), ("_bf16", "bfloat16"))
    )


VARIANTS = (
    _half("csr", plans.linear, plans.csr_formats),
    _half("csr_groups", plans.linear, plans.csr_groups_formats),
    _half("sell", plans.sell, plans.sell_formats),
    _half("bsr", plans.linear, plans.bsr_formats),
    Variant(
        "linear_sell_dots", "linear", SELL.name, "linear_sell_dots.c.jinja", dtypes=("bfloat16",),
        isas=("avx512bf16",), choose=dots, candidates=dots_formats,
    ),
    Variant(
        "linear_pairs", "linear", Pairs.name, "linear_pairs.c.jinja", dtypes=("bfloat16",),
        isas=("avx512bf16", *_C), choose=pairs, candidates=pair_formats,
    ),
    Variant(
        "linear_picks", "linear", Quantized.name, "linear_picks.c.jinja",
        isas=_BYTES, choose=once, candidates=picks_formats, needs=picks_inside,
    ),
    Variant(
        "linear_bitmask_codes", "linear", Quantized.name, "linear_bitmask_codes.c.jinja",
        isas=_BYTES, choose=once, candidates=mask_formats, needs=mask_inside,
    ),
    *_digits("linear_group_int4", GroupInt4.name),
    *_digits("linear_spqr", SpQR.name),
)  # fmt: skip
"""Joined to the catalogue."""
