"""The CUDA half of the catalogue, and the choices behind it: batch plans, tiles, and what each kernel refuses."""

from __future__ import annotations

from sparsec.codegen.catalog import Tile, Variant
from sparsec.codegen.kernel import Plan, Problem
from sparsec.formats import CSR, Format
from sparsec.target import ARCHITECTURES, Target

ALL = ("float16", "bfloat16", "float32")
TENSOR = ("float16", "bfloat16")  # what mma.sync multiplies with fp32 sums and without losing digits of the inputs

_ROWS: Plan = ((8, "gemv", 8), (63, "panel", 32), (0, "panel", 64))


def rows(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """A warp per row: lanes over entries for few rows of x, over rows of x for many."""
    return ((_ROWS, ()),)


def csr_formats(problem: Problem, target: Target) -> tuple[Format, ...]:
    """CSR with one pointer per row."""
    return (CSR().resolve(problem.out_features, problem.in_features),)


VARIANTS: tuple[Variant, ...] = (
    Variant(
        "linear_csr_cuda", "linear", "csr", "linear_csr.cu.jinja", "cuda", ALL, tuple(ARCHITECTURES),
        choose=rows, candidates=csr_formats,
    ),
)  # fmt: skip
