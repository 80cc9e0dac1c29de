"""Products, sums and scalings of a graph as terms of `sparsec.algebra`, optimised there, and written back.

An expression is a tree of calls in which every inner result has one reader; everything below it is a variable. What
depends on weights alone is computed at compile time, so `(x A) B --> x (A B)` wins exactly when A B is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsec.algebra.rules import rule
from sparsec.algebra.search import Candidate, Optimised, optimise, prepared
from sparsec.algebra.terms import Term, flops, v, variables, walk
from sparsec.aten import arguments, opname
from sparsec.codegen import tune
from sparsec.driver import Context
from sparsec.graph import add_constant, constant_nodes, get_constant, owner
from sparsec.passes.rewrite_graph import give_value, place

if TYPE_CHECKING:
    from sparsec.passes.rewrite import Log

aten = torch.ops.aten
RULES = ("linears_folded", "scale_through_linear", "factor_out", "low_rank_left", "low_rank_right")
"""The rules of this file; transpositions and distribution are steps on the way."""

HELPERS = ("transposes_cancelled", "transposed_product", "distribute")
OPS = ("aten::linear", "aten::mm", "aten::matmul", "aten::addmm", "aten::add", "aten::mul", "aten::t")
BUDGET = 120
SPARSE = 0.5
"""Weights with fewer nonzeros than this are not multiplied together: the product would fill up."""

ROWS = (1, 16, 256)


@dataclass
class Lifted:
    """A term and the nodes behind its variables. `rows` is what leading sizes were taken for where they are unknown."""

    term: Term
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    inner: list[fx.Node] = field(default_factory=list)


def rewrite(gm: fx.GraphModule, ctx: Context, log: Log, names: Sequence[str], engine: str) -> None:
    """Optimise every expression of the graph; one that stays is left alone to the node."""
    done: set[fx.Node] = set()
    using = [rule(n) for n in (*names, *HELPERS)]
    for root in reversed(list(gm.graph.nodes)):
        if root in done or opname(root) not in OPS:
            continue
        known = constant_nodes(gm)
        if root in known:
            continue
        lifted = _lift(gm, root, known, None)
        if lifted is None or len(lifted.inner) < 2:
            continue
        done.update(lifted.inner)
        before = flops(lifted.term, frozenset(lifted.fixed))
        found = optimise(lifted.term, tuple(lifted.fixed), engine=engine, budget=BUDGET, using=using)
        if found.best.flops * max(1.0, ctx.options.min_speedup) >= before:
            continue
        places = list(dict.fromkeys(place(n) for n in reversed(lifted.inner)))
        best = _chosen(gm, ctx, lifted, found, log, places)
        if best is None or not best.applied:
            continue
        if not _everywhere(gm, root, known, using, best):
            log.refused(best.applied[0], places, "whether it pays depends on a size that is not known yet")
            continue
        writer = _Writer(gm, root, lifted)
        made = writer.write(best.term)
        stack = made.meta.get("nn_module_stack")
        made.meta = {**root.meta, **({"nn_module_stack": stack} if stack else {})}
        root.replace_all_uses_with(made)
        for node in lifted.inner:
            if not node.users:
                gm.graph.erase_node(node)
        done.update(n for n in writer.made)
        log.applied(best.applied, places, f"{before} --> {best.flops} flops")


def _chosen(
    gm: fx.GraphModule, ctx: Context, lifted: Lifted, found: Optimised, log: Log, places: list[str]
) -> Candidate | None:
    """The winner by cost among the forms that can be written back, and by the clock when that decides."""
    start = Candidate(lifted.term, found.before)
    able = [c for c in found.candidates if c.flops < found.before and _writable(c.term, lifted)]
    if not able:
        log.refused(found.best.applied[0], places, "the cheaper form would multiply sparse weights together, or has no "
                    "form on tensors of this rank")  # fmt: skip
        return None
    if ctx.options.tune != "measure":
        return able[0]
    generator = torch.Generator().manual_seed(0)
    dtype = _dtype(gm, lifted)
    values = {n: torch.randn(s, generator=generator).to(dtype) for n, s in variables(lifted.term).items()}
    us = tune.measure([prepared(c.term, values, frozenset(lifted.fixed)) for c in (start, *able)]).us
    winner = min(range(1, len(us)), key=us.__getitem__)
    gain = us[0] / us[winner]
    if gain < ctx.options.min_speedup:
        log.refused(able[winner - 1].applied[0], places, f"fewer flops, but measured {gain:.2f}x only")
        return None
    return able[winner - 1]


def _dtype(gm: fx.GraphModule, lifted: Lifted) -> torch.dtype:
    for node in lifted.nodes.values():
        value = get_constant(gm, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        if value is not None:
            return value.dtype  # type: ignore[no-any-return]
    return torch.float32


def _everywhere(gm: fx.GraphModule, root: fx.Node, known: Any, using: Any, best: Candidate) -> bool:
    """Whether the same rules win at few and at many rows, where the number of rows is open."""
    if _static(root):
        return True
    for rows in ROWS:
        lifted = _lift(gm, root, known, rows)
        if lifted is None:
            return False
        found = optimise(lifted.term, tuple(lifted.fixed), engine="search", budget=BUDGET, using=using)
        if best.applied != found.best.applied:
            return False
    return True


def _static(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is not None and all(isinstance(s, int) for s in value.shape)


# -- reading -------------------------------------------------------------------------------------------------------


def _lift(gm: fx.GraphModule, root: fx.Node, known: dict[fx.Node, None], rows: int | None) -> Lifted | None:
    """The largest term that ends in `root`, or None when a shape is unknown."""
    lifted = Lifted(v("nothing", 1, 1))
    guess = rows or ROWS[1]

    def leaf(node: fx.Node, rank: int) -> Term | None:
        shape = _shape(gm, node, guess)
        if shape is None or len(shape) != rank:
            return None
        name = next((n for n, other in lifted.nodes.items() if other is node), f"v{len(lifted.nodes)}")
        lifted.nodes[name] = node
        if node in known and _dense_enough(gm, node):
            lifted.fixed.add(name)
        return v(name, *shape)

    def read(node: Any, top: bool = False) -> Term | None:
        if not isinstance(node, fx.Node):
            return None
        mark = len(lifted.inner)
        if node not in known and opname(node) in OPS and (top or len(node.users) == 1):
            lifted.inner.append(node)
            term = _call(node, read, lambda n: leaf(n, 1) if n in known else None, lifted)
            if term is not None and term.shape == _shape(gm, node, guess):
                return term
            del lifted.inner[mark:]
        if top:
            return None
        return leaf(node, 2)

    term = read(root, True)
    if term is None:
        return None
    lifted.term = term
    return lifted


Reader = Callable[..., Term | None]


def _call(node: fx.Node, read: Reader, vector: Reader, lifted: Lifted) -> Term | None:
    """One call as a term over what its arguments are; None when it has a form that terms do not have."""
    bound, name = arguments(node), opname(node)
    if name == "aten::linear":
        x, w = read(bound["input"]), read(bound["weight"])
        if x is None or w is None or x.shape[1] != w.shape[1]:
            return None
        return _biased(x @ w.T, bound["bias"], vector)
    if name in ("aten::mm", "aten::matmul"):
        right = bound["mat2" if name == "aten::mm" else "other"]
        if _rank(right) != 2 or _rank(bound["self"]) < 2:
            return None
        a, b = read(bound["self"]), read(right)
        return a @ b if a is not None and b is not None and a.shape[1] == b.shape[0] else None
    if name == "aten::addmm":
        a, b = read(bound["mat1"]), read(bound["mat2"])
        if a is None or b is None or bound["alpha"] != 1 or bound["beta"] != 1:
            return None
        return _biased(a @ b, bound["self"], vector)
    if name == "aten::t":
        a = read(bound["self"])
        return a.T if a is not None else None
    left, right = bound["self"], bound["other"]
    if name == "aten::add" and bound["alpha"] != 1:
        return None
    return _pair(name, left, right, read, vector, lifted)


def _biased(term: Term, bias: Any, vector: Reader) -> Term | None:
    if bias is None:
        return term
    b = vector(bias)
    return Term("shift", (term, b), (1,)) if b is not None and b.shape == term.shape[1:] else None


def _pair(name: str, left: Any, right: Any, read: Reader, vector: Reader, lifted: Lifted) -> Term | None:
    """A sum or product of two tensors, or of a tensor with a constant vector or a number."""
    if isinstance(right, int | float) and not isinstance(right, bool) and name == "aten::mul":
        x = read(left)
        if x is None:
            return None
        number = f"n{len(lifted.numbers)}"
        lifted.numbers[number] = float(right)
        lifted.fixed.add(number)
        return Term("scale", (x, v(number, x.shape[1])), (1,))
    for x, other in ((left, right), (right, left)):
        s = vector(other) if isinstance(other, fx.Node) else None
        if s is not None:
            a = read(x)
            fits = a is not None and a.shape[1:] == s.shape
            return Term("scale" if name == "aten::mul" else "shift", (a, s), (1,)) if fits and a is not None else None
    a, b = read(left), read(right)
    if a is None or b is None or a.shape != b.shape:
        return None
    return a * b if name == "aten::mul" else a + b


def _shape(gm: fx.GraphModule, node: fx.Node, guess: int) -> tuple[int, ...] | None:
    """Sizes with all leading ones as rows; unknown numbers of rows are taken for `guess`."""
    value = get_constant(gm, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dim() or not value.is_floating_point():
        return None
    if not isinstance(value.shape[-1], int) or 0 in [s for s in value.shape if isinstance(s, int)]:
        return None
    if value.dim() == 1:
        return (value.shape[0],)
    rows = 1
    for size in value.shape[:-1]:
        rows = rows * size if isinstance(size, int) and rows else 0
    return rows or guess, value.shape[-1]


def _dense_enough(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    tensor = get_constant(gm, str(node.target)).detach()
    return tensor.dim() < 2 or bool((tensor != 0).float().mean() >= SPARSE)


# -- writing -------------------------------------------------------------------------------------------------------

WRITTEN = ("var", "matmul", "add", "mul", "t", "scale", "shift", "row", "vector")


def _writable(term: Term, lifted: Lifted) -> bool:
    """Whether every operation has an ATen form for what stands behind the variables, tensors of rank 3 among them."""
    wide = {n for n, node in lifted.nodes.items() if _rank(node) > 2}
    for t in walk(term):
        if t.op not in WRITTEN or (t.op in ("matmul", "add", "mul") and _fills(t, lifted)):
            return False
        deep = any(s.op == "var" and s.data[0] in wide for s in walk(t))
        if deep and t.op in ("t", "row", "vector"):
            return False
        if deep and t.op == "matmul" and any(s.op == "var" and s.data[0] in wide for s in walk(t.args[1])):
            return False
        if deep and t.op == "scale" and t.data == (0,):
            return False
    return True


def _fills(term: Term, lifted: Lifted) -> bool:
    """Whether a product or sum of weights alone has a sparse one among them."""
    names = [t.data[0] for t in walk(term) if t.op == "var"]
    weights = all(n in lifted.numbers or lifted.nodes[n].op == "get_attr" for n in names)
    return weights and not lifted.fixed.issuperset(names)


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return 2 if value is None else int(value.dim())


class _Writer:
    """Puts the calls of a term before `root`; products with a constant right side are linears."""

    def __init__(self, gm: fx.GraphModule, root: fx.Node, lifted: Lifted) -> None:
        self.gm, self.root, self.lifted = gm, root, lifted
        self.made: dict[fx.Node, None] = {}
        self._done: dict[Term, fx.Node] = {}

    def write(self, term: Term) -> fx.Node:
        """The node that computes `term`."""
        if term not in self._done:
            self._done[term] = self._write(term)
        return self._done[term]

    def _fixed(self, term: Term) -> bool:
        return all(t.data[0] in self.lifted.fixed or self._constant(t) for t in walk(term) if t.op == "var")

    def _constant(self, var: Term) -> bool:
        node = self.lifted.nodes.get(var.data[0])
        return node is not None and node.op == "get_attr"

    def _write(self, term: Term) -> fx.Node:
        op, args = term.op, term.args
        if op == "var":
            name = term.data[0]
            return self.lifted.nodes[name] if name in self.lifted.nodes else self._number(name, term.shape)
        if op == "shift" and args[0].op == "matmul" and self._linear(args[0]) and self._fixed(args[1]):
            return self._product(args[0], args[1])
        if op == "matmul":
            if self._linear(term):
                return self._product(term, None)
            return self._emit(aten.mm.default, self.write(args[0]), self.write(args[1]))
        if op == "scale" and term.data == (0,):
            column = self._emit(aten.view.default, self.write(args[1]), [-1, 1])
            return self._emit(aten.mul.Tensor, self.write(args[0]), column)
        simple = {"add": aten.add.Tensor, "mul": aten.mul.Tensor, "scale": aten.mul.Tensor, "shift": aten.add.Tensor}
        if op in simple:
            return self._emit(simple[op], *(self.write(a) for a in args))
        if op == "t":
            return self._emit(aten.t.default, self.write(args[0]))
        return self._emit(aten.view.default, self.write(args[0]), [1, -1] if op == "row" else [-1])

    def _linear(self, product: Term) -> bool:
        return self._fixed(product.args[1]) and not self._fixed(product.args[0])

    def _product(self, product: Term, bias: Term | None) -> fx.Node:
        x, w = product.args
        weight = self.write(w.args[0]) if w.op == "t" else self._emit(aten.t.default, self.write(w))
        made = self._emit(aten.linear.default, self.write(x), weight, None if bias is None else self.write(bias))
        source = self._source(w)
        if source is not None:
            made.meta["nn_module_stack"] = source
        return made

    def _source(self, weight: Term) -> Any:
        """The module of the last old call that reads one of the constants in `weight`."""
        names = [self.lifted.nodes.get(t.data[0]) for t in walk(weight) if t.op == "var"]
        users = [n for n in self.lifted.inner if any(r in n.all_input_nodes for r in names if r is not None)]
        stacks = [n.meta["nn_module_stack"] for n in users if owner(n)[0]]
        return stacks[0] if stacks else None

    def _number(self, name: str, shape: tuple[int, ...]) -> fx.Node:
        dtype = _dtype(self.gm, self.lifted)
        value = torch.full(shape, self.lifted.numbers[name], dtype=dtype)
        with self.gm.graph.inserting_before(self.root):
            return self.gm.graph.get_attr(add_constant(self.gm, "factor", value))

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        with self.gm.graph.inserting_before(self.root):
            node = self.gm.graph.call_function(target, args)
        give_value(self.gm, node)
        self.made[node] = None
        return node
