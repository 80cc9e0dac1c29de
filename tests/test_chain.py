"""Chains: factored weights as stages, the generated kernel and torch's products against float64, and their refusals."""

from __future__ import annotations

import dataclasses
import math
import struct
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from sanitizer import _tensor, build, supported

from sparsec import factors, verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, STEPS, KernelSpec, Problem, Step
from sparsec.errors import FormatError, SpecError
from sparsec.factors import Factor, Kronecker, LowRank, Monarch, Sparse
from sparsec.factors._stages import stages_of
from sparsec.factors.chain import Factored
from sparsec.formats import NM
from sparsec.ops.linear import OVERLOAD
from sparsec.target import Target

TARGET = Target.probe()
ISAS = tuple(isa for isa in ("avx512", "avx2", "portable") if isa in TARGET.isas)
BATCHES = (0, 1, 2, 7, 8, 9, 16, 17, 33, 71)
CASES: tuple[tuple[Factor, tuple[int, int]], ...] = (
    (LowRank(5), (33, 21)),
    (LowRank(1), (1, 1)),
    (Monarch(4, 2), (24, 40)),
    (Kronecker((5, 3), 2), (35, 24)),
    (LowRank(7) + Monarch(2) + Sparse(0.9), (50, 46)),
    (LowRank(2) + NM(2, 4), (19, 20)),
)


def spec_of(
    fmt: Factored, variant: str = "chain", isa: str = ISAS[0], dtype: str = "float32", bias: bool = True,
    steps: tuple[Step, ...] = (), one_thread: int | None = None,
) -> KernelSpec:  # fmt: skip
    problem = Problem("chain", fmt.out, fmt.inp, dtype, 0, bias, steps)
    found = catalog.variant(variant).specs(problem, fmt, TARGET.limit(isa))[0]
    return found if one_thread is None else dataclasses.replace(found, tile=(("one_thread", one_thread),))


@cache
def fitted(at: int, tiled: int, dtype: str = "float32") -> tuple[Factored, dict[str, torch.Tensor]]:
    factor, shape = CASES[at]
    fmt = Factored(factor.resolve(shape), *shape, tiled)
    generator = torch.Generator().manual_seed(at)
    weight = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    return fmt, fmt.store(fmt.factor.fit(weight).buffers)


def run(
    fmt: Factored, buffers: dict[str, torch.Tensor], spec: KernelSpec, x: torch.Tensor
) -> tuple[torch.Tensor, verify.Verdict]:
    bias = torch.randn(fmt.out).to(x.dtype) if spec.bias else None
    needs = any(step.name == "add" for step in spec.epilogue)
    residual = torch.randn(*x.shape[:-1], fmt.out).to(x.dtype) if needs else None
    y = OVERLOAD(x, list(buffers.values()), bias, residual, spec.text())
    products = fmt.products(x.reshape(-1, fmt.inp), buffers)
    return y, verify.check_products(y, products, bias, spec.epilogue, residual)


def kernels() -> list[tuple[int, str, str, str]]:
    """Case, variant, instruction set, dtype: every case on the best set and in torch, two on every set and in bf16."""
    found = [(at, "chain", ISAS[0], "float32") for at in range(len(CASES))]
    found += [(at, "chain", isa, "float32") for at in (2, 4) for isa in ISAS[1:]]
    found += [(at, "chain_bf16", isa, "bfloat16") for at in (3, 4) for isa in (ISAS[0], ISAS[-1])]
    return found + [(at, "chain_torch", "portable", dtype) for at, dtype in ((0, "float32"), (2, "float32"))]


@cache
def built() -> dict[tuple[int, str, str, str], KernelSpec]:
    specs = {}
    for at, variant, isa, dtype in kernels():
        fmt, _ = fitted(at, int(variant != "chain_torch"), dtype)
        threads = None if variant == "chain_torch" else 500
        specs[at, variant, isa, dtype] = spec_of(fmt, variant, isa, dtype, one_thread=threads)
    build_kernels(list(specs.values()), TARGET)
    return specs


