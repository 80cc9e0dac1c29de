"""Speed-up against zeros as SVG: a panel per shape, a line per batch, dashed what the machine's limits would allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 260, 240  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 30, 34
TICKS = (0.5, 1, 2, 4, 8, 16, 32, 64)
COLOURS = ("#1b6ca8", "#d9822b", "#2a9d5c", "#a23b72", "#6b6b6b", "#8a6d00")


Row = Mapping[str, Any]


def layer(row: Row) -> str:
    """The title of rows of `benchmarks/linear.py`."""
    structure = f", {row['structure']}" if row["structure"] else ""
    return f"{row['out']} x {row['in']}, {row['dtype']}{structure}"


def figure(rows: Sequence[Row], title: Callable[[Row], str] = layer) -> str:
    """The figure of rows with `batch`, `zeros`, `ratio` and perhaps `limit_ratio`: a panel for each title, speed-ups on
    a logarithmic axis; the grey line is the dense op.
    """
    panels = list(dict.fromkeys(map(title, rows)))
    batches = sorted({r["batch"] for r in rows})
    width, height = WIDTH * len(panels), HEIGHT + 22
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        here = [r for r in rows if title(r) == panel]
        parts += [f'<g transform="translate({place * WIDTH} 0)">', *_panel(panel, here, batches), "</g>"]
    for place, batch in enumerate(batches):
        x = LEFT + 70 * place
        parts.append(f'<line x1="{x}" y1="{HEIGHT + 8}" x2="{x + 16}" y2="{HEIGHT + 8}" stroke="{_colour(place)}"/>')
        parts.append(f'<text x="{x + 20}" y="{HEIGHT + 12}">batch {batch}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(title: str, rows: Sequence[Row], batches: Sequence[int]) -> list[str]:
    """Axes, title and lines of one panel."""
    zeros = sorted({r["zeros"] for r in rows})
    ratios = [r[key] for r in rows for key in ("ratio", "limit_ratio") if key in r]
    ticks = [t for t in TICKS if t <= 2 * max(ratios) and 2 * t >= min(1.0, *ratios)]
    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    for tick in ticks:
        y = _up(tick, ticks)
        parts.append(
            f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="{"#999" if tick == 1 else "#e4e4e4"}"/>'
        )
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3}" text-anchor="end">{tick:g}x</text>')
    for zero in zeros:
        parts.append(f'<text x="{_across(zero, zeros)}" y="{HEIGHT - 16}" text-anchor="middle">{zero:.0%}</text>')
    for place, batch in enumerate(batches):
        mine = sorted((r for r in rows if r["batch"] == batch), key=lambda r: float(r["zeros"]))
        for key, style in (("limit_ratio", ' stroke-dasharray="3 3" opacity="0.6"'), ("ratio", ' stroke-width="2"')):
            points = " ".join(f"{_across(r['zeros'], zeros)},{_up(r[key], ticks)}" for r in mine if key in r)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(place)}"{style}/>')
    return parts


def _across(zero: float, zeros: Sequence[float]) -> float:
    step = (WIDTH - LEFT - RIGHT) / max(1, len(zeros))
    return round(LEFT + step * (zeros.index(zero) + 0.5), 1)


def _up(ratio: float, ticks: Sequence[float]) -> float:
    """The height of a speed-up; those beyond the axis lie at its end."""
    from math import log2

    low, high = log2(ticks[0]), log2(ticks[-1])
    share = min(1.0, max(0.0, (log2(ratio) - low) / ((high - low) or 1.0)))
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
