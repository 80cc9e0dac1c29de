"""Every condition of every template comes out both ways over the kernels of the catalogue."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import cuda_problems
import numpy as np
import test_chain
import test_conv
from template_branches import Branches, templates, watching

from sparsec.codegen import catalog, gather, headers, render
from sparsec.codegen.kernel import KernelSpec, Problem, Step
from sparsec.factors import LowRank, Sparse
from sparsec.factors.chain import Factored
from sparsec.formats import CSR, Bitmask, parse
from sparsec.target import ARCHITECTURES, FEATURES, ISAS, Target
from sparsec.testing import draw_case, draw_format

STALE = 40  # kernels in a row without a new outcome, after which a variant is done
X86 = Target("x86_64", FEATURES)

NEVER: dict[str, str] = {
    '_epilogue.c.jinja: <% elif s.name == "add" %> never false': "a Step has one of the names above it",
    '_epilogue.cu.jinja: <% elif s.name == "add" %> never false': "a Step has one of the names above it",
}
"""Outcome -> why no kernel can have it."""


def varied(spec: KernelSpec, number: int) -> KernelSpec:
    """Choices that a user or a benchmark may make and the catalogue does not: plans of one routine, tiles."""
    tile = dict(spec.tile)
    if number % 3 == 0:
        tile |= {"one_thread": 0, "panel_bytes": 2048, "ahead": 512}
    plan = spec.plan
    if number % 4 == 1 and plan:
        plan = ((0, *plan[-1][1:]),)
    if number % 4 == 2 and plan and plan[0][1] == "gemv":
        plan = ((0, "gemv", plan[0][2]),)
    return dataclasses.replace(spec, tile=tuple(tile.items()), plan=plan)


def linear(variant: catalog.Variant) -> Iterator[KernelSpec]:
    """Random kernels on every instruction set in turn, some of them tall, some with columns beyond 16 bits."""
    rng = np.random.default_rng(1)
    isas = [isa for isa in variant.isas if isa in X86.isas]
    for number in range(300):
        case = draw_case(rng, X86, [variant])
        target = Target("x86_64", ISAS[isas[number % len(isas)]].features)
        rows, cols = {3: (3000, case.cols), 7: (case.rows, 1 << 20)}.get(number % 11, (case.rows, case.cols))
        fmt = draw_format(rng, variant.format, rows, cols)
        problem = Problem("linear", rows, cols, case.dtype, case.rows, case.bias, case.epilogue)
        if variant.refuse(problem, fmt, target) is None:
            for spec in variant.specs(problem, fmt, target):
                yield varied(spec, number)


GEOMETRIES = {
    **test_conv.CASES,
    "stride 3": (4, 6, test_conv.geometry((31,), 3, stride=3)),
    "groups in place": (8, 16, test_conv.geometry((8, 16), 1, groups=2)),
    "depthwise over one row": (4, 4, test_conv.geometry((1, 20), (1, 3), low=(0, 1), groups=4)),
    "depthwise 1d": (8, 8, test_conv.geometry((64,), 3, low=1, groups=8)),
    "depthwise, two rows in a vector": (4, 4, test_conv.geometry((7, 7), 3, low=1, groups=4)),
    "depthwise 3d, two rows in a vector": (4, 4, test_conv.geometry((2, 7, 7), (1, 3, 3), low=(0, 1, 1), groups=4)),
    "depthwise 3d, whole vectors": (4, 4, test_conv.geometry((2, 5, 128), (1, 3, 3), low=(0, 1, 1), groups=4)),
    "depthwise whole vectors": (4, 4, test_conv.geometry((5, 128), 3, low=1, groups=4)),
    "long kernel": (3, 4, test_conv.geometry((300,), 41)),  # whose planes, in strips of 192, would share a cache set
}
MORE_FORMATS = {
    "dense": ("dense",), "csr": ("csr(index_bits=32,block=1)",), "csr_groups": ("csr_groups(block=9)",),
    "bsr": ("bsr(r=4,c=1,index_bits=16)", "bsr(r=1,c=1,index_bits=32)", "bsr(r=16,c=1,index_bits=16)"),
}  # fmt: skip


def convolutions(variant: catalog.Variant) -> Iterator[KernelSpec]:
    """Every geometry on every instruction set, in formats with short and long blocks."""
    tails = ((), (Step("relu"),), (Step("add"), Step("relu")), (Step("hardswish"),))
    every = list(itertools.product(GEOMETRIES.values(), variant.isas, variant.dtypes))
    order = sorted(np.random.default_rng(2).permutation(len(every)), key=lambda at: not every[at][0][2].layout.flat)
    for turn, at in enumerate(order):  # the few that read x in place come first
        (channels, out, conv), isa, dtype = every[at]
        cols, target = channels // conv.groups * conv.taps, Target("x86_64", ISAS[isa].features)
        problem = Problem(variant.op, out, cols, dtype, out * cols // 4, turn % 3 > 0, tails[turn % 4], (2,), 2, conv)
        for fmt in (*variant.formats(problem, target), *map(parse, MORE_FORMATS.get(variant.format, ()))):
            if variant.refuse(problem, fmt, target) is None:
                for spec in variant.specs(problem, fmt, target):
                    tile = dict(spec.tile) | ({"one_thread": 0} if turn % 3 == 0 else {})
                    if conv.kernel == (41,) and 192 % tile["columns"] == 0:
                        tile["strip"] = 192
                    yield dataclasses.replace(spec, tile=tuple(tile.items()))


def chains(variant: catalog.Variant) -> Iterator[KernelSpec]:
    """The factors of the tests of chains, a sparse one alone, and one with columns beyond 16 bits."""
    tails = ((), *test_chain.TAILS)
    cases = (*test_chain.CASES, (Sparse(0.9), (20, 30)), (LowRank(2) + Sparse(0.9), (20, 70_000)))
    for number, (isa, (factor, shape)) in enumerate(itertools.product(variant.isas, cases)):
        fmt = Factored(factor.resolve(shape), *shape, 1)
        problem = Problem("chain", *shape, variant.dtypes[0], 0, number % 2 == 0, tails[number % len(tails)])
        if variant.refuse(problem, fmt, target := Target("x86_64", ISAS[isa].features)) is None:
            yield from (varied(spec, number) for spec in variant.specs(problem, fmt, target))


def cuda(variant: catalog.Variant) -> Iterator[KernelSpec]:
    """The problems of the CUDA tests and wide ones, with and without bias, on an architecture each."""
    if variant.op != "linear":
        yield cuda_problems.first_spec(variant.name)
        yield cuda_problems.gradient_spec(variant.op, CSR(32, 64).resolve(37, 150), variant.dtypes[0], 37, 150)
        return
    wide = cuda_problems.SHAPES[variant.name][0][0], 1 << 20
    for number, case in enumerate(cuda_problems.cases(variant.name, thorough=True)):
        target = Target.parse(f"cuda:{list(ARCHITECTURES)[number % len(ARCHITECTURES)]}")
        rows, cols = wide if number % 4 == 3 else case.shape
        widths = {"bitmask": (16, 32, 64)}.get(variant.format, ())
        fmt = Bitmask(widths[number % 3]).resolve(rows, cols) if widths else cuda_problems.FORMATS[variant.name]
        problem = Problem("linear", rows, cols, case.dtype, rows, number % 2 == 0, case.steps)
        if variant.refuse(problem, fmt.resolve(rows, cols), target) is None:
            yield from variant.specs(problem, fmt.resolve(rows, cols), target)


def kernels(variant: catalog.Variant) -> Iterator[KernelSpec]:
    if variant.language == "cuda":
        yield from cuda(variant)
    elif variant.language == "batch":
        return  # what it prints is the chain of one matrix
    elif variant.op == "gather_gemm":
        yield from map(gather.spec, variant.isas)
    else:
        yield from {"linear": linear, "conv": convolutions, "pool": convolutions, "chain": chains}[variant.op](variant)


def walk(branches: Branches) -> None:
    """Print kernels of every variant; random ones until they take no new branch."""
    for variant in catalog.builtin():
        if not variant.template:
            continue
        stale = 0
        for spec in kernels(variant):
            before = branches.outcomes
            text = render.render_file(variant.template, spec)
            assert headers.fits(text) == (variant.language == "c" and spec.isa != "portable"), text[:400]
            stale = 0 if branches.outcomes > before else stale + 1
            if stale > STALE and variant.language == "c":
                break


def test_every_condition_of_every_template_comes_out_both_ways() -> None:
    with watching() as branches:
        walk(branches)
    assert [name for name in templates() if name not in branches.files and not name.startswith("export_")] == []
    assert len(branches.lines) > 300
    missing = branches.missing()
    assert {text: line for text, line in missing.items() if text not in NEVER} == {}
    assert [text for text in NEVER if text not in missing] == [], "these outcomes do occur"


def test_an_outcome_that_does_not_occur_is_reported() -> None:
    with watching() as branches:
        spec = next(linear(catalog.variant("linear_csr")))
        render.render_file("linear_csr.c.jinja", spec)
    assert any(text.startswith("_epilogue.c.jinja:") and text.endswith("never true") for text in branches.missing())
    assert render.render_file("linear_csr.c.jinja", spec) == render.render(spec).text  # reporting changes no text
