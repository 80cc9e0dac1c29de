"""How a report looks: a rich table of at most 120 columns, the same as plain text, and an HTML fragment."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from sparsec.codes import PREPACKED, lookup

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from sparsec.report import Report, Row

WIDTH = 120
SITE_WIDTH = 24  # narrower than this, columns give way to names
DROP_ORDER = ("before", "op", "zeros", "batch", "shape", "dense", "after", "format")
COLOURS = {"sparse": "green", "factored": "cyan", "dense": "yellow"}
HEADINGS = ("site", "op", "shape", "batch", "format", "zeros", "before", "after", "dense", "ours", "gain", "code")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
SHORT_OPS = {"embedding": "embed"}
LEGEND = "bytes before and after; microseconds dense and ours; * dense row: time of the best candidate"


def number(value: float) -> str:
    """Three significant digits with a unit prefix, at most five characters: `0.42`, `73.1`, `4.19M`."""
    for limit, suffix in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G")):
        if abs(value) < limit * 0.9995:
            scaled = value / (limit / 1e3)
            digits = 0 if scaled >= 99.95 or (suffix == "" and value == int(value)) else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0e}"


def nbytes(value: float) -> str:
    """Bytes for people: `768 B`, `2.4 MB` (powers of ten)."""
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def cells(row: Row) -> tuple[str, ...]:
    """The texts of one row, in the order of `HEADINGS`."""
    batch = "" if row.batch is None else str(row.batch) if isinstance(row.batch, int) else _span(row.batch)
    gain = "" if row.speedup is None else f"{row.speedup:.{2 if row.speedup < 99.995 else 0}f}x"
    star = "*" if row.decision == "dense" and row.code != PREPACKED and row.sparse_us is not None else ""
    return (
        row.site,
        SHORT_OPS.get(row.op, row.op),
        "x".join(map(str, row.shape)),
        batch,
        compact(row.format),
        f"{1 - row.density:.0%}",
        number(row.dense_nbytes),
        number(row.nbytes),
        "" if row.dense_us is None else number(row.dense_us),
        "" if row.sparse_us is None else number(row.sparse_us) + star,
        gain,
        row.code,
    )


def compact(fmt: str) -> str:
    """A format's canonical text without its field names: `csr(index_bits=16,block=128)` -> `csr(16,128)`."""
    return re.sub(r"\w+=|\s", "", fmt)


def reasons(report: Report) -> list[tuple[str, str, list[str]]]:
    """(code, sentence, sites) of everything that stayed as it was, rows of one sentence together, in order."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.decision == "dense" and row.code != PREPACKED:
            groups.setdefault((row.code, row.reason or lookup(row.code).title), []).append(row.site)
    return [(code, text, names) for (code, text), names in groups.items()]


def title_line(report: Report) -> str:
    """The heading: capture rung, dtype, threads and machine, as far as they are known."""
    parts = [f"sparsec report, {len(report)} sites"]
    if report.capture.get("rung"):
        parts.append(f"captured by {report.capture['rung']}")
    if report.dtype:
        parts.append(DTYPES.get(report.dtype, report.dtype))
    if report.threads:
        parts.append(f"{report.threads} thread{'s' if report.threads > 1 else ''}")
    if report.machine:
        parts.append(report.machine)
    return " · ".join(parts)


def summary(report: Report) -> list[str]:
    """The lines under the table: totals, times of the compilation, capture's reason and notes."""
    t = report.totals()
    kept = f" ({nbytes(t.kept_nbytes)} of kept originals)" if t.kept_nbytes else ""
    compiled = f"{t.sparse} sparse, " + (f"{t.factored} factored, " if t.factored else "") + f"{t.dense} dense"
    lines = [f"{compiled} · weights {nbytes(t.dense_nbytes)} -> {nbytes(t.nbytes)}{kept}"]
    if t.speedup:
        some = "" if t.timed == t.sites else f" ({t.timed} of {t.sites} timed)"
        lines[0] += f" · sites {t.dense_us / 1e3:.2f} ms -> {t.us / 1e3:.2f} ms, {t.speedup:.2f}x{some}"
    took = seconds(report)
    if took:
        lines.append("compiled in " + took)
    if report.capture.get("reason"):
        lines.append(f"capture: {report.capture['reason']}")
    return lines + report.notes


