"""Random convolutions: against the oracle, under sanitizers between guard pages, and what peak memory they take."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sanitizer import build, execute, supported

from sparsec import testing_conv
from sparsec.codegen import catalog, conv_variants, plans_conv
from sparsec.codegen.kernel import DTYPES, Conv, KernelSpec, Step
from sparsec.errors import SpecError
from sparsec.formats import Dense
from sparsec.target import Target
from sparsec.testing_conv import ConvCase, ConvData

TARGET = Target.probe()
VARIANTS = [v.name for v in conv_variants.VARIANTS if v.op == "conv"]


@functools.cache
def _missing(kind: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        return supported(kind, Path(folder))


def _kernel(variant: str, seed: int, isa: str) -> tuple[ConvCase, KernelSpec]:
    """A random kernel that starts threads for the smallest call."""
    rng = np.random.default_rng((seed, VARIANTS.index(variant)))
    case = testing_conv.draw_case(rng, TARGET.limit(isa), [catalog.variant(variant)])
    case = dataclasses.replace(case, isa=isa)
    spec = case.spec(TARGET)
    assert spec is not None
    tile = tuple((k, v) for k, v in spec.tile if k != "one_thread")
    return case, dataclasses.replace(spec, tile=(*tile, ("one_thread", 0)))


def _battery(variant: str, seed: int, kind: str, isa: str, folder: Path, calls: int) -> int:
    if reason := _missing(kind):
        pytest.skip(reason)
    case, spec = _kernel(variant, seed, isa)
    program, rng = build(spec, kind, folder), np.random.default_rng(seed)
    for number in range(calls):
        data = dataclasses.replace(testing_conv.draw_data(rng), images=(1, 0, 3, 2)[number % 4])
        call = testing_conv.make_call(case, data)
        y = torch.full((data.images, case.out, *case.conv.out), float("nan"), dtype=DTYPES[case.dtype])
        arguments = [call.x, y, call.bias, call.residual, *call.buffers]
        wrong, got = execute(program, arguments, 1 + number % 4, low=number % 2 == 1)
        assert not wrong, f"{case}\n{data}\n{wrong[0]}"
        verdict = testing_conv.judge(case, call, got)
        assert verdict.ok, f"{case}\n{data}\n{verdict.sentence}"
    return calls


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_is_safe_and_behaviour_defined(variant: str, tmp_path: Path) -> None:
    assert _battery(variant, 5, "address", TARGET.isas[0], tmp_path, 5) == 5


@pytest.mark.parametrize("variant", ["conv_csr", "conv_depthwise"])
def test_threads_share_nothing_they_write(variant: str, tmp_path: Path) -> None:
    assert _battery(variant, 6, "thread", "portable", tmp_path, 5) == 5


def test_the_sanitizer_sees_a_bad_index(tmp_path: Path) -> None:
    """The net has no hole: a column one beyond the input is reported."""
    if reason := _missing("address"):
        pytest.skip(reason)
    case, spec = _kernel("conv_csr", 5, "portable")
    data = ConvData("full", 1.0, 1, 1, 0)
    call = testing_conv.make_call(case, data)
    buffers = dict(zip(case.format.buffers, call.buffers, strict=True))
    buffers["indices"] = torch.full_like(buffers["indices"], 2**15 - 1)
    y = torch.empty((1, case.out, *case.conv.out), dtype=DTYPES[case.dtype])
    wrong, _ = execute(
        build(spec, "address", tmp_path), [call.x, y, call.bias, call.residual, *buffers.values()], 1, low=False
    )
    assert "status" in wrong[0]


def test_random_problems_agree_with_float64_and_with_one_thread() -> None:
    found = list(testing_conv.run(11, kernels=3, problems=6))
    assert len(found) == 18
    for case, data, wrong in found:
        assert not wrong, f"{case}\n{data}\n{wrong}"


# size, kernel, stride, zeros before, zeros behind, dilation: what random images seldom hit
DEPTHWISE = {
    "two short rows fit one vector": ((7, 7), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    "every second column": ((14, 14), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    "every second column, even zeros": ((15, 40), (3, 4), (2, 2), (0, 2), (1, 1), (1, 1)),
    "two vectors": ((30, 28), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    "four vectors and a rest": ((9, 70), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    "nothing but a scale": ((5, 9), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1)),
    "rows alone": ((12, 20), (3, 1), (1, 1), (1, 0), (1, 0), (1, 1)),
    "zeros wider than the image": ((2, 3), (3, 3), (1, 1), (20, 19), (3, 21), (1, 1)),
    "taps far apart": ((20, 19), (5, 5), (3, 1), (4, 4), (4, 4), (2, 2)),
}


@pytest.mark.parametrize("mode", (2, 0))
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_rows_share_vectors_and_loads(name: str, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place and by padded planes, on one thread and more than there are rows."""
    if mode == 0:
        monkeypatch.setattr(plans_conv, "MAX_LOADS", 0)
    conv = Conv(*DEPTHWISE[name], groups=5)
    case = ConvCase(
        "conv_depthwise", TARGET.isas[0], Dense(), "float32", 5, 10, conv, True, (Step("clamp", (0.0, 6.0)),)
    )
    spec = case.spec(TARGET)
    assert spec is not None and dict(spec.tile)["mode"] == mode
    spec = dataclasses.replace(spec, tile=(*spec.tile, ("one_thread", 0)))
    for threads, images in ((2, 1), (3, 2), (1, 3)):
        data = ConvData("full", 1.0, images, threads, images)
        assert testing_conv.failures(case, data, spec.text()) == []


def test_a_wrong_output_is_seen() -> None:
    case, _ = _kernel("conv_csr", 5, TARGET.isas[0])
    data = ConvData("uniform", 0.5, 1, 1, 0)
    call = testing_conv.make_call(case, data)
    y = torch.zeros(1, case.out, *case.conv.out).to(DTYPES[case.dtype])
    assert not testing_conv.judge(case, call, y + 7).ok


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(variant: str, kind: str, tmp_path: Path) -> None:
    for isa in catalog.variant(variant).isas:
        if isa in TARGET.isas:
            for seed in range(20, 24):
                _battery(variant, seed, kind, isa, tmp_path, 12)


def test_planes_have_less_than_two_to_the_31_elements() -> None:
    """2**31 - 1 is prime: only one axis can have just as many."""

    def plane(size: tuple[int, ...], pad: int = 0) -> Conv:
        ones, pads = (1,) * len(size), (pad,) * len(size)
        return Conv(size, ones, ones, pads, pads, ones)

    assert plane((2**31 - 1,)).out == (2**31 - 1,) and plane((46340, 46341)).out == (46340, 46341)
    for size, pad in (((2**16, 2**15), 0), ((46340, 46341), 1)):
        with pytest.raises(SpecError, match="a plane has more than"):
            plane(size, pad)
    with pytest.raises(SpecError, match="are positive"):
        plane((2**31,))
