"""A picture of a compiled graph: one panel per layer, one box per site or large op, coloured by decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from torch import fx

from sparsec.draw_blocks import Block, Blocks, fold, group_of, shown
from sparsec.draw_layout import Layout, Point, layout, levels_of
from sparsec.errors import SpecError
from sparsec.report import Report, Row
from sparsec.report_text import compact, summary, title_line

SITE_SIZE = (168.0, 50.0)
OP_SIZE = (120.0, 22.0)
PAD = 14.0
HEAD = 24.0
GUTTER = 34.0
TITLE = 22.0
MAX_LEVELS = 18  # a panel deeper than this is continued in another
ASPECT = 1.5  # width over height that the page aims at
CHAR = 6.1  # pixels of a character at 11 px

COLOURS = {  # fill, stroke: told apart by hue and by lightness, also by people who see no red or green
    "sparse": ("#cdeee0", "#00875e"),
    "factored": ("#cfe4f5", "#0072b2"),
    "dense": ("#fdebc8", "#c77700"),
    "op": ("#f1f3f5", "#adb5bd"),
    "glue": ("#ffffff", "#ced4da"),
    "input": ("#ffffff", "#495057"),
    "output": ("#ffffff", "#495057"),
}
LABELS = (("sparse", "sparse kernel"), ("factored", "factored"), ("dense", "stays dense"), ("op", "other ops"))


@dataclass
class Panel:
    """The boxes of one layer, with a stub for every box outside that feeds it."""

    title: str
    members: list[int]
    sizes: list[Point] = field(default_factory=list)
    stubs: list[int] = field(default_factory=list)  # the outside blocks, drawn before the members
    plan: Layout | None = None
    edges: list[tuple[int, int]] = field(default_factory=list)
    at: Point = (0.0, 0.0)
    column: float = 0.0  # left edge of the column

    @property
    def size(self) -> Point:
        plan = self.plan or layout((), ())
        return max(plan.width, len(self.title) * CHAR * 1.1) + 2 * PAD, plan.height + HEAD + 2 * PAD

    def place(self, local: int) -> Point:
        """The centre on the page of a stub or member, by its place in `stubs + members`."""
        plan = self.plan or layout((), ())
        x, y = plan.centres[local]
        return self.at[0] + (self.size[0] - plan.width) / 2 + x, self.at[1] + HEAD + PAD + y


def draw(
    graphs: fx.GraphModule | fx.Graph | Sequence[fx.GraphModule | fx.Graph | tuple[str, fx.GraphModule | fx.Graph]],
    report: Report | None,
    path: str | Path,
) -> Path:
    """Write a picture of one or several graphs to `path` and return it: HTML for .html, SVG for .svg.

    Elementwise and view nodes are folded into their neighbours. The same graph and report give the same bytes.
    Raises SpecError for another suffix.
    """
    target = Path(path)
    if target.suffix.lower() not in (".svg", ".html", ".htm"):
        raise SpecError(f"cannot draw to {target.name!r}: the suffix {target.suffix!r} is neither .svg nor .html")
    several = [graphs] if isinstance(graphs, (fx.GraphModule, fx.Graph)) else list(graphs)
    named = [g if isinstance(g, tuple) else ("", g) for g in several]
    text = svg([(title, g.graph if isinstance(g, fx.GraphModule) else g) for title, g in named], report)
    if target.suffix.lower() != ".svg":
        text = _page(text, report)
    target.write_text(text, encoding="utf-8")
    return target


def svg(graphs: Sequence[tuple[str, fx.Graph]], report: Report | None) -> str:
    """The SVG text of titled graphs under a common legend."""
    heading = [title_line(report), summary(report)[0]] if report is not None else []
    pictures = [(title, blocks := fold(graph, report), make_panels(blocks)) for title, graph in graphs]
    sizes = [_flow(panels, 0.0, 0.0) for _, _, panels in pictures]
    places, width, y = _shelves(sizes, 48.0 + 18.0 * len(heading), TITLE if len(graphs) > 1 else 0.0)
    out: list[str] = []
    for (title, blocks, panels), (left, top) in zip(pictures, places, strict=True):
        if title:
            out.append(_text(left, top - TITLE + 12, title, "h"))
        _flow(panels, left, top)
        out += [_frame(panel) for panel in panels]
        out += _trunks(panels)
        for panel in panels:
            out += _inside(panel, blocks)
    width = max([width, *(2 * PAD + 1.4 * CHAR * len(line) for line in heading)])
    head = [_text(PAD, 20 + 18 * i, line, "h" if i == 0 else "s") for i, line in enumerate(heading)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{y:.0f}" '
            f'viewBox="0 0 {width:.0f} {y:.0f}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="11">',
            "<style>.h{font-size:13px;font-weight:bold}.s{fill:#495057}.b{font-weight:bold}.m{text-anchor:middle}"
            ".e{fill:none;stroke:#868e96;stroke-width:1.1}.t{fill:none;stroke:#868e96;stroke-width:2}</style>",
            f'<rect width="{width:.0f}" height="{y:.0f}" fill="#fff"/>',
            *head,
            *_legend(PAD, 12.0 + 18.0 * len(heading)),
            *out,
            "</svg>\n",
        ]
    )


def _shelves(sizes: Sequence[Point], top: float, title: float) -> tuple[list[Point], float, float]:
    """Corners of pictures set in rows under their titles, and the page's width and height."""
    area = sum((w + GUTTER) * (h + GUTTER + title) for w, h in sizes)
    limit = max([640.0, (area * ASPECT) ** 0.5, *(w + 2 * PAD for w, _ in sizes)])
    places: list[Point] = []
    x, y, high, width = PAD, top, 0.0, 640.0
    for w, h in sizes:
        if x > PAD and x + w + PAD > limit:
            x, y, high = PAD, y + high + GUTTER, 0.0
        places.append((x, y + title))
        width = max(width, x + w + PAD)
        x, high = x + w + GUTTER, max(high, h + title)
    return places, width, y + high + GUTTER


