"""Layered layout of a small directed acyclic graph: where boxes go and how edges bend around them.

The method is the classic one (Sugiyama, Tagawa, Toda 1981): longest-path layers, dummy nodes on edges that span layers,
barycentre sweeps for the order in a layer, and least-squares positions under minimum distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

GAP_X = 14.0
GAP_Y = 26.0
DUMMY = 8.0  # width that a passing edge reserves
SWEEPS = 6
LIGHT = 0.01  # how hard passing edges pull: boxes stand straight and edges give way

Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Centres of the boxes and bend points of the edges, in pixels from the top left corner of the drawing."""

    width: float
    height: float
    centres: tuple[Point, ...]
    routes: tuple[tuple[Point, ...], ...]  # per edge: bottom of the source, bends, top of the target
    levels: tuple[int, ...]


def levels_of(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The longest-path layer of every node; nodes without parents sit just above their first child.

    Edges must go from lower to higher topological position and node numbers must be a topological order.
    """
    level = [0] * count
    children: list[list[int]] = [[] for _ in range(count)]
    parents: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        children[a].append(b)
        parents[b].append(a)
    for node in range(count):
        level[node] = max((level[p] + 1 for p in parents[node]), default=0)
    for node in reversed(range(count)):
        if not parents[node] and children[node]:
            level[node] = min(level[c] for c in children[node]) - 1
    return level


def layout(sizes: Sequence[Point], edges: Sequence[tuple[int, int]], light: int = 0) -> Layout:
    """Place boxes of the given (width, height); `edges` as in `levels_of`. The first `light` boxes pull at no other."""
    level = levels_of(len(sizes), edges)
    boxes, chains = _with_dummies(sizes, edges, level)
    rows: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
    for node, (row, _) in enumerate(boxes):
        rows[row].append(node)
    up: list[list[int]] = [[] for _ in boxes]
    down: list[list[int]] = [[] for _ in boxes]
    for chain in chains:
        for a, b in pairwise(chain):
            down[a].append(b)
            up[b].append(a)
    _order(rows, up, down)
    pull = [LIGHT if n < light or n >= len(sizes) else 1.0 for n in range(len(boxes))]
    x = _positions(rows, [w for _, w in boxes], pull, up, down)
    tops, y = [], 0.0
    heights = [max((sizes[n][1] for n in row if n < len(sizes)), default=0.0) for row in rows]
    for height in heights:
        tops.append(y)
        y += height + GAP_Y
    left = min((x[n] - w / 2 for n, (_, w) in enumerate(boxes)), default=0.0)
    right = max((x[n] + w / 2 for n, (_, w) in enumerate(boxes)), default=0.0)
    middle = [tops[row] + heights[row] / 2 for row, _ in boxes]
    routes = [_route(chain, sizes, level, [v - left for v in x], middle, tops, heights) for chain in chains]
    centres = tuple((x[n] - left, middle[n]) for n in range(len(sizes)))
    return Layout(right - left, max(0.0, y - GAP_Y), centres, tuple(routes), tuple(level))


def _route(
    chain: Sequence[int],
    sizes: Sequence[Point],
    level: Sequence[int],
    x: Sequence[float],
    middle: Sequence[float],
    tops: Sequence[float],
    heights: Sequence[float],
) -> tuple[Point, ...]:
    """The bends of one edge: straight through its rows, so that it only turns in the space between two rows."""
    a, b = chain[0], chain[-1]
    route = [(x[a], middle[a] + sizes[a][1] / 2), (x[a], tops[level[a]] + heights[level[a]])]
    for row, n in enumerate(chain[1:-1], level[a] + 1):
        route += [(x[n], tops[row]), (x[n], tops[row] + heights[row])]
    route += [(x[b], tops[level[b]]), (x[b], middle[b] - sizes[b][1] / 2)]
    return tuple(p for i, p in enumerate(route) if i == 0 or p != route[i - 1])


def _with_dummies(
    sizes: Sequence[Point], edges: Sequence[tuple[int, int]], level: Sequence[int]
) -> tuple[list[tuple[int, float]], list[list[int]]]:
    """(row, width) of every box and dummy, and the chain of them that each edge runs through.

    Edges that leave one box share their dummies, so that a fan-out is one line that splits late.
    """
    boxes = [(level[n], w) for n, (w, _) in enumerate(sizes)]
    shared: dict[tuple[int, int], int] = {}
    chains = []
    for a, b in edges:
        chain = [a]
        for row in range(level[a] + 1, level[b]):
            if (a, row) not in shared:
                shared[a, row] = len(boxes)
                boxes.append((row, DUMMY))
            chain.append(shared[a, row])
        chains.append([*chain, b])
    return boxes, chains


def _order(rows: list[list[int]], up: list[list[int]], down: list[list[int]]) -> None:
    """Sort every row by the mean place of its neighbours, alternating downwards and upwards."""
    for sweep in range(SWEEPS):
        near, order = (up, rows) if sweep % 2 == 0 else (down, rows[::-1])
        place: dict[int, float] = {}
        for row in order:
            fixed = {n: i / max(1, len(row) - 1) if len(row) > 1 else 0.5 for i, n in enumerate(row)}
            key = {}
            for n in row:
                seen = [place[m] for m in near[n] if m in place]
                key[n] = sum(seen) / len(seen) if seen else fixed[n]
            row.sort(key=lambda n: (key[n], fixed[n]))
            place |= {n: i / max(1, len(row) - 1) if len(row) > 1 else 0.5 for i, n in enumerate(row)}


def _positions(
    rows: list[list[int]], widths: list[float], pull: list[float], up: list[list[int]], down: list[list[int]]
) -> list[float]:
    """Centres on the x axis: each row as close to its neighbours' means as the order and the gaps allow."""
    x = [0.0] * len(widths)
    for row in rows:
        total = sum(widths[n] for n in row) + GAP_X * (len(row) - 1)
        at = -total / 2
        for n in row:
            x[n] = at + widths[n] / 2
            at += widths[n] + GAP_X
    for sweep in range(4 * SWEEPS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            near = [up[n] + down[n] for n in row]
            want = [_mean([(x[m], pull[m]) for m in ms], x[n]) for n, ms in zip(row, near, strict=True)]
            for n, value in zip(row, _spread(want, [widths[n] for n in row], [pull[n] for n in row]), strict=True):
                x[n] = value
    return x


def _mean(values: list[tuple[float, float]], default: float) -> float:
    total = sum(w for _, w in values)
    return sum(v * w for v, w in values) / total if total else default


def _spread(want: list[float], widths: list[float], weight: list[float]) -> list[float]:
    """Least-squares positions in order with room for every width: pool adjacent violators after removing the gaps."""
    offset, offsets = 0.0, []
    for i, w in enumerate(widths):
        if i:
            offset += widths[i - 1] / 2 + GAP_X + w / 2
        offsets.append(offset)
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for value, off, wt in zip(want, offsets, weight, strict=True):
        mean, total, members = value - off, wt, 1
        while pools and pools[-1][0] > mean:
            m, t, k = pools.pop()
            mean, total, members = (mean * total + m * t) / (total + t), total + t, members + k
        pools.append((mean, total, members))
    flat = [mean for mean, _, members in pools for _ in range(members)]
    return [f + off for f, off in zip(flat, offsets, strict=True)]
