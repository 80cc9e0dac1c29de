"""Kernels of the formats whose patterns are shared, mixed, reordered or added."""

from __future__ import annotations

from math import comb

from sparsec.codegen import pair
from sparsec.codegen.catalog import Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.codegen.plans import DEFAULT_PLAN, Tile, bsr, linear
from sparsec.formats import NMG, Format, Window
from sparsec.target import Target

_ISAS = ("avx512", "avx2", "portable")
FEW = 2
"""Rows of x up to which sliding windows are tried: they read the weight once for each."""


def nmg(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """The template counts patterns in their order, and is told how many there are."""
    fields = fmt.fields()
    return ((DEFAULT_PLAN, (("patterns", comb(fields["m"], fields["n"])),)),)


def window(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """One row of x at a time, however many there are."""
    return ((((0, "gemv", 1),), ()),)


def window_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """Where vectors of sixteen look activations up, and few rows are expected; the reach that measured faster."""
    if not problem.batches or max(problem.batches) > FEW or not 0.02 <= problem.density <= 0.7:
        return ()
    if "avx512" not in target.isas:
        return ()
    size = problem.nnz * 5 // max(1, problem.threads)
    return (Window(32 if problem.density > 0.15 and size < target.l3 // 4 else 64),)


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
    *_both("linear_window", Window.name, "linear_window.c.jinja", choose=window, candidates=window_formats),
    *_both("linear_block_nm", "block_nm", "linear_block_nm.c.jinja", choose=linear),
    *_both("linear_permuted_bsr", "permuted", "linear_bsr.c.jinja", choose=bsr, needs=bsr_inside),
    *_both(
        "linear_permuted_csr_groups", "permuted", "linear_csr_groups.c.jinja", choose=linear, needs=csr_groups_inside,
    ),
    Variant("linear_sum", "linear", "sum", language="pair", isas=_ISAS, choose=linear, needs=pair.refuse),
)
"""Joined to the catalogue."""
