"""Expressions of linear algebra as frozen trees: shapes, FLOPs, values in any ring, and text.

`v("x", 3, 4) @ v("w", 4, 5)` is a term. Equal terms are one object for evaluation and for cost, so a term is really a
graph without repetitions; `node(term, 1)` and `node(term, 2)` are two computations of the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.algebra.ring import Ring
from sparsec.errors import InputError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """An operation on terms; `data` holds its numbers (axes, sizes, names). `shape` follows from both."""

    op: str
    args: tuple[Term, ...] = ()
    data: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise InputError(f"no operation is called {self.op!r}; there are {', '.join(OPS)}")
        shape = OPS[self.op].shape(self.data, *(a.shape for a in self.args))
        if shape is None:
            shapes = ", ".join(map(str, (a.shape for a in self.args)))
            raise InputError(f"{self.op}{self.data or ''} does not take shapes {shapes}")
        object.__setattr__(self, "_shape", shape)
        object.__setattr__(self, "_hash", hash((self.op, self.args, self.data)))

    def __hash__(self) -> int:
        return self.__dict__["_hash"]  # type: ignore[no-any-return]

    @property
    def shape(self) -> Shape:
        return self.__dict__["_shape"]  # type: ignore[no-any-return]

    def __matmul__(self, other: Term) -> Term:
        return Term("matmul", (self, other))

    def __add__(self, other: Term) -> Term:
        return Term("add", (self, other))

    def __mul__(self, other: Term) -> Term:
        return Term("mul", (self, other))

    @property
    def T(self) -> Term:
        return Term("t", (self,))

    def __str__(self) -> str:
        return OPS[self.op].text(self.data, *(str(a) for a in self.args))

    __repr__ = __str__


@dataclass(frozen=True)
class Op:
    """Meaning of one operation: its shape (None: refused), its value in a ring, the FLOPs of the node, its text."""

    shape: Callable[..., Shape | None]
    value: Callable[..., torch.Tensor]
    flops: Callable[..., int]
    text: Callable[..., str]


def v(name: str, *shape: int) -> Term:
    """A variable."""
    return Term("var", (), (name, *shape))


def walk(term: Term) -> Iterator[Term]:
    """Every distinct subterm once, arguments first."""
    seen: dict[Term, None] = {}

    def visit(t: Term) -> None:
        if t not in seen:
            for a in t.args:
                visit(a)
            seen[t] = None

    visit(term)
    yield from seen


def variables(term: Term) -> dict[str, Shape]:
    """Name -> shape. Raises InputError when one name has two shapes."""
    found: dict[str, Shape] = {}
    for t in walk(term):
        if t.op == "var" and found.setdefault(t.data[0], t.shape) != t.shape:
            raise InputError(f"variable {t.data[0]!r} has shapes {found[t.data[0]]} and {t.shape}")
    return found


def flops(term: Term, constant: frozenset[str] = frozenset()) -> int:
    """FLOPs of one evaluation; what depends on `constant` variables alone is computed before and costs nothing."""
    fixed: dict[Term, bool] = {}
    total = 0
    for t in walk(term):
        fixed[t] = t.data[0] in constant if t.op == "var" else bool(t.args) and all(fixed[a] for a in t.args)
        if not fixed[t]:
            total += OPS[t.op].flops(t.shape, t.data, *(a.shape for a in t.args))
    return total


def evaluate(term: Term, values: Mapping[str, torch.Tensor], ring: Ring) -> torch.Tensor:
    """The value of a term. `values` has a tensor per variable."""
    done: dict[Term, torch.Tensor] = {}
    for t in walk(term):
        done[t] = values[t.data[0]] if t.op == "var" else OPS[t.op].value(ring, t.data, *(done[a] for a in t.args))
    return done[term]


def substitute(term: Term, table: dict[Term, Term]) -> Term:
    """The term with subterms replaced, outermost first."""
    if term in table:
        return table[term]
    args = tuple(substitute(a, table) for a in term.args)
    return term if args == term.args else Term(term.op, args, term.data)


# -- the operations ------------------------------------------------------------------------------------------------


def _same(_: Any, a: Shape, b: Shape) -> Shape | None:
    return a if a == b else None


def _call(name: str) -> Callable[..., str]:
    return lambda data, *args: f"{name}({', '.join((*args, *map(str, data)))})"


def _free(*_: Any) -> int:
    return 0


def _per_entry(shape: Shape, *_: Any) -> int:
    return math.prod(shape)


def _matrix(kind: str) -> Callable[..., Shape | None]:
    def shape(_: Any, a: Shape, b: Shape) -> Shape | None:
        if len(a) != 2 or len(b) != 2:
            return None
        if kind == "matmul":
            return (a[0], b[1]) if a[1] == b[0] else None
        if kind == "kron":
            return a[0] * b[0], a[1] * b[1]
        return (a[0] * b[0], a[1]) if a[1] == b[1] else None

    return shape


def _scaled(axis_shape: Any, a: Shape, s: Shape) -> Shape | None:
    (axis,) = axis_shape
    return a if len(s) == 1 and axis < len(a) and a[axis] == s[0] else None


def _along(data: tuple[Any, ...], a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return s.reshape([-1 if i == data[0] else 1 for i in range(a.dim())])


def _concat(data: tuple[Any, ...], *shapes: Shape) -> Shape | None:
    (axis,) = data
    if not shapes or any(len(s) != len(shapes[0]) or axis >= len(s) for s in shapes):
        return None
    if len({s[:axis] + s[axis + 1 :] for s in shapes}) != 1:
        return None
    return (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])


def _slice(data: tuple[Any, ...], a: Shape) -> Shape | None:
    axis, start, stop = data
    fits = axis < len(a) and 0 <= start < stop <= a[axis]
    return (*a[:axis], stop - start, *a[axis + 1 :]) if fits else None


def _cut(data: tuple[Any, ...], a: torch.Tensor) -> torch.Tensor:
    return a.narrow(data[0], data[1], data[2] - data[1])


def _mode(data: tuple[Any, ...], a: Shape, m: Shape) -> Shape | None:
    (axis,) = data
    fits = axis < len(a) and len(m) == 2 and m[0] == a[axis]
    return (*a[:axis], m[1], *a[axis + 1 :]) if fits else None


def _mode_value(ring: Ring, data: tuple[Any, ...], a: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    moved = a.movedim(data[0], -1)
    return ring.matmul(moved.reshape(-1, m.shape[0]), m).reshape(*moved.shape[:-1], m.shape[1]).movedim(-1, data[0])


def _circulant(c: torch.Tensor) -> torch.Tensor:
    """(p, q, b) generators -> (p b, q b): block [i, j] has c[i, j, (r - s) mod b] at [r, s]."""
    p, q, b = c.shape
    index = (torch.arange(b)[:, None] - torch.arange(b)[None]) % b
    return c[:, :, index].permute(0, 2, 1, 3).reshape(p * b, q * b)


def _convolve(ring: Ring, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Valid correlation of (h, w) with (r, s)."""
    patches = x.unfold(0, k.shape[0], 1).unfold(1, k.shape[1], 1)
    flat = patches.reshape(*patches.shape[:2], -1)
    return ring.sum(ring.mul(flat, k.reshape(-1)), -1)


