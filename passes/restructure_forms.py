"""What `restructure` finds: calls whose weight is a Kronecker product, a diagonal, circulant or an outer product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsec.aten import arguments, opname
from sparsec.graph import cone, get_constant
from sparsec.recipes import call

aten = torch.ops.aten
Known = dict[fx.Node, None]
_VIEWS = ("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten")
_SAME = (*_VIEWS, "aten::unsqueeze", "aten::expand", "aten::clone", "aten::repeat", "aten::contiguous")


@dataclass(frozen=True)
class Derived:
    """A constant that is computed from another one."""

    source: fx.Node
    function: Callable[..., Any]


@dataclass(frozen=True)
class Form:
    """`before(*reads)`, which is `node`, equals `after(*args)`; both are ATen calls on tensors or proxies.

    `flops` are those of both, for one `unit` (a row of x, a pixel) or in all; what depends on constants alone costs
    nothing.
    """

    node: fx.Node
    before: Callable[..., Any]
    reads: tuple[fx.Node, ...]
    after: Callable[..., Any]
    args: tuple[fx.Node | Derived, ...]
    flops: tuple[int, int]
    unit: str = ""


def shape_of(gm: fx.GraphModule | None, node: Any) -> tuple[Any, ...] | None:
    """The sizes of a node, symbolic ones among them; None for what is no tensor or not known."""
    if not isinstance(node, fx.Node):
        return None
    value = get_constant(gm, str(node.target)) if gm is not None and node.op == "get_attr" else node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def dtype_of(gm: fx.GraphModule, node: fx.Node) -> torch.dtype:
    value = get_constant(gm, str(node.target)) if node.op == "get_attr" else node.meta["val"]
    return value.dtype  # type: ignore[no-any-return]


def _matrix(gm: fx.GraphModule, node: Any) -> tuple[int, int] | None:
    """Rows and columns of a matrix of known sizes."""
    shape = shape_of(gm, node)
    good = shape is not None and len(shape) == 2 and all(isinstance(s, int) for s in shape)
    return (shape[0], shape[1]) if good and shape is not None else None


def _kron(gm: fx.GraphModule, node: Any) -> tuple[fx.Node, fx.Node, tuple[int, int], tuple[int, int]] | None:
    if not isinstance(node, fx.Node) or opname(node) != "aten::kron":
        return None
    a, b = node.args[:2]
    first, second = _matrix(gm, a), _matrix(gm, b)
    return (a, b, first, second) if first and second else None  # type: ignore[return-value]


def _product(node: fx.Node) -> tuple[fx.Node, Any, Any, bool] | None:
    """(x, weight, bias, whether the weight is (out, in)) of a linear or a product of two."""
    name = opname(node)
    if name == "aten::linear":
        bound = arguments(node)
        return bound["input"], bound["weight"], bound["bias"], True
    if name in ("aten::mm", "aten::matmul"):
        x, weight = list(arguments(node).values())[:2]
        return x, weight, None, False
    return None


def kron_mixed_product(gm: fx.GraphModule, node: fx.Node, known: Known) -> Form | str | None:
    """`kron(a, b) @ kron(c, d) --> kron(a @ c, b @ d)`"""
    if opname(node) not in ("aten::mm", "aten::matmul"):
        return None
    left, right = (_kron(gm, n) for n in list(arguments(node).values())[:2])
    if left is None or right is None:
        return None
    a, b, (p, m), (q, n) = left
    c, d, (r, s), (t, u) = right
    if m != r:
        return f"the factors cut the inner index differently: {m} x {n} and {r} x {t}"
    return Form(
        node, lambda a, b, c, d: aten.mm.default(aten.kron.default(a, b), aten.kron.default(c, d)), (a, b, c, d),
        lambda a, b, c, d: aten.kron.default(aten.mm.default(a, c), aten.mm.default(b, d)), (a, b, c, d),
        (2 * p * q * m * n * s * u, 2 * p * m * s + 2 * q * n * u + p * q * s * u),
    )  # fmt: skip


def kron_vec(gm: fx.GraphModule, node: fx.Node, known: Known) -> Form | str | None:
    """`x @ kron(a, b) --> the digits of x times a and b`, the cheaper one first."""
    parts = _product(node)
    whole = _kron(gm, parts[1]) if parts else None
    if parts is None or whole is None or _kron(gm, parts[0]) is not None:
        return None
    x, weight, bias, turned = parts
    a, b, first, second = whole
    if not turned:  # the weights of linears are (out, in)
        first, second = first[::-1], second[::-1]
    (p, m), (q, n) = first, second
    orders = (m * n * q + m * q * p, n * m * p + n * p * q)
    b_first = orders[0] <= orders[1]

    def after(x: Any, a: Any, b: Any, *bias: Any) -> Any:
        if not turned:
            a, b = aten.t.default(a), aten.t.default(b)
        digits = aten.unflatten.int(x, -1, [m, n])
        if b_first:
            half = aten.transpose.int(aten.linear.default(digits, b), -1, -2)
            done = aten.transpose.int(aten.linear.default(half, a), -1, -2)
        else:
            half = aten.transpose.int(aten.linear.default(aten.transpose.int(digits, -1, -2), a), -1, -2)
            done = aten.linear.default(half, b)
        flat = aten.flatten.using_ints(done, -2)
        return aten.add.Tensor(flat, bias[0]) if bias else flat

    tail = () if bias is None else (bias,)
    before = aten.linear.default if turned else aten.matmul.default
    return Form(node, before, (x, weight, *tail), after, (x, a, b, *tail), (2 * p * q * m * n, 2 * min(orders)), "row")


def khatri_rao_gram(gm: fx.GraphModule, node: fx.Node, known: Known) -> Form | str | None:
    """`khatri_rao(a, b).T @ khatri_rao(c, d) --> (a.T @ c) * (b.T @ d)`"""
    if opname(node) not in ("aten::mm", "aten::matmul"):
        return None
    left, right = list(arguments(node).values())[:2]
    if not isinstance(left, fx.Node) or opname(left) not in ("aten::t", "aten::numpy_T"):
        return None
    one, two = _khatri_rao(gm, left.args[0]), _khatri_rao(gm, right)
    if one is None or two is None:
        return None
    (a, b), (c, d) = one, two
    (m, r), (n, _), (rows, s) = _sizes(gm, a), _sizes(gm, b), _sizes(gm, c)
    if rows != m:
        return f"the factors have {m} and {rows} rows, so their products do not align"

    def before(a: Any, b: Any, c: Any, d: Any) -> Any:
        return _joined(a, b).t() @ _joined(c, d)

    def after(a: Any, b: Any, c: Any, d: Any) -> Any:
        grams = [aten.mm.default(aten.t.default(u), w) for u, w in ((a, c), (b, d))]
        return aten.mul.Tensor(*grams)

    flops = (m * n * (r + s) + 2 * m * n * r * s, 2 * r * s * (m + n) + r * s)
    return Form(node, before, (a, b, c, d), after, (a, b, c, d), flops)


def _sizes(gm: fx.GraphModule, node: fx.Node) -> tuple[int, int]:
    return _matrix(gm, node) or (0, 0)


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a[:, None] * b[None]).reshape(-1, a.shape[1])


def _khatri_rao(gm: fx.GraphModule, node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(a, b) of the columns' Kronecker products (rows of a times rows of b, columns), in one of its spellings."""
    whole = _matrix(gm, node)
    if whole is None or opname(node) not in _VIEWS or not isinstance(node.args[0], fx.Node):
        return None
    inner = node.args[0]
    found: tuple[Any, Any] | None = None
    if opname(inner) == "aten::einsum":
        bound = arguments(inner)
        left, _, out = bound["equation"].replace(" ", "").partition("->")
        labels = left.split(",")
        pairs = len(labels) == 2 and all(len(t) == 2 for t in labels) and labels[0][1] == labels[1][1]
        if pairs and out == labels[0][0] + labels[1] and len(set(out)) == 3:
            found = tuple(bound["tensors"])
    elif opname(inner) == "aten::mul":
        sides = [n for n in list(arguments(inner).values())[:2] if isinstance(n, fx.Node)]
        if len(sides) == 2 and all(opname(n) == "aten::unsqueeze" for n in sides):
            dims = [int(arguments(n)["dim"]) % 3 for n in sides]
            if sorted(dims) == [0, 1]:
                found = tuple(n.args[0] for n in (sides if dims == [1, 0] else sides[::-1]))  # type: ignore[assignment]
    if found is None:
        return None
    a, b = (_matrix(gm, n) for n in found)
    return found if a and b and a[1] == b[1] and whole == (a[0] * b[0], a[1]) else None


