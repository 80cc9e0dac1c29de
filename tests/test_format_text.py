"""Canonical text of formats: `parse` is the inverse of `text` and refuses everything else."""

from __future__ import annotations

import pytest
from format_tools import FORMAT_LIST
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import SpecError
from sparsec.formats import FORMATS, NM, FanIn, Format, parse, register_format

ids = [f.text() for f in FORMAT_LIST]


@pytest.mark.parametrize("fmt", (*FORMAT_LIST, NM(2, 4), FanIn(3)), ids=[*ids, "nm", "fan_in"])
def test_parse_is_the_inverse_of_text(fmt: Format) -> None:
    assert parse(fmt.text()) == fmt
    assert hash(parse(fmt.text())) == hash(fmt)
    resolved = fmt.resolve(30, 40)
    assert parse(resolved.text()) == resolved
    assert resolved.resolve(30, 40) == resolved


@pytest.mark.parametrize(
    "text",
    [
        "", "csr(", "csr()", "csr(16)", "csr(index_bits=16", "csr(index_bits=16))", "csr (index_bits=16)", "csrr",
        "csr(block=128,index_bits=16)", "csr(block=128,block=128)", "csr(block=0128)", "csr(block=-1)",
        "csr(block=1e3)", "csr(index_bits=None)", "bsr(r=4)", "bsr(r=4,c=1)x", "dense,",
        "CSR", "csr(size=3)", "csr(block=dense)",
        "csr(block=(1,2))", "csr(__class__=1)", "csr(block=9" + "9" * 5000 + ")", "(" * 5000, "csr(block=" * 3000,
        "csr(block=" * 60,
    ],
)  # fmt: skip
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(SpecError):
        parse(text)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_parse_raises_nothing_else(text: str) -> None:
    try:
        fmt = parse(text)
    except SpecError:
        return
    assert fmt.text() == text


def test_formats_nest_sixteen_deep_and_no_deeper() -> None:
    """Neither text is a format, since a block is a number: the reasons differ."""
    with pytest.raises(SpecError) as caught:
        parse("csr(block=" * 16 + "1" + ")" * 16)
    assert "holds more" not in str(caught.value)
    with pytest.raises(SpecError, match="holds more than 16 formats"):
        parse("csr(block=" * 17 + "1" + ")" * 17)


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="nearest: 'bitmask'"):
        parse("bitmsk")


def test_register_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.formats.FORMATS", dict(FORMATS))

    class Mine(Format):
        name = "mine"
        buffers = ("values",)

    register_format(Mine)
    with pytest.raises(SpecError, match="taken by Mine"):
        register_format(Mine)
    Mine.name = "No Good"
    with pytest.raises(SpecError, match="lower-case identifier"):
        register_format(Mine)
