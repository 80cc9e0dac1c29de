"""Kernels that serve many layers under sanitizers: points and kept pixels (`gather_gemm`), and max pooling."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_masks
import test_points
import torch
import torch.nn.functional as F
from sanitizer import build, execute, supported

import sparsec
from sparsec.codegen import gather, pool
from sparsec.codegen.kernel import Conv, Problem
from sparsec.formats import Dense
from sparsec.ops import gather as gather_op
from sparsec.ops import masked as masked_op
from sparsec.points import sparse_conv, submanifold_conv
from sparsec.target import Target

TARGET = Target.probe()
OUTPUT = 7  # of the operands of gather_gemm
ISAS = [isa for isa in gather.VARIANTS[0].isas if isa in TARGET.isas]
KINDS = [  # the smallest instruction set compiles soonest; the others in the soak
    *(pytest.param("address", isa, marks=[pytest.mark.soak] * (isa != "portable")) for isa in ISAS),
    ("thread", ISAS[0]),
]
POOLS = {  # planes, kernel, stride, padding, dilation
    "3x3 by 2": ((5, 20, 31), (3, 3), (2, 2), (1, 1), (1, 1)),
    "2x2 by 2": ((3, 14, 14), (2, 2), (2, 2), (0, 0), (1, 1)),
    "5x5 in place": ((2, 9, 40), (5, 5), (1, 1), (2, 2), (1, 1)),
    "dilated": ((4, 17, 17), (3, 2), (1, 2), (1, 0), (2, 3)),
}


@functools.cache
def _missing(kind: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        return supported(kind, Path(folder))


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The operands of every call of gather_gemm that the ops make for points, strides and masks, in rows and planes."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gather_op, "kernel_call", lambda: lambda *operands: calls.append(operands))
    monkeypatch.setattr(masked_op, "kernel_call", lambda: lambda *operands: calls.append(operands))
    for size, out, kernel, dilation in test_points.SUBMANIFOLD:
        points, _, _ = test_points.cloud(*size)
        submanifold_conv(points, *test_points.weights(out, size[1], *kernel), dilation)
    for size, out, kernel, stride, padding, dilation in test_points.REGULAR:
        points, _, _ = test_points.cloud(*size)
        sparse_conv(points, *test_points.weights(out, size[1], *kernel), stride, padding, dilation)
    with torch.no_grad():
        for name in test_masks.CONVS:
            conv, x, mask = test_masks.case(name)
            masked = sparsec.mask_outputs(conv, {"<root>": mask})
            for layout in (torch.contiguous_format, torch.channels_last):
                masked(x.to(memory_format=layout) if x.dim() == 4 else x)
    return calls


@pytest.mark.parametrize(("kind", "isa"), KINDS)
def test_points_and_pixels(kind: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := _missing(kind):
        pytest.skip(reason)
    call = gather.kernel().call
    program = build(gather.spec(isa), kind, tmp_path, (f"-DOUTPUT={OUTPUT}",))
    calls = recorded(monkeypatch)
    assert len(calls) > 20
    for number, operands in enumerate(calls):
        call(*operands)  # as users have it; the tests of points and of masks say that it is right
        wrong, got = execute(program, operands, 1 + number % 3, low=number % 2 == 1, output=OUTPUT)
        assert not wrong, (number, wrong)
        assert torch.allclose(got, operands[OUTPUT], atol=1e-5), number


def test_a_pair_that_points_out_of_range_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel itself, before anything is read."""
    if reason := _missing("address"):
        pytest.skip(reason)
    program = build(gather.spec(ISAS[-1]), "address", tmp_path, (f"-DOUTPUT={OUTPUT}",))
    operands = list(recorded(monkeypatch)[0])
    for which, rows in ((4, operands[11]), (5, operands[12])):
        broken = [*operands[:which], operands[which].clone(), *operands[which + 1 :]]
        broken[which][len(broken[which]) // 2] = rows
        wrong, _ = execute(program, broken, 1, low=False, output=OUTPUT)
        assert "points out of range" in wrong[0] and "Sanitizer" not in wrong[0]


def pools(isa: str) -> Iterator[tuple[Any, tuple[int, ...], tuple[Any, ...]]]:
    """(spec that starts threads for the smallest call, shape of an image, the other arguments)."""
    for shape, kernel, stride, padding, dilation in POOLS.values():
        conv = Conv(shape[1:], kernel, stride, padding, padding, dilation, shape[0])
        problem = Problem(pool.VARIANT.op, shape[0], conv.taps, "float32", shape[0] * conv.taps, conv=conv)
        for spec in pool.VARIANT.specs(problem, Dense(), TARGET.limit(isa))[:1]:
            tile = (*((k, v) for k, v in spec.tile if k != "one_thread"), ("one_thread", 0))
            yield dataclasses.replace(spec, tile=tile), shape, (kernel, stride, padding, dilation)


@pytest.mark.parametrize(
    ("kind", "isa", "count"),
    [
        *(pytest.param("address", i, 4, marks=pytest.mark.soak) for i in pool.VARIANT.isas if i in TARGET.isas),
        ("address", "portable", 2),
        ("thread", "portable", 1),
    ],
)
def test_pools(kind: str, isa: str, count: int, tmp_path: Path) -> None:
    if reason := _missing(kind):
        pytest.skip(reason)
    for spec, shape, numbers in itertools.islice(pools(isa), count):
        assert spec.isa == isa
        program = build(spec, kind, tmp_path)
        for images in (1, 3, 0):
            x = torch.randn(images, *shape, generator=torch.Generator().manual_seed(images))
            want = F.max_pool2d(x, *numbers) if images else torch.empty(0, *spec.output_shape)
            y = torch.full_like(want, float("nan"))
            wrong, got = execute(program, [x, y, None, None], 1 + images, low=images == 1)
            assert not wrong, (spec, wrong)
            assert torch.equal(got, want)