def diag_absorbed(gm: fx.GraphModule, node: fx.Node, known: Known) -> Form | str | None:
    """`x @ diag(d) --> x * d`, `diag(d) @ x --> x * d over the rows`"""
    parts = _product(node)
    if parts is None:
        return None
    x, weight, bias, _ = parts
    d, left = _diagonal(gm, weight), False
    if d is None and bias is None and _matrix(gm, weight) is not None:
        d, left = _diagonal(gm, x), True
        x, weight = weight, x
    sizes = shape_of(gm, d)
    if d is None or sizes is None or not isinstance(sizes[0], int):
        return None
    n = sizes[0]

    def after(x: Any, d: Any, *bias: Any) -> Any:
        done = aten.mul.Tensor(x, aten.unsqueeze.default(d, 1) if left else d)
        return aten.add.Tensor(done, bias[0]) if bias else done

    tail = () if bias is None else (bias,)
    before: Any = aten.matmul.default if opname(node) != "aten::linear" else aten.linear.default
    if left:
        cols = _sizes(gm, x)[1]
        return Form(node, lambda x, w: before(w, x), (x, weight), after, (x, d), (2 * n * n * cols, n * cols))
    return Form(node, before, (x, weight, *tail), after, (x, d, *tail), (2 * n * n, n + n * len(tail)), "row")


