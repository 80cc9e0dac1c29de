"""Factored weights through TVM: chains against float64, their schedules, their threads, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest
import torch
from torch import nn

pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'sparsec[tvm]'")

import sparsec
from sparsec import verify
from sparsec.codegen import build, catalog, tvm, tvm_chain, tvm_compat, tvm_rules
from sparsec.codegen.kernel import KernelSpec, Problem, Step
from sparsec.errors import SpecError
from sparsec.factors import Factor, Kronecker, LowRank, Monarch, Sparse
from sparsec.factors.chain import Factored
from sparsec.ops.linear import OVERLOAD
from sparsec.target import Target

HERE = Target.parse("tvm")
BATCHES = (0, 1, 2, 7, 8, 9, 16, 17, 31, 33, 71, 130)
CASES: tuple[tuple[Factor, tuple[int, int], str, tuple[Step, ...]], ...] = (
    (LowRank(5), (33, 21), "avx512", (Step("gelu"), Step("add"))),
    (Kronecker((5, 3), 2), (35, 24), "avx2", (Step("relu"),)),
    (LowRank(7) + Monarch(2) + Sparse(0.9), (50, 46), "portable", (Step("silu"),)),
)
"""Two plain products; sums over groups and spectators, the second resuming; a sparse operand beside dense ones."""


@cache
def fitted(at: int) -> tuple[Factored, tuple[torch.Tensor, ...], KernelSpec]:
    """A case's format, its buffers, and the first kernel that the catalogue offers for it."""
    factor, shape, isa, steps = CASES[at]
    if isa not in HERE.isas:
        pytest.skip(f"this processor has no {isa}")
    fmt = Factored(factor.resolve(shape), *shape, 1)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(at))
    problem = Problem("chain", *shape, "float32", 0, True, steps)
    spec = catalog.variant("chain_tvm").specs(problem, fmt, HERE.limit(isa))[0]
    if at > 0:  # both widths are generated for the first, and one is quicker to build
        spec = dataclasses.replace(spec, plan=((0, "panel", 8),))
    return fmt, tuple(fmt.store(fmt.factor.fit(weight).buffers).values()), spec


def run(at: int, x: torch.Tensor, threads: int | None = None) -> tuple[torch.Tensor, verify.Verdict]:
    """What the kernel makes of x with a bias of ones, and its verdict."""
    fmt, buffers, spec = fitted(at)
    bias = torch.ones(fmt.out)
    adds = any(step.name == "add" for step in spec.epilogue)
    residual = torch.full((*x.shape[:-1], fmt.out), 0.25) if adds else None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        y = OVERLOAD(x, list(buffers), bias, residual, spec.text())
    finally:
        torch.set_num_threads(before)
    products = fmt.products(x.reshape(-1, fmt.inp), dict(zip(fmt.buffers, buffers, strict=True)))
    return y, verify.check_products(y.view(-1, fmt.out), products, bias, spec.epilogue, residual)


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda at: f"{CASES[at][0].name}-{CASES[at][2]}")
def test_every_batch_equals_float64(at: int) -> None:
    generator = torch.Generator().manual_seed(at)
    for batch in BATCHES:
        y, verdict = run(at, torch.randn(batch, CASES[at][1][1], generator=generator))
        assert verdict.ok and y.shape == (batch, CASES[at][1][0]), f"batch {batch}: {verdict.sentence}"
    y, verdict = run(at, torch.randn(2, 3, CASES[at][1][1], generator=generator))
    assert verdict.ok and y.shape == (2, 3, CASES[at][1][0]), verdict.sentence


def test_rows_do_not_see_each_other() -> None:
    for value in (math.nan, math.inf, -math.inf, 1e-42, 1e36):
        x = torch.randn(5, 46, generator=torch.Generator().manual_seed(1))
        x[2, 23] = value
        y, verdict = run(2, x)
        assert verdict.ok, f"{value}: {verdict.sentence}"
        assert torch.isfinite(y[[0, 1, 3, 4]]).all() and bool(torch.isfinite(y[2]).all()) == math.isfinite(value)


