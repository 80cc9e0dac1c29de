"""What was done to every site and why: rows, totals, and their text, HTML and JSON forms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec.codes import INSTALLED, PREPACKED, lookup
from sparsec.errors import LoadError, SpecError, nearest

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = 1
"""Version of the dictionary that `Report.to_dict` gives; raised when a key changes its meaning."""

DECISIONS = ("sparse", "factored", "dense")


@dataclass(frozen=True)
class Row:
    """What was decided for one site.

    `shape` is the weight's. `batch` is the rows of the input that the site saw, or all the sizes that were timed.
    `density` is nonzeros over entries. `nbytes` counts what the site stores now, `dense_nbytes` the dense weight.
    Times are microseconds a call, summed over the sizes when there are several; `sparse_us` of a dense row is what the
    best candidate took, and of a prepacked one what that takes. `error` is the relative error to the original weight:
    0 for exact sites, None when unknown.
    """

    site: str
    op: str = "linear"
    shape: tuple[int, ...] = ()
    batch: int | tuple[int, ...] | None = None
    format: str = "dense"
    density: float = 1.0
    nbytes: int = 0
    dense_nbytes: int = 0
    dense_us: float | None = None
    sparse_us: float | None = None
    decision: str = "dense"
    variant: str = ""
    code: str = INSTALLED
    reason: str = ""
    error: float | None = None

    def __post_init__(self) -> None:
        if self.decision not in DECISIONS:
            raise SpecError(f"row of {self.site!r}: decision {self.decision!r} is none of {', '.join(DECISIONS)}")
        lookup(self.code)

    @property
    def speedup(self) -> float | None:
        """Dense time over the kernel's time; None when the site was not timed."""
        return self.dense_us / self.sparse_us if self.dense_us and self.sparse_us else None

    @property
    def us(self) -> float | None:
        """Microseconds the site takes as it was decided; None when it was not timed."""
        return self.dense_us if self.decision == "dense" and self.code != PREPACKED else self.sparse_us

    def to_dict(self) -> dict[str, Any]:
        """Field name -> plain JSON value; tuples become lists, non-finite floats their names."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of `to_dict`. Raises LoadError for missing or unknown fields."""
        names = {f.name for f in dataclasses.fields(cls)}
        if set(data) != names:
            wrong = sorted(names ^ set(data))
            raise LoadError(f"report row has missing or unknown fields {wrong}; a row has {sorted(names)}")
        values = dict(data)
        for key in ("density", "dense_us", "sparse_us", "error"):
            values[key] = None if values[key] is None else float(values[key])
        values["shape"] = tuple(values["shape"])
        if isinstance(values["batch"], list):
            values["batch"] = tuple(values["batch"])
        try:
            return cls(**values)
        except SpecError as error:
            raise LoadError(str(error)) from error


@dataclass(frozen=True)
class Totals:
    """Sums over the rows. Times cover the sites that were timed; bytes count a shared weight once."""

    sites: int
    sparse: int
    factored: int
    dense: int
    dense_nbytes: int  # weights before
    nbytes: int  # weights after, kept originals included
    kept_nbytes: int  # originals kept so that the state dict can be given back bit-equal
    dense_us: float
    us: float  # the same sites as decided
    timed: int

    @property
    def speedup(self) -> float | None:
        """Estimated speed-up of the sites alone; None when nothing was timed."""
        return self.dense_us / self.us if self.us > 0 else None


