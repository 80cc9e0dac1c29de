"""Tiles: round trips, the order of a matrix unit, exact bytes, refusals, and damaged buffers; alone and quantised."""

from __future__ import annotations

import pytest
import torch
from format_tools import COMMON, Break, bits, nbytes, put, shorter, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import FormatError
from sparsec.formats import Quantized, Tiles, parse
from sparsec.formats.tiles import MAX_WIDE, ROWS, WORDS, together

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 150),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_and_exact_bytes(rows: int, cols: int, density: float, dtype: torch.dtype) -> None:
    dense, fmt = weight(rows, cols, density, dtype), Tiles()
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    assert torch.equal(
        bits(fmt.unpack(buffers, rows, cols)), bits(torch.where(dense == 0, torch.zeros_like(dense), dense))
    )
    assert torch.equal(fmt.positions(buffers, rows, cols), dense != 0)
    assert fmt.stored(dense) == buffers["values"].numel()
    assert nbytes(buffers) == fmt.nbytes(rows, cols, fmt.stored(dense), dense.element_size())
    assert parse(fmt.text()) == fmt


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.integers(0, 20), cols=st.integers(0, 140), density=st.sampled_from([0.0, 0.2, 1.0]))
def test_quantised_codes_are_within_half_a_step(rows: int, cols: int, density: float) -> None:
    dense, fmt = weight(rows, cols, density), Quantized(Tiles())
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    again = fmt.unpack(buffers, rows, cols)
    assert torch.all((again - dense).abs() <= buffers["scales"][:, None] * 0.500001)
    assert parse(fmt.text()) == fmt and tuple(buffers) == fmt.buffers
    assert nbytes(buffers) == fmt.nbytes(rows, cols, buffers["values"].numel(), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_lies_as_a_matrix_unit_reads_its_second_operand(dtype: torch.dtype) -> None:
    """Word i of a full tile: of each of 16 rows in turn, the columns that share a lane of 32 bits."""
    group = together(torch.empty(0, dtype=dtype).element_size())
    dense = (torch.arange(ROWS * WORDS * group) % 100 + 1).view(ROWS, WORDS * group).to(dtype)
    buffers = Tiles().pack(dense)
    expected = dense.view(ROWS, WORDS, group).transpose(0, 1).reshape(-1)
    assert torch.equal(buffers["values"], expected) and buffers["pointers"].tolist() == [0, dense.numel()]
    assert bool((buffers["masks"] == -1).all())


def test_a_mask_keeps_zeros_and_empty_tiles_store_nothing() -> None:
    zeros, mask = torch.zeros(20, 70, dtype=torch.bfloat16), weight(20, 70, 0.5) != 0
    mask[:16, 32:64] = False
    buffers = Tiles().pack(zeros, mask)
    Tiles().validate(buffers, 20, 70)
    assert torch.equal(Tiles().positions(buffers, 20, 70), mask)
    assert buffers["pointers"][1] == buffers["pointers"][2] and buffers["pointers"].numel() == 2 * 3 + 1


def test_wide_items_and_too_many_columns_are_refused() -> None:
    with pytest.raises(FormatError, match="of 1, 2 or 4 bytes, not of torch.float64"):
        Tiles().pack(torch.ones(2, 2, dtype=torch.float64))
    most = MAX_WIDE * WORDS * 4
    with pytest.raises(FormatError, match=f"more than {most}"):
        Tiles().pack(torch.zeros(1, most + 1, dtype=torch.int8))


BROKEN: list[tuple[Break, str]] = [
    *COMMON,
    (swap("values", lambda t: t.double()), "exceed 4 bytes"),
    (swap("masks", shorter), "'masks' has shape"),
    (swap("masks", lambda t: t.short()), "'masks' has dtype torch.int16, expected torch.int32"),
    (put("masks", (0, 0), 0), "but the masks of tile 0 set"),
    (put("masks", (11, 0), -1), r"\(11, 0\) holds 0xffffffff, which sets bits past row 36; valid there: 0x3ff"),
    (put("masks", (3, 10), 1), r"\(3, 10\) holds 0x1, which sets bits past column 115; valid there: 0x0"),
    (put("masks", (3, 9), -1), r"bits past column 115|but the masks of tile 3"),
    (swap("pointers", lambda t: t + 1), "'pointers'"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_damaged_buffers_are_refused(change: Break, words: str) -> None:
    fmt, dense = Tiles(), weight(37, 116, 0.5, torch.bfloat16)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, 37, 116)
    with pytest.raises(FormatError, match=words):
        fmt.validate(change(buffers), 37, 116)
