"""Rows, totals, codes, and the text, HTML and JSON forms of a report; the progress bar's silence."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsec import codes
from sparsec.errors import LoadError, SpecError
from sparsec.progress import Progress
from sparsec.report import Report, Row
from sparsec.report_text import LEGEND, WIDTH, number, shorten


def _sparse(site: str = "encoder.layer.0.output.dense", **changes: object) -> Row:
    values: dict = {
        "site": site,
        "op": "linear",
        "shape": (384, 1536),
        "batch": 1024,
        "format": "csr(index_bits=16,block=128)",
        "density": 0.1,
        "nbytes": 400_000,
        "dense_nbytes": 2_359_296,
        "dense_us": 800.0,
        "sparse_us": 200.0,
        "decision": "sparse",
        "variant": "linear_csr",
        "code": codes.INSTALLED,
        "reason": "4.00x as fast as dense",
        "error": 0.0,
    }
    return Row(**{**values, **changes})


def _dense(site: str = "pooler.dense", **changes: object) -> Row:
    values: dict = {"dense_us": 20.0, "sparse_us": 25.0, "dense_nbytes": 100, "nbytes": 100, "shape": (5, 5)}
    values |= {"code": codes.DENSE_FASTER, "reason": "dense takes 20.0 us, linear_csr 25.0 us"}
    return Row(site, **{**values, **changes})


def _report(*rows: Row, **more: object) -> Report:
    settings: dict = {
        "capture": {"rung": "trace", "reason": "model.py:12: data-dependent branch"},
        "timings": {"capture_s": 1.0, "passes": {"fold": 0.25, "fuse": 0.25}, "build_s": 2.0, "total_s": 4.0},
        "machine": "a processor",
        "threads": 2,
        "dtype": "float32",
        "notes": ["a note"],
    }
    return Report(rows or (_sparse(), _dense()), **{**settings, **more})


def test_round_trip_through_json_keeps_everything():
    dynamic = _sparse("dynamic", batch=(1, 4, 16), error=float("nan"), dense_us=None, sparse_us=None)
    report = _report(_sparse(), _dense(), dynamic, shared={"dynamic": "pooler.dense"}, kept_nbytes=7)
    again = Report.from_dict(json.loads(report.to_json()))
    assert again.to_dict() == report.to_dict()
    assert again.row("dynamic").batch == (1, 4, 16) and again.row("dynamic").shape == (384, 1536)
    assert again.row("dynamic").error != again.row("dynamic").error, "NaN survives strict JSON"
    assert str(again) == str(report) and again.kept_nbytes == 7


def test_json_row_has_exactly_the_public_fields():
    public = "site op shape batch format density nbytes dense_nbytes dense_us sparse_us decision variant code reason"
    public += " error"
    assert list(_report().to_dict()["rows"][0]) == public.split()


@pytest.mark.parametrize("damage", ["schema", "row", "code", "missing", "twice"])
def test_from_dict_refuses_damaged_data(damage: str):
    data = _report().to_dict()
    if damage == "schema":
        data["schema"] = 99
    elif damage == "row":
        del data["rows"][0]["reason"]
    elif damage == "code":
        data["rows"][0]["code"] = "SPC9999"
    elif damage == "missing":
        del data["capture"]
    else:
        data["rows"].append(data["rows"][0])
    patterns = {"schema": "schema 99", "row": r"\['reason'\]", "code": "SPC9999", "missing": "capture"}
    with pytest.raises(LoadError, match=patterns.get(damage, "already")):
        Report.from_dict(data)


def test_rows_are_unique_per_site():
    report = _report()
    with pytest.raises(SpecError, match="has a report row already"):
        report.add(_sparse())
    report.put(_sparse(dense_us=1000.0))
    assert len(report) == 2 and report.rows[0].dense_us == 1000.0
    assert report.update("pooler.dense", reason="other").reason == report.row("pooler.dense").reason == "other"


def test_unknown_site_names_the_nearest():
    with pytest.raises(SpecError, match=r"no site 'pooler\.dens'.*nearest: 'pooler\.dense'"):
        _report().row("pooler.dens")


def test_a_row_checks_its_decision_and_code():
    with pytest.raises(SpecError, match="'fast' is none of sparse, factored, dense"):
        Row("a", decision="fast")
    with pytest.raises(SpecError, match="no report code 'SPC1'"):
        Row("a", code="SPC1")


def test_totals_count_what_runs():
    tied = _sparse("tied")
    untimed = Row("untimed", code=codes.SPEC_DENSE, nbytes=50, dense_nbytes=50)
    totals = _report(_sparse(), tied, _dense(), untimed, shared={"tied": "x"}, kept_nbytes=1000).totals()
    assert (totals.sites, totals.sparse, totals.dense, totals.factored, totals.timed) == (4, 2, 2, 0, 3)
    assert totals.dense_nbytes == 2_359_296 + 100 + 50, "a shared weight is counted once"
    assert totals.nbytes == 400_000 + 100 + 50 + 1000, "kept originals are counted"
    assert (totals.dense_us, totals.us) == (1620.0, 420.0), "a dense row costs its dense time"
    assert totals.speedup == pytest.approx(1620 / 420)
    assert Report().totals().speedup is None


def test_text_fits_and_explains():
    names = [f"encoder.layer.{i}.attention.output.dense" for i in range(11)]
    text = str(_report(*(_sparse(n) for n in names), _dense(), _dense("other.dense")))
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "\x1b" not in text, "no colour codes in plain text"
    for name in names:
        assert sum(name in line for line in lines) == 1, "every site has one line"
    assert "SPC0100 dense takes 20.0 us, linear_csr 25.0 us" in text
    assert "pooler.dense, other.dense" in text, "sites with one reason share a line"
    assert "csr(16,128)" in text and "4.00x" in text and "25*" in text and LEGEND in text
    assert "captured by trace" in lines[0] and "fp32" in lines[0] and "2 threads" in lines[0]
    assert "capture: model.py:12: data-dependent branch" in text and "a note" in text
    assert "4.00 s: capture 1.00, passes 0.50, build 2.00" in text


def test_narrow_and_colour_terminals():
    from rich.console import Console

    for width in (100, 80, 60, 40):
        out = io.StringIO()
        Console(file=out, width=width, color_system=None).print(_report())
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert any("SPC0000" in line and "4.00x" in line for line in lines), "decisive columns stay"
    out = io.StringIO()
    Console(file=out, width=WIDTH, force_terminal=True, color_system="standard").print(_report())
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert plain != out.getvalue()
    assert [line.rstrip() for line in plain.splitlines()] == str(_report()).splitlines()


def test_an_empty_report_prints():
    assert "0 sites" in str(Report()) and repr(Report()).startswith("<Report: 0 sites")
    assert "sites 3.86x" in repr(_report(_sparse(), _sparse("b"), _dense()))


def test_text_from_models_cannot_become_markup():
    nasty = "<script>[bold red]{x}"
    report = _report(_dense(nasty, reason="[/] <b>"), machine="<m>")
    assert nasty in str(report) and "[/] <b>" in str(report)
    page = report.to_html()
    assert "<script>" not in page and "&lt;script&gt;[bold red]{x}" in page and "&lt;m&gt;" in page
    assert page == report._repr_html_()


def test_numbers_stay_short():
    values = [0, 0.42, 7, 9.994, 9.996, 73.14, 99.96, 999.4, 999.6, 1000, 94_000, 2_359_296, 46_881_792, 10**12 - 1]
    assert max(len(number(v)) for v in values) <= 5
    shown = [number(v) for v in (0, 0.42, 20.0, 73.14, 999.6, 2_359_296)]
    assert shown == ["0", "0.42", "20", "73.1", "1.00k", "2.36M"]


def test_names_are_elided_only_while_they_stay_apart():
    assert shorten(["a.b.c", "long.name.of.a.site"], 12) == ["a.b.c", "…of.a.site"]
    same = ["first.of.two.tails", "second.of.two.tails"]
    assert shorten(same, 12) == same


def test_codes_are_stable_and_sentences_complete():
    assert list(codes.CODES) == sorted(codes.CODES) and all(re.fullmatch(r"SPC\d{4}", c) for c in codes.CODES)
    constants = {v for k, v in vars(codes).items() if k.isupper() and isinstance(v, str)}
    assert constants == set(codes.CODES), "every code has a constant"
    assert codes.sentence(codes.WITHIN_MARGIN, variant="v", speedup=1.03, min_speedup=1.05) == (
        "v is 1.03x as fast as dense, less than min_speedup=1.05"
    )
    with pytest.raises(SpecError, match="SPC0101 needs variant, min_speedup; given: speedup"):
        codes.sentence(codes.WITHIN_MARGIN, speedup=1.03)
    with pytest.raises(SpecError, match=r"no report code .SPC0109.; nearest: .*SPC0100"):
        codes.sentence("SPC0109")


def test_the_table_of_codes_is_documented(request: pytest.FixtureRequest):
    page = Path(__file__).parent.parent / "docs" / "codes.md"
    if request.config.getoption("--update-golden"):
        page.write_text(codes.markdown(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == codes.markdown(), "run pytest with --update-golden"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_silent_unless_watched(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    with Progress(3) as bar:
        bar.advance()
        bar.advance(2)
    assert bar.done == 3 and capfd.readouterr() == ("", "")
    for level, shown in ((logging.WARNING, True), (logging.CRITICAL, False)):
        terminal = _Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(logging.getLogger("sparsec"), "level", level)
        logging.getLogger("sparsec").manager._clear_cache()
        with Progress(2, "building kernels") as bar:
            bar.advance()
        assert ("building kernels" in terminal.getvalue()) is shown


def test_rich_is_imported_on_use_only():
    code = "import sys, sparsec.report, sparsec.codes, sparsec.progress; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