def test_threads_give_equal_bits() -> None:
    """Work enough for several tasks, more tasks than panels, and a last panel that is narrower than the others."""
    for batch in (17, 400, 1203):
        x = torch.randn(batch, 21, generator=torch.Generator().manual_seed(batch))
        answers = [run(0, x, threads)[0] for threads in (1, 2, 3, 7)]
        assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_every_product_is_scheduled_as_a_contraction() -> None:
    _, _, spec = fitted(2)
    schedule = tvm_compat.new_schedule(tvm_compat.parse(tvm_chain.text_of(spec)))
    done = tvm_rules.schedule(schedule, tvm_chain.blocks_of(spec), 4, tvm_rules.Tile(()))
    widths = {width for _, _, width in spec.plan}
    fields = dict(spec.fields)
    assert fields["stages"] == 5 and fields["sparse"] == 1, "two of the low rank, two of the Monarch, one sparse"
    assert [line[2] for line in done if line[1] == "fma"] == ["contract"] * (5 * len(widths))
    assert {line[0] for line in done if line[1] == "fma"} == {f"stage{i}_{w}" for i in range(5) for w in widths}
    text = tvm.BACKEND.render(spec).text
    assert text.count("T.vectorized(4)") >= 5 * len(widths) and spec.symbol in text
    assert tvm_compat.script(tvm_compat.parse(text)) == text, "what is shown is what is built"


def test_bad_operands_are_refused_before_anything_is_written() -> None:
    fmt, buffers, spec = fitted(2)
    values, weights, indices, pointers = buffers
    call = build.get_kernel(spec.text()).call
    x, y, bias = torch.randn(3, 46), torch.full((3, 50), 7.0), torch.zeros(50)
    short = pointers.clone()
    short[-1] -= 1
    for operands, message in (
        ((x, y, None, None, *buffers), "compiled with bias: pass a tensor"),
        ((x, y, bias, y, *buffers), "compiled without residual: pass None"),
        ((x, y, bias, None, values, weights, indices), f"reads 4 buffers of {fmt.name}"),
        ((x, y, bias, None, values[1:].clone(), weights, indices, pointers), "shape"),
        ((x, y, bias, None, values, weights, indices, short), "last pointer does not match the size of values"),
        ((x[:, 1:], y, bias, None, *buffers), "shape"),
        ((x.double(), y, bias, None, *buffers), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*operands)
    assert bool((y == 7).all())


def test_what_is_no_chain_for_tvm_is_refused_with_its_reason() -> None:
    variant, problem = catalog.variant("chain_tvm"), Problem("chain", 50, 46, "float32", 0)
    fmt = fitted(2)[0]
    assert variant.refuse(problem, fmt, HERE) is None
    assert variant.refuse(dataclasses.replace(problem, dtype="bfloat16"), fmt, HERE) == (
        "chain_tvm computes in float32, not bfloat16"
    )
    assert "tiled operands" in str(variant.refuse(problem, dataclasses.replace(fmt, tiled=0), HERE))
    long = Factored(LowRank(1) + LowRank(2) + LowRank(3) + LowRank(4) + LowRank(5), 50, 46)
    assert "a chain of 10 products; those by TVM have at most 8" in str(variant.refuse(problem, long, HERE))
    assert not variant.serves(Target.probe()) and not catalog.variant("chain").serves(HERE)
    good = fitted(2)[2]
    for change, message in (
        ({"op": "linear"}, "computes chain, not linear"), ({"dtype": "bfloat16"}, "float32, not bfloat16"),
        ({"plan": ()}, "last line of a plan"), ({"plan": ((0, "gemv", 1),)}, "valid: panel, panels with"),
        ({"fields": ()}, "needs the stages"), ({"epilogue": (Step("add"),) * 2}, "one residual"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=message):
            tvm_chain.text_of(dataclasses.replace(good, **change))


def test_a_factor_in_a_spec_goes_through_tvm() -> None:
    """Generated chains first; torch's own products, which need no compiler either, contend where times are taken."""
    assert [v.name for v in catalog.variants_for("chain", None, HERE)] == ["chain_tvm", "chain_torch"]
    torch.manual_seed(0)
    layer, x = nn.Linear(21, 33).eval(), torch.randn(9, 21)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(33, 5) @ torch.randn(5, 21))
    compiled = sparsec.compile(layer, LowRank(5), (x,), target="tvm:portable", tune="off", tolerance=1e-3)
    (row,) = sparsec.report(compiled).rows
    assert (row.variant, row.decision) == ("chain_tvm", "factored")
    assert "@T.prim_func" in sparsec.source(compiled, row.site)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), atol=1e-4)
