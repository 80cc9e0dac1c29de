"""Every C variant under address, undefined-behaviour and thread sanitizers, between guard pages; and nothing leaks."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch
from sanitizer import build, cases, problems, run, supported
from torch import nn

import sparsec
from sparsec.codegen import catalog
from sparsec.target import Target

TARGET = Target.probe()
VARIANTS = [v for v in catalog.variants_for("linear") if v.language == "c" and v.isa(TARGET) is not None]


@functools.cache
def _missing(kind: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        return supported(kind, Path(folder))


def _battery(variant: catalog.Variant, isa: str, kind: str, folder: Path, kernels: int, calls: int, seed: int) -> int:
    if reason := _missing(kind):
        pytest.skip(reason)
    count = 0
    for case, spec in cases(variant, isa, seed, kernels):
        program = build(spec, kind, folder)
        for number, data in enumerate(problems(seed, calls)):
            wrong = run(program, case, data, threads=1 + number % 3 if kind == "address" else 3, low=number % 2 == 1)
            assert not wrong, f"{case}\n{data}\n{wrong[0]}"
            count += 1
    return count


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_memory_is_safe_and_behaviour_defined(variant: catalog.Variant, tmp_path: Path) -> None:
    assert _battery(variant, variant.isa(TARGET) or "portable", "address", tmp_path, kernels=1, calls=5, seed=7) == 5


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[2:3], ids=lambda v: v.name)
def test_threads_share_nothing_they_write(variant: catalog.Variant, tmp_path: Path) -> None:
    assert _battery(variant, "portable", "thread", tmp_path, kernels=1, calls=5, seed=8) == 5


def test_the_sanitizers_see_a_bad_index(tmp_path: Path) -> None:
    """The net has no hole: an index one beyond the input is reported."""
    if reason := _missing("address"):
        pytest.skip(reason)
    variant = catalog.variant("linear_csr")
    ((case, spec),) = cases(variant, "portable", 3, 1)
    data = dataclasses.replace(problems(3, 1)[0], pattern="full", values="normal", batch=1)
    program = build(spec, "address", tmp_path)
    assert run(program, case, data, 1, low=False) == []

    class Broken(type(case.format)):  # type: ignore[misc]
        def pack(self, dense: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            buffers = super().pack(dense, mask)
            buffers["indices"][-1] = dense.shape[1]
            return buffers

    broken = dataclasses.replace(case, format=Broken(**case.format.fields()))
    assert "status" in run(program, broken, data, 1, low=False)[0]


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_instruction_set(variant: catalog.Variant, kind: str, tmp_path: Path) -> None:
    for isa in variant.isas:
        if isa in TARGET.isas:
            _battery(variant, isa, kind, tmp_path, kernels=3, calls=12, seed=100)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _libraries() -> int:
    return sum("k_" in line or "sparsec" in line for line in Path("/proc/self/maps").read_text().splitlines())


def _cycle(x: torch.Tensor) -> None:
    layer = nn.Linear(32, 32).eval()
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.8] = 0
    cm = sparsec.compile(layer, None, (x,), tune="off", min_speedup=0, capture="trace")
    cm(x)


@pytest.mark.parametrize("cycles", [50, pytest.param(1000, marks=pytest.mark.soak)])
def test_compiling_and_dropping_leaks_nothing(cycles: int) -> None:
    """Files and libraries to the last one; memory to 64 KiB a cycle, which a leaked graph or weight would pass."""
    x = torch.randn(2, 32)
    for _ in range(5):
        _cycle(x)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), _libraries(), _resident()
    for _ in range(cycles):
        _cycle(x)
    gc.collect()
    after = len(os.listdir("/proc/self/fd")), _libraries(), _resident()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < (4 << 20) + cycles * (16 << 10)
