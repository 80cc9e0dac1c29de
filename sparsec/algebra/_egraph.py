# mypy: disable-error-code="empty-body"
"""What egglog is told: the sort of matrices, their operations, shapes, rules and costs.

Imported by `saturate` alone, when egglog is there. Annotations are objects here, not text: egglog reads them.
"""

from egglog import Expr, StringLike, eq, function, i64, i64Like, rewrite, rule, ruleset, set_, set_cost, vars_


class Mat(Expr):
    """A matrix; the name of a variable."""

    def __init__(self, name: StringLike) -> None: ...


@function
def matmul(a: Mat, b: Mat) -> Mat: ...


@function
def add(a: Mat, b: Mat) -> Mat: ...


@function
def mul(a: Mat, b: Mat) -> Mat: ...


@function
def kron(a: Mat, b: Mat) -> Mat: ...


@function
def khatri_rao(a: Mat, b: Mat) -> Mat: ...


@function
def t(a: Mat) -> Mat: ...


@function(merge=lambda old, new: new)
def rows(a: Mat) -> i64: ...


@function(merge=lambda old, new: new)
def cols(a: Mat) -> i64: ...


@function(merge=lambda old, new: old.min(new))
def live(a: Mat) -> i64:
    """0 for what depends on constants alone, else 1."""


a, b, c, d, e = vars_("a b c d e", Mat)
m, k, n, p, x, y = vars_("m k n p x y", i64)

NAMED = {
    "low_rank_right": rewrite(matmul(matmul(a, b), c)).to(matmul(a, matmul(b, c))),
    "low_rank_left": rewrite(matmul(a, matmul(b, c))).to(matmul(matmul(a, b), c)),
    "factor_out": rewrite(add(matmul(a, b), matmul(a, c))).to(matmul(a, add(b, c))),
    "factor_out right": rewrite(add(matmul(a, c), matmul(b, c))).to(matmul(add(a, b), c)),
    "distribute": rewrite(matmul(a, add(b, c))).to(add(matmul(a, b), matmul(a, c))),
    "add commutes": rewrite(add(a, b)).to(add(b, a)),
    "mul commutes": rewrite(mul(a, b)).to(mul(b, a)),
    "transposes_cancelled": rewrite(t(t(a))).to(a),
    "transposed_product": rewrite(t(matmul(a, b))).to(matmul(t(b), t(a))),
    "kron_mixed_product": rewrite(matmul(kron(a, b), kron(c, d))).to(
        kron(matmul(a, c), matmul(b, d)), eq(m).to(cols(a)), eq(m).to(rows(c))
    ),
    "khatri_rao_gram": rewrite(matmul(t(khatri_rao(a, b)), khatri_rao(c, d))).to(
        mul(matmul(t(a), c), matmul(t(b), d)), eq(m).to(rows(a)), eq(m).to(rows(c))
    ),
}
"""Rule name -> rewrite; the names are those of `sparsec.algebra.rules`, which prove them."""

RULES = ruleset(*NAMED.values(), name="algebra")

_alive = (eq(x).to(live(a)), eq(y).to(live(b)))
_shape_a = (eq(m).to(rows(a)), eq(k).to(cols(a)))
_shape_b = (eq(n).to(rows(b)), eq(p).to(cols(b)))

SHAPES = ruleset(
    rule(eq(e).to(matmul(a, b)), *_shape_a, *_shape_b, *_alive).then(
        set_(rows(e)).to(m), set_(cols(e)).to(p), set_(live(e)).to(x.max(y))
    ),
    *(
        rule(eq(e).to(op(a, b)), *_shape_a, *_alive).then(
            set_(rows(e)).to(m), set_(cols(e)).to(k), set_(live(e)).to(x.max(y))
        )
        for op in (add, mul)
    ),
    rule(eq(e).to(kron(a, b)), *_shape_a, *_shape_b, *_alive).then(
        set_(rows(e)).to(m * n), set_(cols(e)).to(k * p), set_(live(e)).to(x.max(y))
    ),
    rule(eq(e).to(khatri_rao(a, b)), *_shape_a, *_shape_b, *_alive).then(
        set_(rows(e)).to(m * n), set_(cols(e)).to(k), set_(live(e)).to(x.max(y))
    ),
    rule(eq(e).to(t(a)), *_shape_a, eq(x).to(live(a))).then(
        set_(rows(e)).to(k), set_(cols(e)).to(m), set_(live(e)).to(x)
    ),
    name="shapes",
)

COSTS = ruleset(
    rule(eq(e).to(matmul(a, b)), *_shape_a, *_shape_b, eq(x).to(live(e))).then(
        set_cost(matmul(a, b), i64(2) * m * k * p * x + 1)
    ),
    *(
        rule(eq(e).to(op(a, b)), *_shape_a, eq(x).to(live(e))).then(set_cost(op(a, b), m * k * x + 1))
        for op in (add, mul)
    ),
    *(
        rule(eq(e).to(op(a, b)), eq(m).to(rows(e)), eq(k).to(cols(e)), eq(x).to(live(e))).then(
            set_cost(op(a, b), m * k * x + 1)
        )
        for op in (kron, khatri_rao)
    ),
    name="costs",
)

OPERATIONS = {"matmul": matmul, "add": add, "mul": mul, "kron": kron, "khatri_rao": khatri_rao, "t": t}
Number = i64Like
