"""Rules of whole layers: linears merged and folded, norms, pooled non-linearities."""

from __future__ import annotations

import random

from sparsec.algebra.rules import CONDITIONAL, EXACT, REASSOCIATION, Outcome, Refusal, Rule
from sparsec.algebra.rules_linear import sizes
from sparsec.algebra.terms import Term, substitute, v, walk


def shift(x: Term, b: Term) -> Term:
    """x + b for a bias b over the last axis."""
    return Term("shift", (x, b), (1,))


def concat(axis: int, *terms: Term) -> Term:
    return Term("concat", terms, (axis,))


def _parts(whole: Term, widths: list[int]) -> list[Term]:
    made, start = [], 0
    for width in widths:
        made.append(Term("slice", (whole,), (1, start, start + width)))
        start += width
    return made


def _is_weight(t: Term) -> bool:
    return all(s.op in ("var", "t", "concat", "scale", "diag", "slice") for s in walk(t))


def _parallel(t: Term) -> Outcome:
    groups: dict[Term, list[Term]] = {}
    for sub in walk(t):
        if sub.op == "matmul" and _is_weight(sub.args[1]):
            groups.setdefault(sub.args[0], []).append(sub)
    for x, found in groups.items():
        if len(found) > 1 and not _is_weight(x):
            whole = x @ concat(1, *(f.args[1] for f in found))
            return substitute(t, dict(zip(found, _parts(whole, [f.shape[1] for f in found]))))
    return None


def _parallel_sample(rng: random.Random) -> Term:
    m, k, n, p = sizes(rng, 4)
    x = Term("map", (v("x", m, k),))
    a, b = x @ v("a", k, n), x @ v("b", k, p)
    return Term("map", (a,)).T @ b


def _qkv(t: Term) -> Outcome:
    groups: dict[Term, list[Term]] = {}
    for sub in walk(t):
        if sub.op == "shift" and sub.data == (1,) and sub.args[0].op == "matmul":
            product = sub.args[0]
            if product.args[1].op == "var" and sub.args[1].op == "var":
                groups.setdefault(product.args[0], []).append(sub)
    for x, found in groups.items():
        if len(found) >= 3:
            weight = concat(1, *(f.args[0].args[1] for f in found))
            bias = concat(0, *(f.args[1] for f in found))
            whole = shift(x @ weight, bias)
            return substitute(t, dict(zip(found, _parts(whole, [f.shape[1] for f in found]))))
        if len(found) == 2:
            return Refusal("only two linears with a bias read this input; merging them is `parallel_linears`")
    return None


def _qkv_sample(rng: random.Random, count: int = 3) -> Term:
    m, k, n, p = sizes(rng, 4)
    x = Term("norm", (v("x", m, k),))
    widths = (n, n, p)[:count]
    q, *rest = (shift(x @ v(f"w{i}", k, d), v(f"b{i}", d)) for i, d in enumerate(widths))
    scores = Term("norm", (q @ rest[0].T,))
    return scores @ rest[1] if count == 3 else scores


def _linears(t: Term) -> Outcome:
    """Two linears without a function between them are one; with biases p and q the first bias goes through b."""
    outer_bias = t.args[1] if t.op == "shift" and t.data == (1,) else None
    product = t.args[0] if outer_bias is not None else t
    if product.op != "matmul" or product.args[0].op != "shift" or product.args[0].data != (1,):
        return None
    (first, p), b = product.args[0].args, product.args[1]
    if first.op != "matmul":
        return None
    x, a = first.args
    bias = Term("row", (p,)) @ b
    if outer_bias is not None:
        bias = bias + Term("row", (outer_bias,))
    return shift(x @ (a @ b), Term("vector", (bias,)))


def _linears_sample(rng: random.Random) -> Term:
    m, k, r, n = sizes(rng, 4)
    y = shift(v("x", m, k) @ v("a", k, r), v("p", r)) @ v("b", r, n)
    return shift(y, v("q", n)) if rng.random() < 0.7 else y


def _affine(t: Term) -> Outcome:
    """The gain and offset of a norm go into the linear behind it."""
    bias = t.args[1] if t.op == "shift" and t.data == (1,) else None
    product = t.args[0] if bias is not None else t
    if product.op != "matmul":
        return None
    y, w = product.args
    if y.op != "shift" or y.data != (1,) or y.args[0].op != "scale" or y.args[0].data != (1,):
        return None
    (inner, g), h = y.args[0].args, y.args[1]
    if inner.op not in ("norm", "var"):
        return Refusal(f"the gain stands behind {inner.op!r}, not behind a norm")
    made = Term("row", (h,)) @ w
    if bias is not None:
        made = made + Term("row", (bias,))
    return shift(inner @ Term("scale", (w, g), (0,)), Term("vector", (made,)))


def _affine_sample(rng: random.Random) -> Term:
    m, k, n = sizes(rng, 3)
    y = shift(Term("scale", (Term("norm", (v("x", m, k),)), v("g", k)), (1,)), v("h", k)) @ v("w", k, n)
    return shift(y, v("b", n)) if rng.random() < 0.7 else y


def _affine_refused(rng: random.Random) -> Term:
    m, k, n = sizes(rng, 3)
    return shift(Term("scale", (Term("map", (v("x", m, k),)), v("g", k)), (1,)), v("h", k)) @ v("w", k, n)


def _streamed(t: Term) -> Outcome:
    """The pooled activations of a linear need not exist at once: rows are taken in blocks."""
    if t.op != "pool" or t.args[0].op != "map" or t.args[0].args[0].op != "matmul":
        return None
    x, w = t.args[0].args[0].args
    rows = x.shape[0]
    if rows < 2:
        return Refusal("there is one row, so there is nothing to stream")
    half = rows // 2
    blocks = (Term("slice", (x,), (0, a, b)) for a, b in ((0, half), (half, rows)))
    first, second = (Term("pool", (Term("map", (part @ w,)),)) for part in blocks)
    return first + second


def _streamed_sample(rng: random.Random) -> Term:
    m, k, n = sizes(rng, 3)
    return Term("pool", (Term("map", (v("x", m + 1, k) @ v("w", k, n),)),))


def _streamed_refused(rng: random.Random) -> Term:
    k, n = sizes(rng, 2)
    return Term("pool", (Term("map", (v("x", 1, k) @ v("w", k, n),)),))


RULES = (
    Rule("parallel_linears", "f(x @ a), g(x @ b) --> y = x @ concat(a, b); f(y[:, :n]), g(y[:, n:])", EXACT, _parallel,
         _parallel_sample, whole=True),
    Rule("qkv_merged", "x @ q + p, x @ k + r, x @ v + s --> slices of x @ concat(q, k, v) + concat(p, r, s)",
         CONDITIONAL, _qkv, _qkv_sample, "Three or more linears with biases read one input.",
         lambda r: _qkv_sample(r, 2), whole=True),
    Rule("linears_folded", "(x @ a + p) @ b + q --> x @ (a @ b) + (p @ b + q)", REASSOCIATION, _linears,
         _linears_sample),
    Rule("affine_through_norm", "(norm(x) * g + h) @ w + b --> norm(x) @ scale(w, g, rows) + (h @ w + b)", CONDITIONAL,
         _affine, _affine_sample, "The gain and offset are a norm's, applied to its whole output.", _affine_refused),
    Rule("pooled_streamed", "pool(f(x @ w)) --> pool(f(x[:m] @ w)) + pool(f(x[m:] @ w))", CONDITIONAL, _streamed,
         _streamed_sample, "There are two rows or more.", _streamed_refused),
)  # fmt: skip
