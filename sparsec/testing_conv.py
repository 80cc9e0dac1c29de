"""Random convolution problems, valid by construction: every geometry that a kernel can be made for, against float64.

A `ConvCase` fixes what a kernel is generated for, a `ConvData` one call of it. `python -m sparsec.testing_kernels --op
conv` runs thousands; the sanitizer battery runs the same under instrumentation.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsec import verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, Conv, KernelSpec, Problem, Step
from sparsec.errors import SpecError
from sparsec.formats import BSR, FORMATS, Dense, Format
from sparsec.ops import conv as op
from sparsec.target import Target

SIZES = {1: (1, 2, 7, 15, 16, 17, 31, 33, 64, 100), 2: (1, 2, 3, 4, 7, 8, 9, 14, 16, 17, 28, 33), 3: (1, 2, 3, 4, 5, 8)}
"""Input sizes by the number of axes: around vectors, tiles and the images of common networks."""
CHANNELS = (1, 2, 3, 4, 5, 8, 12, 16, 17, 40)
PATTERNS = ("uniform", "empty", "full", "one_entry", "filters", "kernels")
IMAGES = (0, 1, 1, 2, 3, 5)
_STEPS = (
    (), (Step("relu"),), (Step("silu"),), (Step("clamp", (0.0, 6.0)),), (Step("hardswish"),), (Step("add"),),
    (Step("add"), Step("relu")), (Step("scale", (-0.5,)),),
)  # fmt: skip
KERNELS = 8  # of one block


@dataclass(frozen=True)
class ConvCase:
    """What one convolution kernel is generated for; `tile` numbers the choices that its variant offers."""

    variant: str
    isa: str
    format: Format
    dtype: str
    channels: int
    out: int
    conv: Conv
    bias: bool
    epilogue: tuple[Step, ...]
    tile: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        return (self.out, self.channels // self.conv.groups, *self.conv.kernel)

    @property
    def matrix(self) -> tuple[int, int]:
        """Of the weight as it is packed."""
        return self.out, self.channels // self.conv.groups * self.conv.taps

    def spec(self, target: Target) -> KernelSpec | None:
        """The kernel of the case on `target`, or None where the variant refuses it."""
        problem, variant = _problem(self), catalog.variant(self.variant)
        narrowed = target if self.isa == target.isas[0] else target.limit(self.isa)
        if variant.refuse(problem, self.format, narrowed):
            return None
        offered = variant.specs(problem, self.format, narrowed)
        return offered[self.tile % len(offered)]


@dataclass(frozen=True)
class ConvData:
    """One weight and one call: everything that follows from a seed."""

    pattern: str
    density: float
    images: int
    threads: int
    seed: int


def _problem(case: ConvCase) -> Problem:
    rows, cols = case.matrix
    return Problem(
        "conv", rows, cols, case.dtype, rows * cols // 4, case.bias, case.epilogue, (1, 3), torch.get_num_threads(),
        case.conv,
    )  # fmt: skip


def variants(target: Target, names: Sequence[str] = ()) -> list[catalog.Variant]:
    """The convolution variants that this target can run, or those of them that are named, but for factored weights."""
    table = [v for v in catalog.variants_for("conv", target=target) if v.isa(target) and v.format in FORMATS]
    return [v for v in table if not names or v.name in names]


def draw_case(rng: np.random.Generator, target: Target, table: Sequence[catalog.Variant]) -> ConvCase:
    """A random case that its variant accepts."""
    while True:
        variant = table[int(rng.integers(len(table)))]
        isas = [isa for isa in variant.isas if isa in target.isas]
        channels, out, conv = _geometry(rng, depthwise=variant.name == "conv_depthwise")
        case = ConvCase(
            variant.name, isas[int(rng.integers(len(isas)))], Dense(),
            variant.dtypes[int(rng.integers(len(variant.dtypes)))], channels, out, conv, bool(rng.random() < 0.5),
            _STEPS[int(rng.integers(len(_STEPS)))], int(rng.integers(3)),
        )  # fmt: skip
        if variant.format == "bsr":
            formats: Sequence[Format] = (BSR(int(rng.integers(1, 17)), 1).resolve(*case.matrix),)
        else:
            formats = variant.formats(_problem(case), target.limit(case.isa)) or (Dense(),)
        case = dataclasses.replace(case, format=formats[0])
        if formats[0].name == variant.format and case.spec(target) is not None:
            return case


def _geometry(rng: np.random.Generator, depthwise: bool) -> tuple[int, int, Conv]:
    """Channels, outputs and a geometry that has an output; a third of all is 1x1 with stride 1."""
    while True:
        axes = int(rng.choice((1, 2, 2, 2, 3)))

        def numbers(values: Sequence[int], axes: int = axes) -> tuple[int, ...]:
            return tuple(int(n) for n in rng.choice(values, axes))

        size, ones, none = numbers(SIZES[axes]), (1,) * axes, (0,) * axes
        channels, groups = int(rng.choice(CHANNELS)), int(rng.choice((1, 1, 1, 2, 4)))
        out = int(rng.choice(CHANNELS))
        if depthwise:
            groups, out = channels, channels * int(rng.choice((1, 1, 2)))
        elif channels % groups or out % groups:
            continue
        try:
            if not depthwise and rng.random() < 0.33:
                return channels, out, Conv(size, ones, ones, none, none, ones, groups)
            kernel, stride = numbers((1, 2, 3, 3, 5)), numbers((1, 1, 2, 3))
            low, high = numbers((0, 1, 1, 2, 3)), numbers((0, 1, 1, 2, 3))
            return channels, out, Conv(size, kernel, stride, low, high, numbers((1, 1, 2)), groups)
        except SpecError:  # the kernel does not fit: draw again
            continue


def draw_data(rng: np.random.Generator) -> ConvData:
    """A random call."""
    return ConvData(
        PATTERNS[int(rng.choice(len(PATTERNS), p=(0.5, 0.1, 0.1, 0.1, 0.1, 0.1)))], float(rng.choice((0.05, 0.2, 0.5))),
        int(rng.choice(IMAGES)), int(rng.integers(1, 5)), int(rng.integers(2**31)),
    )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """The tensors of one call."""

    x: torch.Tensor
    weight: torch.Tensor  # (out, in / groups, *kernel)
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    buffers: tuple[torch.Tensor, ...]


def make_call(case: ConvCase, data: ConvData) -> Call:
    """The tensors that follow from a case and a seed."""
    rng, dtype = np.random.default_rng(data.seed), DTYPES[case.dtype]

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    weight = normal(*case.shape) * torch.from_numpy(_mask(case, data, rng))
    steps = [step.name for step in case.epilogue]
    return Call(
        normal(data.images, case.channels, *case.conv.size), weight, normal(case.out) if case.bias else None,
        normal(data.images, case.out, *case.conv.out) if "add" in steps else None,
        tuple(case.format.pack(weight.reshape(case.matrix)).values()),
    )  # fmt: skip


def _mask(case: ConvCase, data: ConvData, rng: np.random.Generator) -> np.ndarray:
    """Which weights are kept: single ones, whole filters, whole kernels."""
    shape = case.shape
    if data.pattern in ("empty", "one_entry"):
        mask = np.zeros(shape, bool)
        mask.reshape(-1)[int(rng.integers(mask.size))] = data.pattern == "one_entry"
        return mask
    if data.pattern == "full":
        return np.ones(shape, bool)
    drawn = {"filters": (shape[0], *(1,) * (len(shape) - 1)), "kernels": (*shape[:2], *(1,) * (len(shape) - 2))}
    return np.broadcast_to(rng.random(drawn.get(data.pattern, shape)) < data.density, shape).copy()


def judge(case: ConvCase, call: Call, y: torch.Tensor) -> verify.Verdict:
    """An output against torch's convolution in float64, within the bound of the sums that were made."""
    conv = case.conv

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(values.shape[0], case.out, conv.pixels).transpose(1, 2).reshape(-1, case.out)

    x, weight = call.x.double(), call.weight.double()
    exact, size = (rows(op.dense(a, w, None, conv)) for a, w in ((x, weight), (x.abs(), weight.abs())))
    longest = int(torch.count_nonzero(weight.flatten(1), dim=1).max())
    rest = rows(call.residual) if call.residual is not None else None
    return verify.check_products(rows(y), (exact, size, longest), call.bias, case.epilogue, rest)


