"""Rules of sums, products, transposition and diagonals."""

from __future__ import annotations

import random

from sparsec.algebra.ring import FLOAT
from sparsec.algebra.rules import CONDITIONAL, EXACT, REASSOCIATION, Outcome, Refusal, Rule
from sparsec.algebra.terms import Term, substitute, v, walk


def sizes(rng: random.Random, count: int, most: int = 5) -> list[int]:
    """`count` random sizes from 1 to `most`."""
    return [rng.randint(1, most) for _ in range(count)]


def _right(t: Term) -> Outcome:
    if t.op == "matmul" and t.args[0].op == "matmul":
        (x, u), w = t.args[0].args, t.args[1]
        return x @ (u @ w)
    return None


def _left(t: Term) -> Outcome:
    if t.op == "matmul" and t.args[1].op == "matmul":
        x, (u, w) = t.args[0], t.args[1].args
        return (x @ u) @ w
    return None


def _chain(rng: random.Random, left: bool) -> Term:
    a, b, c, d = sizes(rng, 4)
    x, u, w = v("x", a, b), v("u", b, c), v("v", c, d)
    return (x @ u) @ w if left else x @ (u @ w)


def _factor(t: Term) -> Outcome:
    if t.op != "add" or any(a.op != "matmul" for a in t.args):
        return None
    (x, a), (y, b) = t.args[0].args, t.args[1].args
    if x == y and a.shape == b.shape:
        return x @ (a + b)
    if a == b and x.shape == y.shape:
        return (x + y) @ a
    return None


def _factor_sample(rng: random.Random) -> Term:
    m, k, n = sizes(rng, 3)
    x, y, a, b = v("x", m, k), v("y", m, k), v("a", k, n), v("b", k, n)
    return x @ a + x @ b if rng.random() < 0.5 else x @ a + y @ a


def _distribute(t: Term) -> Outcome:
    if t.op == "matmul" and t.args[1].op == "add":
        a, b = t.args[1].args
        return t.args[0] @ a + t.args[0] @ b
    return None


def _distribute_sample(rng: random.Random) -> Term:
    m, k, n = sizes(rng, 3)
    return v("x", m, k) @ (v("a", k, n) + v("b", k, n))


def _double(t: Term) -> Outcome:
    if t.op == "t" and t.args[0].op == "t":
        return t.args[0].args[0]
    if t.op == "permute":
        inner = t.args[0]
        if t.data == tuple(range(len(t.data))):
            return inner
        if inner.op == "permute":
            made = tuple(inner.data[i] for i in t.data)
            return inner.args[0] if made == tuple(range(len(made))) else Term("permute", inner.args, made)
    return None


def _double_sample(rng: random.Random) -> Term:
    rank = rng.randint(2, 4)
    x = v("x", *sizes(rng, rank))
    if rank == 2 and rng.random() < 0.5:
        return x.T.T
    first, second = (tuple(rng.sample(range(rank), rank)) for _ in range(2))
    return Term("permute", (Term("permute", (x,), first),), second)


def _transposed_product(t: Term) -> Outcome:
    if t.op == "t" and t.args[0].op == "matmul":
        a, b = t.args[0].args
        return b.T @ a.T
    return None


def _transposed_sample(rng: random.Random) -> Term:
    m, k, n = sizes(rng, 3)
    return (v("a", m, k) @ v("b", k, n)).T


def _diag(t: Term) -> Outcome:
    if t.op != "matmul":
        return None
    a, b = t.args
    if a.op == "diag":
        return Term("scale", (b, a.args[0]), (0,))
    if b.op == "diag":
        return Term("scale", (a, b.args[0]), (1,))
    return None


def _diag_sample(rng: random.Random) -> Term:
    m, n = sizes(rng, 2)
    a = v("a", m, n)
    left = rng.random() < 0.5
    d = Term("diag", (v("d", m if left else n),))
    return d @ a if left else a @ d