def _valid(_: Any, x: Shape, k: Shape) -> Shape | None:
    fits = len(x) == 2 and len(k) == 2 and k[0] <= x[0] and k[1] <= x[1]
    return (x[0] - k[0] + 1, x[1] - k[1] + 1) if fits else None


def _if(good: bool, shape: Shape) -> Shape | None:
    return shape if good else None


def _spectral(_: Any, c: Shape, x: Shape) -> Shape | None:
    return (x[0], c[0], c[2]) if len(c) == len(x) == 3 and c[1:] == x[1:] else None


def _spectral_value(ring: Ring, _: Any, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """sum_j c[i, j, f] x[n, j, f] for every frequency f."""
    return ring.sum(ring.mul(c[None], x[:, None]), 2)


def _dft_flops(shape: Shape, *_: Any) -> int:
    return int(5 * math.prod(shape) * math.log2(max(2, shape[-1])))


OPS: dict[str, Op] = {
    "var": Op(lambda d: tuple(d[1:]), lambda *_: torch.empty(0), _free, lambda d: str(d[0])),
    "node": Op(lambda d, a: a, lambda r, d, a: a, _free, lambda d, a: f"{a}'{d[0]}"),
    "matmul": Op(_matrix("matmul"), lambda r, d, a, b: r.matmul(a, b), lambda s, d, a, b: 2 * a[0] * a[1] * b[1],
                 lambda d, a, b: f"({a} @ {b})"),
    "add": Op(_same, lambda r, d, a, b: r.add(a, b), _per_entry, lambda d, a, b: f"({a} + {b})"),
    "mul": Op(_same, lambda r, d, a, b: r.mul(a, b), _per_entry, lambda d, a, b: f"({a} * {b})"),
    "t": Op(lambda d, a: _if(len(a) == 2, a[::-1]), lambda r, d, a: a.T, _free, lambda d, a: f"{a}.T"),
    "permute": Op(lambda d, a: _if(sorted(d) == list(range(len(a))), tuple(a[i] for i in d)),
                  lambda r, d, a: a.permute(d), _free, _call("permute")),
    "reshape": Op(lambda d, a: _if(math.prod(d) == math.prod(a), tuple(d)), lambda r, d, a: a.reshape(d), _free,
                  _call("reshape")),
    "kron": Op(_matrix("kron"), lambda r, d, a, b: r.wrap(torch.kron(a.contiguous(), b.contiguous())), _per_entry,
               _call("kron")),
    "khatri_rao": Op(_matrix("khatri_rao"),
                     lambda r, d, a, b: r.mul(a[:, None], b[None]).reshape(-1, a.shape[1]), _per_entry,
                     _call("khatri_rao")),
    "mode": Op(_mode, _mode_value, lambda s, d, a, m: 2 * math.prod(a) * m[1], _call("mode")),
    "diag": Op(lambda d, a: _if(len(a) == 1, (*a, *a)), lambda r, d, a: torch.diag(a), _free, _call("diag")),
    "scale": Op(_scaled, lambda r, d, a, s: r.mul(a, _along(d, a, s)), _per_entry, _call("scale")),
    "shift": Op(_scaled, lambda r, d, a, s: r.add(a, _along(d, a, s)), _per_entry, _call("shift")),
    "concat": Op(_concat, lambda r, d, *a: torch.cat(a, d[0]), _free, _call("concat")),
    "slice": Op(_slice, lambda r, d, a: _cut(d, a), _free, _call("slice")),
    "row": Op(lambda d, a: _if(len(a) == 1, (1, *a)), lambda r, d, a: a[None], _free, _call("row")),
    "vector": Op(lambda d, a: _if(len(a) == 2 and a[0] == 1, a[1:]), lambda r, d, a: a[0], _free, _call("vector")),
    "outer": Op(lambda d, a, b: _if(len(a) == len(b) == 1, (*a, *b)), lambda r, d, a, b: r.mul(a[:, None], b[None]),
                _per_entry, _call("outer")),
    "circulant": Op(lambda d, c: _if(len(c) == 3, (c[0] * c[2], c[1] * c[2])), lambda r, d, c: _circulant(c), _free,
                    _call("circulant")),
    "dft": Op(lambda d, a: a, lambda r, d, a: r.dft(a), _dft_flops, _call("dft")),
    "idft": Op(lambda d, a: a, lambda r, d, a: r.dft(a, inverse=True), _dft_flops, _call("idft")),
    "spectral": Op(_spectral, _spectral_value, lambda s, d, c, x: 8 * x[0] * math.prod(c), _call("spectral")),
    "conv": Op(_valid, lambda r, d, x, k: _convolve(r, x, k), lambda s, d, x, k: 2 * math.prod(s) * math.prod(k),
               _call("conv")),
    "map": Op(lambda d, a: a, lambda r, d, a: r.opaque(a), _per_entry, _call("f")),
    "norm": Op(lambda d, a: a, lambda r, d, a: r.opaque_rows(a), lambda s, *_: 8 * math.prod(s), _call("norm")),
    "relu": Op(lambda d, a: a, lambda r, d, a: a.clamp(min=0), _per_entry, _call("relu")),
    "abs": Op(lambda d, a: a, lambda r, d, a: a.abs(), _per_entry, _call("abs")),
    "pool": Op(lambda d, a: _if(len(a) == 2, a[1:]), lambda r, d, a: r.sum(a, 0), lambda s, d, a: math.prod(a),
               _call("pool")),
}  # fmt: skip
"""Every operation. `map` and `norm` are functions that rules may not look into."""

