"""Row-grouped CSR: round trips, exact bytes, and refusal of damaged buffers."""

from __future__ import annotations

import pytest
import torch
from format_tools import COMMON, DTYPES, Break, bits, nbytes, put, shorter, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import FormatError, SpecError
from sparsec.formats import CSRGroups, parse
from sparsec.formats.csr_groups import ORDER, ROWS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 70),
    block=st.sampled_from([None, 1, 7, 64, 255]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_and_exact_bytes(
    rows: int, cols: int, block: int | None, density: float, dtype: torch.dtype
) -> None:
    dense = weight(rows, cols, density, dtype)
    fmt = CSRGroups(block).resolve(rows, cols)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    assert torch.equal(
        bits(fmt.unpack(buffers, rows, cols)), bits(torch.where(dense == 0, torch.zeros_like(dense), dense))
    )
    assert torch.equal(fmt.positions(buffers, rows, cols), dense != 0)
    touched = sum(int((dense[r : r + ROWS] != 0).any(0).sum()) for r in range(0, rows, ROWS))
    assert nbytes(buffers) == fmt.bytes_of(rows, cols, fmt.stored(dense), touched, dense.element_size())
    assert parse(fmt.text()) == fmt


def test_columns_are_sorted_by_the_rows_that_hold_them() -> None:
    dense = torch.tensor([[1.0, 0, 3, 0], [4, 0, 0, 6], [0, 0, 7, 0], [8, 0, 9, 0], [0, 5, 0, 0]])
    buffers = CSRGroups(4).pack(dense)
    assert buffers["values"].tolist() == [3, 7, 9, 1, 4, 8, 6, 5]  # rows 0, 2, 3; rows 0, 1, 3; row 1; the next group
    assert buffers["indices"].tolist() == [2, 0, 3, 1]
    assert buffers["pointers"].tolist() == [0, 7, 8] and buffers["starts"].tolist() == [0, 3, 4]
    used = {ORDER[i] for i in buffers["counts"][0].nonzero().flatten().tolist()}
    assert used == {0b1101, 0b1011, 0b0010}


def test_estimate_of_bytes_is_near_for_a_random_pattern() -> None:
    dense, fmt = weight(128, 512, 0.3), CSRGroups(128)
    assert abs(nbytes(fmt.pack(dense)) / fmt.nbytes(128, 512, fmt.stored(dense), 4) - 1) < 0.02


@pytest.mark.parametrize("block", [0, 256, True, "8"])
def test_bad_blocks_are_refused(block: object) -> None:
    with pytest.raises(SpecError, match="block"):
        CSRGroups(block)  # type: ignore[arg-type]


BROKEN: list[tuple[Break, str]] = [
    *(line for line in COMMON if line[1] != "expected" or line[0] is not None),
    (put("indices", 0, 9), "'indices' at position 0 holds 9, valid: 0 to 7"),
    (swap("indices", lambda t: t.flip(0)), "'indices'"),
    (swap("indices", shorter), "'starts' at position"),
    (swap("counts", shorter), "'counts' has shape"),
    (swap("counts", lambda t: t.flip(1)), "its 'counts' add up to"),
    (put("pointers", 1, 1000), "'pointers' at position"),
    (put("starts", 0, 1), "'starts' at position 0 holds 1"),
    (swap("starts", lambda t: t.long()), "'starts' has dtype"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_damaged_buffers_are_refused(change: Break, words: str) -> None:
    dense, fmt = weight(10, 20, 0.5), CSRGroups(8)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, 10, 20)
    with pytest.raises(FormatError, match="csr_groups") as caught:
        fmt.validate(change(buffers), 10, 20)
    assert words in str(caught.value)


def test_the_segment_whose_counts_disagree_is_named() -> None:
    """A column of four values is missing from the second block: the first segment is right, the second is not."""
    fmt = CSRGroups(4)
    buffers = fmt.pack(torch.ones(4, 12))
    steps = buffers["pointers"].diff().tolist()
    assert len(steps) == 3 and min(steps) > 0
    buffers["counts"][1, buffers["counts"][1].argmax()] -= 1
    with pytest.raises(FormatError, match=f"gives segment 1 {steps[1]} .*add up to {steps[1] - 4}"):
        fmt.validate(buffers, 4, 12)


def test_a_column_may_not_have_two_patterns_nor_a_row_past_the_last_hold_values() -> None:
    fmt, buffers = CSRGroups(4), CSRGroups(4).pack(torch.tensor([[1.0, 2, 0, 0], [0, 3, 0, 0]]))
    buffers["indices"][1] = int(buffers["indices"][0])
    with pytest.raises(FormatError, match="a second time in segment 0"):
        fmt.validate(buffers, 2, 4)
    four = fmt.pack(torch.ones(4, 4))
    with pytest.raises(FormatError, match="a row past 1"):
        fmt.validate(four, 2, 4)
