"""Structures: what is planted is found, exactly, and an unstructured weight claims nothing."""

from __future__ import annotations

import pytest
import torch

from sparsec.graph import Structure
from sparsec.structure import detect, measure


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(rows: int, cols: int) -> torch.Tensor:
    """Random values without a single zero."""
    return torch.rand(rows, cols, generator=gen()) + 0.5


def random_mask(rows: int, cols: int, density: float, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, cols, generator=gen(seed)) < density


def top_n(dense: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = torch.rand(dense.numel() // m, m, generator=gen(2))
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, dim=1).indices, True)
    return dense * mask.view_as(dense)


def blocks(r: int, c: int, high: int, wide: int, density: float = 0.3) -> torch.Tensor:
    mask = random_mask(high, wide, density).repeat_interleave(r, 0).repeat_interleave(c, 1)
    return values(high * r, wide * c) * mask


def kinds(dense: torch.Tensor) -> list[str]:
    return [s.kind for s in detect(dense)]


def test_dense_and_empty_weights() -> None:
    assert detect(values(5, 7)) == (Structure("dense"),)
    assert measure(values(5, 7))[0] == 35
    assert detect(torch.zeros(3, 4)) == (
        Structure("zero_rows", (3,)),
        Structure("zero_cols", (4,)),
        Structure("unstructured"),
    )
    assert detect(torch.zeros(0, 4)) == (Structure("dense"),)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(64, 64), (128, 96), (384, 384), (100, 77)])
def test_random_zeros_claim_nothing_but_zeros(density: float, shape: tuple[int, int]) -> None:
    dense = values(*shape) * random_mask(*shape, density)
    found = set(kinds(dense)) - {"zero_rows", "zero_cols"}
    assert found == {"unstructured"}, detect(dense)
    assert measure(dense)[0] == int((dense != 0).sum())


