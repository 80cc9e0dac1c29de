"""TiledCSL, TwoFour, GroupInt4 and SpQR: round trips, exact bytes, refused corruption, and banks without conflicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import FormatError, SpecError
from sparsec.formats import CSR, Format, GroupInt4, SpQR, TiledCSL, TwoFour, parse
from sparsec.formats._quant import pack_bits, unpack_bits
from sparsec.formats.tiled_csl import conflict_degrees

EXACT: tuple[Format, ...] = (TiledCSL(64), TiledCSL(128), TiledCSL(256), TwoFour())
LOSSY: tuple[Format, ...] = (GroupInt4(), SpQR(), SpQR(0), SpQR(500))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _weight(seed: int, rows: int, cols: int, density: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, cols, generator=generator) < density
    return torch.where(kept, torch.randn(rows, cols, generator=generator), torch.zeros(())).to(dtype)


def _two_of_four(weight: torch.Tensor) -> torch.Tensor:
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % 4)).reshape(rows, -1, 4)
    order = padded.abs().float().argsort(dim=2, descending=True)
    kept = torch.zeros_like(padded, dtype=torch.bool).scatter_(2, order[..., :2], True)
    return torch.where(kept, padded, torch.zeros_like(padded)).reshape(rows, -1)[:, :cols].contiguous()


def _size(buffers: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in buffers.values())


problems = st.tuples(
    st.integers(0, 2**16), st.integers(1, 300), st.integers(1, 200), st.sampled_from((0.0, 0.03, 0.3, 0.8, 1.0)),
    st.sampled_from(DTYPES),
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems, st.sampled_from(EXACT))
def test_exact_round_trips(problem: tuple[int, int, int, float, torch.dtype], fmt: Format) -> None:
    weight = _weight(*problem)
    if fmt == TwoFour():
        weight = _two_of_four(weight)
    rows, cols = weight.shape
    packed = fmt.pack(weight)
    fmt.validate(packed, rows, cols)
    assert torch.equal(fmt.unpack(packed, rows, cols), weight)
    assert _size(packed) == fmt.nbytes(rows, cols, fmt.stored(weight), weight.element_size())
    kept = fmt.positions(packed, rows, cols)
    assert (kept | (weight == 0)).all() and (fmt == TwoFour() or torch.equal(kept, weight != 0))
    assert parse(fmt.text()) == fmt and tuple(packed) == fmt.buffers and packed["values"].dtype == weight.dtype


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problems, st.sampled_from(LOSSY))
def test_lossy_formats_hold_what_unpack_says(problem: tuple[int, int, int, float, torch.dtype], fmt: Format) -> None:
    weight = _weight(*problem)
    rows, cols = weight.shape
    packed = fmt.pack(weight)
    fmt.validate(packed, rows, cols)
    back = fmt.unpack(packed, rows, cols)
    assert back.dtype == weight.dtype and back.shape == weight.shape and not fmt.exact
    assert _size(packed) == fmt.nbytes(rows, cols, fmt.stored(weight), weight.element_size())
    assert not back[~fmt.positions(packed, rows, cols)].any()
    # each group spans at most twice the largest value; half a step of 4 or 3 bits, and the rounding of the type
    step = 2 * weight.float().abs().max() / (15 if fmt.name == "group_int4" else 7)
    slack = 1.05 + 20 * torch.finfo(weight.dtype).eps
    assert ((back.float() - weight.float()).abs() <= step / 2 * slack).all()


@pytest.mark.parametrize("fmt", [*EXACT, *LOSSY], ids=lambda f: f.text())
def test_corruption_is_refused_by_name(fmt: Format) -> None:
    weight = _two_of_four(_weight(3, 40, 96, 0.5, torch.float16))
    packed = fmt.pack(weight)
    for key, tensor in packed.items():
        other = tensor[:-1] if tensor.numel() else tensor.new_zeros(3)
        for bad in (other, tensor.to(torch.int64), tensor.flatten()[:0]):
            if bad.shape == tensor.shape and bad.dtype == tensor.dtype:
                continue
            with pytest.raises(FormatError, match=fmt.name):
                fmt.validate({**packed, key: bad.contiguous()}, 40, 96)
    with pytest.raises(FormatError, match="expected"):
        fmt.validate(dict(reversed(packed.items())), 40, 96)


def _broken(fmt: Format, key: str, at: int, value: int | float, complaint: str) -> None:
    weight = _two_of_four(_weight(3, 40, 90, 0.5, torch.float16))
    packed = {name: tensor.clone() for name, tensor in fmt.pack(weight).items()}
    packed[key].view(-1)[at] = value
    with pytest.raises(FormatError, match=complaint):
        fmt.validate(packed, 40, 90)


def test_indices_out_of_range_are_refused() -> None:
    tile = TiledCSL(64)
    _broken(tile, "places", 0, 64 * 64 + 64, "position 0 holds 4160; valid: 0 to 4159")
    _broken(tile, "places", 0, 41 * 64, r"which lies outside \(40, 90\)")
    _broken(tile, "places", 0, 64 * 64, "whose value must be zero")
    _broken(tile, "pointers", 1, 3, "not a multiple of 8")
    _broken(TwoFour(), "places", 2, 0, r"row 0, group 8 the places \[0, 0\]; valid: two that rise")
    _broken(TwoFour(), "values", 2 * 23 + 1, 1.0, r"not zero outside \(40, 90\)")
    _broken(GroupInt4(), "indices", 0, 6, "valid: 0 to 5|not above")
    _broken(GroupInt4(), "values", 0, float("nan"), "not finite")
    _broken(SpQR(), "indices", 0, -1, "valid: 0 to 89")
    _broken(SpQR(), "scales", 0, float("inf"), "not finite")
    places = tile.pack(_weight(0, 64, 64, 0.5, torch.float16))
    places["places"][1] = places["places"][0]
    with pytest.raises(FormatError, match="repeats another entry"):
        tile.validate(places, 64, 64)


def test_refusals() -> None:
    assert "4 nonzeros in columns 0 to 3" in str(TwoFour().refuse(torch.ones(2, 8)))
    for fmt in (GroupInt4(), SpQR()):
        assert "infinite" in str(fmt.refuse(torch.full((2, 16), float("inf"))))
        assert "not quantised" in str(fmt.refuse(torch.ones(2, 16, dtype=torch.float64)))
    with pytest.raises(SpecError, match="64, 128, 256"):
        TiledCSL(100)
    with pytest.raises(SpecError, match="0 to 500"):
        SpQR(501)


def test_outliers_are_never_in_the_padding() -> None:
    weight = torch.zeros(6, 17)
    packed = SpQR(500).pack(weight)
    SpQR(500).validate(packed, 6, 17)
    assert packed["values"].numel() == 51 and torch.equal(SpQR(500).unpack(packed, 6, 17), weight)


def test_the_mask_is_the_pattern() -> None:
    weight = _weight(1, 70, 130, 0.9, torch.float32)
    mask = _weight(2, 70, 130, 0.3, torch.float32) != 0
    packed = TiledCSL().pack(weight, mask)
    assert torch.equal(TiledCSL().unpack(packed, 70, 130), torch.where(mask, weight, torch.zeros(())))


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_survive_packing(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (50, 16), generator=torch.Generator().manual_seed(1))
    words = pack_bits(codes, bits)
    assert words.shape == (50, bits) and words.dtype == torch.int16
    assert torch.equal(unpack_bits(words, bits), codes)


# -- shared memory -----------------------------------------------------------------------------------------------------


def test_a_warp_scatters_without_bank_conflicts_where_the_pattern_allows() -> None:
    """Diagonal stripes fill all banks alike: then every one of the 32 lanes hits a bank of its own, every time."""
    rows, cols = torch.arange(128)[:, None], torch.arange(64)[None, :]
    for stripe in (2, 4, 8):
        weight = ((rows + cols) % stripe < stripe // 2).half()
        packed = TiledCSL(128).pack(weight)
        degrees = conflict_degrees(packed["places"], packed["pointers"])
        assert degrees.size == 128 * 64 // 2 // 32 and degrees.max() == 1
    full = TiledCSL(128).pack(torch.ones(256, 128, dtype=torch.float16))
    assert conflict_degrees(full["places"], full["pointers"]).max() == 1


@pytest.mark.parametrize("density", [0.05, 0.2, 0.4])
def test_random_patterns_come_close_to_the_least_conflicts_possible(density: float) -> None:
    """A tile cannot do with fewer turns than its fullest bank has entries; and naive order does far worse."""
    weight = _weight(7, 512, 512, density, torch.float16)
    packed = TiledCSL(128).pack(weight)
    places, ends = packed["places"], packed["pointers"].tolist()
    spent = least = naive = 0
    for begin, end in zip(ends[:-1], ends[1:], strict=True):  # noqa: RUF007
        part = places[begin:end]
        edge = torch.tensor([0, end - begin], dtype=torch.int32)
        degrees = conflict_degrees(part, edge)
        spent += int(degrees.sum())
        least += max(degrees.size, int(np.bincount(part.numpy().view(np.uint16).astype(int) // 2 % 32).max()))
        naive += int(conflict_degrees(part.sort().values, edge).sum())
    assert spent <= 1.06 * least and naive > 2 * spent


def test_bytes_are_a_share_of_dense() -> None:
    """4 bytes an entry, padded to eights, and 4 a tile: smaller than dense 16-bit weights below half density."""
    weight = _weight(9, 1024, 1024, 0.2, torch.float16)
    entries = int((weight != 0).sum())
    size = TiledCSL().nbytes(1024, 1024, TiledCSL().stored(weight), 2)
    tiles = 8 * 16
    assert 4 * entries + 4 * (tiles + 1) <= size <= 4 * (entries + 7 * tiles) + 4 * (tiles + 1)
    assert size < 0.41 * 2 * 1024 * 1024 and size < CSR(index_bits=32).nbytes(1024, 1024, entries, 2)
    half = GroupInt4().nbytes(4096, 4096, 4096 * 4096 // 2, 2)
    assert half <= 0.26 * 2 * 4096 * 4096
