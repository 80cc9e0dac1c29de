"""Formats of shared, mixed, reordered and added patterns: round trips, bytes, refusals, and kernels by float64."""

from __future__ import annotations

import functools
import itertools
from math import comb

import pytest
import torch
from format_tools import Break, bits, nbytes, put, shorter, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, KernelSpec, Problem, Step
from sparsec.errors import FormatError, SpecError
from sparsec.formats import (
    BSR,
    CSR,
    NM,
    NMG,
    BlockNM,
    CSRGroups,
    FanIn,
    Format,
    Permuted,
    Quantized,
    Sum,
    parse,
    pattern,
)  # fmt: skip
from sparsec.formats._order import order_of
from sparsec.formats.nmg import patterns
from sparsec.ops.linear import OVERLOAD
from sparsec.target import Target

FORMATS: tuple[Format, ...] = (
    NMG(1, 4, 3), NMG(2, 4, 2), NMG(2, 8, 1), BlockNM(), BlockNM(4, 8), BlockNM(32, 32),
    Permuted(BSR(4, 2)), Permuted(CSR(), "length"), Permuted(CSRGroups(), "rcm", "jaccard"),
    Permuted(BSR(16, 1), "none", "rcm"),
    Sum(BSR(4, 4), CSR()), NM(2, 4) + CSR(), FanIn(3) + CSRGroups(),
)  # fmt: skip
IDS = [f.text() for f in FORMATS]


def obeying(fmt: Format, dense: torch.Tensor) -> torch.Tensor:
    return dense * fmt.choose(dense) if isinstance(fmt, NMG) else dense


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(3, 60), cols=st.integers(3, 60), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), seed=st.integers(0, 3),
)  # fmt: skip
def test_round_trip_bytes_and_text(
    fmt: Format, rows: int, cols: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    dense = obeying(fmt, weight(rows, cols, density, dtype, seed))
    fmt = fmt.resolve(rows, cols)
    assert fmt.refuse(dense) is None and parse(fmt.text()) == fmt and fmt.resolve(rows, cols) == fmt
    buffers = fmt.pack(dense)
    assert tuple(buffers) == fmt.buffers
    fmt.validate(buffers, rows, cols)
    back = fmt.unpack(buffers, rows, cols)
    assert torch.equal(bits(back)[dense != 0], bits(dense)[dense != 0]) and not (back[dense == 0] != 0).any()
    positions = fmt.positions(buffers, rows, cols)
    assert positions.shape == dense.shape and bool(positions[dense != 0].all())
    assert fmt.stored(dense) == sum(t.numel() for k, t in buffers.items() if k.endswith("values"))
    if isinstance(fmt, Sum):
        first, rest = fmt.split(buffers)
        size = fmt.bytes_of(rows, cols, first["values"].numel(), rest["values"].numel(), dense.element_size())
    else:
        size = fmt.nbytes(rows, cols, fmt.stored(dense), dense.element_size())
    inner = getattr(fmt, "format", getattr(fmt, "second", None))
    assert size == nbytes(buffers) or isinstance(inner, CSRGroups)  # whose nbytes is an expectation


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not isinstance(f, NMG)], ids=lambda f: f.text())
def test_a_mask_and_special_values_are_kept(fmt: Format) -> None:
    dense = weight(20, 24, 0.4)
    dense[1, 2], dense[5, 7], dense[19, 23] = float("nan"), float("inf"), float("-inf")
    mask = pattern(dense)
    mask[:, ::3] = False
    buffers = fmt.pack(dense, mask)
    fmt.validate(buffers, 20, 24)
    back = fmt.unpack(buffers, 20, 24)
    assert torch.equal(bits(back)[mask], bits(dense)[mask]) and not (back[~mask] != 0).any()


BROKEN: tuple[tuple[Format, Break, str], ...] = (
    (NMG(2, 4, 2), put("slots", (0, 0, 0), 99), "is no order of the rows"),
    (NMG(2, 4, 2), put("values", (-1, -1, -1, -1), 5.0), "is not zero outside"),
    (NMG(2, 4, 2), swap("values", shorter), "has shape"),
    (BlockNM(), put("places", (0, 0), 16), "valid: 0 to 15"),
    (BlockNM(), put("places", (1, 0), 0), "places rise down a block"),
    (BlockNM(), put("pointers", 1, 3), "steps; valid"),
    (BlockNM(), put("pointers", 0, 1), "expected 0"),
    (Permuted(BSR(4, 2)), put("row_places", 0, 1), "'row_places' is no order"),
    (Permuted(BSR(4, 2), "none", "rcm"), put("col_places", 0, -1), "'col_places' is no order"),
    (Permuted(BSR(4, 2)), put("indices", 0, 99), "indices rise strictly"),
    (Sum(BSR(4, 4), CSR()), put("rest_indices", 0, 24), "in the buffers of the rest"),
    (Sum(BSR(4, 4), CSR()), swap("rest_values", lambda t: t.double()), "torch.float64, 'values' torch.float32"),
    (Sum(BSR(4, 4), CSR()), swap("pointers", shorter), "has shape"),
)


