"""A stream: consecutive kernels that run image by image on planned memory, as one op.

What a network computes between two layers is read once, soon, and never again. A stream keeps it in one small block of
memory, an arena, laid out beforehand so that values which do not live at the same time share a place (the greedy
placement by size of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020). Whole images
are dealt to threads, which then never wait for each other; the images that are left over are computed by all threads
together, layer by layer.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsec.codegen import catalog
from sparsec.codegen.kernel import KernelSpec
from sparsec.errors import SpecError
from sparsec.target import Target

ALIGN = 64
MAX_STEPS = 4096
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
OPS = ("conv", "pool")
INPUT, OUTPUT, ARENA = 0, 1, 2
"""Where a value lies: in an input tensor, in an output tensor, in the arena."""


def refuse(spec: KernelSpec) -> str | None:
    """Why a kernel cannot be a step: steps are C kernels that treat every image of a batch alike."""
    if spec.op not in OPS or spec.conv is None:
        return f"op {spec.op!r} does not go image by image"
    if spec.dtype not in ITEM_BYTES or spec.device != "cpu":
        return f"streams are of float32 or bfloat16 on the CPU, not {spec.dtype} on {spec.device}"
    language = catalog.variant(spec.variant).language
    return None if language == "c" else f"kernels of {language} check more than sizes"


@dataclass(frozen=True)
class Step:
    """One kernel: which values it reads, whether a bias is among its operands, and how many packed buffers are."""

    kernel: str
    x: int
    residual: int  # -1: none
    bias: bool
    buffers: int

    @property
    def spec(self) -> KernelSpec:
        return parsed(self.kernel)

    @property
    def own(self) -> bool:
        """Whether an output channel reads its own input channels alone."""
        return self.spec.conv is not None and self.spec.in_features == self.spec.conv.taps

    @property
    def align(self) -> int:
        """Output channels that the kernel computes together."""
        return {"conv_csr": 1, "conv_bsr": dict(self.spec.fields).get("r", 1)}.get(self.spec.variant, 4)


@dataclass(frozen=True)
class Stream:
    """Values 0 to inputs - 1 are the inputs, value inputs + i is what step i computes; `outputs` are those handed out.

    `operands` of the op are, step by step, the bias where there is one and the packed buffers.
    """

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.steps) <= MAX_STEPS or self.inputs < 1 or not self.outputs:
            raise SpecError(f"a stream has inputs, outputs and 1 to {MAX_STEPS} steps")
        if len({step.spec.dtype for step in self.steps}) != 1:
            raise SpecError("the steps of a stream have one dtype")
        shapes: list[tuple[int, ...] | None] = [None] * self.inputs
        for place, step in enumerate(self.steps):
            if (reason := refuse(step.spec)) is not None:
                raise SpecError(f"step {place} of a stream: {reason}")
            added = any(s.name == "add" for s in step.spec.epilogue)
            if added != (step.residual >= 0) or step.bias != step.spec.bias or not 0 <= step.buffers <= 16:
                raise SpecError(f"step {place} of a stream has other operands than its kernel")
            for read, shape in ((step.x, step.spec.input_shape), (step.residual, step.spec.output_shape)):
                if read >= len(shapes) or (read < 0 and read != step.residual):
                    raise SpecError(f"step {place} of a stream reads value {read}, which comes later or never")
                if read >= 0 and shapes[read] not in (None, shape):
                    raise SpecError(f"step {place} of a stream reads {shape} from value {read} of {shapes[read]}")
                if read >= 0:
                    shapes[read] = shape
            shapes.append(step.spec.output_shape)
        if None in shapes or len(set(self.outputs)) != len(self.outputs):
            raise SpecError("a stream reads all of its inputs, and hands out a value once")
        if not all(self.inputs <= value < len(shapes) for value in self.outputs):
            raise SpecError("a stream hands out what its steps compute")

    @property
    def dtype(self) -> str:
        return self.steps[0].spec.dtype

    @property
    def operands(self) -> int:
        """How many tensors the steps take besides values."""
        return sum(step.bias + step.buffers for step in self.steps)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """(channels, *size) of every value."""
        found: list[tuple[int, ...]] = [()] * self.inputs
        for step in self.steps:
            found[step.x] = step.spec.input_shape
            if 0 <= step.residual < self.inputs:
                found[step.residual] = step.spec.output_shape
            found.append(step.spec.output_shape)
        return tuple(found)

    @functools.cached_property
    def chunks(self) -> tuple[int, ...]:
        """For every step, the output channels after which the next step goes on with them, or 0 for all.

        A convolution in front of a depthwise one, or of a pooling, hands over as many channels as stay in L2, where all
        of them would not: then they are never written to memory.
        """
        l2 = Target.probe().l2
        found = [0] * len(self.steps)
        for place, (step, reader) in enumerate(itertools.pairwise(self.steps)):
            value = self.inputs + place
            readers = [s for s in self.steps if value in (s.x, s.residual)]
            alone = readers == [reader] and reader.residual != value and value not in self.outputs
            if not (alone and reader.own) or step.own or (place and found[place - 1]) or self._bytes(value) < l2:
                continue
            rows, *size = self.shapes[value]
            fit = l2 // 2 // (math.prod(size) * ITEM_BYTES[self.dtype])
            found[place] = max(1, fit // step.align) * step.align % rows  # 0 where all of them fit
        return tuple(found)

    @functools.cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(kind, number or byte offset) of every value: INPUT i, OUTPUT i, or ARENA at an offset."""
        last = list(range(len(self.shapes)))  # the value that is computed from it last; itself where nobody reads it
        for made, step in enumerate(self.steps, self.inputs):
            for read in (step.x, step.residual):
                if read >= 0:
                    last[read] = made
        spans = []
        for place, value in enumerate(range(self.inputs, len(self.shapes))):
            if value not in self.outputs:
                together = place > 0 and self.chunks[place - 1] > 0  # with the step before, a few channels at a time
                spans.append((value, (self._kept(value), value - together, last[value])))
        offsets = arrange([span for _, span in spans])
        found = dict(zip((value for value, _ in spans), offsets, strict=True))
        return tuple(
            (INPUT, value) if value < self.inputs
            else (OUTPUT, self.outputs.index(value)) if value in self.outputs
            else (ARENA, found[value])
            for value in range(len(self.shapes))
        )  # fmt: skip

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena of one thread."""
        ends = (at + self._kept(v) for v, (kind, at) in enumerate(self.places) if kind == ARENA)
        return max(ends, default=0)

    def _bytes(self, value: int) -> int:
        return self._padded(self.shapes[value])

    def _kept(self, value: int) -> int:
        """Bytes of a value that the arena keeps."""
        rows = self.chunks[value - self.inputs]
        return self._padded((rows, *self.shapes[value][1:])) if rows else self._bytes(value)

    def _padded(self, shape: tuple[int, ...]) -> int:
        size = math.prod(shape) * ITEM_BYTES[self.dtype]
        return -(-size // ALIGN) * ALIGN

    def text(self) -> str:
        """Canonical text: equal kernels are written once."""
        kernels = list(dict.fromkeys(step.kernel for step in self.steps))
        steps = [[kernels.index(s.kernel), s.x, s.residual, int(s.bias), s.buffers] for s in self.steps]
        return json.dumps([kernels, self.inputs, steps, list(self.outputs)], separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Stream:
        """The inverse of `text`. Raises SpecError for text that no Stream printed."""
        try:
            kernels, inputs, steps, outputs = json.loads(text)
            numbers = [inputs, *outputs, *(n for step in steps for n in step)]
            if not all(type(n) is int for n in numbers) or not all(isinstance(k, str) for k in kernels):
                raise ValueError("a stream is kernels, and integers")
            made = tuple(Step(kernels[k], x, residual, bool(bias), buffers) for k, x, residual, bias, buffers in steps)
            stream = cls(inputs, made, tuple(outputs))
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            raise SpecError(f"not the text of a stream: {text[:120]!r} ({error})") from error
        if stream.text() != text:
            raise SpecError(f"not the canonical text of a stream: {text[:120]!r}")
        return stream


def arrange(spans: Sequence[tuple[int, int, int]]) -> list[int]:
    """Offsets of values (bytes, first step, last step) such that those whose steps overlap do not: the largest first,
    each in the lowest gap that is wide enough."""
    order = sorted(range(len(spans)), key=lambda i: (-spans[i][0], spans[i][1]))
    offsets = [0] * len(spans)
    placed: list[int] = []
    for i in order:
        size, first, last = spans[i]
        at = 0
        for j in sorted((j for j in placed if spans[j][1] <= last and first <= spans[j][2]), key=offsets.__getitem__):
            if at + size <= offsets[j]:
                break
            at = max(at, offsets[j] + spans[j][0])
        offsets[i] = at
        placed.append(i)
    return offsets


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> KernelSpec:
    """KernelSpec.parse, once per text."""
    return KernelSpec.parse(text)
