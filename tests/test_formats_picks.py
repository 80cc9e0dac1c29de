"""Picks: round trips, the walk of sixteen rows, exact bytes, refusals, and damaged buffers; alone and quantised."""

from __future__ import annotations

import pytest
import torch
from format_tools import Break, nbytes, put, shorter, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import FormatError
from sparsec.formats import Bitmask, Format, Picks, Quantized, parse
from sparsec.formats.picks import LANES, MAX_COLS, REACH, STEPS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(0, 40), cols=st.integers(0, 200), density=st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_round_trip_and_exact_bytes(rows: int, cols: int, density: float) -> None:
    dense, fmt = weight(rows, cols, density, torch.int8), Picks()
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    assert torch.equal(fmt.unpack(buffers, rows, cols), dense)
    assert torch.equal(fmt.positions(buffers, rows, cols), dense != 0)
    assert fmt.stored(dense) == buffers["values"].numel()
    assert nbytes(buffers) == fmt.nbytes(rows, cols, fmt.stored(dense), 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    cols=st.integers(0, 140),
    inner=st.sampled_from([Picks(), Bitmask(64), Bitmask(16)]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_quantised_codes_are_within_half_a_step(rows: int, cols: int, inner: Format, density: float) -> None:
    dense, fmt = weight(rows, cols, density), Quantized(inner).resolve(rows, cols)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    again = fmt.unpack(buffers, rows, cols)
    assert torch.all((again - dense).abs() <= buffers["scales"][:, None] * 0.500001)
    assert torch.equal(fmt.positions(buffers, rows, cols), again != 0)
    assert parse(fmt.text()) == fmt and tuple(buffers) == fmt.buffers
    assert nbytes(buffers) == fmt.nbytes(rows, cols, buffers["values"].numel(), 4)


def test_rows_walk_together_and_the_one_ahead_waits() -> None:
    dense = torch.zeros(2, 200, dtype=torch.int8)
    dense[0, [3, 4, 5, 6, 7, 66]] = torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.int8)
    dense[1, [70, 199]] = torch.tensor([7, 8], dtype=torch.int8)
    buffers = Picks().pack(dense)
    values, places = (buffers[key].view(-1, LANES, STEPS) for key in ("values", "places"))
    assert buffers["starts"].tolist() == [3, 7, 199] and buffers["pointers"].tolist() == [0, 3]
    assert values[:, 0].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]]
    assert values[:, 1].tolist() == [[0, 0, 0, 0], [7, 0, 0, 0], [8, 0, 0, 0]]
    assert places[:, 0].tolist() == [[0, 1, 2, 3], [0, 59, 0, 0], [0, 0, 0, 0]] and places[1, 1, 0] == 63


def test_random_patterns_fill_their_groups() -> None:
    for density, most in ((0.5, 1.1), (0.2, 1.25), (0.1, 1.5)):
        dense = weight(64, 1024, density, torch.int8, seed=3)
        assert Picks().stored(dense) / int(dense.count_nonzero()) < most


def test_other_dtypes_and_too_many_columns_are_refused() -> None:
    with pytest.raises(FormatError, match="picks are of torch.int8, not of torch.float32"):
        Picks().pack(torch.ones(2, 2))
    with pytest.raises(FormatError, match=f"numbered for, {MAX_COLS}"):
        Picks().pack(torch.zeros(1, MAX_COLS + 1, dtype=torch.int8))
    wide = torch.zeros(1, MAX_COLS, dtype=torch.int8)
    wide[0, -1] = 5
    buffers = Picks().pack(wide)
    Picks().validate(buffers, 1, MAX_COLS)
    assert torch.equal(Picks().unpack(buffers, 1, MAX_COLS), wide)


BROKEN: list[tuple[Break, str]] = [
    (swap("values", lambda t: t.float()), "'values' has dtype"),
    (swap("places", shorter), "'places' has shape"),
    (swap("starts", lambda t: t[:-1].clone()), "expected"),
    (put("starts", 0, 100), "'starts' at position 0 holds 100; valid: below 100"),
    (put("places", 5, REACH), f"'places' at position 5 holds {REACH}; valid: below {REACH}"),
    (put("values", slice(None), 1), "does not lie behind|outside"),
    (swap("pointers", lambda t: t + 1), "'pointers'"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_damaged_buffers_are_refused(change: Break, words: str) -> None:
    fmt, buffers = Picks(), Picks().pack(weight(20, 100, 0.5, torch.int8))
    fmt.validate(buffers, 20, 100)
    with pytest.raises(FormatError, match=words):
        fmt.validate(change(buffers), 20, 100)