@pytest.mark.parametrize(("fmt", "broken", "words"), BROKEN, ids=[f"{f.name}-{w}" for f, _, w in BROKEN])
def test_damage_is_named(fmt: Format, broken: Break, words: str) -> None:
    dense = obeying(fmt, weight(20, 24, 0.5))
    dense[:4, :4] = 1.0 if isinstance(fmt, Sum) else dense[:4, :4]
    buffers = fmt.pack(dense)
    fmt.validate(buffers, 20, 24)
    with pytest.raises(FormatError, match=words):
        fmt.validate(broken(buffers), 20, 24)


def test_no_position_is_stored_twice() -> None:
    dense = torch.zeros(8, 8)
    dense[:4, :4] = 1
    buffers = Sum(BSR(4, 4), CSR()).pack(dense)
    double = {**buffers, **{f"rest_{k}": t for k, t in CSR().pack(dense).items()}}
    with pytest.raises(FormatError, match=r"position \(0, 0\) is stored by both parts"):
        Sum(BSR(4, 4), CSR()).validate(double, 8, 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NMG(4, 4, 1), "n must be below m"),
        (lambda: NMG(8, 16, 1), "at most 4096"),
        (lambda: NMG(2, 4, 0), "positive"),
        (lambda: BlockNM(5, 16), "valid sizes: 4, 8, 16, 32"),
        (lambda: Permuted(CSR(), "best"), "valid: 'none', 'jaccard', 'rcm', 'length'"),
        (lambda: Permuted(Permuted(CSR())), "no exact format"),
        (lambda: Sum(Quantized(), CSR()), "no exact format"),
        (lambda: Sum(CSR(), 3), "no exact format"),
    ],
)
def test_bad_fields_are_spec_errors(make: object, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make()  # type: ignore[operator]


def test_refusals_name_the_place() -> None:
    fmt = NMG(1, 2, 1)
    assert "row 1 has more than 1 nonzeros in group 0" in str(fmt.refuse(torch.tensor([[1.0, 0.0], [1.0, 1.0]])))
    assert "cannot share the patterns of group 0" in str(fmt.refuse(torch.tensor([[1.0, 0.0], [1.0, 0.0]])))
    assert fmt.refuse(torch.tensor([[0.0, 0.0], [1.0, 0.0]])) is None, "an empty group takes what is left"
    assert "nm(n=1,m=4): row 0 has 3 nonzeros" in str(Sum(NM(1, 4), NM(1, 4)).refuse(torch.ones(1, 4)))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8), (2, 16)])
def test_neighbouring_patterns_exchange_one_member(n: int, m: int) -> None:
    order = patterns(n, m)
    assert sorted(order) == list(itertools.combinations(range(m), n)) and len(order) == comb(m, n)
    assert all(len(set(a) ^ set(b)) == 2 for a, b in itertools.pairwise(order))


def test_orders_are_permutations_of_like_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.rand(4, 64, generator=generator) < 0.3
    rows = kinds[torch.randint(4, (50,), generator=generator)].numpy()
    for name in ("jaccard", "rcm", "length", "none"):
        assert sorted(order_of(name, rows)) == list(range(50))
    found = rows[order_of("jaccard", rows)]
    changes = (found[1:] != found[:-1]).any(axis=1).sum()
    assert changes == len(kinds) - 1


# Kernels: the whole chain from pack to the epilogue against float64.

ISAS = tuple(isa for isa in ("avx512", "avx2", "portable") if isa in Target.probe().isas)
STEPS = ((Step("relu"),), (Step("add"), Step("gelu")))
CASES: tuple[tuple[Format, int, int, str, str], ...] = (
    *((fmt, rows, cols, isa, "float32") for fmt, rows, cols in (
        (NMG(2, 4, 2), 37, 41), (NMG(2, 16, 1), 130, 70), (BlockNM(), 37, 41), (BlockNM(4, 8), 18, 23),
        (Permuted(BSR(16, 1)), 37, 41), (Permuted(CSRGroups(), "rcm", "length"), 34, 53),
        (Sum(BSR(4, 4), CSR()), 33, 41),
    ) for isa in dict.fromkeys((ISAS[0], ISAS[-1]))),
    (NMG(1, 4, 3), 24, 64, ISAS[0], "bfloat16"), (BlockNM(16, 32), 50, 70, ISAS[0], "bfloat16"),
    (Permuted(BSR(4, 4), "jaccard", "rcm"), 33, 45, ISAS[0], "bfloat16"),
    (NM(2, 4) + CSRGroups(), 35, 46, ISAS[0], "float32"),
)  # fmt: skip