@pytest.mark.parametrize("kernel", kernels(), ids=lambda k: f"{CASES[k[0]][0].name}{k[0]}-{k[1]}-{k[2]}")
def test_every_batch_equals_float64(kernel: tuple[int, str, str, str]) -> None:
    at, variant, _, dtype = kernel
    fmt, buffers = fitted(at, int(variant != "chain_torch"), dtype)
    for batch in BATCHES:
        y, verdict = run(fmt, buffers, built()[kernel], torch.randn(batch, fmt.inp).to(DTYPES[dtype]))
        assert verdict.ok and y.shape == (batch, fmt.out), f"batch {batch}: {verdict.sentence}"


def test_contract_equals_reconstruct_and_the_way_back() -> None:
    for at, (factor, shape) in enumerate(CASES):
        weights = []
        for tiled in (0, 1):
            fmt, buffers = fitted(at, tiled)
            fmt.validate(buffers, *shape)
            weights.append(fmt.unpack(buffers, *shape))
            x = torch.randn(3, shape[1])
            exact, size, count = fmt.products(x, buffers)
            rebuilt = x.double() @ weights[-1].double().T
            assert torch.all((exact - rebuilt).abs() <= 1e-6 * size) and count > 0, factor.text()
        assert torch.allclose(*weights, rtol=0, atol=1e-7), factor.text()


def test_a_chain_rounds_like_one_sum_of_the_same_bound() -> None:
    """`products` gives the n whose 8 + 2 sqrt(n) is the sum of that over the stages of the worst term."""
    fmt = Factored(LowRank(9).resolve((40, 100)), 40, 100, 0)
    buffers = fmt.store(fmt.factor.fit(torch.randn(40, 100)).buffers)
    longest = fmt.products(torch.randn(2, 100), buffers)[2]
    stages = (8 + 2 * 100**0.5) + (8 + 2 * 9**0.5)
    assert 0 <= longest - ((stages - 8) / 2) ** 2 <= 1.0


