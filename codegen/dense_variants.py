"""Kernels of dense linears at few rows, where a library's packing costs more than the product."""

from __future__ import annotations

import torch

from sparsec.codegen.catalog import Tile, Variant
from sparsec.codegen.kernel import KernelSpec, Plan, Problem
from sparsec.formats import Dense, Format
from sparsec.target import Target

FEW_ROWS = 16
"""Rows of x up to which the kernel is worth building; it reads x from L1 for every tile of the weight."""

ALONE = (("one_thread", 1 << 30),)
"""Never wakes a second thread: the weight streams from L2 in less time than that takes, up to some size."""

_PLAN: Plan = ((0, "gemv", 1),)


def plans(problem: Problem, fmt: Format, target: Target, isa: str) -> tuple[tuple[Plan, Tile], ...]:
    """The calling thread alone, and all threads; the clock knows what waking them costs."""
    return ((_PLAN, ALONE), (_PLAN, ())) if problem.threads > 1 else ((_PLAN, ALONE),)


def refuse(problem: Problem, fmt: Format, target: Target) -> str | None:
    """Refuses many rows, and numbers of rows that are not known."""
    if not problem.batches or max(problem.batches) > FEW_ROWS:
        seen = max(problem.batches) if problem.batches else "any number of"
        return f"linear_dense is for at most {FEW_ROWS} rows, not {seen}"
    return None


def few_rows(weight: torch.Tensor, bias: torch.Tensor | None, rows: int, target: Target) -> tuple[KernelSpec, ...]:
    """The kernels of a dense linear (out, in) on `rows` rows; none where the variant refuses."""
    out, inp = weight.shape
    problem = Problem(
        op="linear", out_features=out, in_features=inp, dtype=str(weight.dtype).removeprefix("torch."),
        nnz=weight.numel(), bias=bias is not None, batches=(rows,), threads=torch.get_num_threads(),
    )  # fmt: skip
    return () if VARIANTS[0].refuse(problem, Dense(), target) else VARIANTS[0].specs(problem, Dense(), target)


VARIANTS: tuple[Variant, ...] = (
    Variant(
        "linear_dense", "linear", "dense", "linear_dense.c.jinja", dtypes=("float32", "bfloat16"),
        isas=("avx512", "avx2", "portable"), choose=plans, needs=refuse,
    ),
)  # fmt: skip
