"""Storage formats: round trips over odd sizes and every dtype, exact bytes, and a typed error for every corruption."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from format_tools import COMMON, DTYPES, FORMAT_LIST, Break, bits, longer, nbytes, put, shorter, strided, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import FormatError, SpecError
from sparsec.formats import BSR, CSR, Bitmask, Dense, Format, pattern
from sparsec.formats._pack import select

ids = [f.text() for f in FORMAT_LIST]


def check_round_trip(fmt: Format, dense: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    rows, cols = dense.shape
    buffers = fmt.pack(dense, mask)
    assert tuple(buffers) == fmt.buffers
    fmt.validate(buffers, rows, cols)
    kept = pattern(dense, mask)
    back = fmt.unpack(buffers, rows, cols)
    assert back.dtype == dense.dtype and back.shape == dense.shape
    assert torch.equal(bits(back)[kept], bits(dense)[kept])
    assert not (back[~kept] != 0).any()
    positions = fmt.positions(buffers, rows, cols)
    assert positions.dtype == torch.bool and positions[kept].all()
    if not fmt.blocked and not isinstance(fmt, Dense):
        assert torch.equal(positions, kept)
    stored = buffers["values"].numel()
    assert nbytes(buffers) == fmt.nbytes(rows, cols, stored, dense.element_size())
    if mask is None:
        assert fmt.stored(dense) == stored


@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=ids)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.95, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 3),
)
def test_round_trip(fmt: Format, rows: int, cols: int, density: float, dtype: torch.dtype, seed: int) -> None:
    check_round_trip(fmt, weight(rows, cols, density, dtype, seed))


@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_special_values_empty_rows_and_a_mask(fmt: Format, dtype: torch.dtype) -> None:
    dense = weight(37, 41, 0.3, dtype)
    dense[5:9] = 0
    dense[:, 7] = 0
    if dtype.is_floating_point:
        dense[2, 3], dense[2, 4], dense[3, 0], dense[36, 40] = float("nan"), float("inf"), -0.0, float("-inf")
    check_round_trip(fmt, dense)
    mask = torch.rand(37, 41, generator=torch.Generator().manual_seed(5)) < 0.4
    mask[2, 3:5] = True
    check_round_trip(fmt, dense, mask)


@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=ids)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (700, 1000)], ids=str)
def test_empty_and_many_chunks(fmt: Format, shape: tuple[int, int]) -> None:
    check_round_trip(fmt, weight(*shape, 0.1))


@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=ids)
def test_pack_takes_views_and_parameters_and_shares_nothing(fmt: Format) -> None:
    base = torch.nn.Parameter(weight(24, 40, 0.4))
    buffers = fmt.pack(base.t())
    assert torch.equal(fmt.unpack(buffers, 40, 24), base.detach().t())
    assert not buffers["values"].requires_grad
    before = {k: v.clone() for k, v in fmt.pack(base).items()}
    buffers = fmt.pack(base)
    with torch.no_grad():
        base.zero_()
    assert all(torch.equal(buffers[k], before[k]) for k in before)


def test_layout_of_csr() -> None:
    dense = torch.tensor([[0, 1.0, 0, 2, 0], [0, 0, 0, 0, 0], [3, 0, 0, 0, 4]])
    buffers = CSR(16, 2).pack(dense)
    assert buffers["values"].tolist() == [1, 2, 3, 4]
    assert buffers["indices"].dtype == torch.int16 and buffers["indices"].tolist() == [1, 3, 0, 4]
    assert buffers["pointers"].dtype == torch.int32
    assert buffers["pointers"].tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 3, 4]
    assert CSR(32).pack(dense)["pointers"].tolist() == [0, 2, 2, 4]


def test_csr_indices_above_32767_are_unsigned_bits() -> None:
    dense = torch.zeros(2, 65535)
    dense[0, 40000] = dense[1, 65534] = 1.0
    buffers = CSR().pack(dense)
    assert buffers["indices"].tolist() == [40000 - 65536, 65534 - 65536]
    check_round_trip(CSR(None, 128), dense)
    wide = torch.zeros(1, 65537)
    wide[0, 65536] = 1.0
    assert CSR().pack(wide)["indices"].dtype == torch.int32
    assert "65535" in str(CSR(16).refuse(wide))
    with pytest.raises(FormatError, match=r"use CSR\(index_bits=32\)"):
        CSR(16).pack(wide)
    check_round_trip(CSR(), wide)
    check_round_trip(BSR(1, 2), wide)


def test_column_numbers_take_two_bytes_where_they_fit() -> None:
    for cols, dtype in ((65536, np.uint16), (65537, np.int32)):
        mask = np.zeros((1, cols), bool)
        mask[0, -1] = True
        values, numbers = select(torch.arange(float(cols))[None], mask, columns=True)
        assert numbers is not None and numbers.dtype == dtype and numbers.tolist() == values.tolist() == [cols - 1]


def test_layout_of_bitmask() -> None:
    dense = torch.zeros(2, 18)
    dense[0, [0, 3, 17]] = torch.tensor([1.0, 2, 3])
    dense[1, 15] = 4.0
    buffers = Bitmask(16, 16).pack(dense)
    assert buffers["masks"].dtype == torch.int16 and buffers["masks"].tolist() == [[0b1001, 0b10], [-(1 << 15), 0]]
    assert buffers["pointers"].tolist() == [0, 2, 3, 4, 4]
    assert Bitmask(64).pack(dense)["masks"].tolist() == [[0b1001 | 1 << 17], [1 << 15]]


def test_layout_of_bsr() -> None:
    dense = torch.zeros(3, 5)
    dense[0, 1], dense[1, 4], dense[2, 2] = 1.0, 2.0, 3.0
    buffers = BSR(2, 2).pack(dense)
    assert buffers["values"].tolist() == [[[0, 1], [0, 0]], [[0, 0], [2, 0]], [[3, 0], [0, 0]]]
    assert buffers["indices"].tolist() == [0, 2, 1] and buffers["pointers"].tolist() == [0, 2, 3]
    masked = BSR(2, 2).pack(torch.ones(2, 2), torch.tensor([[True, False], [False, False]]))
    assert masked["values"].tolist() == [[[1, 0], [0, 0]]]


def test_resolve_fixes_open_fields() -> None:
    assert CSR().resolve(3, 384) == CSR(16, 384)
    assert CSR(block=128).resolve(3, 65536) == CSR(32, 128)
    assert Bitmask().resolve(3, 20) == Bitmask(16, 32)
    assert BSR(2, 4).resolve(3, 384) == BSR(2, 4, 16)
    assert BSR(2, 4).resolve(3, 4 * 65535) == BSR(2, 4, 16) and BSR(2, 4).resolve(3, 4 * 65535 + 1) == BSR(2, 4, 32)
    assert CSR().resolve(1, 0) == CSR(16, 1)


# Corruption: each line breaks one thing in buffers that pack made, and names words of the message.

POINTERS: list[tuple[Break, str]] = [
    (put("pointers", 0, 1), "'pointers' at position 0 holds 1, expected 0"),
    (put("pointers", 0, -1), "'pointers' at position 0 holds -1"),
    (put("pointers", -1, 10_000), "'pointers' at position .* holds 10000, expected"),
    (put("pointers", 3, 10_000), "'pointers' at position 4 holds .* less than 10000"),
    (put("pointers", 3, -7), "'pointers' at position 3 holds -7, less than"),
    (put("pointers", 3, -(2**31)), "holds -2147483648"),
    (swap("pointers", lambda t: t.to(torch.int64)), "'pointers' has dtype torch.int64, expected torch.int32"),
    (swap("pointers", shorter), "'pointers' has shape"),
    (swap("pointers", longer), "'pointers' has shape"),
    (swap("pointers", strided), "'pointers' is not contiguous"),
]
INDICES: list[tuple[Break, str]] = [
    (put("indices", 0, -1), "'indices'"),
    (put("indices", -1, 9_999), "'indices' at position .* holds 9999, valid: "),
    (lambda b: put("indices", 1, int(b["indices"][0]))(b), "'indices' at position 1 .*not above"),
    (lambda b: swap("indices", lambda t: t.flip(0))(b), "'indices'"),
    (swap("indices", lambda t: t.to(torch.int64)), "'indices' has dtype torch.int64"),
    (swap("indices", shorter), "'indices' has shape"),
    (swap("indices", longer), "'indices' has shape"),
    (swap("indices", strided), "'indices' is not contiguous"),
]
MASKS: list[tuple[Break, str]] = [
    (put("masks", (0, -1), 1 << 14), "'masks' at position .* sets bits past column"),
    (lambda b: put("masks", (1, 0), int(b["masks"][1, 0]) ^ 1)(b), "masks of row 1, block 0 set"),
    (swap("masks", lambda t: t.to(torch.int64)), "'masks' has dtype torch.int64"),
    (swap("masks", shorter), "'masks' has shape"),
    (swap("masks", lambda t: t[:, :-1].clone()), "'masks' has shape"),
    (swap("masks", strided), "'masks' is not contiguous"),
]
CASES: list[tuple[Format, Break, str]] = [
    *((CSR(16, 16), b, m) for b, m in [*COMMON, *POINTERS, *INDICES]),
    *((CSR(32), b, m) for b, m in [*COMMON, *POINTERS, *INDICES]),
    *((BSR(4, 3), b, m) for b, m in [*COMMON, *POINTERS, *INDICES]),
    *((Bitmask(16, 32), b, m) for b, m in [*COMMON, *POINTERS, *MASKS]),
    *((Bitmask(16), b, m) for b, m in [*COMMON, *POINTERS, *MASKS]),
    *((Dense(), b, m) for b, m in COMMON[2:]),
]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0].text()}-{i}")
def test_validate_rejects(case: int) -> None:
    fmt, change, message = CASES[case]
    buffers = fmt.pack(weight(29, 43, 0.4))
    fmt.validate(buffers, 29, 43)
    with pytest.raises(FormatError, match=message):
        fmt.validate(change(buffers), 29, 43)


def test_validate_rejects_an_index_of_another_block() -> None:
    fmt = CSR(16, 4)
    buffers = fmt.pack(torch.tensor([[0, 1.0, 0, 0, 0, 2.0, 0, 0]]))
    with pytest.raises(FormatError, match=r"'indices' at position 1 holds 3, valid: 4 to 7"):
        fmt.validate(put("indices", 1, 3)(buffers), 1, 8)


@pytest.mark.parametrize("at", [(0, 3, 0), (0, 0, 3)], ids=["rows", "columns"])
def test_validate_rejects_values_in_the_padding_of_bsr(at: tuple[int, ...]) -> None:
    fmt = BSR(4, 4)
    buffers = fmt.pack(torch.ones(3, 3))
    with pytest.raises(FormatError, match="block 0 is not zero in"):
        fmt.validate(put("values", at, 1.0)(buffers), 3, 3)


def test_validate_checks_the_sizes_it_is_given() -> None:
    buffers = CSR().pack(weight(8, 8, 0.5))
    with pytest.raises(FormatError, match="'pointers' has shape"):
        CSR().validate(buffers, 9, 8)
    with pytest.raises(FormatError, match="valid: 0 to 3"):
        CSR().validate(buffers, 8, 4)


@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=ids)
def test_what_no_format_holds(fmt: Format) -> None:
    with pytest.raises(FormatError, match="2-D"):
        fmt.pack(torch.ones(3))
    for dtype in (torch.complex64, torch.int32, torch.bool):
        with pytest.raises(FormatError, match=str(dtype)):
            fmt.pack(torch.ones(2, 2).to(dtype))
        assert "cannot be packed" in str(fmt.refuse(torch.ones(2, 2).to(dtype)))
    with pytest.raises(FormatError, match=r"mask must be bool of shape \(2, 2\)"):
        fmt.pack(torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(FormatError, match="mask must be bool"):
        fmt.pack(torch.ones(2, 2), torch.ones(2, 2))
    assert fmt.refuse(torch.ones(2, 2)) is None


def test_refuses_quantised_and_sparse_tensors() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    assert "quantised" in str(CSR().refuse(quantised))
    with pytest.raises(FormatError, match="to_dense"):
        CSR().pack(torch.ones(2, 2).to_sparse())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CSR(8), "index_bits=8"),
        (lambda: CSR(16, 0), "block=0 must be a positive integer or None"),
        (lambda: CSR(16, True), "block=True"),
        (lambda: Bitmask(8), "width=8 is not one of 16, 32, 64"),
        (lambda: Bitmask(32, 48), "block=48 is not a multiple of width=32"),
        (lambda: BSR(0, 1), "r=0 must be a positive integer"),
        (lambda: BSR(1, 2.0), "c=2.0"),
        (lambda: BSR(1, 2, 64), "index_bits=64"),
    ],
)
def test_fields_are_checked(make: Callable[[], Format], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize("fmt", [f for f in FORMAT_LIST if f != Dense()], ids=[i for i in ids if i != "dense"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_validate_passes_cannot_lead_outside(fmt: Format, data: st.DataObject) -> None:
    """Random damage to an index buffer is refused, or unpacks to a matrix that packs into the very same indices."""
    rows, cols = 9, 21
    buffers = fmt.pack(weight(rows, cols, 0.4))
    key = data.draw(st.sampled_from(fmt.buffers[1:]))
    at = data.draw(st.integers(0, buffers[key].numel() - 1))
    kind = torch.iinfo(buffers[key].dtype)
    value = data.draw(st.one_of(st.integers(-3, 40), st.integers(kind.min, kind.max)))
    damaged = {**buffers, key: buffers[key].clone()}
    damaged[key].view(-1)[at] = value
    try:
        fmt.validate(damaged, rows, cols)
    except FormatError:
        return
    again = fmt.pack(fmt.unpack(damaged, rows, cols))
    assert all(torch.equal(again[k], damaged[k]) for k in damaged)


@pytest.mark.parametrize("shape", [(0, 20), (3, 0), (0, 0)])
def test_bitmasks_of_nothing_are_valid(shape: tuple[int, int]) -> None:
    fmt = Bitmask(16, 16)
    buffers = fmt.pack(torch.zeros(shape))
    fmt.validate(buffers, *shape)
    assert fmt.unpack(buffers, *shape).shape == shape
