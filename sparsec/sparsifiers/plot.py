"""A scatter plot as SVG text, without any plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

MARGIN = (56, 16, 44, 20)  # left, right, bottom, top


def scatter(
    rows: Sequence[tuple[str, float, float, bool]], across: str, up: str, width: int = 640, height: int = 400
) -> str:
    """Points (name, x, y, highlighted) with their names; the highlighted ones are joined in the order of x."""
    left, right, bottom, top = MARGIN
    xs, ys = _axis([r[1] for r in rows]), _axis([r[2] for r in rows])

    def at(x: float, y: float) -> tuple[float, float]:
        px = left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - right)
        py = height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - bottom - top)
        return round(px, 1), round(py, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for x in xs:
        px, py = at(x, ys[0])
        parts.append(f'<line x1="{px}" y1="{py}" x2="{px}" y2="{top}" stroke="#ddd"/>')
        parts.append(f'<text x="{px}" y="{py + 16}" text-anchor="middle">{x:g}</text>')
    for y in ys:
        px, py = at(xs[0], y)
        parts.append(f'<line x1="{px}" y1="{py}" x2="{width - right}" y2="{py}" stroke="#ddd"/>')
        parts.append(f'<text x="{px - 6}" y="{py + 4}" text-anchor="end">{y:g}</text>')
    parts.append(f'<text x="{width / 2:g}" y="{height - 8}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text transform="translate(14 {height / 2:g}) rotate(-90)" text-anchor="middle">{escape(up)}</text>')
    best = sorted(at(x, y) for _, x, y, lit in rows if lit)
    if len(best) > 1:
        parts.append(f'<polyline points="{" ".join(f"{x},{y}" for x, y in best)}" fill="none" stroke="#2a6"/>')
    for name, x, y, lit in rows:
        px, py = at(x, y)
        end = px > 0.75 * width
        parts.append(f'<circle cx="{px}" cy="{py}" r="4" fill="{"#2a6" if lit else "#999"}"/>')
        place = f'x="{px - 7 if end else px + 7}" y="{py - 5}" text-anchor="{"end" if end else "start"}"'
        parts.append(f"<text {place}>{escape(name)}</text>")
    return "\n".join([*parts, "</svg>"])


def _axis(values: Sequence[float]) -> list[float]:
    """Round ticks that enclose the values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(f for f in (1, 2, 5, 10) if span / (step * f) <= 6)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]
