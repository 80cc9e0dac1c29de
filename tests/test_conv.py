"""Convolution kernels: every variant and mode against torch in float64, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

from sparsec.codegen import catalog, conv_variants, render
from sparsec.codegen.build import build_kernels
from sparsec.codegen.conv import Axis, Conv
from sparsec.codegen.kernel import DTYPES, KernelSpec, Problem, Step
from sparsec.errors import SpecError
from sparsec.formats import Format, parse
from sparsec.graph import Fact
from sparsec.ops import conv as op
from sparsec.passes import _product
from sparsec.target import Target
from sparsec.verify import apply_steps, check


def geometry(size, kernel, stride=1, low=0, high=None, dilation=1, groups=1) -> Conv:  # type: ignore[no-untyped-def]
    """A Conv with numbers spread over its axes."""
    axes = len(size)
    spread = [v if isinstance(v, tuple) else (v,) * axes for v in (kernel, stride, low, low if high is None else high)]
    return Conv(size, *spread, dilation if isinstance(dilation, tuple) else (dilation,) * axes, groups)


# name, channels, outputs, geometry
CASES = {
    "1x1 in place": (5, 7, geometry((8, 16), 1)),
    "1x1 odd image": (6, 9, geometry((7, 9), 1)),
    "1x1 stride 2": (4, 8, geometry((9, 11), 1, stride=2)),
    "3x3": (5, 6, geometry((9, 7), 3, low=1)),
    "3x3 stride 2": (4, 5, geometry((11, 40), 3, stride=2, low=1)),
    "3x3 dilation 2": (3, 8, geometry((9, 9), 3, low=2, dilation=2)),
    "asymmetric padding": (3, 4, geometry((8, 8), 3, stride=2, low=(0, 1), high=(1, 2))),
    "groups": (8, 12, geometry((6, 5), 3, low=1, groups=2)),
    "5x1 stride (3, 1)": (3, 5, geometry((16, 6), (5, 1), stride=(3, 1), low=(2, 0))),
    "many channels": (48, 36, geometry((6, 6), 3, low=1)),
    "1d": (6, 7, geometry((37,), 5, stride=2, low=2)),
    "3d": (3, 5, geometry((4, 5, 6), 3, stride=(1, 2, 1), low=1)),
    "padding wider than the image": (2, 3, geometry((2, 3), 3, low=4)),
    "one pixel": (7, 5, geometry((1, 1), 1)),
    "depthwise": (6, 6, geometry((9, 37), 3, low=1, groups=6)),
    "depthwise stride 2, two filters": (4, 8, geometry((11, 35), 3, stride=2, low=(0, 0), high=(1, 1), groups=4)),
}


def problem(name: str, dtype: str = "float32", steps: tuple[Step, ...] = (), bias: bool = True) -> Problem:
    channels, out, conv = CASES[name]
    cols = channels // conv.groups * conv.taps
    return Problem("conv", out, cols, dtype, out * cols // 4, bias, steps, (2,), 2, conv)


@functools.cache
def specs(name: str, isa: str, dtype: str = "float32", steps: tuple[Step, ...] = ()) -> tuple[KernelSpec, ...]:
    """Every kernel that the catalogue offers for a case; built together."""
    target, wanted = Target.probe().limit(isa), problem(name, dtype, steps)
    found: list[KernelSpec] = []
    turn = list(CASES).index(name)  # variants take turns: each kernel takes half a second to build
    for place, variant in enumerate(conv_variants.VARIANTS):
        if variant.format != "dense" and place % 2 == turn % 2 and both_take(wanted, target):
            continue
        if variant.name == "conv_dense" and turn % 4:
            continue
        formats = variant.formats(wanted, target) or (parse("dense"),)
        for fmt in formats:
            if variant.format == fmt.name and variant.refuse(wanted, fmt, target) is None:
                found += variant.specs(wanted, fmt, target)
    build_kernels(found, Target.probe())
    return tuple(found)


def both_take(wanted: Problem, target: Target) -> bool:
    """Whether grouped CSR takes the problem too, so that either may be left to another case."""
    fmt = parse(f"csr_groups(block={wanted.in_features})") if wanted.in_features < 256 else parse("csr_groups(block=9)")
    return catalog.variant("conv_csr_groups").refuse(wanted, fmt, target) is None


def weight_of(name: str, dtype: str, seed: int = 0) -> torch.Tensor:
    """A (out, in) matrix at a quarter nonzeros, one row and one column empty where there are several."""
    wanted = problem(name)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(wanted.out_features, wanted.in_features, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < 0.25
    weight[wanted.out_features // 2] = 0
    return weight.to(DTYPES[dtype])


def held(name: str, spec: KernelSpec, images: int, weight: torch.Tensor, x: torch.Tensor | None = None) -> None:
    """Run a kernel through the op and hold it to the float64 oracle on every pixel, and to torch's own convolution."""
    channels, out, conv = CASES[name]
    generator = torch.Generator().manual_seed(1)
    dtype = DTYPES[spec.dtype]
    x = torch.randn(images, channels, *conv.size, generator=generator).to(dtype) if x is None else x
    bias = torch.randn(out, generator=generator).to(dtype)
    adds = any(step.name == "add" for step in spec.epilogue)
    residual = torch.randn(images, out, *conv.out, generator=generator).to(dtype) if adds else None
    fmt: Format = parse(spec.format)
    packed = fmt.pack(weight)
    fmt.validate(packed, *weight.shape)
    y = op.OVERLOAD(x, list(packed.values()), bias, residual, spec.text())
    stored = fmt.positions(packed, *weight.shape)
    wanted = problem(name, spec.dtype, spec.epilogue)
    for s in _product.samples(wanted, y, x, weight, stored, bias, residual):
        verdict = check(s.y, s.x, s.weight, s.bias, spec.epilogue, s.residual, s.stored)
        assert verdict.ok, f"{name}, {spec.variant} {dict(spec.tile)}: {verdict.sentence}"
    if bool(torch.isfinite(x).all()) and bool(torch.isfinite(weight).all()) and images:
        shaped = weight.reshape(out, channels // conv.groups, *conv.kernel).double()
        rest = residual.double() if residual is not None else None
        exact = apply_steps(spec.epilogue, op.dense(x.double(), shaped, bias.double(), conv), rest)
        near = 1e-4 if spec.dtype == "float32" else 6e-2
        assert torch.allclose(y.double(), exact, rtol=near, atol=near)


@pytest.mark.parametrize("name", CASES)
def test_every_kernel_agrees_with_torch_and_the_oracle(name: str) -> None:
    offered = specs(name, Target.probe().isas[0])
    assert offered
    for spec in offered:
        for images in (0, 1, 3):
            held(name, spec, images, weight_of(name, "float32"))


@pytest.mark.parametrize(("name", "rows"), [("3x3", 4), ("1x1 in place", 16), ("groups", 3), ("1d", 1)])
def test_blocks_over_output_channels(name: str, rows: int) -> None:
    target, wanted = Target.probe(), problem(name)
    variant = catalog.variant("conv_bsr")
    fmt = parse(f"bsr(r={rows},c=1,index_bits=16)")
    (spec,) = variant.specs(wanted, fmt, target)
    for images in (1, 3):
        held(name, spec, images, weight_of(name, "float32"))
    assert "by one input" in (variant.refuse(wanted, parse("bsr(r=2,c=2,index_bits=16)"), target) or "")
    assert "a group" in (variant.refuse(problem("groups"), parse("bsr(r=4,c=1,index_bits=16)"), target) or "")


@pytest.mark.parametrize("isa", ["avx2", "portable"])
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "depthwise"])
def test_narrower_instruction_sets(name: str, isa: str) -> None:
    if isa not in Target.probe().isas:
        pytest.skip(f"this processor has no {isa}")
    for spec in specs(name, isa):
        held(name, spec, 2, weight_of(name, "float32"))


