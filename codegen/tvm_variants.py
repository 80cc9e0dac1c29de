"""The TVM half of the catalogue: what is tried for `target="tvm"`, and where there is no C compiler."""

from __future__ import annotations

from sparsec.codegen import plans
from sparsec.codegen.catalog import Tile, Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.formats import Format
from sparsec.target import Target

_ISAS = ("avx512", "avx2", "portable")
_PLAN: Plan = ((1, "gemv", 1), (16, "panel", 16), (63, "panel", 32), (0, "panel", 64))


def panels(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """Rows one by one for one row of x, then panels that widen with the batch: fewer widths than in C build sooner."""
    return ((_PLAN, ()),)


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
)
