"""N:M and constant fan-in: formats whose rows all store the same number of values."""

from __future__ import annotations

import pytest
import torch
from format_tools import COMMON, DTYPES, Break, nbytes, put, shorter, strided, swap, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import FormatError, SpecError
from sparsec.formats import NM, FanIn, Format, parse

# N:M


def top(dense: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """At most n random nonzeros per group of m columns, the last group cut off."""
    rows, cols = dense.shape
    groups = -(-cols // m)
    scores = torch.rand(rows, groups, m, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(n, dim=2).indices, True)
    return dense * mask.view(rows, groups * m)[:, :cols]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 16), (1, 32), (31, 32)]),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_of_nm(rows: int, cols: int, nm: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    fmt, dense = NM(*nm), top(weight(rows, cols, density, dtype), *nm)
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    assert torch.equal(fmt.unpack(buffers, rows, cols), dense)
    assert nbytes(buffers) == fmt.nbytes(rows, cols, fmt.stored(dense), dense.element_size())
    assert fmt.positions(buffers, rows, cols)[dense != 0].all()
    assert parse(fmt.text()) == fmt


def test_layout_and_refusals_of_nm() -> None:
    dense = torch.tensor([[0, 1.0, 0, 2, 0, 0, 3, 0], [0, 0, 0, 0, 4, 5, 0, 0]])
    buffers = NM(2, 4).pack(dense)
    assert buffers["values"].tolist() == [[[1, 2], [0, 3]], [[0, 0], [4, 5]]]
    assert buffers["places"].tolist() == [[[1, 3], [0, 2]], [[0, 1], [0, 1]]]
    dense[1, 6] = 6.0
    assert NM(2, 4).refuse(dense) == "row 1 has 3 nonzeros in columns 4 to 7, 2 at most fit"
    with pytest.raises(FormatError, match="row 1 has 3 nonzeros"):
        NM(2, 4).pack(dense)
    mask = dense != 0
    mask[1, 6] = False
    assert torch.equal(NM(2, 4).unpack(NM(2, 4).pack(dense, mask), 2, 8), dense * mask)
    for n, m in ((4, 4), (2, 64), (0, 4)):
        with pytest.raises(SpecError, match="NM"):
            NM(n, m)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *COMMON,
        (put("places", (3, 2, 1), 4), r"'places' at \(3, 2, 1\) holds 4; valid: 0 to 3"),
        (put("places", (3, 2, 1), 0), "places rise strictly inside a group"),
        (put("places", (3, 2, 0), 3), "places rise strictly inside a group"),
        (lambda b: put("places", (0, -1, 1), 3)(put("values", (0, -1, 1), 1.0)(b)), "in a column past 42"),
        (swap("places", lambda t: t.to(torch.int32)), "'places' has dtype torch.int32"),
        (swap("places", shorter), "'places' has shape"),
        (swap("places", strided), "'places' is not contiguous"),
    ],
)
def test_validate_rejects_broken_nm(change: Break, message: str) -> None:
    fmt = NM(2, 4)
    buffers = fmt.pack(top(weight(29, 43, 1.0), 2, 4))
    fmt.validate(buffers, 29, 43)
    with pytest.raises(FormatError, match=message):
        fmt.validate(change(buffers), 29, 43)


# Constant fan-in


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    spare=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_of_fan_in(rows: int, cols: int, density: float, spare: int, dtype: torch.dtype) -> None:
    dense = weight(rows, cols, density, dtype)
    most = int((dense != 0).sum(1).max())
    fmt = FanIn(max(1, min(cols, most + spare)))
    buffers = fmt.pack(dense)
    fmt.validate(buffers, rows, cols)
    assert torch.equal(fmt.unpack(buffers, rows, cols), dense)
    assert nbytes(buffers) == fmt.nbytes(rows, cols, fmt.stored(dense), dense.element_size())
    assert int(fmt.positions(buffers, rows, cols).sum()) == rows * fmt.k
    assert parse(fmt.resolve(rows, cols).text()) == fmt.resolve(rows, cols)


def test_layout_and_refusals_of_fan_in() -> None:
    dense = torch.tensor([[0, 1.0, 0, 2, 0], [0, 0, 0, 0, 3]])
    buffers = FanIn(2).pack(dense)
    assert buffers["values"].tolist() == [[1, 2], [0, 3]] and buffers["indices"].tolist() == [[1, 3], [0, 4]]
    assert FanIn(1).refuse(dense) == "row 0 has 2 nonzeros, 1 at most fit"
    with pytest.raises(FormatError, match=r"fan_in\(k=6\) cannot hold .* k=6 is more than its 5 columns"):
        FanIn(6).pack(dense)
    wide = torch.zeros(2, 65536)
    wide[:, 65535] = 1.0
    assert "use index_bits=32" in str(FanIn(1, 16).refuse(wide))
    assert FanIn(1).pack(wide)["indices"].tolist() == [[65535], [65535]]
    for make in (lambda: FanIn(0), lambda: FanIn(2, 8)):
        with pytest.raises(SpecError, match="FanIn"):
            make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *COMMON,
        (put("indices", (3, 4), 43), r"'indices' at \(3, 4\) holds 43; valid: 0 to 42"),
        (put("indices", (3, 0), -1), "valid: 0 to 42"),
        (put("indices", (3, 4), 0), "indices rise strictly inside a row"),
        (swap("indices", lambda t: t.to(torch.int32)), "'indices' has dtype torch.int32"),
        (swap("indices", shorter), "'indices' has shape"),
        (swap("indices", strided), "'indices' is not contiguous"),
    ],
)
def test_validate_rejects_broken_fan_in(change: Break, message: str) -> None:
    fmt = FanIn(5)
    mask = torch.zeros(29, 43).scatter_(1, torch.rand(29, 43, generator=torch.Generator().manual_seed(1)).topk(5)[1], 1)
    buffers = fmt.pack(weight(29, 43, 1.0) * mask)
    fmt.validate(buffers, 29, 43)
    with pytest.raises(FormatError, match=message):
        fmt.validate(change(buffers), 29, 43)


@pytest.mark.parametrize("fmt", [NM(2, 4), FanIn(3)], ids=lambda f: f.name)
def test_dtypes_without_a_kernel_are_refused_by_name(fmt: Format) -> None:
    assert "complex64" in (fmt.refuse(torch.zeros(4, 8, dtype=torch.complex64)) or "")
    assert fmt.refuse(torch.zeros(4, 8)) is None
