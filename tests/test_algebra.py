"""The contraction planner: orders, costs, structured operands, and what a plan refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sparsec
from sparsec.algebra import (
    Circulant,
    Delta,
    Diagonal,
    Hankel,
    Identity,
    KhatriRao,
    Kron,
    Sparse,
    Symmetric,
    Toeplitz,
    order,
    plan,
    plan_many,
)
from sparsec.algebra.operands import fast_length
from sparsec.errors import InputError, SpecError
from sparsec.formats import BSR, CSR, NM, Bitmask

D = torch.float64


def R(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed + sum(shape)))


def masked(*shape: int, keep: float = 0.1) -> torch.Tensor:
    return R(*shape) * (torch.rand(*shape, generator=torch.Generator().manual_seed(7)) < keep)


def written(op):
    if isinstance(op, torch.Tensor):
        return op if op.layout is torch.strided else op.to_dense()
    return op.dense()


def check(einsum: str, *operands):
    """Plan, run, compare with torch.einsum over operands written out; the plan."""
    made = plan(einsum, *operands)
    got = made(*operands)
    dense = [written(op) for op in operands]
    wide = torch.complex128 if any(d.is_complex() for d in dense) else D
    want = torch.einsum(einsum, *(d.to(wide) for d in dense))
    assert got.shape == want.shape
    torch.testing.assert_close(got.to(wide), want, rtol=1e-10, atol=1e-10)
    return made


# -- orders --------------------------------------------------------------------------------------------------------


def opt_einsum_equations() -> list[str]:
    pytest.importorskip("opt_einsum")
    from opt_einsum.tests.test_contract import tests

    return list(dict.fromkeys(tests))


def test_never_more_flops_than_opt_einsum_on_its_own_equations():
    oe = pytest.importorskip("opt_einsum")
    worse = []
    equations = opt_einsum_equations()
    assert len(equations) > 60
    better = 0
    for equation in equations:
        shapes = [tuple(s) for s in oe.testing.build_shapes(equation)]
        theirs = oe.contract_path(equation, *shapes, shapes=True, optimize="optimal")[1]
        ours = plan(equation, *shapes)
        assert ours.flops <= ours.naive, equation
        better += ours.flops < int(theirs.opt_cost)
        if ours.flops > int(theirs.opt_cost):
            worse.append((equation, ours.flops, int(theirs.opt_cost)))
    assert not worse and better  # it has no orders that sum an index of one tensor first


def test_never_more_flops_than_opt_einsum_on_its_random_equations():
    oe = pytest.importorskip("opt_einsum")
    for seed in range(40):
        equation, shapes = oe.testing.rand_equation(7, 3, n_out=seed % 3, seed=seed)[:2]
        shapes = [tuple(int(s) for s in shape) for shape in shapes]
        theirs = int(oe.contract_path(equation, *shapes, shapes=True, optimize="optimal")[1].opt_cost)
        ours = plan(equation, *shapes)
        assert ours.flops <= theirs, (equation, shapes)


def test_values_of_opt_einsum_equations():
    oe = pytest.importorskip("opt_einsum")
    for equation in opt_einsum_equations()[::3]:
        shapes = oe.testing.build_shapes(equation)
        check(equation, *(R(*shape, seed=i) for i, shape in enumerate(shapes)))


def test_twelve_operands_are_optimal_and_more_are_searched():
    chain = [(2 + i % 5, 2 + (i + 1) % 5) for i in range(12)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    einsum = ",".join(letters[i : i + 2] for i in range(12)) + "->" + letters[0] + letters[12]
    assert plan(einsum, *chain).order == "optimal"
    assert plan(einsum, *chain).flops == matrix_chain([s[0] for s in chain] + [chain[-1][1]])
    longer = [(2 + i % 5, 2 + (i + 1) % 5) for i in range(20)]
    einsum = ",".join(letters[i : i + 2] for i in range(20)) + "->" + letters[0] + letters[20]
    made = check(einsum, *(R(*s, seed=i) for i, s in enumerate(longer)))
    assert "20 tensors" in made.order
    assert made.flops <= 1.1 * matrix_chain([s[0] for s in longer] + [longer[-1][1]])


def matrix_chain(sizes: list[int]) -> int:
    """The textbook recurrence for the FLOPs of a chain of matrices."""
    count = len(sizes) - 1
    best = [[0] * count for _ in range(count)]
    for span in range(1, count):
        for i in range(count - span):
            j = i + span
            best[i][j] = min(
                best[i][k] + best[k + 1][j] + 2 * sizes[i] * sizes[k + 1] * sizes[j + 1] for k in range(i, j)
            )
    return best[0][-1]


def test_search_without_cotengra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(order, "_cotengra", lambda *_: [])
    sizes = [3, 9, 2, 8, 4, 7, 5, 6, 2, 9, 3, 8, 4, 7, 2, 6]
    letters = "abcdefghijklmnop"
    einsum = ",".join(letters[i : i + 2] for i in range(15)) + "->ap"
    made = plan(einsum, *itertools.pairwise(sizes))
    assert made.flops <= 1.1 * matrix_chain(sizes)


def test_memory_cap_changes_the_order_or_refuses():
    a, b, c = R(40, 2), R(2, 40), R(40, 40)
    free = plan("ij,jk,kl->il", a, b, c)
    capped = plan("ij,jk,kl->il", a, b, c, memory=free.peak * 8)
    assert capped.peak <= free.peak
    outer = [R(50, seed=i) for i in range(3)] + [R(50, 50, 50)]
    tight = plan("a,b,c,abc->", *outer, memory=2500 * 8)
    assert tight.peak <= 2500
    with pytest.raises(InputError, match="the most frugal order needs 2500 entries"):
        plan("a,b,c,abc->", *outer, memory=100 * 8)
    with pytest.raises(SpecError, match="positive number of bytes"):
        plan("a,a->", (3,), (3,), memory=0)


# -- structured operands -----------------------------------------------------------------------------------------


def test_deltas_cost_nothing():
    assert check("ij,jk->ik", Identity(4), R(4, 3)).flops == 0
    assert check("ij,kl->ijkl", Delta(3), Delta(2)).flops == 0
    assert check("ijk,jk->i", Delta(3, 3), R(3, 3)).flops == 0
    assert check("i,j->ij", Delta(3, 1), R(4)).flops == 0
    assert check("ij,jk,kl,lm->im", Delta(5), R(5, 6), Delta(6), R(6, 7)).flops == 2 * 5 * 6 * 7
    made = check("ij,ij->", Delta(6), R(6, 6))
    assert made.flops == 6 and made.steps[0].mode == "sum"
    assert plan("ij->", Delta(6))(Delta(6)) == 6


def test_deltas_may_be_left_out_of_the_call():
    x = R(4, 3)
    assert torch.equal(plan("ij,jk->ik", Identity(4), x)(x), x)


def test_diagonal_is_a_scaling():
    made = check("bi,ij->bj", R(5, 6), Diagonal(R(6)))
    assert made.flops == 30 and [s.mode for s in made.steps] == ["scale"]
    assert check("ij,jk,kl->il", Diagonal(R(6)), R(6, 7), Diagonal(R(7))).flops == 2 * 42


def test_kronecker_factors_stay_apart():
    check("bi,ji->bj", R(6, 256), Kron(R(16, 16), R(16, 16)))
    made = plan("bi,ji->bj", (64, 4096), Kron((64, 64), (64, 64)))
    assert made.flops == 2 * 2 * 64 * 64**3
    assert made.naive > 30 * made.flops
    assert check("bi,ij->bj", R(5, 12), Kron(Identity(3), R(4, 2))).flops == 2 * 5 * 3 * 4 * 2
    nested = Kron(R(2, 3), Kron(R(3, 2), Diagonal(R(2))))
    assert not check("bi,ij->bj", R(5, 12), nested).notes
    vectors = check("i,i->", Kron(R(3), R(4)), Kron(R(3, seed=1), R(4, seed=1)))
    assert vectors.flops == 2 * 3 + 2 * 4 + 1


def test_kronecker_mixed_product_is_found():
    a, b, c, d = R(6, 5), R(4, 3), R(5, 6), R(3, 7)
    made = check("ij,jk->ik", Kron(a, b), Kron(c, d))
    assert made.flops == 2 * 6 * 5 * 6 + 2 * 4 * 3 * 7 + 36 * 28


def test_kronecker_cuts_that_nest_and_cuts_that_do_not():
    assert not check("ij,jk,kl->il", Kron(R(2, 6), R(3, 2)), Kron(R(3, 5), R(4, 2)), R(10, 3)).notes
    made = check("ij,jk,kl->il", Kron(R(2, 4), R(3, 3)), Kron(R(3, 5), R(4, 2)), R(10, 3))
    assert "operand 1 (Kron) is written out" in made.notes[0] and "note:" in repr(made)


def test_khatri_rao_gram_is_a_hadamard_product():
    a, b, c, d = R(30, 4), R(40, 4), R(30, 5), R(40, 5)
    made = check("jr,js->rs", KhatriRao(a, b), KhatriRao(c, d))
    assert made.flops == 2 * 30 * 20 + 2 * 40 * 20 + 20


@pytest.mark.parametrize("rows,cols", [(700, 600), (600, 700), (513, 513)])
def test_shift_invariant_matrices_by_fft_when_it_pays(rows: int, cols: int):
    x = R(8, cols)
    for op in (Toeplitz(R(rows), R(cols)), Hankel(R(rows), R(cols))):
        made = check("bi,oi->bo", x, op)
        assert made.steps[0].mode == "fft right" or made.steps[0].mode == "fft left"
        assert made.flops < made.naive / 4
        check("bo,oi->bi", R(8, rows), op)
    small = check("bi,oi->bo", R(2, 5), Toeplitz(R(4), R(5)))
    assert small.steps[0].mode == "gemm"


def test_circulant_needs_no_padding():
    op = Circulant(R(1000))
    assert op.length == 1000 and Toeplitz(R(1000)).length == fast_length(1999) == 2000
    assert check("bi,oi->bo", R(3, 1000), op).steps[0].mode.startswith("fft")
    check("bo,oi->bi", R(3, 1000), op)


def test_shift_invariant_in_places_where_no_fft_applies():
    check("io,io->", R(7, 5), Toeplitz(R(7), R(5)))
    check("ii->i", Circulant(R(6)))
    check("ij,jk->ik", Toeplitz(R(6)), Circulant(R(6)))
    made = check("bi,ij->bj", R(3, 12), Kron(Circulant(R(3)), R(4, 4)))
    assert not made.notes
    split = check("ij,jk->ik", Circulant(R(12)), Kron(R(3, 3), R(4, 4)))
    assert "Circulant of operand 0 is written out" in split.notes[0]


def test_fast_length_is_the_smallest():
    smooth = sorted(2**a * 3**b * 5**c for a in range(9) for b in range(6) for c in range(4))
    for least in range(1, 200):
        assert fast_length(least) == next(s for s in smooth if s >= least)


@pytest.mark.parametrize("einsum", ["bi,oi->bo", "bo,oi->bi", "oi,oi->", "oi,oi->oi", "boi,oi->bo", "oix,oi->ox"])
def test_sparse_operands_in_every_place(einsum: str):
    weight = masked(30, 40)
    sizes = {"b": 5, "o": 30, "i": 40, "x": 3}
    left = R(*(sizes[c] for c in einsum.split(",")[0]))
    made = check(einsum, left, Sparse(weight))
    nnz = int(torch.count_nonzero(weight))
    rest = math.prod(sizes[c] for c in einsum.split(",")[0] if c not in "oi")
    assert made.flops == nnz * rest * (1 if einsum == "oi,oi->oi" else 2)
    assert made.steps[0].mode.startswith("spmm")


def test_sparse_alone_and_with_structure():
    weight = masked(30, 40)
    assert check("oi->o", Sparse(weight)).flops == int(torch.count_nonzero(weight))
    check("ii->i", Sparse(weight[:, :30]))
    check("oi->io", Sparse(weight))
    check("bi,ji->bj", R(5, 1200), Kron(Sparse(weight), Diagonal(R(30))))
    check("oi,oj,ok->ijk", Sparse(weight), Sparse(weight), Sparse(weight))
    for layout in ("to_sparse_coo", "to_sparse_csr", "to_sparse_csc"):
        check("bi,oi->bo", R(5, 40), getattr(weight, layout)())
    check("bi,oi->bo", R(5, 40), weight.to_sparse_bsr((5, 4)))


def test_sparse_integers_are_exact():
    weight = (masked(30, 40) * 10).round().long()
    x = torch.arange(80).reshape(2, 40)
    assert torch.equal(plan("bi,oi->bo", x, Sparse(weight))(x, Sparse(weight)), x @ weight.T)


@pytest.mark.parametrize("fmt", [CSR(), Bitmask(), BSR(4, 2), NM(2, 4)], ids=lambda f: f.name)
def test_any_storage_format_is_an_operand(fmt):
    weight = masked(16, 32, keep=0.5).float()
    if fmt.name == "nm":
        weight = weight.reshape(16, 8, 4) * torch.tensor([1.0, 0.0, 1.0, 0.0])
        weight = weight.reshape(16, 32)
    fmt = fmt.resolve(16, 32)
    op = Sparse.packed(fmt, fmt.pack(weight), 16, 32)
    x = R(3, 32).float()
    torch.testing.assert_close(plan("bi,oi->bo", x, op)(x, op), x @ weight.T)
    assert op.nnz == int(torch.count_nonzero(weight))


def test_complex_operands():
    c = torch.complex(R(8, 3), R(8, 3, seed=1))
    mixed = check("bi,ir,ro->bo", R(5, 8), c, R(3, 9))
    assert mixed.flops == 4 * (5 * 8 * 3 + 5 * 3 * 9)
    assert check("ir,ro->io", c, torch.complex(R(3, 4), R(3, 4))).flops == 8 * 8 * 3 * 4
    check("ib,io->bo", c, Toeplitz(R(8), R(5)))
    big = torch.complex(R(6, 700), R(6, 700, seed=2))
    assert check("bi,oi->bo", big, Toeplitz(R(600), R(700))).steps[0].mode.startswith("fft")
    check("bi,oi->bo", R(6, 700), Circulant(torch.complex(R(700), R(700, seed=3))))


# -- sizes known later, sharing ------------------------------------------------------------------------------------


def test_a_plan_per_bucket_of_a_symbolic_batch():
    made = sparsec.plan("bi,ij,jk->bk", ("batch", 256), (256, 256), (256, 256))
    assert [(a, b) for a, b, _ in made.ranges()] == [(1, 256), (257, None)]
    (batch,) = made.symbols
    assert sorted(map(str, made.costs)) == sorted(map(str, [262144 * batch, 131072 * batch + 33554432]))
    a, b = R(256, 256), R(256, 256, seed=1)
    for rows in (1, 256, 257, 1000):
        x = R(rows, 256)
        torch.testing.assert_close(made(x, a, b), x @ a @ b)
        assert len(made.at(batch=rows).steps) == 2
        assert made.at(batch=rows).flops.subs(batch, rows) == min(c.subs(batch, rows) for c in made.costs)
    assert "batch 1 to 256: 262144*batch flops" in repr(made)


def test_symbolic_refusals():
    made = plan("bi,bj->ij", ("n", 3), ("n", 4))
    with pytest.raises(InputError, match="size n is 6 here and 5 before"):
        made(R(5, 3), R(6, 4))
    with pytest.raises(InputError, match="takes 2 operands"):
        made(R(5, 3))
    with pytest.raises(InputError, match="needs the sizes n; got m"):
        made.at(m=3)
    with pytest.raises(InputError, match="plan it by itself"):
        plan_many([("bi->i", ("n", 3))])
    two = plan("bi,ij,jo->bo", ("b", "i"), ("i", 8), (8, "o"))
    x, a, c = R(3, 5), R(5, 8), R(8, 2)
    torch.testing.assert_close(two(x, a, c), x @ a @ c)
    with pytest.raises(InputError, match="ranges need one unknown size"):
        two.ranges()
    assert "order 1" in repr(two)


def test_equal_products_of_one_expression_are_computed_once():
    a = R(7, 7)
    shared = plan("ij,jk,kl,lm->im", a, a, a, a)
    apart = plan("ij,jk,kl,lm->im", *(R(7, 7, seed=i) for i in range(4)))
    assert (len(shared.steps), len(apart.steps)) == (2, 3)
    torch.testing.assert_close(shared(a, a, a, a), torch.linalg.matrix_power(a, 4))
    with pytest.raises(InputError, match="were one object when planned"):
        shared(a, a, a.clone(), a)
    shapes = plan("ij,jk->ik", (3, 3), (3, 3))  # two equal tuples may be one object: never taken for one operand
    assert shapes.same == (0, 1)


def test_products_are_shared_over_expressions():
    x, w, u, v = R(5, 8), R(8, 6), R(6, 3), R(6, 4)
    made = plan_many([("bi,ij,jk->bk", x, w, u), ("bi,ij,jk->bk", x, w, v), ("bi,ij->jb", x, w)])
    assert len(made.steps) == 3
    for got, want in zip(made(x, w, u, v), (x @ w @ u, x @ w @ v, (x @ w).T)):
        torch.testing.assert_close(got, want)
    assert made.flops == 2 * 5 * 8 * 6 + 2 * 5 * 6 * 7


def test_symmetric_matrices_share_transposed_products():
    a = R(6, 6)
    a = a + a.T
    plain = plan_many([("ij,jk->ik", a, a), ("ji,jk,kl,lm->im", a, a, a, a)])
    turned = plan_many([("ij,jk->ik", s := Symmetric(a), s), ("ji,jk,kl,lm->im", s, s, s, s)])
    assert turned.flops < plain.flops
    torch.testing.assert_close(turned(s)[1], torch.linalg.matrix_power(a, 4))
    with pytest.raises(InputError, match="not a symmetric matrix"):
        Symmetric(R(3, 3))


def test_stored_plans_compare_and_show():
    one, two = (plan("bi,ir,ro->bo", (64, 1024), (1024, 64), (64, 1024)) for _ in range(2))
    assert one == two and repr(one) == repr(two)
    text = repr(one)
    assert "before: 2.013e+08" not in text  # one loop nest multiplies three operands
    assert f"{3 * 64 * 1024 * 64 * 1024:.3e}" in text and f"{2 * 2 * 64 * 1024 * 64:.3e}" in text
    assert "i r, b i -> r b" in text or "b i, i r -> b r" in text


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "einsum,shapes,error,says",
    [
        ("ij,jk", [(2, 3)], InputError, "names 2 operands, 1 were given"),
        ("ij->ik", [(2, 3)], SpecError, "output label 'k' is on no operand"),
        ("ij->ii", [(2, 3)], SpecError, "occurs twice"),
        ("i1->i", [(2, 3)], SpecError, "'1' is no label"),
        ("i->j->k", [(2,)], SpecError, "two arrows"),
        ("ij,jk->ik", [(2, 3), (4, 5)], InputError, "label 'j' is 3 before and 4 on operand 1"),
        ("ij->i", [(2, 3, 4)], InputError, "has 3 dimensions, its labels 'ij' name 2"),
        ("ij->i", [(0, 3)], InputError, "has size 0"),
    ],
)
def test_malformed_expressions(einsum, shapes, error, says):
    with pytest.raises(error, match=says):
        plan(einsum, *shapes)


def test_malformed_operands():
    for bad in (lambda: Delta(0), lambda: Diagonal(R(2, 2)), lambda: Kron(R(2), R(2, 2)), lambda: KhatriRao(R(2)),
                lambda: Toeplitz(R(2, 2)), lambda: plan("i->", "abc"), lambda: plan("i->", (-1,)), lambda: plan("->"),
                lambda: plan_many([]), lambda: KhatriRao(R(2, 3), R(2, 4))):  # fmt: skip
        with pytest.raises(InputError):
            bad()
    with pytest.raises(SpecError, match="text such as"):
        plan(3, (2,))


def test_malformed_calls():
    made = plan("bi,io->bo", (4, 3), (3, 5))
    with pytest.raises(InputError, match="takes 2 operands, got 1"):
        made(R(4, 3))
    with pytest.raises(InputError, match="operand 1 has shape"):
        made(R(4, 3), R(3, 6))
    with pytest.raises(InputError, match="was planned as Dense, got Sparse"):
        made(R(4, 3), Sparse(R(3, 5)))
    with pytest.raises(InputError, match="planned without data"):
        made((4, 3), R(3, 5))


def test_ellipsis_and_implicit_output():
    check("...i,io->...o", R(2, 3, 4), R(4, 5))
    check("ij,jk", R(2, 3), R(3, 4))
    check("...", R(2, 3))
    with pytest.raises(InputError, match="fewer dimensions"):
        plan("...ij->i", (3,))