def _diagonal(gm: fx.GraphModule, node: Any) -> fx.Node | None:
    """d of diag(d)."""
    if not isinstance(node, fx.Node) or opname(node) not in ("aten::diag", "aten::diag_embed"):
        return None
    bound = arguments(node)
    source = bound["self"]
    offset = bound.get("diagonal", 0) or bound.get("offset", 0)
    axes = (bound.get("dim1", -2), bound.get("dim2", -1))
    plain = offset == 0 and axes == (-2, -1) and len(shape_of(gm, source) or ()) == 1
    return source if plain else None


def block_circulant_fft(gm: fx.GraphModule, node: fx.Node, known: Known) -> Form | str | None:
    """`x @ circulant(c).T --> idft(spectral(dft(c), dft(x)))` where the calls that make the weight make a circulant."""
    if opname(node) != "aten::linear":
        return None
    bound = arguments(node)
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    sizes = _matrix(gm, weight)
    if sizes is None or weight not in known or weight.op == "get_attr":
        return None
    block = _circulant_block(gm, weight, sizes)
    if block is None:
        return None
    p, q = sizes[0] // block, sizes[1] // block

    def spectrum(w: Any) -> Any:
        first = aten.select.int(aten.view.default(aten.clone.default(w), [p, block, q, block]), 3, 0)
        return aten.fft_rfft.default(aten.transpose.int(first, 1, 2))

    def after(x: Any, c: Any, *bias: Any) -> Any:
        waves = aten.fft_rfft.default(aten.unflatten.int(x, -1, [q, block]))
        mixed = aten.einsum.default("...jf,ijf->...if", [waves, c])
        done = aten.flatten.using_ints(aten.fft_irfft.default(mixed, block), -2)
        return aten.add.Tensor(done, bias[0]) if bias else done

    tail = () if bias is None else (bias,)
    half = block // 2 + 1
    flops = 2 * sizes[0] * sizes[1], int(2.5 * block * math.log2(block)) * (p + q) + 8 * p * q * half
    waves = Derived(weight, spectrum)
    return Form(node, aten.linear.default, (x, weight, *tail), after, (x, waves, *tail), flops, "row")


