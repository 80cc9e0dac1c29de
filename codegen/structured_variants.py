"""Kernels of the formats whose patterns are shared, mixed, reordered or added."""

from __future__ import annotations

from math import comb

from sparsec.codegen import pair
from sparsec.codegen.catalog import Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.codegen.plans import DEFAULT_PLAN, Tile, linear
from sparsec.formats import NMG, Format
from sparsec.target import Target

_ISAS = ("avx512", "avx2", "portable")


def nmg(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """The template counts patterns in their order, and is told how many there are."""
    fields = fmt.fields()
    return ((DEFAULT_PLAN, (("patterns", comb(fields["m"], fields["n"])),)),)


def bsr_inside(problem: Problem, fmt: Format, target: Target) -> str | None:
    """The format that was permuted must be the template's."""
    return _inside("bsr", fmt)


def csr_groups_inside(problem: Problem, fmt: Format, target: Target) -> str | None:
    """The format that was permuted must be the template's."""
    return _inside("csr_groups", fmt)


def _inside(name: str, fmt: Format) -> str | None:
    inner = fmt.fields()["format"]
    return None if inner.name == name else f"it reads a permuted {name}, not {inner.text()}"


def _both(name: str, fmt: str, template: str, **choices: object) -> tuple[Variant, ...]:
    """A template in fp32 and in bf16."""
    return tuple(
        Variant(name + tail, "linear", fmt, template, dtypes=(dtype,), isas=_ISAS, **choices)  # type: ignore[arg-type]
        for tail, dtype in (("", "float32"), ("_bf16", "bfloat16"))
    )


VARIANTS = (
    *_both("linear_nmg", NMG.name, "linear_nmg.c.jinja", choose=nmg),
    *_both("linear_block_nm", "block_nm", "linear_block_nm.c.jinja", choose=linear),
    *_both("linear_permuted_bsr", "permuted", "linear_bsr.c.jinja", choose=linear, needs=bsr_inside),
    *_both(
        "linear_permuted_csr_groups", "permuted", "linear_csr_groups.c.jinja", choose=linear, needs=csr_groups_inside,
    ),
    Variant("linear_sum", "linear", "sum", language="pair", isas=_ISAS, choose=linear, needs=pair.refuse),
)
"""Joined to the catalogue."""