class Report:
    """One row per site, and how the compilation went.

    `capture` holds `rung` ("export", "trace", "regions") and `reason`, why the rungs above failed. `timings` holds
    seconds: `capture_s`, `passes` (name -> seconds), `build_s`, `tune_s`, `verify_s`, `total_s`. `shared` maps a site
    to the one whose packed weight it uses. `kept_nbytes` are originals kept beside their folded forms.
    """

    def __init__(
        self,
        rows: Iterable[Row] = (),
        *,
        capture: Mapping[str, str] | None = None,
        timings: Mapping[str, Any] | None = None,
        machine: str = "",
        threads: int = 0,
        dtype: str = "",
        notes: Iterable[str] = (),
        shared: Mapping[str, str] | None = None,
        kept_nbytes: int = 0,
    ) -> None:
        self._rows: dict[str, Row] = {}
        self.capture: dict[str, str] = dict(capture or {})
        self.timings: dict[str, Any] = dict(timings or {})
        self.machine = machine
        self.threads = threads
        self.dtype = dtype
        self.notes: list[str] = list(notes)
        self.shared: dict[str, str] = dict(shared or {})
        self.kept_nbytes = kept_nbytes
        for row in rows:
            self.add(row)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows in graph order; `add`, `put` and `update` change them."""
        return tuple(self._rows.values())

    def add(self, row: Row) -> None:
        """Append a row. Raises SpecError when its site has one already."""
        if row.site in self._rows:
            raise SpecError(f"site {row.site!r} has a report row already; `update` changes it")
        self._rows[row.site] = row

    def put(self, row: Row) -> None:
        """Append a row, or replace the one of the same site in its place."""
        self._rows[row.site] = row

    def update(self, site: str, **changes: Any) -> Row:
        """Change fields of the row of `site` and return it."""
        self._rows[site] = dataclasses.replace(self.row(site), **changes)
        return self._rows[site]

    def note(self, text: str) -> None:
        """Add a line to the notes, once."""
        if text not in self.notes:
            self.notes.append(text)

    def row(self, site: str) -> Row:
        """The row of `site`. Raises SpecError with the nearest names when there is none."""
        if site not in self._rows:
            raise SpecError(f"no site {site!r} in this report; {nearest(site, self._rows)}")
        return self._rows[site]

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, site: object) -> bool:
        return site in self._rows

    def totals(self) -> Totals:
        """Counts, bytes and microseconds over all rows."""
        own = [r for r in self.rows if r.site not in self.shared]
        timed = [r for r in self.rows if r.dense_us is not None and r.us is not None]
        count = {d: sum(r.decision == d for r in self.rows) for d in DECISIONS}
        return Totals(
            sites=len(self._rows),
            **count,
            dense_nbytes=sum(r.dense_nbytes for r in own),
            nbytes=sum(r.nbytes for r in own) + self.kept_nbytes,
            kept_nbytes=self.kept_nbytes,
            dense_us=sum(r.dense_us or 0.0 for r in timed),
            us=sum(r.us or 0.0 for r in timed),
            timed=len(timed),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, with the schema's version; `totals` is included for readers."""
        totals = self.totals()
        return {
            "schema": SCHEMA,
            "rows": [r.to_dict() for r in self.rows],
            "capture": dict(self.capture),
            "timings": _plain(self.timings),
            "machine": self.machine,
            "threads": self.threads,
            "dtype": self.dtype,
            "notes": list(self.notes),
            "shared": dict(self.shared),
            "kept_nbytes": self.kept_nbytes,
            "totals": {**dataclasses.asdict(totals), "speedup": totals.speedup},
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as strict JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`; totals are computed again. Raises LoadError for another schema or damaged rows."""
        if data.get("schema") != SCHEMA:
            raise LoadError(f"report has schema {data.get('schema')!r}; this version reads {SCHEMA}")
        keys = ("capture", "timings", "machine", "threads", "dtype", "notes", "shared", "kept_nbytes")
        missing = [k for k in ("rows", *keys) if k not in data]
        if missing:
            raise LoadError(f"report lacks {', '.join(missing)}")
        try:
            return cls([Row.from_dict(r) for r in data["rows"]], **{k: data[k] for k in keys})
        except SpecError as error:
            raise LoadError(str(error)) from error

    def __rich__(self) -> RenderableType:
        from sparsec import report_text

        return report_text.Renderable(self)

    def __str__(self) -> str:
        """The table as plain text of at most 120 columns."""
        from sparsec import report_text

        return report_text.plain(self)

    def __repr__(self) -> str:
        t = self.totals()
        speed = f", sites {t.speedup:.2f}x" if t.speedup else ""
        return f"<Report: {t.sites} sites, {t.sparse + t.factored} compiled, {t.dense} dense{speed}>"

    def to_html(self) -> str:
        """An HTML fragment: the table, the reasons and the totals, every text escaped."""
        from sparsec import report_text

        return report_text.html(self)

    _repr_html_ = to_html


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
