"""Sliding windows: round trips, exact bytes, windows that move on, and refusal of damaged buffers."""

from __future__ import annotations

import pytest
import torch
from format_tools import COMMON, DTYPES, Break, bits, nbytes, put, shorter, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import catalog
from sparsec.codegen.kernel import Problem
from sparsec.errors import FormatError, SpecError
from sparsec.formats import Buffers, Window, parse
from sparsec.target import ISAS, Target

FULL = Target("x86_64", ISAS["avx512"].features, l1d=32 << 10, l3=32 << 20)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 150),
    reach=st.sampled_from([None, 32, 64]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_and_exact_bytes(
    rows: int, cols: int, reach: int | None, density: float, dtype: torch.dtype
) -> None:
    dense = weight(rows, cols, density, dtype)
    fmt = Window(reach).resolve(rows, cols)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    assert torch.equal(
        bits(fmt.unpack(buffers, rows, cols)), bits(torch.where(dense == 0, torch.zeros_like(dense), dense))
    )
    assert torch.equal(fmt.positions(buffers, rows, cols), dense != 0)
    assert fmt.stored(dense) == buffers["values"].numel()
    assert nbytes(buffers) == fmt.nbytes(rows, cols, fmt.stored(dense), dense.element_size())
    assert parse(fmt.text()) == fmt


def test_rows_take_what_the_window_holds_and_wait_where_they_are_ahead() -> None:
    dense = torch.zeros(2, 100)
    dense[0, [3, 40, 50, 90]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    dense[1, [35, 36, 80]] = torch.tensor([5.0, 6.0, 7.0])
    buffers = Window(32).pack(dense)
    places, values = (buffers[key].view(-1, 2, 16)[:, :, :2].tolist() for key in ("places", "values"))
    assert buffers["starts"].tolist() == [0, 2, 5] and buffers["pointers"].tolist() == [0, 3]
    assert places == [[[0x43, 0], [0, 0]], [[0x48, 0x43], [0x52, 0x44]], [[0x4A, 0x40], [0, 0]]]
    assert values == [[[1, 0], [0, 0]], [[2, 5], [3, 6]], [[4, 7], [0, 0]]]
    far = Window(64).pack(dense)
    assert far["starts"].tolist() == [0, 3]
    assert far["places"].view(-1, 2, 16)[:, :, :2].tolist() == [[[0x43, 0x83], [0x88, 0x84]], [[0x42, 0x80], [0x8A, 0]]]


def test_a_mask_keeps_zeros_and_random_patterns_fill_as_documented() -> None:
    zeros, mask = torch.zeros(6, 9), weight(6, 9, 0.5) != 0
    buffers = Window(32).pack(zeros, mask)
    Window(32).validate(buffers, 6, 9)
    assert torch.equal(Window(32).positions(buffers, 6, 9), mask)
    for density, reach, least in ((0.5, 64, 0.92), (0.1, 64, 0.72), (0.5, 32, 0.88), (0.2, 32, 0.71)):
        dense = weight(256, 768, density)
        assert least < int(dense.count_nonzero()) / Window(reach).stored(dense) < least + 0.06


def test_windows_are_offered_where_few_rows_meet_wide_vectors() -> None:
    known = catalog.variant("linear_window")
    one = Problem("linear", 3072, 768, "float32", 472_000, batches=(1,), threads=2)
    assert known.formats(one, FULL) == (Window(32),)
    for change in ({"batches": (16,)}, {"batches": ()}, {"nnz": 20}, {"nnz": 2_200_000}):
        assert known.formats(Problem(**{**one.__dict__, **change}), FULL) == ()
    assert known.formats(Problem(**{**one.__dict__, "nnz": 236_000}), FULL) == (Window(64),)
    assert known.formats(one, FULL.limit("avx2")) == ()


@pytest.mark.parametrize("reach", [0, 16, 48, "64"])
def test_bad_fields_are_refused(reach: object) -> None:
    with pytest.raises(SpecError, match="reach"):
        Window(reach)  # type: ignore[arg-type]
    assert "more than windows are numbered for" in str(Window().refuse(torch.zeros(1, 600_000)))


def _filled(buffers: Buffers) -> Buffers:
    """A value where there is only filling."""
    return put("values", int((buffers["places"] == 0).nonzero()[0]), 3.0)(buffers)


def _again(buffers: Buffers) -> Buffers:
    """The second entry of a row where its first one is."""
    lane = int((buffers["places"][:16].bool() & buffers["places"][16:32].bool()).nonzero()[0])
    return put("places", 16 + lane, int(buffers["places"][lane]))(buffers)


BROKEN: list[tuple[Break, str]] = [
    *(line for line in COMMON if line[1] != "expected" or line[0] is not None),
    (swap("places", shorter), "'places' has shape"),
    (swap("values", shorter), "'values' has shape"),
    (put("places", 0, 0x20), "'places' at position 0 holds 0x20"),
    (put("places", 0, 0xC1), "'places' at position 0 holds 0xc1"),
    (put("places", 0, 7), "'places' at position 0 holds 0x7"),
    (put("starts", 0, 100), "'starts' at position 0 holds 100, valid: 0 to 2"),
    (put("starts", 0, -1), "'starts' at position 0 holds -1"),
    (put("pointers", 1, 1000), "'pointers' at position"),
    (put("places", 13, 0x41), "outside (12, 90)"),
    (_again, "does not lie behind"),
    (_filled, "where 'places' says filling"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_damaged_buffers_are_refused(change: Break, words: str) -> None:
    dense, fmt = weight(12, 90, 0.5), Window(64)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, 12, 90)
    with pytest.raises(FormatError, match="window") as caught:
        fmt.validate(change(buffers), 12, 90)
    assert words in str(caught.value)


def test_the_second_half_belongs_to_the_longer_reach() -> None:
    buffers = Window(64).pack(torch.ones(16, 64))
    with pytest.raises(FormatError, match="0x5f$"):
        Window(32).validate(buffers, 16, 64)
