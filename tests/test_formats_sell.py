"""Sliced ELLPACK: round trips, exact bytes, the order of rows, and refusal of damaged buffers."""

from __future__ import annotations

import pytest
import torch
from format_tools import COMMON, DTYPES, Break, bits, nbytes, put, shorter, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import FormatError, SpecError
from sparsec.formats import SELL, Buffers, parse
from sparsec.formats.sell import ROWS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 70),
    block=st.sampled_from([None, 1, 7, 64, 255]),
    window=st.sampled_from([4, 8, 128, 256]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_and_exact_bytes(
    rows: int, cols: int, block: int | None, window: int, density: float, dtype: torch.dtype
) -> None:
    dense = weight(rows, cols, density, dtype)
    fmt = SELL(block, window).resolve(rows, cols)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    assert torch.equal(
        bits(fmt.unpack(buffers, rows, cols)), bits(torch.where(dense == 0, torch.zeros_like(dense), dense))
    )
    assert torch.equal(fmt.positions(buffers, rows, cols), dense != 0)
    assert fmt.stored(dense) == buffers["values"].numel()
    assert nbytes(buffers) == fmt.nbytes(rows, cols, fmt.stored(dense), dense.element_size())
    assert parse(fmt.text()) == fmt


def test_rows_are_sorted_by_length_and_a_slice_is_as_long_as_its_first() -> None:
    dense = torch.tensor([[1.0, 0, 0], [2, 3, 0], [0, 0, 0], [4, 5, 6], [0, 7, 0]])
    buffers = SELL(3, 8).pack(dense)
    assert buffers["rows"].tolist() == [3, 1, 0, 4, 2, 5, 6, 7] and buffers["counts"].tolist() == [3, 0]
    assert buffers["values"].tolist() == [4, 2, 1, 7, 5, 3, 0, 0, 6, 0, 0, 0]
    assert buffers["indices"].tolist() == [1, 1, 1, 2, 2, 2, 0, 0, 3, 0, 0, 0]
    assert buffers["pointers"].tolist() == [0, 3]


def test_a_mask_keeps_zeros_and_a_random_pattern_fills_little() -> None:
    zeros, mask = torch.zeros(6, 9), weight(6, 9, 0.5) != 0
    buffers = SELL(4).pack(zeros, mask)
    SELL(4).validate(buffers, 6, 9)
    assert torch.equal(SELL(4).positions(buffers, 6, 9), mask)
    dense, fmt = weight(512, 1020, 0.2), SELL(255)
    assert 1.0 <= fmt.stored(dense) / int(dense.count_nonzero()) < 1.02


@pytest.mark.parametrize(
    ("fields", "word"),
    [((0,), "block"), ((256,), "block"), (("8",), "block"), ((8, 6), "window"), ((8, 512), "window")],
)
def test_bad_fields_are_refused(fields: tuple[object, ...], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        SELL(*fields)  # type: ignore[arg-type]


def _filled(buffers: Buffers) -> Buffers:
    """A value where there is only filling."""
    return put("values", int((buffers["indices"] == 0).nonzero()[0]), 3.0)(buffers)


def _twice(buffers: Buffers) -> Buffers:
    return put("rows", 0, int(buffers["rows"][1]))(buffers)


BROKEN: list[tuple[Break, str]] = [
    *(line for line in COMMON if line[1] != "expected" or line[0] is not None),
    (put("indices", 0, 9), "'indices' at position 0 holds 9, valid: 0 to 8"),
    (swap("indices", shorter), "'indices' has shape"),
    (swap("counts", shorter), "'counts' has shape"),
    (put("counts", 0, 200), "add up to"),
    (swap("rows", shorter), "'rows' has shape"),
    (_twice, "does not list every row of segment 0 once"),
    (put("pointers", 1, 1000), "'pointers' at position"),
    (put("indices", 4, 1), "places of a row ascend"),
    (put("indices", 0, 0), "zeros fill its end"),
    (_filled, "where 'indices' says filling"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_damaged_buffers_are_refused(change: Break, words: str) -> None:
    dense, fmt = weight(10, 20, 0.5), SELL(8)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, 10, 20)
    with pytest.raises(FormatError, match="sell") as caught:
        fmt.validate(change(buffers), 10, 20)
    assert words in str(caught.value)


def test_a_row_past_the_last_may_hold_nothing() -> None:
    four = SELL(4).pack(torch.ones(4, 4))
    with pytest.raises(FormatError, match="valid: 0 to 0"):
        SELL(4).validate(four, 2, 4)


def test_slices_are_whole() -> None:
    buffers = SELL(4).pack(torch.ones(4, 4))
    ragged = {**buffers, "values": buffers["values"][:-1].clone(), "indices": buffers["indices"][:-1].clone()}
    with pytest.raises(FormatError, match="no multiple of 4"):
        SELL(4).validate(ragged, ROWS, 4)
