"""Rules of Kronecker and Khatri-Rao products, circulant blocks and separable filters."""

from __future__ import annotations

import random

from sparsec.algebra.ring import TRANSFORM, transform_lengths
from sparsec.algebra.rules import CONDITIONAL, REASSOCIATION, Outcome, Refusal, Rule
from sparsec.algebra.rules_linear import sizes
from sparsec.algebra.terms import Term, v


def _mixed(t: Term) -> Outcome:
    if t.op != "matmul" or any(a.op != "kron" for a in t.args):
        return None
    (a, b), (c, d) = t.args[0].args, t.args[1].args
    if a.shape[1] != c.shape[0]:
        return Refusal(f"the factors cut the inner index differently: {a.shape[1]} x {b.shape[1]} and "
                       f"{c.shape[0]} x {d.shape[0]}")  # fmt: skip
    return Term("kron", (a @ c, b @ d))


def _mixed_sample(rng: random.Random) -> Term:
    p, q, r, s, m, n = sizes(rng, 6, 4)
    return Term("kron", (v("a", p, m), v("b", q, n))) @ Term("kron", (v("c", m, r), v("d", n, s)))


def _mixed_refused(rng: random.Random) -> Term:
    p, q, r, s = sizes(rng, 4, 3)
    m, n = rng.choice([(2, 3), (2, 5), (3, 4)])
    return Term("kron", (v("a", p, m), v("b", q, n))) @ Term("kron", (v("c", n, r), v("d", m, s)))


def _vec(t: Term) -> Outcome:
    if t.op != "matmul" or t.args[1].op != "kron":
        return None
    x, (a, b) = t.args[0], t.args[1].args
    rows = x.shape[0]
    cube = Term("reshape", (x,), (rows, a.shape[0], b.shape[0]))
    done = Term("mode", (Term("mode", (cube, a), (1,)), b), (2,))
    return Term("reshape", (done,), (rows, a.shape[1] * b.shape[1]))


def _vec_sample(rng: random.Random) -> Term:
    m, p, q, r, s = sizes(rng, 5, 4)
    return v("x", m, p * q) @ Term("kron", (v("a", p, r), v("b", q, s)))


def _gram(t: Term) -> Outcome:
    if t.op != "matmul" or t.args[0].op != "t":
        return None
    left, right = t.args[0].args[0], t.args[1]
    if left.op != "khatri_rao" or right.op != "khatri_rao":
        return None
    (a, b), (c, d) = left.args, right.args
    if a.shape[0] != c.shape[0]:
        return Refusal(f"the factors have {a.shape[0]} and {c.shape[0]} rows, so their products do not align")
    return (a.T @ c) * (b.T @ d)


def _gram_sample(rng: random.Random) -> Term:
    m, n, r, s = sizes(rng, 4)
    return Term("khatri_rao", (v("a", m, r), v("b", n, r))).T @ Term("khatri_rao", (v("c", m, s), v("d", n, s)))


def _gram_refused(rng: random.Random) -> Term:
    r, s = sizes(rng, 2)
    m, n = rng.choice([(2, 3), (3, 5), (4, 2)])
    return Term("khatri_rao", (v("a", m, r), v("b", n, r))).T @ Term("khatri_rao", (v("c", n, s), v("d", m, s)))


def _circulant(t: Term) -> Outcome:
    """y_i = sum_j c_ij (*) x_j is a product per frequency."""
    if t.op != "matmul" or t.args[1].op != "t" or t.args[1].args[0].op != "circulant":
        return None
    x, c = t.args[0], t.args[1].args[0].args[0]
    p, q, b = c.shape
    spectra = Term("dft", (c,)), Term("dft", (Term("reshape", (x,), (x.shape[0], q, b)),))
    return Term("reshape", (Term("idft", (Term("spectral", spectra),)),), (x.shape[0], p * b))


def _circulant_sample(rng: random.Random) -> Term:
    m, p, q = sizes(rng, 3, 3)
    b = rng.choice(transform_lengths(12))
    return v("x", m, q * b) @ Term("circulant", (v("c", p, q, b),)).T


def _separable(t: Term) -> Outcome:
    if t.op != "conv":
        return None
    x, k = t.args
    if k.op == "add" and all(a.op == "outer" for a in k.args):
        first, second = (Term("conv", (x, a)) for a in k.args)
        return first + second
    if k.op != "outer":
        if 1 in k.shape:  # one row or column is separated already
            return None
        return Refusal("the filter is not known to be an outer product: factor it first (a lossy step)")
    a, b = k.args
    column, row = Term("row", (a,)).T, Term("row", (b,))
    return Term("conv", (Term("conv", (x, column)), row))


def _separable_sample(rng: random.Random) -> Term:
    h, w = (rng.randint(4, 8) for _ in range(2))
    r, s = (rng.randint(1, 4) for _ in range(2))
    one = Term("outer", (v("a", r), v("b", s)))
    return Term("conv", (v("x", h, w), one if rng.random() < 0.5 else one + Term("outer", (v("c", r), v("d", s)))))


def _separable_refused(rng: random.Random) -> Term:
    return Term("conv", (v("x", rng.randint(4, 8), rng.randint(4, 8)), v("k", rng.randint(2, 4), rng.randint(2, 4))))


RULES = (
    Rule("kron_mixed_product", "kron(a, b) @ kron(c, d) --> kron(a @ c, b @ d)", CONDITIONAL, _mixed, _mixed_sample,
         "The factors cut the inner index alike.", _mixed_refused, source="Van Loan 2000, eq. 4"),
    Rule("kron_vec", "x @ kron(a, b) --> reshape(mode(mode(reshape(x), a), b))", REASSOCIATION, _vec, _vec_sample,
         source="Van Loan 2000, eq. 3 (vec trick)"),
    Rule("khatri_rao_gram", "khatri_rao(a, b).T @ khatri_rao(c, d) --> (a.T @ c) * (b.T @ d)", CONDITIONAL, _gram,
         _gram_sample, "The factors' rows align.", _gram_refused, source="Kolda and Bader 2009, sec. 2.6"),
    Rule("block_circulant_fft", "x @ circulant(c).T --> idft(spectral(dft(c), dft(x)))", REASSOCIATION, _circulant,
         _circulant_sample, ring=TRANSFORM, source="Davis 1979, sec. 3.2"),
    Rule("separable_filter", "conv(x, outer(a, b)) --> conv(conv(x, a as a column), b as a row)", CONDITIONAL,
         _separable, _separable_sample, "The filter is a sum of known outer products.", _separable_refused),
)  # fmt: skip
