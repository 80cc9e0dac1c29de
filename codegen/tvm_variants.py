"""The TVM half of the catalogue: what is tried for `target="tvm"`, and where there is no C compiler."""

from __future__ import annotations

from sparsec.codegen import chain_variants, plans
from sparsec.codegen.catalog import Tile, Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.formats import Format
from sparsec.target import ISAS, Target

MAX_STAGES = 8
"""Products of one chain: each takes about half a second to schedule and compile for two widths of panels."""

_ISAS = ("avx512", "avx2", "portable")
_PLAN: Plan = ((1, "gemv", 1), (16, "panel", 16), (63, "panel", 32), (0, "panel", 64))


def panels(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Rows one by one for one row of x, then panels that widen with the batch: fewer widths than in C build sooner."""
    return ((_PLAN, ()),)


def chains(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Two widths of panels, the limits being those of the batch of one thread; narrow ones for few registers."""
    wide = ISAS[isa].lanes == 16
    return ((((16, "panel", 16), (0, "panel", 32)) if wide else ((8, "panel", 8), (0, "panel", 16)), ()),)


def chain_needs(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Tiled operands, and few of them."""
    reason = chain_variants.chain_needs(problem, fmt, target)
    if reason is None and (stages := fmt.fields()["stages"]) > MAX_STAGES:
        reason = f"a chain of {stages} products; those by TVM have at most {MAX_STAGES}"
    return reason


def _variant(name: str, candidates: object = plans.no_formats) -> Variant:
    return Variant(
        f"linear_{name}_tvm", "linear", name, language="tvm", isas=_ISAS, choose=panels,
        candidates=candidates,  # type: ignore[arg-type]
    )  # fmt: skip


VARIANTS: tuple[Variant, ...] = (
    _variant("csr", plans.csr_formats),
    _variant("bsr", plans.bsr_formats),
    _variant("nm"),
    _variant("fan_in"),
    Variant(
        "chain_tvm", chain_variants.OP, chain_variants.FORMAT, language="tvm", isas=_ISAS, choose=chains,
        needs=chain_needs,
    ),
)  # fmt: skip