def _spec(case: tuple[Format, int, int, str, str]) -> KernelSpec:
    fmt, rows, cols, isa, dtype = case
    steps = STEPS[CASES.index(case) % 2]
    problem = Problem("linear", rows, cols, dtype, rows * cols // 4, True, steps)
    target = Target.probe() if isa == Target.probe().isas[0] else Target.probe().limit(isa)
    (variant,) = [v for v in catalog.variants_for("linear", fmt.name, target) if v.refuse(problem, fmt, target) is None]
    return variant.specs(problem, fmt, target)[0]


@functools.cache
def _kernels() -> dict[KernelSpec, object]:
    return dict(build_kernels([_spec(case) for case in CASES], Target.probe()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].text()}-{c[3]}-{c[4]}")
def test_kernels_agree_with_float64_at_every_batch(case: tuple[Format, int, int, str, str]) -> None:
    fmt, rows, cols, _, dtype = case
    spec = _spec(case)
    assert spec in _kernels()
    torch.manual_seed(0)
    for density in (0.0, 0.3, 1.0):
        dense = torch.randn(rows, cols) * (torch.rand(rows, cols) < density)
        dense[3:7] = 0
        dense = obeying(fmt, dense).to(DTYPES[dtype])
        buffers = fmt.resolve(rows, cols).pack(dense)
        bias = torch.randn(rows).to(dense.dtype)
        for batch in (0, 1, 2, 9, 17, 33, 71):
            x, rest = torch.randn(batch, cols).to(dense.dtype), torch.randn(batch, rows).to(dense.dtype)
            residual = rest if spec.epilogue[0].name == "add" else None
            y = OVERLOAD(x, list(buffers.values()), bias, residual, spec.text())
            stored = fmt.positions(buffers, rows, cols)
            verdict = verify.check(y, x, dense, bias, spec.epilogue, residual, stored)
            assert verdict.ok, (batch, density, verdict.sentence)


def test_a_sum_refuses_what_two_kernels_cannot_do() -> None:
    target, variant = Target.probe(), catalog.variant("linear_sum")
    late = Problem("linear", 8, 8, "float32", 9, epilogue=(Step("relu"), Step("add")))
    assert "before other steps only" in str(variant.refuse(late, Sum(BSR(4, 4), CSR()), target))
    plain = Problem("linear", 8, 8, "float32", 9)
    assert "not nmg" in str(variant.refuse(plain, Sum(NMG(1, 4, 1), CSR()), target))
    permuted = catalog.variant("linear_permuted_bsr")
    assert "a permuted bsr, not csr" in str(permuted.refuse(plain, Permuted(CSR()), target))


@pytest.mark.parametrize(("inner", "together"), [(CSR(), (1, 1)), (BSR(4, 2), (2, 4))])
def test_orders_look_at_as_many_as_a_block_stores_together(inner: Format, together: tuple[int, int]) -> None:
    """Columns for the order of rows, and rows for that of columns; single values where there are no blocks."""
    dense = weight(24, 32, 0.3)
    buffers = Permuted(inner, "length", "length").pack(dense)
    rows, cols = buffers["row_places"].long(), buffers["col_places"].long()
    bits = (dense != 0).numpy()
    assert rows.tolist() == order_of("length", bits, together[0]).tolist()
    assert cols.tolist() == order_of("length", bits[rows.numpy()].T, together[1]).tolist()
    others = order_of("length", bits, 8), order_of("length", bits[rows.numpy()].T, 8)
    assert rows.tolist() != others[0].tolist() and cols.tolist() != others[1].tolist()


def test_a_mix_takes_the_level_nearest_to_what_each_block_keeps() -> None:
    """A block keeps as many per row as it has of the largest values in the mean, rounded to 0, 1, 2, 4 or 8."""
    fmt, dense = BlockNM(4, 8), torch.full((4, 24), 0.001)
    dense[:, :3] = 9.0  # a mean of 3 lies between 2 and 4: the smaller of two that are as near
    dense[:, 8] = 9.0
    dense[0, 16] = 9.0  # a mean of a quarter is none
    mask = fmt.mix(dense, 1 - 17 / 96)
    assert mask.reshape(4, 3, 8).sum(2).tolist() == [[2, 1, 0]] * 4
    assert bool(mask[:, 8].all()) and bool(mask[:, :2].all())
