"""Pairs: round trips, what counts as stored, bytes, refusals, and damaged buffers."""

from __future__ import annotations

import pytest
import torch
from format_tools import Break, bits, nbytes, put, shorter, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import FormatError, SpecError
from sparsec.formats import SELL, CSRGroups, Pairs, parse


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    cols=st.integers(0, 70),
    block=st.sampled_from([None, 1, 7, 255]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_round_trip_and_both_of_a_pair_count_as_stored(rows: int, cols: int, block: int | None, density: float) -> None:
    dense = weight(rows, cols, density, torch.bfloat16)
    fmt = Pairs(CSRGroups(block) if block else None).resolve(rows, cols)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    kept = torch.where(dense == 0, torch.zeros_like(dense), dense)
    assert torch.equal(bits(fmt.unpack(buffers, rows, cols)), bits(kept))
    padded = torch.nn.functional.pad(dense != 0, (0, cols % 2))
    pairs = padded.reshape(rows, padded.shape[1] // 2, 2).any(2)
    assert torch.equal(fmt.positions(buffers, rows, cols), pairs.repeat_interleave(2, 1)[:, :cols])
    assert fmt.stored(dense) == buffers["values"].numel() == 2 * int(pairs.sum())
    assert buffers["values"].dtype == torch.bfloat16 and parse(fmt.text()) == fmt


def test_bytes_are_near_their_estimate() -> None:
    dense, fmt = weight(256, 1024, 0.5, torch.bfloat16), Pairs()
    assert abs(nbytes(fmt.pack(dense)) / fmt.nbytes(256, 1024, fmt.stored(dense), 2) - 1) < 0.03


def test_a_mask_keeps_zeros_and_nan_keeps_its_bits() -> None:
    mask = weight(9, 13, 0.3) != 0
    strange = torch.full((9, 13), -0x3F, dtype=torch.int16).view(torch.bfloat16)  # NaN with a payload, negative
    buffers = Pairs().pack(strange, mask)
    Pairs().validate(buffers, 9, 13)
    assert torch.equal(bits(Pairs().unpack(buffers, 9, 13)), torch.where(mask, bits(strange), bits(strange * 0) * 0))
    zeros = Pairs().pack(torch.zeros(9, 13, dtype=torch.bfloat16), mask)
    assert zeros["values"].numel() == buffers["values"].numel()


def test_other_dtypes_and_other_formats_inside_are_refused() -> None:
    with pytest.raises(FormatError, match="pairs are of torch.bfloat16, not of torch.float32"):
        Pairs().pack(torch.ones(2, 2))
    with pytest.raises(SpecError, match="by CSRGroups"):
        Pairs(SELL())


BROKEN: list[tuple[Break, str]] = [
    (swap("values", lambda t: t.float()), "'values' has dtype torch.float32; valid: torch.bfloat16"),
    (swap("values", shorter), "expected whole pairs in one dimension"),
    (swap("values", lambda t: t[:-2].clone()), "expected"),
    (put("indices", 0, 200), "'indices' at position 0 holds 200"),
    (swap("counts", shorter), "'counts' has shape"),
    (swap("pointers", lambda t: t + 1), "'pointers'"),
    (put("values", slice(None), 1.0), "holds a value behind the last input of row"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_damaged_buffers_are_refused(change: Break, words: str) -> None:
    fmt, buffers = Pairs(), Pairs().pack(weight(10, 41, 0.5, torch.bfloat16))
    fmt.validate(buffers, 10, 41)
    with pytest.raises(FormatError, match=words):
        fmt.validate(change(buffers), 10, 41)