@pytest.mark.parametrize("name", ["3x3", "1x1 in place"])
def test_bfloat16_storage(name: str) -> None:
    for spec in specs(name, Target.probe().isas[0], "bfloat16"):
        held(name, spec, 2, weight_of(name, "bfloat16"))


@pytest.mark.parametrize("steps", [("hardswish",), ("add", "relu"), ("silu",)])
def test_epilogues_with_a_residual(steps: tuple[str, ...]) -> None:
    for name in ("1x1 in place", "3x3"):
        for spec in specs(name, Target.probe().isas[0], "float32", tuple(map(Step, steps))):
            held(name, spec, 2, weight_of(name, "float32"))


@pytest.mark.parametrize("name", ["3x3", "1x1 in place"])
def test_stored_values_that_are_not_finite_and_empty_weights(name: str) -> None:
    channels, _, conv = CASES[name]
    wild = weight_of(name, "float32")
    places = wild.nonzero()
    for i, value in enumerate((float("inf"), float("-inf"), float("nan"))):
        wild[tuple(places[i * 3])] = value
    x = torch.randn(2, channels, *conv.size, generator=torch.Generator().manual_seed(2))
    x[0, 0, 0, 0], x[1, -1, -1, -1] = float("inf"), float("nan")
    for spec in specs(name, Target.probe().isas[0]):
        held(name, spec, 2, wild)
        held(name, spec, 2, weight_of(name, "float32"), x)
        held(name, spec, 2, torch.zeros_like(wild))


