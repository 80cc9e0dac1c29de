"""Convolution over points: equal to dense convolution on the occupied cells, forwards and backwards, in every dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsec
from sparsec.codegen.gather import kernel, spec
from sparsec.errors import InputError, SpecError
from sparsec.ops.gather import GATHER, Pairs, product
from sparsec.points import (
    FocalConv,
    SparseConv,
    SparseTensor,
    SubmanifoldConv,
    focal_conv,
    sparse_conv,
    submanifold_conv,
)
from sparsec.points import tensor as tensor_module

DENSE = {2: F.conv2d, 3: F.conv3d}


def cloud(
    *size: int, occupancy: float = 0.2, dtype: torch.dtype = torch.float32, shuffle: bool = True, seed: int = 0
) -> tuple[SparseTensor, torch.Tensor, torch.Tensor]:
    """(points, the dense grid, its mask (batch, 1, *grid)); size is (batch, channels, *grid)."""
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(size[0], *size[2:], generator=gen) < occupancy
    dense = torch.randn(size, generator=gen, dtype=torch.float64).to(dtype) * mask[:, None]
    points = SparseTensor.from_dense(dense, mask)
    if shuffle:
        order = torch.randperm(len(points.coords), generator=gen)
        points = SparseTensor(points.coords[order], points.features[order], points.shape, points.batch)
    return points, dense, mask[:, None]


def weights(
    out: int, inp: int, *kernel_size: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    made = torch.randn(out, inp, *kernel_size, generator=gen, dtype=torch.float64)
    return (made / math.sqrt(made[0].numel())).to(dtype), torch.randn(out, generator=gen, dtype=torch.float64).to(dtype)


def reached(mask: torch.Tensor, kernel_size: tuple[int, ...], **conv: Any) -> torch.Tensor:
    return DENSE[mask.dim() - 2](mask.double(), torch.ones(1, 1, *kernel_size, dtype=torch.float64), **conv) > 0


SUBMANIFOLD = [  # size, out, kernel, dilation
    ((2, 5, 9, 8, 7), 7, (3, 3, 3), 1),
    ((1, 1, 6, 5, 4), 1, (1, 1, 1), 1),
    ((1, 33, 7, 7, 7), 65, (3, 1, 5), (1, 2, 1)),
    ((3, 16, 11, 13), 16, (3, 3), 1),
    ((2, 4, 11, 13), 130, (5, 3), (2, 1)),
]


@pytest.mark.parametrize(("size", "out", "kernel_size", "dilation"), SUBMANIFOLD)
@pytest.mark.parametrize("large", [False, True], ids=["table", "search"])
def test_submanifold_equals_dense_on_the_points(
    size: tuple[int, ...], out: int, kernel_size: tuple[int, ...], dilation: Any, large: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tensor_module, "TABLE", 0 if large else 1 << 22)
    points, dense, mask = cloud(*size)
    weight, bias = weights(out, size[1], *kernel_size)
    steps = (dilation,) * len(kernel_size) if isinstance(dilation, int) else dilation
    want = DENSE[len(kernel_size)](
        dense.double(), weight.double(), bias.double(), dilation=steps,
        padding=tuple(k // 2 * d for k, d in zip(kernel_size, steps)),
    )  # fmt: skip
    got = submanifold_conv(points, weight, bias, dilation)
    assert got.coords is points.coords and got.index is points.index
    assert (got.dense() - want * mask).abs().max() < 1e-5


REGULAR = [  # size, out, kernel, stride, padding, dilation
    ((2, 5, 9, 8, 7), 7, (3, 3, 3), 2, 1, 1),
    ((1, 3, 9, 8, 7), 4, (2, 2, 2), 2, 0, 1),
    ((1, 8, 10, 9, 8), 8, (3, 2, 1), (1, 2, 3), (2, 0, 1), (2, 1, 1)),
    ((2, 17, 14, 9), 31, (3, 3), (2, 1), (0, 1), 1),
    ((1, 2, 5, 5), 3, (4, 4), 1, 3, 1),
]


@pytest.mark.parametrize(("size", "out", "kernel_size", "stride", "padding", "dilation"), REGULAR)
@pytest.mark.parametrize("large", [False, True], ids=["table", "search"])
def test_regular_equals_dense_on_what_is_reached(
    size: Any, out: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, large: bool, monkeypatch: Any
) -> None:
    if large:
        monkeypatch.setattr(tensor_module, "TABLE", 0)
        monkeypatch.setattr(sparsec.points.rulebook, "TABLE", 0)
    points, dense, mask = cloud(*size, occupancy=0.1)
    weight, bias = weights(out, size[1], *kernel_size)
    conv = {"stride": stride, "padding": padding, "dilation": dilation}
    want = DENSE[len(kernel_size)](dense.double(), weight.double(), bias.double(), **conv)
    on = reached(mask, kernel_size, **conv)
    got = sparse_conv(points, weight, bias, **conv)
    assert got.shape == tuple(want.shape[2:]) and len(got.coords) == int(on.sum())
    assert (got.dense() - want * on).abs().max() < 1e-5


def test_gradients_are_those_of_dense_convolution() -> None:
    points, dense, mask = cloud(2, 4, 7, 6, 5)
    weight, bias = weights(6, 4, 3, 3, 3)
    for wide in (torch.float32, torch.float64):
        mine = [t.detach().to(wide, copy=True).requires_grad_() for t in (points.features, weight, bias)]
        theirs = [t.detach().double().requires_grad_() for t in (dense, weight, bias)]
        y = submanifold_conv(points.with_features(mine[0]), *mine[1:])
        out = sparse_conv(y, mine[1][:, :1].expand(-1, 6, -1, -1, -1), stride=2, padding=1).features.square().sum()
        middle = F.conv3d(*theirs, padding=1) * mask
        wide_weight = theirs[1][:, :1].expand(-1, 6, -1, -1, -1)
        want = F.conv3d(middle, wide_weight, stride=2, padding=1).square().sum()
        out.backward()
        want.backward()
        at = (points.coords[:, 0], slice(None), *points.coords[:, 1:].unbind(1))
        for a, b in zip([t.grad for t in mine], [theirs[0].grad[at], theirs[1].grad, theirs[2].grad]):
            assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_gradcheck_in_float64() -> None:
    points, _, _ = cloud(1, 2, 4, 4, 3, dtype=torch.float64)
    weight, bias = (t.requires_grad_() for t in weights(3, 2, 3, 3, 1, dtype=torch.float64))
    features = points.features.requires_grad_()

    def both(f: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = submanifold_conv(points.with_features(f), w, b)
        return sparse_conv(y, w[:, :1].expand(-1, 3, -1, -1, -1), stride=2, padding=1).dense()

    assert torch.autograd.gradcheck(both, (features, weight, bias))


def test_focal_convolution_lies_between_submanifold_and_regular() -> None:
    points, _, _ = cloud(2, 4, 8, 8, 8, occupancy=0.05)
    weight, bias = weights(5, 4, 3, 3, 3)
    importance = torch.rand(len(points.coords), 27, generator=torch.Generator().manual_seed(2)) * 0.98 + 0.01
    shut = focal_conv(points, weight, importance, 1.0, bias, weigh=False)
    assert torch.equal(shut.features, submanifold_conv(points, weight, bias).features)
    weighed = points.with_features(points.features * importance[:, 13:14])
    for weigh, source in ((False, points), (True, weighed)):
        wide = focal_conv(points, weight, importance, 0.0, bias, weigh=weigh)
        want = sparse_conv(source, weight, bias, padding=1)
        assert len(wide.coords) == len(want.coords)
        assert torch.allclose(wide.dense(), want.dense(), atol=1e-6)
    counts = [len(focal_conv(points, weight, importance, t, bias).coords) for t in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] > counts[-1]


def test_focal_outputs_are_exactly_those_the_importance_names() -> None:
    coords = torch.tensor([[0, 1, 1], [0, 4, 4], [0, 0, 3]])
    points = SparseTensor(coords, torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), (6, 6), 1)
    importance = torch.zeros(3, 9)
    importance[0, 4], importance[0, 5], importance[0, 8] = 0.9, 0.5, 0.49  # right of it, and below right: too weak
    importance[1, 0] = 1.0  # a point whose own importance is small grows nothing
    importance[2, 4], importance[2, 1] = 0.9, 0.9  # above the first row: outside the grid
    weight, _ = weights(3, 2, 3, 3)
    got = focal_conv(points, weight, importance, 0.5, weigh=False)
    assert got.coords.tolist() == [*coords.tolist(), [0, 1, 2]]
    want = F.conv2d(points.dense(), weight, padding=1)
    assert torch.allclose(got.features, want[0][:, got.coords[:, 1], got.coords[:, 2]].t(), atol=1e-6)


def test_the_gradient_reaches_the_importance() -> None:
    torch.manual_seed(0)
    layer = FocalConv(4, 6, 3, dims=2, threshold=0.4)
    points, _, _ = cloud(1, 4, 9, 9)
    layer(points).features.square().sum().backward()
    centre = layer.scores.weight.grad[4]
    assert centre.abs().max() > 0 and all(p.grad is not None for p in layer.parameters())


def test_modules_take_the_parameters_of_torch() -> None:
    torch.manual_seed(0)
    dense = nn.Conv3d(3, 5, 3, stride=2, padding=1)
    points, grid, mask = cloud(1, 3, 8, 8, 8)
    layer = SparseConv(3, 5, 3, stride=2, padding=1)
    layer.load_state_dict(dense.state_dict())
    on = reached(mask, (3, 3, 3), stride=2, padding=1)
    assert torch.allclose(layer(points).dense(), dense(grid) * on, atol=1e-5)
    net = nn.Sequential(SubmanifoldConv(3, 4, dims=3), SubmanifoldConv(4, 5, bias=False))
    assert net(points).features.shape == (len(points.coords), 5)


def test_rulebooks_are_built_once_per_kernel_and_shared() -> None:
    points, _, _ = cloud(1, 4, 8, 8, 8)
    weight, _ = weights(4, 4, 3, 3, 3)
    y = submanifold_conv(submanifold_conv(points, weight), weight)
    assert list(points.index.rulebooks) == [("submanifold", (3, 3, 3), (1, 1, 1))] and y.index is points.index
    a, b = (sparse_conv(points, weight, stride=2) for _ in range(2))
    assert a.index is b.index and a.index is not points.index and len(points.index.rulebooks) == 2
    submanifold_conv(points, weight, dilation=2)
    assert len(points.index.rulebooks) == 3


def test_pairs_count_what_is_multiplied() -> None:
    """Three in a row: the middle meets three, the ends two each."""
    points = SparseTensor(torch.tensor([[0, 2, 1], [0, 2, 2], [0, 2, 3]]), torch.ones(3, 1), (5, 5), 1)
    pairs, _ = sparsec.points.rulebook.submanifold(points.index, (3, 3), (1, 1))
    assert pairs.bounds[-1] == 7 and [b - a for a, b in zip(pairs.bounds, pairs.bounds[1:])] == [
        0,
        0,
        0,
        2,
        3,
        2,
        0,
        0,
        0,
    ]
    back = pairs.transposed
    assert sorted(zip(back.source.tolist(), back.target.tolist())) == sorted(
        zip(pairs.target.tolist(), pairs.source.tolist())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    points, dense, mask = cloud(1, 32, 6, 6, 6, dtype=dtype)
    weight, bias = weights(8, 32, 3, 3, 3, dtype=dtype)
    got = submanifold_conv(points, weight, bias)
    want = F.conv3d(dense.double(), weight.double(), bias.double(), padding=1) * mask
    assert got.features.dtype is dtype
    assert (got.dense().double() - want).abs().max() < 2 * torch.finfo(dtype).eps * float(want.abs().max())


def test_empty_and_full_grids() -> None:
    weight, bias = weights(3, 2, 3, 3)
    none = SparseTensor(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 2), (4, 4), 2)
    assert submanifold_conv(none, weight, bias).dense().shape == (2, 3, 4, 4)
    assert not sparse_conv(none, weight, bias).coords.numel() and none.occupancy == 0
    points, dense, _ = cloud(2, 2, 4, 4, occupancy=1.1)
    assert points.occupancy == 1
    assert torch.allclose(
        submanifold_conv(points, weight, bias).dense(), F.conv2d(dense, weight, bias, padding=1), atol=1e-6
    )


def test_every_instruction_set_gives_the_same() -> None:
    from sparsec.codegen.build import build_kernels
    from sparsec.target import Target

    target = Target.probe()
    points, _, _ = cloud(1, 21, 6, 6, 6, occupancy=0.4)
    weight, bias = weights(37, 21, 3, 3, 3)
    packed = weight.flatten(2)
    pairs, _ = sparsec.points.rulebook.submanifold(points.index, (3, 3, 3), (1, 1, 1))
    want = product(points.features.double(), packed.double(), bias.double(), pairs)
    n = len(points.coords)
    for isa in [i for i in ("avx2", "portable") if i in target.isas]:
        y = torch.full((n, 37), math.nan)
        (built,) = build_kernels([spec(isa)], target).values()
        (source, begin, starts), (_, chunk, *_) = pairs.operands
        operands = points.features, packed, bias, None, source, begin, starts, y, torch.empty_like(packed), None
        built.call(*operands, 1, n, n, 27, chunk, 1, 21, 37, 0, 0)
        assert (y - want).abs().max() < 1e-5, isa


def test_indices_out_of_range_never_reach_memory() -> None:
    ones = torch.ones(4, 2)
    pairs = Pairs.build(torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.arange(4), 1, 4, 4)
    weight = torch.ones(3, 2, 1)
    assert torch.equal(product(ones, weight, None, pairs), torch.full((4, 3), 2.0))
    (source, target, starts), sizes = pairs.operands
    for bad in (
        [source + 1, target, starts],
        [source, target - 1, starts],
        [source, target, starts + 9],
        [source, target, -starts],
    ):
        with pytest.raises(InputError, match="out of range"):
            GATHER(ones, weight, None, bad, sizes, [], [])
    with pytest.raises(InputError, match="do not fit"):
        product(ones, weight[:, :1], None, pairs)
    with pytest.raises(InputError, match="refuses"):
        GATHER(ones, weight, None, [source.long(), target, starts], sizes, [], [])
    with pytest.raises(InputError, match="32 bits"):
        Pairs.build(*[torch.zeros(1, dtype=torch.int64)] * 3, offsets=1, inputs=2**31, outputs=1)
    assert kernel().spec.op == "gather_gemm"


GOOD = torch.tensor([[0, 1, 2], [1, 0, 0]])
BAD: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "list": ([[0, 1, 2]], torch.ones(1, 1), {}, "must be tensors"),
    "float coordinates": (GOOD.float(), torch.ones(2, 1), {}, "must be integers"),
    "one dimension": (GOOD[:, :2], torch.ones(2, 1), {}, r"\(points, 1 \+ d\)"),
    "lengths": (GOOD, torch.ones(3, 1), {}, "with 2 points"),
    "integer features": (GOOD, torch.ones(2, 1, dtype=torch.int64), {}, "floating point"),
    "duplicates": (GOOD[[0, 1, 0]], torch.ones(3, 1), {}, r"\[0, 1, 2\] occurs more than once"),
    "duplicates in a large grid": (GOOD[[0, 1, 0]], torch.ones(3, 1), {"shape": (9999, 9999)}, "more than once"),
    "negative": (-GOOD, torch.ones(2, 1), {}, "outside the grid"),
    "beyond the shape": (GOOD, torch.ones(2, 1), {"shape": (2, 2)}, "x = 2 lies outside"),
    "beyond the batch": (GOOD, torch.ones(2, 1), {"batch": 1}, "image = 1 lies outside"),
    "shape of another rank": (GOOD, torch.ones(2, 1), {"shape": (4, 4, 4)}, "2 positive integers"),
    "no points": (GOOD[:0], torch.ones(0, 1), {}, "give shape and batch"),
    "cells beyond 62 bits": (GOOD, torch.ones(2, 1), {"shape": (2**31, 2**31)}, "62 bits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused(case: str) -> None:
    coords, features, more, message = BAD[case]
    with pytest.raises(InputError, match=message):
        SparseTensor(coords, features, **more)


def test_bad_calls_are_refused() -> None:
    points, dense, _ = cloud(1, 2, 6, 6)
    weight, bias = weights(3, 2, 3, 3)
    n = len(points.coords)
    calls: list[tuple[Any, str]] = [
        (lambda: submanifold_conv(dense, weight), "expected a SparseTensor"),
        (lambda: submanifold_conv(points, weight[:, :1]), r"must be \(out, 2"),
        (lambda: submanifold_conv(points, weight[..., 0]), "2 kernel sizes"),
        (lambda: submanifold_conv(points, weight[..., :2]), "no centre"),
        (lambda: submanifold_conv(points, weight, bias[:2]), r"bias must be \(3,\)"),
        (lambda: submanifold_conv(points, weight.double()), "weight torch.float64"),
        (lambda: submanifold_conv(points, weight, dilation=0), "dilation must be"),
        (lambda: sparse_conv(points, weight, stride=(1, 2, 3)), "stride must be"),
        (lambda: sparse_conv(points, weight, padding=-1), "padding must be"),
        (lambda: sparse_conv(points, weight, dilation=4), "does not fit a grid"),
        (lambda: focal_conv(points, weight, torch.ones(n, 8)), "importance must be"),
        (lambda: focal_conv(points, weight, torch.ones(n, 9), 2.0), "threshold must be"),
        (lambda: focal_conv(points, weight, torch.full((n, 9), math.nan)), "apply a sigmoid"),
        (lambda: points.with_features(torch.ones(n + 1, 2)), "expected features"),
        (lambda: SparseTensor.from_dense(torch.ones(2, 3)), "expected"),
        (lambda: SparseTensor.from_dense(dense, torch.ones(1, 6, 6)), "mask must be bool"),
        (lambda: SubmanifoldConv(3, 4, dims=4), "dims must be"),
        (lambda: SparseConv(3, 0), "positive integers"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()


def test_the_template_refuses_what_it_cannot_print() -> None:
    from dataclasses import replace

    from sparsec.codegen.render import render

    with pytest.raises(SpecError, match="float32 only"):
        render(replace(spec("portable"), dtype="bfloat16"))
    text = render(spec("avx512")).text
    assert text == render(spec("avx512")).text and "tile_6x4" in text and "tile_6x4" not in render(spec("avx2")).text
