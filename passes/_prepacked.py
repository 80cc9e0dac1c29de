"""Dense sites on oneDNN with the weight reordered once: one more contender, judged like the kernels.

    gelu(aten.linear(x, W, b)) --> sparsec.linear_prepacked(x, W, b, None, kernel)

The graph keeps the plain weight (see `sparsec.ops.prepacked`), so nothing is packed here and nothing needs a way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsec import codes, verify
from sparsec.aten import arguments
from sparsec.codegen.kernel import DTYPES, KernelSpec, Problem
from sparsec.driver import Context
from sparsec.graph import Fact, epilogue_nodes, take_over
from sparsec.ops import prepacked
from sparsec.report import Row


@dataclass(frozen=True)
class Prepacked:
    """What select decided for a site that stays dense on a prepacked weight; lower installs it."""

    kernel: KernelSpec


def candidate(problem: Problem, batches: Sequence[int], ctx: Context) -> Prepacked | None:
    """The contender for a site, laid out for the middle of `batches`; None where oneDNN has nothing to offer.

    Only the clock can tell whether it is faster, so there is none without it, nor where a sparse kernel is forced.
    """
    if ctx.options.tune != "measure" or ctx.options.min_speedup == 0 or ctx.target.kind == "cuda" or not batches:
        return None
    dtype = DTYPES.get(problem.dtype)
    if problem.op != "linear" or dtype is None or not prepacked.available(dtype):
        return None
    middle = sorted(batches)[len(batches) // 2]
    return Prepacked(
        KernelSpec(
            op="linear", variant=prepacked.VARIANT, format="dense", dtype=problem.dtype,
            out_features=problem.out_features, in_features=problem.in_features, isa="portable", bias=problem.bias,
            epilogue=problem.epilogue, tile=(("batch", middle),),
        )
    )  # fmt: skip


def call(
    found: Prepacked, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, residual: torch.Tensor | None
) -> Callable[[], torch.Tensor]:
    """The contender as the clock runs it."""
    text = found.kernel.text()
    return lambda: prepacked.PREPACKED(x, weight, bias, residual, text)


def wins(dense: Sequence[float], packed: Sequence[float], taken: float, least: float) -> bool:
    """Whether prepacking pays: over what was `taken` so far (us), by `least` over dense, and at no size a loss."""
    total = sum(packed)
    never_slower = all(p <= d for p, d in zip(packed, dense, strict=True))
    return never_slower and total < taken and sum(dense) >= least * total


def check(
    found: Prepacked, fact: Fact, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor,
    residual: torch.Tensor | None,
) -> verify.Verdict:  # fmt: skip
    """oneDNN against float64, within the bound that every kernel is held to."""
    rows = verify.sample(x.shape[0])
    rest = residual[rows] if residual is not None else None
    with torch.inference_mode():
        y = call(found, weight, bias, x, residual)()
    stored = torch.ones_like(weight, dtype=torch.bool)
    return verify.check(y[rows], x[rows], weight, bias, fact.epilogue, rest, stored)


def report(row: Row, dense: Sequence[float], packed: Sequence[float]) -> Row:
    """The row of a site that is installed prepacked, and stores its weight twice."""
    speedup = sum(dense) / sum(packed)
    return dataclasses.replace(
        row, format="dense", nbytes=2 * row.dense_nbytes, decision="dense", variant=prepacked.VARIANT, error=0.0,
        dense_us=sum(dense), sparse_us=sum(packed), code=codes.PREPACKED,
        reason=codes.sentence(codes.PREPACKED, library="oneDNN", speedup=speedup),
    )  # fmt: skip


def install(gm: fx.GraphModule, node: fx.Node, choice: Prepacked) -> None:
    """Insert the op behind the last absorbed node, move all uses to it, erase what it replaces."""
    absorbed, residual = epilogue_nodes(gm, node)
    bound = arguments(node)  # by name: a bias that a pass has added may be a keyword
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    with gm.graph.inserting_before(absorbed[-1] if absorbed else node):
        new = gm.graph.call_function(prepacked.PREPACKED, (x, weight, bias, residual, choice.kernel.text()))
    take_over(new, node, absorbed)
