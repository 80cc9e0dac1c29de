"""Reading a report from a file: the types of every field, before anything prints or adds them."""

from __future__ import annotations

from typing import Any

from sparsec.errors import LoadError, SparsecError
from sparsec.report import Report, Row
from sparsec.save_values import sequence

_NUMBER = (int, float)
_TEXTS = ("site", "op", "format", "decision", "variant", "code", "reason")


def check_report(data: Any) -> Report:
    """The Report of `Report.to_dict`; LoadError unless every field has the type that reports write."""
    if not isinstance(data, dict):
        raise LoadError("report.json is not an object")
    rows = sequence(data.get("rows"), "rows of the report")
    if not all(isinstance(row, dict) for row in rows):
        raise LoadError("rows of the report are not objects")
    try:
        report = Report.from_dict(data)
    except (SparsecError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise LoadError(f"report.json: {error!s:.300}") from error
    for row in report.rows:
        if wrong := _wrong(row):
            raise LoadError(f"report.json: field {wrong!r} of a row has the wrong type")
    tables = (report.capture, report.shared)
    if (
        not all(_texts(t.values()) for t in tables)
        or not _texts(report.notes)
        or not _texts((report.machine, report.dtype))
    ):
        raise LoadError("report.json: capture, shared, notes, machine and dtype are texts")
    if type(report.threads) is not int or type(report.kept_nbytes) is not int or not _timings(report.timings):
        raise LoadError("report.json: threads, kept_nbytes and timings are numbers")
    return report


def _wrong(row: Row) -> str | None:
    for name in _TEXTS:
        if not isinstance(getattr(row, name), str):
            return name
    for name in ("nbytes", "dense_nbytes"):
        if type(getattr(row, name)) is not int:
            return name
    for name in ("dense_us", "sparse_us", "error"):
        if not isinstance(getattr(row, name), (*_NUMBER, type(None))):
            return name
    if type(row.density) is not float or not all(type(s) is int for s in row.shape):
        return "shape"
    batch = row.batch if isinstance(row.batch, tuple) else (row.batch,)
    return None if all(b is None or type(b) is int for b in batch) else "batch"


def _texts(values: Any) -> bool:
    return all(isinstance(v, str) for v in values)


def _timings(values: dict[str, Any]) -> bool:
    return all(
        type(v) in _NUMBER or (isinstance(v, dict) and all(type(x) in _NUMBER for x in v.values()))
        for v in values.values()
    )