def test_bytes_and_products_are_their_formulas() -> None:
    fmt, buffers = fitted(0, 1)  # rank 5 of (33, 21)
    stages = stages_of(fmt.factor, fmt.shape)
    right, left = stages.stages
    assert (right.tile, right.packed, left.tile, left.packed) == (8, 8 * 21, 8, 40 * 5)
    assert stages.products() == sum(s.packed for s in stages.stages) and stages.buffers == (33, 5)
    for at in range(len(CASES)):
        fmt, buffers = fitted(at, 1)
        held = sum(t.numel() * t.element_size() for t in buffers.values())
        assert held == fmt.nbytes(fmt.out, fmt.inp, 0, 4), fmt.text()
    plain, own = fitted(2, 0)
    assert sum(t.numel() * 4 for t in own.values()) == plain.nbytes(24, 40, 0, 4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_equal_bits(threads: int) -> None:
    """Panels shared out, and steps shared out where there are fewer panels than threads."""
    fmt, buffers = fitted(4, 1)
    spec = built()[4, "chain", ISAS[0], "float32"]
    before = torch.get_num_threads()
    for batch in (5, 40, 200):
        x = torch.randn(batch, fmt.inp, generator=torch.Generator().manual_seed(batch))
        bias = torch.zeros(fmt.out)
        try:
            torch.set_num_threads(1)
            want = OVERLOAD(x, list(buffers.values()), bias, None, spec.text())
            torch.set_num_threads(threads)
            got = OVERLOAD(x, list(buffers.values()), bias, None, spec.text())
        finally:
            torch.set_num_threads(before)
        assert torch.equal(got, want)


TAILS = (
    (Step("relu"), Step("gelu"), Step("add")),
    (Step("silu"), Step("tanh"), Step("scale", (-1.5,))),
    (Step("add"), Step("gelu_tanh"), Step("hardswish"), Step("clamp", (-0.5, 0.75))),
)


@pytest.mark.parametrize("steps", TAILS, ids=lambda s: "-".join(step.name for step in s))
def test_every_epilogue_step(steps: tuple[Step, ...]) -> None:
    assert {step.name for tail in TAILS for step in tail} == set(STEPS)
    for variant in ("chain", "chain_torch"):
        fmt, buffers = fitted(0, int(variant == "chain"))
        spec = spec_of(fmt, variant, bias=steps is not TAILS[1], steps=steps)
        _, verdict = run(fmt, buffers, spec, torch.randn(11, fmt.inp))
        assert verdict.ok, verdict.sentence


def test_layouts_and_values() -> None:
    fmt, buffers = fitted(4, 1)
    spec = built()[4, "chain", ISAS[0], "float32"]
    wide = torch.randn(9, 2 * fmt.inp)
    for x in (
        wide[:, ::2],
        torch.randn(fmt.inp, 9).t(),
        torch.randn(1, fmt.inp).expand(9, -1),
        wide[:, 1 : fmt.inp + 1],
    ):
        assert run(fmt, buffers, spec, x)[1].ok
    y, verdict = run(fmt, buffers, spec, torch.randn(2, 3, fmt.inp))
    assert verdict.ok and y.shape == (2, 3, fmt.out)
    for value in (float("nan"), float("inf"), -float("inf"), 1e-42, 1e36):
        x = torch.randn(5, fmt.inp)
        x[2, fmt.inp // 2] = value
        y, verdict = run(fmt, buffers, spec, x)
        assert verdict.ok, f"{value}: {verdict.sentence}"
        assert torch.isfinite(y[[0, 1, 3, 4]]).all(), "rows do not see each other"
        assert bool(torch.isfinite(y[2]).all()) == math.isfinite(value)


def test_opcheck_and_gradients_are_refused() -> None:
    fmt, buffers = fitted(0, 1)
    spec = built()[0, "chain", ISAS[0], "float32"]
    args = (torch.randn(3, fmt.inp), list(buffers.values()), torch.randn(fmt.out), None, spec.text())
    assert set(torch.library.opcheck(OVERLOAD, args).values()) == {"SUCCESS"}
    with pytest.raises(ValueError, match="gradient"):
        OVERLOAD(torch.randn(3, fmt.inp, requires_grad=True), *args[1:])


@pytest.mark.parametrize("variant", ["chain", "chain_torch"])
def test_kernels_refuse_operands_that_do_not_fit(variant: str) -> None:
    fmt, buffers = fitted(0, int(variant == "chain"))
    isa = ISAS[0] if variant == "chain" else "portable"
    text, given, bias = built()[0, variant, isa, "float32"].text(), list(buffers.values()), torch.randn(fmt.out)
    x = torch.randn(3, fmt.inp)
    for wrong in (
        (x[:, 1:], given, bias), (x.double(), given, bias), (x, [*given, bias], bias), (x, given, None),
        (x, given, bias[1:]), (x, [t.double() for t in given], bias),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            OVERLOAD(*wrong, None, text)


def test_texts_are_parsed_back_and_others_refused() -> None:
    for at in range(len(CASES)):
        for tiled in (0, 1):
            fmt, _ = fitted(at, tiled)
            assert Factored.parse(fmt.text()) == fmt
    for text in (
        "factored(factor=low_rank(rank=5),out=33,inp=21)",
        "factored(factor=low_rank(rank=50),out=33,inp=21,tiled=1)",
        "factored(factor=monarch(rank=1),out=24,inp=24,tiled=1)",
        "factored(factor=csr,out=24,inp=24,tiled=1)",
        "factored(factor=low_rank(rank=05),out=33,inp=21,tiled=1)",
    ):
        with pytest.raises(SpecError):
            Factored.parse(text)


def test_damaged_buffers_are_named() -> None:
    fmt, buffers = fitted(4, 1)
    bad = buffers["indices_0"].clone()
    bad[0] = fmt.inp
    for change, message in (
        ({"values": buffers["values"][1:].clone()}, "buffer 'values' is .* expected [0-9]+ floating values"),
        ({"indices_0": bad}, "indices"),
        ({"values_0": buffers["values_0"].double()}, "'values_0' is torch.float64"),
        ({"pointers_0": buffers["pointers_0"].flip(0)}, "pointers"),
    ):
        with pytest.raises(FormatError, match=message):
            fmt.validate({**buffers, **change}, *fmt.shape)
    with pytest.raises(FormatError, match="buffers are"):
        fmt.validate({"values": buffers["values"]}, *fmt.shape)
    with pytest.raises(FormatError, match=r"holds a weight of \(50, 46\)"):
        fmt.validate(buffers, 50, 47)
    with pytest.raises(FormatError, match="NaN"):
        fmt.pack(torch.full(fmt.shape, float("nan")))
    with pytest.raises(FormatError, match="no pattern"):
        fmt.pack(torch.ones(fmt.shape), torch.ones(fmt.shape, dtype=torch.bool))


@dataclasses.dataclass(frozen=True)
class Scattered(Factor):
    """W[o, (i, j, k)] over a matrix of (i, k) for each j: the sum runs over inputs that do not lie evenly."""

    name = "scattered"

    def contract(self, shape: tuple[int, ...]) -> tuple[factors.Contraction, ...]:
        first = factors.Operand(("a",), "rik", (2, 2, 3))
        second = factors.Operand(("b",), "orj", (shape[0], 2, 4))
        return (factors.Contraction("ijk", "o", (2, 4, 3), (shape[0],), (first, second)),)


def test_what_is_no_chain_is_refused_with_its_reason() -> None:
    with pytest.raises(SpecError, match="do not lie evenly"):
        stages_of(Scattered(), (5, 24))
    problem = Problem("chain", 5, 24, "float32", 0)
    assert "evenly" in str(catalog.variant("chain").refuse(problem, Factored(Scattered(), 5, 24), TARGET))
    tiled, plain = fitted(4, 1)[0], fitted(4, 0)[0]
    sized = dataclasses.replace(problem, out_features=50, in_features=46)
    assert "tiled operands" in str(catalog.variant("chain").refuse(sized, plain, TARGET))
    assert "sparse operand" in str(catalog.variant("chain_torch").refuse(sized, plain, TARGET))
    assert "as the factor has them" in str(catalog.variant("chain_torch").refuse(sized, tiled, TARGET))
    with pytest.raises(SpecError, match="op 'chain' only"):
        from sparsec.codegen.render import render

        render(dataclasses.replace(spec_of(tiled), op="linear"))


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_memory_is_safe_and_threads_share_nothing(kind: str, tmp_path: Path) -> None:
    if reason := supported(kind, tmp_path):
        pytest.skip(reason)
    fmt, buffers = fitted(4, 1)
    isa = ISAS[0] if kind == "address" else "portable"
    spec = spec_of(fmt, isa=isa, steps=(Step("add"), Step("gelu")), one_thread=0)
    program = build(spec, kind, tmp_path)
    for batch, threads, low in ((1, 1, 0), (0, 2, 1), (33, 2, 1), (5, 3, 0), (100, 3, 1)):
        x, bias, residual = torch.randn(batch, fmt.inp), torch.randn(fmt.out), torch.randn(batch, fmt.out)
        arguments = [x, torch.full((batch, fmt.out), float("nan")), bias, residual, *buffers.values()]
        place, out = program.with_suffix(".in"), program.with_suffix(".out")
        place.write_bytes(struct.pack("<i", len(arguments)) + b"".join(_tensor(t) for t in arguments))
        done = subprocess.run([program, place, out, str(threads), str(low)], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr.strip(), done.stderr[:1500]
        y = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32) if batch else torch.empty(0)
        verdict = verify.check_products(y.view(batch, fmt.out), fmt.products(x, buffers), bias, spec.epilogue, residual)
        assert verdict.ok, verdict.sentence
