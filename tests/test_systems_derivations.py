"""Published systems that search: derivation-based optimisation of expressions, and flip graphs of bilinear schemes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from sparsec.algebra import bilinear, derive, rule
from sparsec.algebra.proof import prove
from sparsec.algebra.rules_layers import concat
from sparsec.algebra.search import optimise
from sparsec.algebra.terms import Term, v
from sparsec.errors import InputError


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


# -- OLLIE (Zheng et al. 2023) -------------------------------------------------------------------------------------

X = whole(2, 3, 12)
CASES = {
    "convolution": (derive.convolution(2, 3, 4, 12, 3, padding=1), (4, 3, 3), lambda w: F.conv1d(X, w, padding=1)),
    "pointwise": (derive.convolution(2, 3, 4, 12, 1), (4, 3, 1), lambda w: F.conv1d(X, w)),
    "dilated": (derive.convolution(2, 3, 4, 12, 3, dilation=2, padding=2), (4, 3, 3),
                lambda w: F.conv1d(X, w, padding=2, dilation=2)),
    "dilated by three": (derive.convolution(2, 3, 4, 12, 3, dilation=3), (4, 3, 3),
                         lambda w: F.conv1d(X, w, dilation=3)),
    "strided": (derive.convolution(2, 3, 4, 12, 3, stride=2, padding=1), (4, 3, 3),
                lambda w: F.conv1d(X, w, stride=2, padding=1)),
    "transposed": (derive.transposed_convolution(2, 3, 4, 12, 3, 2), (3, 4, 3),
                   lambda w: F.conv_transpose1d(X, w, stride=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_derivation_keeps_the_value_on_integers(name: str):
    scope, shape, reference = CASES[name]
    w = whole(*shape, seed=1)
    found = derive.derive(scope)
    assert len(found) >= 2 and found[-1].cost >= found[0].cost
    for derivation in found:
        assert torch.equal(derive.evaluate(derivation.scope, {"x": X, "w": w}), reference(w)), derivation


def best(scope: derive.Scope) -> derive.Derivation:
    return derive.derive(scope)[0]


def test_a_convolution_is_one_product_and_an_addition_of_shifts():
    found = best(derive.convolution(1, 64, 64, 32, 3, padding=1))
    assert derive.kinds(found.scope) == ("product", "gather") and found.applied == ("split_sum", "substitute")
    inner = found.scope.factors[0].source
    assert isinstance(inner, derive.Scope)
    assert inner.iterations == 64 * 64 * 32 * 3  # over the unpadded input
    assert "h + r + -1" in str(found.scope)


def test_pointwise_transposed_and_dilated_convolutions():
    assert derive.kinds(best(derive.convolution(1, 64, 64, 32, 1)).scope) == ("product",)
    found = best(derive.transposed_convolution(1, 64, 64, 32, 3, 2))
    assert derive.kinds(found.scope) == ("product", "gather") and "(h + -1r) / 2" in str(found.scope)
    dilated = derive.derive(derive.convolution(1, 2, 2, 32, 3, dilation=2))
    dense = next(d for d in dilated if d.applied == ("split_traversal",))
    assert derive.kinds(dense.scope) == ("convolution", "gather") and "x.split(2, 2)" in str(dense.scope)
    assert dense.cost < dilated[-1].cost / 10


def test_a_small_convolution_stays_a_convolution():
    assert best(derive.convolution(1, 2, 2, 32, 3)).applied == ()


def test_fingerprints_do_not_depend_on_names():
    one = derive.convolution(1, 2, 3, 8, 3)
    table = dict(zip("nfhcr", "abtkq"))

    def renamed(access: derive.Access) -> derive.Access:
        dims = (derive.Affine(tuple((table[n], c) for n, c in d.terms), d.const, d.den) for d in access.dims)
        return derive.Access(access.source, tuple(dims), access.shape)

    loops, sums = (tuple(derive.Range(table[r.name], r.size) for r in group) for group in (one.loops, one.sums))
    other = derive.Scope(loops, sums, tuple(renamed(f) for f in one.factors))
    assert derive.fingerprint(one) == derive.fingerprint(other)
    assert derive.fingerprint(one) != derive.fingerprint(derive.convolution(1, 2, 3, 8, 3, dilation=2))


def test_products_with_one_input_become_one_product():
    x = Term("map", (v("x", 8, 64),))
    apart = Term("map", (x @ v("a", 64, 32),)) @ Term("map", (x @ v("b", 64, 32),)).T
    merged = rule("parallel_linears").rewrite(apart)
    assert isinstance(merged, Term) and str(concat(1, v("a", 64, 32), v("b", 64, 32))) in str(merged)
    assert prove(rule("parallel_linears")).holds


def test_chains_are_reassociated():
    found = optimise(v("a", 4, 256) @ (v("b", 256, 256) @ v("c", 256, 4)), engine="search")
    assert found.best.flops == 2 * 4 * 256 * 256 + 2 * 4 * 256 * 4 and found.before > 60 * found.best.flops / 64


def test_an_expression_checks_its_tensors():
    with pytest.raises(InputError, match="has shape"):
        derive.evaluate(derive.convolution(2, 3, 4, 12, 3), {"x": X[:, :2], "w": whole(4, 3, 3)})


# -- structured products by flip graphs (Khoruzhii, Gelss, Pokutta 2025) -------------------------------------------


def found(kinds: str, rank: int, prime: int) -> tuple[bilinear.Scheme, bilinear.Scheme]:
    for seed in range(8):
        scheme = bilinear.search(kinds, 2, rank, prime, seed=seed, steps=60_000)
        lifted = bilinear.lift(scheme) if scheme is not None else None
        if scheme is not None and lifted is not None:
            return scheme, lifted
    raise AssertionError(f"no scheme of rank {rank} for {kinds}")


def test_general_product_of_rank_seven_on_blocks():
    scheme, lifted = found("gg", 7, 2)
    assert bilinear.standard("gg", 2).rank == 8 and scheme.rank == lifted.rank == 7
    assert scheme.holds() and lifted.holds() and lifted.prime == 0
    a, b = whole(10, 10), whole(10, 10, seed=1)
    assert torch.equal(bilinear.apply(lifted, a, b), a @ b)


def test_symmetric_product_of_rank_five_needs_a_half_and_holds_for_entries_only():
    scheme, lifted = found("ss", 5, 3)
    assert scheme.rank == 5 and scheme.holds() and lifted.holds()
    assert any(x.denominator == 2 for term in lifted.terms for f in term for x in map(Fraction, f))
    a, b = whole(2, 2), whole(2, 2, seed=1)
    a, b = a + a.T, b + b.T
    torch.testing.assert_close(bilinear.apply(lifted, a, b), a @ b)
    with pytest.raises(InputError, match="right for entries, not for blocks of 2"):
        bilinear.apply(lifted, whole(4, 4), whole(4, 4))


@pytest.mark.parametrize("kinds", ["gg", "gt", "sg", "ug", "gw", "uw", "us"])
def test_brent_equations_hold_for_the_standard_scheme_of_every_kind(kinds: str):
    scheme = bilinear.standard(kinds, 3)
    assert scheme.holds() or kinds == "ss"
    broken = bilinear.Scheme(scheme.problem, scheme.terms[:-1])
    assert not broken.holds()


def test_triangular_products_run_on_blocks():
    a, b = whole(6, 6).triu(), whole(6, 6, seed=1)
    assert torch.equal(bilinear.apply(bilinear.standard("ug", 3), a, b), a @ b)
    assert bilinear.standard("ug", 3).rank == 18 < bilinear.standard("gg", 3).rank


def test_recursion_shares_and_refusals():
    assert bilinear.recursive_share(34, 10, 49) == Fraction(8, 13)
    assert bilinear.recursive_share(34, 12, 49) == Fraction(22, 37)
    with pytest.raises(InputError, match="names two of"):
        bilinear.problem("gx", 2)
    with pytest.raises(InputError, match="lift it first"):
        bilinear.apply(bilinear.standard("gg", 2, prime=2), whole(2, 2), whole(2, 2))
    with pytest.raises(InputError, match="divisible by 2"):
        bilinear.apply(bilinear.standard("gg", 2), whole(3, 3), whole(3, 3))
    assert bilinear.search("gg", 2, 6, 2, steps=300) is None