@pytest.mark.parametrize("m", range(2, 33))
@pytest.mark.parametrize("part", ["one", "half", "most"])
def test_nm(m: int, part: str) -> None:
    n = {"one": 1, "half": max(1, m // 2), "most": m - 1}[part]
    dense = top_n(values(90, 6 * m), n, m)
    found = [s for s in detect(dense) if s.kind == "nm"]
    assert len(found) == 1
    (a, b) = found[0].params
    assert m % b == 0 and a * m == n * b  # the same structure in its smallest form, where random groups allow one
    assert Structure("fan_in", (6 * n,)) in detect(dense)


def test_nm_of_a_multiple_is_the_tightest() -> None:
    assert Structure("nm", (2, 4)) in detect(top_n(values(96, 96), 2, 4))
    assert Structure("nm", (1, 2)) in detect(top_n(values(96, 96), 1, 2))


def test_nm_needs_every_entry() -> None:
    dense = top_n(values(200, 64), 2, 4)
    dense[150, 20:23] = 1.0
    assert Structure("nm", (2, 4)) not in detect(dense)
    assert all(n * 4 > m * 2 for s in detect(dense) if s.kind == "nm" for n, m in [s.params])
    fewer = top_n(values(200, 64), 2, 4)
    fewer[7, 8:12] = 0
    assert Structure("nm", (2, 4)) in detect(fewer)
    assert "fan_in" not in kinds(fewer)


def test_nm_of_a_convolution_runs_along_channels() -> None:
    weight = torch.rand(32, 3, 3, 16, generator=gen()) + 0.5
    planted = top_n(weight.reshape(-1, 16), 1, 4).reshape(32, 3, 3, 16).permute(0, 3, 1, 2)  # (out, in, 3, 3)
    flat = planted.reshape(32, -1)
    assert Structure("nm", (1, 4)) in detect(flat, kernel=9)
    assert "nm" not in [s.kind for s in detect(flat)]


@pytest.mark.parametrize(
    "shape", [(16, 1), (1, 4), (4, 4), (1, 2), (2, 1), (32, 32), (64, 1), (3, 5), (1, 12), (8, 16), (1, 64)], ids=str
)
def test_blocks(shape: tuple[int, int]) -> None:
    r, c = shape
    dense = blocks(r, c, 40, 40)
    assert detect(dense)[0] == Structure("block", shape)
    broken = dense.clone()
    empty = (dense == 0).nonzero()[5]
    broken[empty[0], empty[1]] = 1.0
    assert "block" not in kinds(broken)


def test_blocks_with_a_tail_and_large_blocks() -> None:
    assert detect(blocks(4, 4, 20, 20)[:78, :77].contiguous())[0] == Structure("block", (4, 4))
    assert detect(blocks(128, 96, 4, 4))[0] == Structure("block", (64, 32))
    assert detect(blocks(1, 100, 40, 4))[0] == Structure("block", (1, 50))


@pytest.mark.parametrize("shape", [(16, 1), (1, 16), (4, 4), (8, 8), (4, 1)], ids=str)
def test_blocks_with_accidental_zeros(shape: tuple[int, int]) -> None:
    dense = blocks(*shape, 48, 48)
    places = (dense != 0).nonzero()
    for i in range(0, len(places), len(places) // 7):
        dense[places[i][0], places[i][1]] = 0.0
    assert Structure("block", shape) in detect(dense)


def test_int8_blocks() -> None:
    dense = (blocks(16, 1, 12, 64) * 60).to(torch.int8)
    dense[(dense == 41)] = 0
    assert detect(dense)[0] == Structure("block", (16, 1))


def test_fan_in() -> None:
    scores = torch.rand(60, 90, generator=gen(3))
    mask = torch.zeros(60, 90).scatter_(1, scores.topk(17, dim=1).indices, 1.0)
    assert detect(values(60, 90) * mask) == (Structure("fan_in", (17,)), Structure("unstructured"))
    mask[[3, 9]] = 0
    assert detect(values(60, 90) * mask) == (
        Structure("fan_in", (17,)),
        Structure("zero_rows", (2,)),
        Structure("unstructured"),
    )
    mask[0, mask[0].argmax()] = 0
    assert "fan_in" not in kinds(values(60, 90) * mask)


@pytest.mark.parametrize("band", [(0, 0), (1, 1), (0, 3), (4, 0), (2, 5)], ids=str)
def test_banded(band: tuple[int, int]) -> None:
    dense = values(40, 40).tril(band[1]).triu(-band[0])
    assert Structure("banded", band) in detect(dense)
    dense[30, 2] = 1.0
    assert Structure("banded", band) not in detect(dense)


def test_wide_bands_are_no_structure() -> None:
    assert "banded" not in kinds(values(40, 40).tril())


def test_block_diagonal() -> None:
    parts = [values(6, 10) for _ in range(5)]
    assert Structure("block_diagonal", (6, 10)) in detect(torch.block_diag(*parts))
    assert Structure("block_diagonal", (1, 1)) in detect(torch.eye(12))
    uneven = torch.block_diag(values(3, 5), values(9, 4), values(4, 11))
    assert Structure("block_diagonal", (3, 5, 9, 4, 4, 11)) in detect(uneven)
    uneven[0, 19] = 1.0
    assert "block_diagonal" not in kinds(uneven)


def test_zero_rows_and_columns() -> None:
    dense = values(500, 30)
    dense[[4, 300]] = 0
    dense[:, [1, 2, 29]] = 0
    found = detect(dense)
    assert Structure("zero_rows", (2,)) in found and Structure("zero_cols", (3,)) in found


def test_nan_counts_and_minus_zero_does_not() -> None:
    dense = values(8, 8)
    dense[0, 0] = float("nan")
    assert detect(dense) == (Structure("dense"),)
    dense[1, 1] = -0.0
    nnz, found = measure(dense)
    assert nnz == 63 and found == (Structure("unstructured"),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    dense = (blocks(4, 4, 16, 16) * 3).to(dtype)
    assert detect(dense)[0] == Structure("block", (4, 4))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)], ids=str)
def test_tiny_weights(shape: tuple[int, int]) -> None:
    dense = values(*shape)
    dense[0, 0] = 0
    nnz, found = measure(dense)
    assert nnz == dense.numel() - 1
    assert found[-1] == Structure("unstructured")