def _circulant_block(gm: fx.GraphModule, weight: fx.Node, sizes: tuple[int, int]) -> int | None:
    """The block size b >= 2 that the calls give whatever the values are: they are run on random ones, twice."""
    nodes = cone(weight)
    lengths = {n for leaf in nodes if leaf.op == "get_attr" for n in get_constant(gm, str(leaf.target)).shape}
    for block in sorted((n for n in lengths if n > 1 and not sizes[0] % n and not sizes[1] % n), reverse=True):
        if all(_is_circulant(_sampled(gm, nodes, seed), block) for seed in (0, 1)):
            return int(block)
    return None


def _sampled(gm: fx.GraphModule, nodes: list[fx.Node], seed: int) -> torch.Tensor:
    """What the calls make of random sources; indices and masks are what they are."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                tensor = get_constant(gm, str(node.target)).detach()
                drawn = torch.randn(tensor.shape, generator=generator)
                values[node] = drawn.to(tensor) if tensor.is_floating_point() else tensor
            else:
                values[node] = call(node, values)
    found: torch.Tensor = values[nodes[-1]]
    return found


def _is_circulant(w: torch.Tensor, block: int) -> bool:
    cut = w.reshape(w.shape[0] // block, block, w.shape[1] // block, block)
    index = (torch.arange(block)[:, None] - torch.arange(block)[None]) % block
    return torch.equal(cut, cut[:, :, :, 0][:, index].permute(0, 1, 3, 2))


def separable_filter(gm: fx.GraphModule, node: fx.Node, known: Known) -> Form | str | None:
    """`conv(x, outer(a, b)) --> conv(conv(x, a as a column), b as a row)`, the same filter for every channel."""
    if opname(node) != "aten::conv2d":
        return None
    bound = arguments(node)
    x, weight, bias, groups = bound["input"], bound["weight"], bound["bias"], bound["groups"]
    shape = shape_of(gm, weight)
    outer = _outer(gm, weight)
    if outer is None or shape is None or isinstance(bound["padding"], str):
        return None
    a, b, rows, cols = outer
    if shape[1] != 1 or shape[0] != groups or tuple(shape[2:]) != (rows, cols):
        return "the outer product is not the filter of single channels"
    walk = [[v, v] if isinstance(v, int) else list(v) * (2 // len(v)) for v in
            (bound["stride"], bound["padding"], bound["dilation"])]  # fmt: skip

    def after(x: Any, a: Any, b: Any, *bias: Any) -> Any:
        column = aten.expand.default(aten.view.default(a, [1, 1, rows, 1]), [groups, 1, rows, 1])
        row = aten.expand.default(aten.view.default(b, [1, 1, 1, cols]), [groups, 1, 1, cols])
        (s0, s1), (p0, p1), (d0, d1) = walk
        half = aten.conv2d.default(x, column, None, [s0, 1], [p0, 0], [d0, 1], groups)
        return aten.conv2d.default(half, row, bias[0] if bias else None, [1, s1], [0, p1], [1, d1], groups)

    def before(x: Any, w: Any, *bias: Any) -> Any:
        return aten.conv2d.default(x, w, bias[0] if bias else None, *walk, groups)

    tail = () if bias is None else (bias,)
    flops = 2 * rows * cols, 2 * rows * walk[0][1] + 2 * cols
    return Form(node, before, (x, weight, *tail), after, (x, a, b, *tail), flops, "pixel")


def _outer(gm: fx.GraphModule, node: Any) -> tuple[fx.Node, fx.Node, int, int] | None:
    """(a, b, rows, columns) of an outer product, behind calls that only add dimensions of size one or repeat."""
    while isinstance(node, fx.Node) and opname(node) in _SAME:
        node = node.args[0]
    if not isinstance(node, fx.Node) or opname(node) not in ("aten::outer", "aten::ger"):
        return None
    a, b = node.args[:2]
    sizes = [shape_of(gm, n) for n in (a, b)]
    if any(s is None or len(s) != 1 or not isinstance(s[0], int) for s in sizes):
        return None
    return a, b, sizes[0][0], sizes[1][0]  # type: ignore[return-value,index]