def _scale(t: Term) -> Outcome:
    if t.op == "matmul" and t.args[0].op == "scale" and t.args[0].data == (1,):
        (x, s), w = t.args[0].args, t.args[1]
        return x @ Term("scale", (w, s), (0,))
    if t.op == "matmul" and t.args[1].op == "scale" and t.args[1].data == (1,):
        (w, s), x = t.args[1].args, t.args[0]
        return Term("scale", (x @ w, s), (1,))
    if t.op == "scale" and t.data == (1,) and t.args[0].op == "matmul":
        (x, w), s = t.args[0].args, t.args[1]
        return x @ Term("scale", (w, s), (1,))
    return None


def _scale_sample(rng: random.Random) -> Term:
    m, k, n = sizes(rng, 3)
    x, w = v("x", m, k), v("w", k, n)
    kind = rng.randrange(3)
    if kind == 0:
        return Term("scale", (x, v("s", k)), (1,)) @ w
    if kind == 1:
        return Term("scale", (x @ w, v("s", n)), (1,))
    return x @ Term("scale", (w, v("s", n)), (1,))


def _shared(t: Term) -> Outcome:
    firsts: dict[Term, Term] = {}
    table: dict[Term, Term] = {}
    for sub in walk(t):
        if sub.op == "node":
            table[sub] = firsts.setdefault(sub.args[0], sub)
    table = {a: b for a, b in table.items() if a != b}
    return substitute(t, table) if table else None


def _shared_sample(rng: random.Random) -> Term:
    m, k, n = sizes(rng, 3)
    x, w = v("x", m, k), v("w", k, n)
    one, two = (Term("node", (x @ w,), (i,)) for i in (1, 2))
    f, g = Term("map", (one,)), Term("norm", (two,))
    return f.T @ g if rng.random() < 0.5 else f * g + one


def _positive(t: Term) -> Outcome:
    if t.op != "relu" or t.args[0].op != "scale":
        return None
    (x, s), axis = t.args[0].args, t.args[0].data
    if s.op != "abs":
        return Refusal("relu(s * x) is s * relu(x) only for s >= 0, and the sign of this factor is not known")
    return Term("scale", (Term("relu", (x,)), s), axis)


def _positive_sample(rng: random.Random, known: bool) -> Term:
    m, n = sizes(rng, 2)
    s = v("s", n)
    return Term("relu", (Term("scale", (v("x", m, n), Term("abs", (s,)) if known else s), (1,)),))

RULES = (
    Rule("low_rank_right", "(x @ u) @ v --> x @ (u @ v)", REASSOCIATION, _right, lambda r: _chain(r, True)),
    Rule("low_rank_left", "x @ (u @ v) --> (x @ u) @ v", REASSOCIATION, _left, lambda r: _chain(r, False)),
    Rule("factor_out", "x @ a + x @ b --> x @ (a + b);  x @ a + y @ a --> (x + y) @ a", REASSOCIATION, _factor,
         _factor_sample),
    Rule("distribute", "x @ (a + b) --> x @ a + x @ b", REASSOCIATION, _distribute, _distribute_sample),
    Rule("transposes_cancelled", "x.T.T --> x;  permute(permute(x, p), q) --> permute(x, p[q])", EXACT, _double,
         _double_sample),
    Rule("transposed_product", "(a @ b).T --> b.T @ a.T", EXACT, _transposed_product, _transposed_sample),
    Rule("diag_absorbed", "diag(d) @ a --> scale(a, d, rows);  a @ diag(d) --> scale(a, d, columns)", EXACT, _diag,
         _diag_sample),
    Rule("scale_through_linear", "scale(x, s) @ w --> x @ scale(w, s, rows);  "
         "scale(x @ w, s) --> x @ scale(w, s, columns), and back", REASSOCIATION, _scale, _scale_sample),
    Rule("shared", "f(x @ w) + g(x @ w) --> y = x @ w; f(y) + g(y)", EXACT, _shared, _shared_sample, whole=True),
    Rule("scale_through_relu", "relu(scale(x, s)) --> scale(relu(x), s)", CONDITIONAL, _positive,
         lambda r: _positive_sample(r, True), "Every factor s is known to be nonnegative.",
         lambda r: _positive_sample(r, False), FLOAT),
)  # fmt: skip
