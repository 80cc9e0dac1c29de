"""The order of contraction: dynamic programming over subsets up to twelve tensors, greedy search with repair beyond.

A tree is nested pairs of positions. Costs are those of `sparsec.algebra.cost`, so a sparse or shift-invariant tensor
pulls the order towards itself.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.algebra.cost import Sizes, Value, pair

OPTIMAL = 12
"""Most tensors that are ordered by dynamic programming."""

Tree = Any  # int, or (Tree, Tree), or Known


@dataclass(frozen=True)
class Known:
    """A subset of the tensors whose product exists already; it costs nothing."""

    subset: int


@dataclass(frozen=True)
class Found:
    """A tree, its weighted FLOPs, and the entries of its largest intermediate."""

    tree: Tree
    cost: Any
    peak: Any


def optimal(
    values: Sequence[Value],
    out: int,
    sizes: Sizes,
    limit: float = math.inf,
    known: Callable[[int], bool] | None = None,
    by_peak: bool = False,
) -> Found | None:
    """The cheapest tree over all orders, outer products included; None when every one breaks `limit` (entries).

    The result itself is not counted against the limit. `known` tells which subsets are free; `by_peak` minimises the
    largest intermediate instead of FLOPs. Takes 3^n / 2 comparisons.
    """
    count = len(values)
    full = (1 << count) - 1
    kept = _kept(values, out)
    best: list[tuple[Any, Any] | None] = [None] * (full + 1)
    tree: list[Tree] = [None] * (full + 1)
    for position in range(count):
        best[1 << position] = (0, 0)
        tree[1 << position] = position
    complex_subset = sum(1 << i for i, v in enumerate(values) if v.complex)
    special = {1 << i: v for i, v in enumerate(values) if v.leaf is not None and v.leaf.kind != "dense"}
    for subset in range(1, full + 1):
        if subset & (subset - 1) == 0:
            continue
        keep = kept[subset]
        entries = sizes(keep) if subset != full else 0
        if entries > limit:
            continue
        if known is not None and subset != full and known(subset):
            best[subset], tree[subset] = (0, entries), Known(subset)
            continue
        top: tuple[Any, Any] | None = None
        half = (subset - 1) & subset
        while half:
            rest = subset ^ half
            if half > rest and best[half] is not None and best[rest] is not None:
                (flops_a, peak_a), (flops_b, peak_b) = best[half], best[rest]  # type: ignore[misc]
                if by_peak:
                    cost: tuple[Any, Any] = (max(entries, flops_a, flops_b), 0)
                    if top is None or cost < top:
                        top, tree[subset] = cost, (tree[half], tree[rest])
                elif top is None or flops_a + flops_b < top[0]:
                    step = _step(half, rest, kept, keep, sizes, complex_subset, special)
                    cost = (flops_a + flops_b + step, max(entries, peak_a, peak_b))
                    if top is None or cost < top:
                        top, tree[subset] = cost, (tree[half], tree[rest])
            half = (half - 1) & subset
        best[subset] = top
    end = best[full]
    return None if end is None else Found(tree[full], end[0], end[0] if by_peak else end[1])


def _kept(values: Sequence[Value], out: int) -> list[int]:
    """For every subset, the atoms that its product keeps: those of the result or of tensors outside."""
    count = len(values)
    inside = [0] * (1 << count)
    for subset in range(1, 1 << count):
        low = subset & -subset
        inside[subset] = inside[subset ^ low] | values[low.bit_length() - 1].mask
    full = (1 << count) - 1
    made = [inside[s] & (out | inside[full ^ s]) for s in range(1 << count)]
    for position, value in enumerate(values):
        made[1 << position] = value.mask
    return made


def _step(
    half: int, rest: int, kept: list[int], keep: int, sizes: Sizes, complexes: int, special: dict[int, Value]
) -> Any:
    if half in special or rest in special or complexes:
        a = special.get(half) or Value(kept[half], bool(half & complexes))
        b = special.get(rest) or Value(kept[rest], bool(rest & complexes))
        return pair(a, b, keep, sizes)[0]
    union = kept[half] | kept[rest]
    return sizes(union) * (2 if union & ~keep else 1)


def greedy(values: Sequence[Value], out: int, sizes: Sizes, chance: random.Random | None = None) -> Tree:
    """Contract again and again the pair that shrinks the most, with noise from `chance` for another attempt."""
    masks = {i: v.mask for i, v in enumerate(values)}
    trees: dict[int, Tree] = {i: i for i in masks}
    owners: dict[int, set[int]] = {}
    for i, mask in masks.items():
        for bit in _bits(mask):
            owners.setdefault(bit, set()).add(i)
    fresh = len(values)
    queue: list[tuple[float, int, int]] = []

    def result(i: int, j: int) -> int:
        union = masks[i] | masks[j]
        return sum(b for b in _bits(union) if b & out or owners[b] - {i, j})

    def push(i: int, j: int) -> None:
        gain = float(sizes(result(i, j)) - sizes(masks[i]) - sizes(masks[j]))
        if chance is not None:
            gain -= chance.gammavariate(1.0, 0.3) * abs(gain)
        heapq.heappush(queue, (gain, min(i, j), max(i, j)))

    for i in masks:
        for j in sorted({k for b in _bits(masks[i]) for k in owners[b] if k > i}):
            push(i, j)
    while len(masks) > 1:
        pick = next(((i, j) for _, i, j in _drain(queue) if i in masks and j in masks), None)
        if pick is None:  # nothing shares an index: outer products, smallest first
            first, second = sorted(masks, key=lambda k: (float(sizes(masks[k])), k))[:2]
            pick = first, second
        i, j = pick
        mask = result(i, j)
        for k in (i, j):
            for bit in _bits(masks.pop(k)):
                owners[bit].discard(k)
        masks[fresh], trees[fresh] = mask, (trees.pop(i), trees.pop(j))
        for bit in _bits(mask):
            owners[bit].add(fresh)
        for k in sorted({k for b in _bits(mask) for k in owners[b] if k != fresh}):
            push(fresh, k)
        fresh += 1
    return trees.popitem()[1]


def _drain(queue: list[tuple[float, int, int]]) -> Any:
    while queue:
        yield heapq.heappop(queue)


def _bits(mask: int) -> list[int]:
    return [1 << i for i in range(mask.bit_length()) if mask >> i & 1]


def measure(tree: Tree, values: Sequence[Value], out: int, sizes: Sizes) -> Found:
    """Weighted FLOPs and largest intermediate of a tree."""
    flops: Any = 0
    peak: Any = 0

    def walk(node: Tree, outside: int, top: bool) -> Value:
        nonlocal flops, peak
        if isinstance(node, int):
            return values[node]
        left, right = node
        a = walk(left, outside | _mask(right, values), False)
        b = walk(right, outside | _mask(left, values), False)
        keep = (a.mask | b.mask) & outside
        flops += pair(a, b, keep, sizes)[0]
        peak = peak if top else max(peak, sizes(keep))
        return Value(keep, a.complex or b.complex)

    walk(tree, out, True)
    return Found(tree, flops, peak)


def _mask(tree: Tree, values: Sequence[Value]) -> int:
    if isinstance(tree, int):
        return values[tree].mask
    return _mask(tree[0], values) | _mask(tree[1], values)


def repair(
    tree: Tree, values: Sequence[Value], out: int, sizes: Sizes, limit: float = math.inf, width: int = 7
) -> Tree:
    """Reorder every group of `width` neighbouring subtrees optimally, from the leaves up."""

    def visit(node: Tree, outside: int) -> Tree:
        if isinstance(node, int):
            return node
        left, right = node
        left = visit(left, outside | _mask(right, values))
        right = visit(right, outside | _mask(left, values))
        group: list[Tree] = [left, right]
        while len(group) < width:
            open_ = [g for g in group if not isinstance(g, int)]
            if not open_:
                break
            widest = max(open_, key=lambda g: float(sizes(_mask(g, values))))
            at = group.index(widest)
            group[at : at + 1] = list(widest)
        if len(group) < 3:
            return left, right
        masks = [_mask(g, values) for g in group]
        inner = []
        for i, g in enumerate(group):
            others = outside
            for j, m in enumerate(masks):
                others |= m if j != i else 0
            inner.append(values[g] if isinstance(g, int) else Value(masks[i] & others, _complex(g, values)))
        found = optimal(inner, outside, sizes, limit)
        return (left, right) if found is None else _substitute(found.tree, group)

    return visit(tree, out)


def _complex(tree: Tree, values: Sequence[Value]) -> bool:
    if isinstance(tree, int):
        return values[tree].complex
    return _complex(tree[0], values) or _complex(tree[1], values)


def _substitute(tree: Tree, group: list[Tree]) -> Tree:
    return group[tree] if isinstance(tree, int) else tuple(_substitute(t, group) for t in tree)


def search(values: Sequence[Value], out: int, sizes: Sizes, limit: float = math.inf, tries: int = 16) -> Found | None:
    """A good tree for many tensors: the cheapest of greedy attempts and, when installed, cotengra's, each repaired."""
    starts = [greedy(values, out, sizes)]
    starts += [greedy(values, out, sizes, random.Random(seed)) for seed in range(tries)]
    starts += _cotengra(values, out, sizes)
    ranked = sorted((measure(t, values, out, sizes) for t in starts), key=lambda f: float(f.cost))[:4]
    done = [measure(repair(f.tree, values, out, sizes, limit), values, out, sizes) for f in ranked]
    done = [f for f in (*done, *ranked) if f.peak <= limit]
    return min(done, key=lambda f: float(f.cost)) if done else None


def _cotengra(values: Sequence[Value], out: int, sizes: Sizes) -> list[Tree]:
    try:
        import cotengra
    except ImportError:
        return []
    finder = cotengra.RandomGreedyOptimizer(max_repeats=32, seed=0, accel=False)
    inputs = [[str(b.bit_length() - 1) for b in _bits(v.mask)] for v in values]
    output = [str(b.bit_length() - 1) for b in _bits(out)]
    table = {str(i): int(size) for i, size in enumerate(sizes.of)}
    path = finder(inputs, output, table)
    stack: list[Tree] = list(range(len(values)))
    for step in path:
        taken = [stack.pop(i) for i in sorted(step, reverse=True)]
        made = taken[0]
        for other in taken[1:]:
            made = (made, other)
        stack.append(made)
    made = stack[0]
    for other in stack[1:]:
        made = (made, other)
    return [made]