def make_panels(blocks: Blocks) -> list[Panel]:
    """One laid out panel per group, in order of first appearance; root-level boxes make a panel per run."""
    members: dict[tuple[str, int], list[int]] = {}
    run, last = 0, ""
    for i, block in enumerate(blocks.blocks):
        run += block.group != last
        last = block.group
        members.setdefault((block.group, run if block.group == "" else 0), []).append(i)
    panels = []
    for (group, _), inside in members.items():
        first = {blocks.blocks[i].kind for i in inside}
        title = group or ("inputs" if "input" in first else "output" if "output" in first else "model")
        panels += _split(title, inside, blocks)
    for panel in panels:
        _plan(panel, blocks)
    return panels


def _split(title: str, inside: list[int], blocks: Blocks) -> list[Panel]:
    """Cut a group that is too deep for one panel into several, by layer."""
    local = {b: i for i, b in enumerate(inside)}
    edges = [(local[a], local[b]) for a, b in blocks.edges if a in local and b in local]
    level = levels_of(len(inside), edges)
    parts: dict[int, list[int]] = {}
    for b, at in zip(inside, level, strict=True):
        parts.setdefault(at // MAX_LEVELS, []).append(b)
    names = [title] + [f"{title} ({k + 2})" for k in range(len(parts) - 1)]
    return [Panel(name, parts[key]) for name, key in zip(names, sorted(parts), strict=True)]


def _plan(panel: Panel, blocks: Blocks) -> None:
    inside = set(panel.members)
    outside = {a for a, b in blocks.edges if b in inside and a not in inside}
    panel.stubs = sorted(outside)
    local = {b: i for i, b in enumerate([*panel.stubs, *panel.members])}
    panel.edges = [(local[a], local[b]) for a, b in blocks.edges if b in inside]
    stub_sizes = [(len(_stub_label(blocks.blocks[s], panel.title)) * CHAR, 14.0) for s in panel.stubs]
    panel.sizes = stub_sizes + [SITE_SIZE if blocks.blocks[b].kind == "site" else OP_SIZE for b in panel.members]
    panel.plan = layout(panel.sizes, panel.edges, light=len(panel.stubs))


def _flow(panels: list[Panel], left: float, top: float) -> Point:
    """Stack panels in as many columns as the aimed-at aspect asks for; return the right bottom corner."""
    tallest = max((p.size[1] for p in panels), default=0.0)
    total = sum(p.size[1] + GUTTER for p in panels)
    stacks = [_stack(panels, max(tallest, total / k) + (0.0 if k == 1 else GUTTER)) for k in range(1, 13)]
    columns = min(stacks, key=lambda c: abs(_extent(c)[0] / max(1.0, _extent(c)[1]) - ASPECT))
    x = left
    for column in columns:
        y, wide = top, max(p.size[0] for p in column)
        for p in column:
            p.at, p.column = (x + (wide - p.size[0]) / 2, y), x
            y += p.size[1] + GUTTER
        x += wide + GUTTER
    width, height = _extent(columns)
    return left + width, top + height


def _stack(panels: list[Panel], limit: float) -> list[list[Panel]]:
    """Panels in order, in columns of at most `limit` pixels."""
    columns: list[list[Panel]] = []
    used = limit
    for panel in panels:
        if not columns or used + panel.size[1] > limit:
            columns.append([])
            used = 0.0
        columns[-1].append(panel)
        used += panel.size[1] + GUTTER
    return columns


def _extent(columns: list[list[Panel]]) -> Point:
    width = sum(max(p.size[0] for p in c) + GUTTER for c in columns)
    height = max((sum(p.size[1] + GUTTER for p in c) for c in columns), default=0.0)
    return width - GUTTER, height - GUTTER


def _trunks(panels: list[Panel]) -> list[str]:
    """Thick lines from one panel to the next, through the gutter when the next one starts a new column."""
    out = []
    for prev, panel in pairwise(panels):
        for s in panel.stubs:
            if s not in prev.members or not _is_last(s, prev):
                continue
            x0, y0 = prev.place(len(prev.stubs) + prev.members.index(s))
            y0 += prev.sizes[len(prev.stubs) + prev.members.index(s)][1] / 2
            x1, y1 = panel.place(panel.stubs.index(s))
            y1 -= 7
            if panel.at[1] > prev.at[1]:
                out.append(f'<path class="t" d="{_curve([(x0, y0), (x1, y1)])}"/>')
                continue
            low, high = prev.at[1] + prev.size[1] + GUTTER / 3, panel.at[1] - 8
            side = panel.column - GUTTER / 2
            points = [(x0, y0), (x0, low), (side, low), (side, high), (x1, high), (x1, y1)]
            line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
            out.append(f'<polyline class="t" stroke-linejoin="round" points="{line}"/>')
    return out


def _is_last(block: int, panel: Panel) -> bool:
    """True when nothing in the panel comes after the block."""
    local = len(panel.stubs) + panel.members.index(block)
    return all(a != local for a, _ in panel.edges)


def _frame(panel: Panel) -> str:
    (x, y), (w, h) = panel.at, panel.size
    rect = f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" rx="8" fill="#f8f9fa" stroke="#dee2e6"/>'
    return rect + _text(x + 10, y + 17, panel.title, "b s")


def _inside(panel: Panel, blocks: Blocks) -> list[str]:
    """Edges, stubs and boxes of a panel."""
    plan = panel.plan or layout((), ())
    dx, dy = panel.at[0] + (panel.size[0] - plan.width) / 2, panel.at[1] + HEAD + PAD
    out = []
    out += [f'<path class="e" d="{_curve([(px + dx, py + dy) for px, py in route])}"/>' for route in plan.routes]
    for i, b in enumerate([*panel.stubs, *panel.members]):
        cx, cy = panel.place(i)
        if i < len(panel.stubs):
            label = _stub_label(blocks.blocks[b], panel.title)
            out.append(f'<g><title>{escape(blocks.blocks[b].name)}</title>{_text(cx, cy + 4, label, "m s")}</g>')
        else:
            out.append(_box(blocks.blocks[b], cx, cy, panel.sizes[i]))
    return out


def _box(block: Block, cx: float, cy: float, size: Point) -> str:
    """One box with its label and a tooltip."""
    w, h = size
    kind = block.row.decision if block.row is not None else "op" if block.kind == "site" else block.kind
    fill, stroke = COLOURS[kind]
    dash = ' stroke-dasharray="3 2"' if block.kind == "glue" else ""
    rect = (
        f'<rect x="{cx - w / 2:.0f}" y="{cy - h / 2:.0f}" width="{w:.0f}" height="{h:.0f}" '
        f'rx="{11 if block.kind in ("input", "output") else 4}" fill="{fill}" stroke="{stroke}"{dash}/>'
    )
    lines = site_lines(block) if block.kind == "site" else [_join(block.name, shown(block.folded))]
    top = cy + 4 - 14.0 * (len(lines) - 1) / 2
    room = int((w - 8) / CHAR)
    lines[0] = _tail(lines[0], int(room / 1.15)) if block.kind == "site" else lines[0]  # bold is wider
    styles = ["m b", "m", "m"] if block.kind == "site" else ["m"]
    texts = [_text(cx, top + 14 * i, _fit(s, room), styles[i]) for i, s in enumerate(lines)]
    return f"<g><title>{escape(tooltip(block))}</title>{rect}{''.join(texts)}</g>"


def site_lines(block: Block) -> list[str]:
    """The label of a site: its name inside the layer, format and density, gain and what was fused."""
    inner = block.name.removeprefix(block.group).lstrip(".") or block.name
    row = block.row
    if row is None:
        return [inner, shown(block.folded)]
    format_ = row.op if row.decision == "dense" else compact(row.format)
    gain = row.code if row.decision == "dense" else f"{row.speedup:.1f}x" if row.speedup else "untimed"
    return [inner, f"{format_} · {1 - row.density:.0%} zeros", _join(gain, shown(block.folded))]


def tooltip(block: Block) -> str:
    """What the mouse shows: the row's sentence for a site, the folded nodes otherwise."""
    lines = [block.site or block.name]
    row = block.row
    if row is not None:
        shape = "x".join(map(str, row.shape))
        lines.append(f"{row.op} {shape}, {row.format}, {row.code}: {row.reason}")
        lines.append(f"{row.dense_nbytes} -> {row.nbytes} bytes{_times(row)}")
    return "\n".join([*lines, "nodes: " + ", ".join(block.nodes)])


def _times(row: Row) -> str:
    if row.dense_us is None or row.sparse_us is None:
        return ""
    return f", dense {row.dense_us:.1f} us, kernel {row.sparse_us:.1f} us"


def _stub_label(block: Block, title: str) -> str:
    name = {"site": block.name.rpartition(".")[2], "glue": block.nodes[-1]}.get(block.kind, block.name)
    same = block.group in (group_of(title), block.name)
    where = "" if same else ".".join(block.group.split(".")[-2:])
    return _fit("↓ " + (f"{where} {name}" if where else name), 28)


def _legend(x: float, y: float) -> list[str]:
    out = []
    for key, label in LABELS:
        fill, stroke = COLOURS[key]
        out.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="14" height="10" rx="2" fill="{fill}" stroke="{stroke}"/>')
        out.append(_text(x + 19, y + 9, label, "s"))
        x += 40 + len(label) * CHAR
    return out


def _page(picture: str, report: Report | None) -> str:
    """An HTML page of the picture and the report's table, with nothing to fetch."""
    table = report.to_html() if report is not None else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>sparsec</title>'
        "<style>body{font-family:sans-serif;margin:1em}table{border-collapse:collapse;font-size:12px}"
        "td,th{padding:1px 8px;text-align:right}td:first-child,th:first-child{text-align:left}</style>"
        f'</head><body><div style="overflow:auto">{picture}</div>{table}</body></html>\n'
    )


def _curve(points: Sequence[Point]) -> str:
    """A smooth path that leaves and enters every point vertically."""
    out = [f"M{points[0][0]:.0f} {points[0][1]:.0f}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        if abs(x0 - x1) < 0.5:
            out.append(f"L{x1:.0f} {y1:.0f}")
        else:
            middle = (y0 + y1) / 2
            out.append(f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}")
    return "".join(out)


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{style}">{escape(text)}</text>'


def _join(first: str, second: str) -> str:
    return f"{first} {second}".strip()


def _tail(name: str, room: int) -> str:
    """The last parts of a dotted name that fit into `room` characters."""
    text = name
    while len(text) > room - (text != name) and "." in text:
        text = text.split(".", 1)[1]
    return text if text == name else "…" + text


def _fit(text: str, room: int) -> str:
    """At most `room` characters, cut in the middle."""
    if len(text) <= room:
        return text
    keep = room - 1
    return text[: keep // 2] + "…" + text[len(text) - (keep - keep // 2) :]