def failures(case: ConvCase, data: ConvData, text: str) -> list[str]:
    """What is wrong with one call of a built kernel; the same bits are asked of every number of threads."""
    call, before = make_call(case, data), torch.get_num_threads()
    outputs = []
    try:
        for threads in (data.threads, 1):
            torch.set_num_threads(threads)
            outputs.append(op.OVERLOAD(call.x, list(call.buffers), call.bias, call.residual, text))
    finally:
        torch.set_num_threads(before)
    verdict = judge(case, call, outputs[0])
    wrong = [] if verdict.ok else [verdict.sentence]
    return wrong + ([] if torch.equal(*outputs) else [f"{data.threads} threads and one give different bits"])


def run(
    seed: int, kernels: int, problems: int, target: Target | None = None, names: Sequence[str] = (), block: int = 0
) -> Iterator[tuple[ConvCase, ConvData, list[str]]]:
    """Draw `kernels` kernels, run `problems` problems on each, and yield each with what is wrong."""
    target = target or Target.probe()
    rng = np.random.default_rng((seed, block))
    for _ in range(kernels):
        case = draw_case(rng, target, variants(target, names))
        spec = case.spec(target)
        if spec is None:  # draw_case has asked
            continue
        tile = tuple((k, v) for k, v in spec.tile if k != "one_thread")
        spec = dataclasses.replace(spec, tile=(*tile, ("one_thread", 0)))  # threads share even the smallest call
        build_kernels([spec], target)
        for _ in range(problems):
            data = draw_data(rng)
            yield case, data, failures(case, data, spec.text())


def block(
    seed: int, number: int, problems: int, target: Target, names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Counts and failures of one block, for Totals."""
    count: Counter[str] = Counter()
    wrong, kernels = [], set()
    for case, data, complaints in run(seed, KERNELS, problems, target, names, number):
        count[case.variant] += 1
        kernels.add(case)
        if complaints:
            wrong.append(f"block ({seed}, {number}): {case}\n{data}\n  {'; '.join(complaints)}")
    return {"problems": count.total(), "large": 0, "kernels": len(kernels), "variants": dict(count)}, wrong