def seconds(report: Report) -> str:
    """`3.1 s: capture 0.9, passes 0.4, build 1.2`: the times of the compilation, empty when none is known."""
    times = report.timings
    parts = []
    for key, name in (("capture_s", "capture"), ("passes", "passes"), ("build_s", "build"), ("tune_s", "tune")):
        value = times.get(key)
        if value:
            parts.append(f"{name} {sum(value.values()) if isinstance(value, dict) else value:.2f}")
    if times.get("verify_s"):
        parts.append(f"verify {times['verify_s']:.2f}")
    total = f"{times['total_s']:.2f} s" if times.get("total_s") else ""
    return ": ".join(p for p in (total, ", ".join(parts)) if p)


class Renderable:
    """What rich prints for a report: it takes what the console is wide, at most `WIDTH`, and drops columns to fit."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        report = self.report
        yield Text(title_line(report), style="bold")
        if len(report):
            yield table(report, min(WIDTH, options.max_width))
        if any("*" in cells(r)[9] for r in report.rows):
            yield Text(LEGEND, style="dim")
        for code, sentence, names in reasons(report):
            yield Text.assemble((code, COLOURS["dense"]), f" {sentence}")
            yield Padding(Text(listed(names), style="dim"), (0, 0, 0, 8))
        for i, line in enumerate(summary(report)):
            yield Text(line, style="bold" if i == 0 else "")


def table(report: Report, width: int) -> Table:
    """The rows as a rich table of at most `width` columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    body = [cells(r) for r in report.rows]
    keep, room = columns(body, width)
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    for i in keep:
        left = HEADINGS[i] in ("site", "op", "format", "code")
        out.add_column(HEADINGS[i], justify="left" if left else "right", overflow="fold")
    sites = shorten([texts[0] for texts in body], room)
    for row, site, texts in zip(report.rows, sites, body, strict=True):
        shown = (site, *(texts[i] for i in keep[1:]))
        out.add_row(*(Text(t) for t in shown), style=COLOURS[row.decision])
    return out


def columns(body: list[tuple[str, ...]], width: int) -> tuple[list[int], int]:
    """The columns that fit into `width` with one space between them, and the room that is left for site names."""
    widths = [max(len(h), *(len(texts[i]) for texts in body)) for i, h in enumerate(HEADINGS)]
    keep = list(range(len(HEADINGS)))
    wanted = min(widths[0], SITE_WIDTH)
    for drop in (*DROP_ORDER, ""):
        room = width - sum(widths[i] + 1 for i in keep[1:])
        if room >= wanted or not drop:
            break
        keep.remove(HEADINGS.index(drop))
    return keep, max(8, room)


def plain(report: Report) -> str:
    """The report as text without colour, at most `WIDTH` columns wide."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(report)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def html(report: Report) -> str:
    """An HTML fragment for notebooks; every text is escaped and nothing is fetched."""
    colours = {"sparse": "#dcefdc", "factored": "#d8eef2", "dense": "#f6efd2"}
    head = "".join(f"<th>{escape(h)}</th>" for h in HEADINGS)
    body = []
    for row in report.rows:
        columns = "".join(f"<td>{escape(c)}</td>" for c in cells(row))
        body.append(f'<tr style="background:{colours[row.decision]}" title="{escape(row.reason)}">{columns}</tr>')
    why = [f"<li><code>{escape(c)}</code> {escape(s)}: {escape(listed(n))}</li>" for c, s, n in reasons(report)]
    foot = [f"<p>{escape(line)}</p>" for line in summary(report)]
    return (
        f'<div class="sparsec-report"><p><b>{escape(title_line(report))}</b></p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f"<ul>{''.join(why)}</ul>{''.join(foot)}</div>"
    )


def listed(names: list[str], limit: int = 6) -> str:
    """The names, or the first of many with a count."""
    if len(names) <= limit:
        return ", ".join(names)
    return ", ".join(names[: limit - 1]) + f" and {len(names) - limit + 1} more"


def shorten(names: Iterable[str], width: int) -> list[str]:
    """Long dotted names with leading parts elided; whole again where two would read the same."""
    full = list(names)
    short = []
    for name in full:
        text = name
        while len(text) > width - (text != name) and "." in text:
            text = text.split(".", 1)[1]
        short.append(text if text == name else "…" + text)
    return [s if short.count(s) == 1 else name for s, name in zip(short, full, strict=True)]


def _span(batches: tuple[int, ...]) -> str:
    return f"{batches[0]}..{batches[-1]}" if len(batches) > 1 else "".join(map(str, batches))