def test_threads_do_not_change_the_result() -> None:
    before = torch.get_num_threads()
    for spec in specs("many channels", Target.probe().isas[0]):
        spec = dataclasses.replace(spec, tile=(*spec.tile, ("one_thread", 1)))  # even this small problem is shared out
        outputs = []
        weight, x = weight_of("many channels", "float32"), torch.randn(3, 48, 6, 6)
        packed = list(parse(spec.format).pack(weight).values())
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                outputs.append(op.OVERLOAD(x, packed, torch.zeros(36), None, spec.text()))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_opcheck_strides_and_single_images() -> None:
    (spec, *_) = specs("3x3", Target.probe().isas[0])
    packed = list(parse(spec.format).pack(weight_of("3x3", "float32")).values())
    x, bias = torch.randn(2, 5, 9, 7), torch.randn(6)
    torch.library.opcheck(op.OVERLOAD, (x, packed, bias, None, spec.text()))
    want = op.OVERLOAD(x, packed, bias, None, spec.text())
    assert torch.equal(op.OVERLOAD(x.to(memory_format=torch.channels_last), packed, bias, None, spec.text()), want)
    assert torch.equal(op.OVERLOAD(x[1], packed, bias, None, spec.text()), want[1])
    plain = weight_of("3x3", "float32").reshape(6, 5, 3, 3)
    some = op.BUCKETS(x, packed, plain, bias, None, spec.text(), [2, 0])
    assert torch.allclose(some, want, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert op.OVERLOAD(x, packed, bias, None, spec.text()).dtype is torch.float32


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5, 9, 8), "compiled for"),
        (torch.zeros(9, 7), "compiled for"),
        (torch.zeros(2, 5, 9, 7, dtype=torch.float64), "compiled for torch.float32"),
        (torch.zeros(2, 5, 9, 7, requires_grad=True), "compiled for inference"),
    ],
)
def test_wrong_inputs_are_named(x: torch.Tensor, message: str) -> None:
    (spec, *_) = specs("3x3", Target.probe().isas[0])
    packed = list(parse(spec.format).pack(weight_of("3x3", "float32")).values())
    with pytest.raises(ValueError, match=message):
        op.OVERLOAD(x, packed, torch.zeros(6), None, spec.text())


def test_geometry_refuses_what_has_no_output_and_reads_its_own_text() -> None:
    with pytest.raises(SpecError, match="no output"):
        geometry((2, 2), 5)
    with pytest.raises(SpecError, match="positive"):
        geometry((4, 4), 3, stride=0)
    for broken in (None, [1], [[4]] * 6 + ["1"], [[4], [1.5], [1], [0], [0], [1], 1]):
        with pytest.raises(SpecError):
            Conv.parse(broken)
    for _, _, conv in CASES.values():
        assert Conv.parse(conv.numbers()) == conv
    (spec, *_) = specs("3x3", Target.probe().isas[0])
    assert spec.conv is not None and KernelSpec.parse(spec.text()) == spec


def test_the_layout_places_every_tap() -> None:
    """Position p under tap t reads what direct indexing reads, for every axis of every case."""
    axes = {axis for _, _, conv in CASES.values() for axis in conv.axes} | {Axis(50, 7, 3, 5, 2, 2)}
    for axis in axes:
        for phase, shift in axis.taps:
            first, last = axis.data(phase)
            for p in range(axis.out):
                place = (p + shift) * axis.stride + phase - axis.low
                inside = 0 <= place < axis.size
                row, at = divmod(p + shift, axis.extent)
                assert inside == (row == 0 and first <= at < last) or (row == 1 and not inside and at < first)


def test_variants_refuse_with_a_reason() -> None:
    target = Target.probe()
    variant = catalog.variant("conv_csr_groups")
    three = dataclasses.replace(problem("groups"), out_features=6)
    reason = variant.refuse(three, parse("csr_groups(block=9)"), target)
    assert reason is not None and "groups of four rows" in reason
    naked = dataclasses.replace(problem("3x3"), conv=None)
    assert "geometry" in (variant.refuse(naked, parse("csr_groups(block=9)"), target) or "")
    depthwise = catalog.variant("conv_depthwise")
    assert "one input channel" in (depthwise.refuse(problem("3x3"), parse("dense"), target) or "")


def test_equal_specs_print_equal_text_and_bad_tiles_are_refused() -> None:
    for spec in specs("3x3", Target.probe().isas[0]):
        assert render.render_file(catalog.variant(spec.variant).template, spec) == render.render(spec).text
        for change in ({"mode": 3}, {"columns": 63}, {"step": 0}):
            tile = tuple({**dict(spec.tile), **change}.items())
            with pytest.raises(SpecError):
                render.render(dataclasses.replace(spec, tile=tile))


def test_sampled_columns_are_what_unfold_gives() -> None:
    conv = geometry((9, 8), (3, 2), stride=2, low=(1, 0), dilation=(2, 1))
    x = torch.randn(2, 3, 9, 8)
    wanted = Problem("conv", 4, 18, "float32", 72, False, (), (2,), 1, conv)
    y, weight = torch.zeros(2, 4, *conv.out), torch.ones(4, 18)
    (sample,) = _product.samples(wanted, y, x, weight, weight != 0, None, None)
    want = F.unfold(x, (3, 2), (2, 1), (1, 0), 2).transpose(1, 2).reshape(-1, 18)
    assert sample.x.shape[0] == 2 * conv.pixels and torch.equal(sample.x, want)


def test_facts_name_the_op_of_the_catalogue() -> None:
    base = Fact("a", "conv2d", "Conv2d", "w", None, (4, 3, 3, 3), "float32")
    assert _product.op_of(base) == "conv" and _product.op_of(dataclasses.replace(base, op="linear")) == "linear"
