"""The geometry of a convolution, and the layout of padded planes in which every tap is a constant offset.

A convolution of stride s splits its input into s phases along each axis; over one phase it has stride 1. Padded rows
are laid one after the other at `pitch` elements, so that the input of output position p under a tap is at p + offset
(Elsen et al., "Fast Sparse ConvNets", CVPR 2020, for 1x1; the offsets are those of direct convolution). The zeros at
the end of a row are those at the beginning of the next one, and images follow each other: no panel ends with an image.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

from sparsec.errors import SpecError

MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Axis:
    """One spatial axis: input size, taps, stride, zeros before and behind, dilation."""

    size: int
    kernel: int
    stride: int
    low: int
    high: int
    dilation: int

    @property
    def out(self) -> int:
        """Output size; 0 or less when the kernel does not fit."""
        return (self.size + self.low + self.high - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        """(phase, shift) of every tap: which of the `stride` phases it reads, and how far behind the output."""
        steps = (t * self.dilation for t in range(self.kernel))
        return tuple((step % self.stride, step // self.stride) for step in steps)

    @property
    def phases(self) -> tuple[int, ...]:
        """The phases that some tap reads, ascending."""
        return tuple(sorted({phase for phase, _ in self.taps}))

    @property
    def trivial(self) -> bool:
        """Whether output positions are input positions."""
        return (self.kernel, self.stride, self.low, self.high) == (1, 1, 0, 0)

    def data(self, phase: int) -> tuple[int, int]:
        """The positions [first, last) of a phase that hold input; those before and behind are padding."""
        need = self.out + max(shift for _, shift in self.taps)
        first = min(need, max(0, -(-(self.low - phase) // self.stride)))
        return first, min(need, max(first, -(-(self.size + self.low - phase) // self.stride)))

    @property
    def extent(self) -> int:
        """Positions from one row to the next: padding behind a row that is padding before the next counts once."""
        need = self.out + max(shift for _, shift in self.taps)
        spans = [self.data(phase) for phase in self.phases]
        shared = min(min(first, need - last) for first, last in spans)
        return max(self.out, need - shared)


@dataclass(frozen=True)
class Layout:
    """Padded planes of a convolution, all sizes in elements.

    `axes` are those that are left when axes on which nothing happens have been merged. There is a plane for each input
    channel and each of `phases`; `taps` are the (index of the phase, offset) of the taps in C order.
    """

    axes: tuple[Axis, ...]
    phases: tuple[tuple[int, ...], ...]
    taps: tuple[tuple[int, int], ...]

    @property
    def pitch(self) -> int:
        return self.axes[-1].extent

    @property
    def rows(self) -> int:
        """Rows of `pitch` positions in an image."""
        return math.prod(axis.extent for axis in self.axes[:-1])

    @property
    def span(self) -> int:
        """The largest offset of a tap."""
        return max(offset for _, offset in self.taps)

    @property
    def flat(self) -> bool:
        """Whether output positions are input positions, all of them used."""
        return len(self.axes) == 1 and self.axes[0].trivial


@dataclass(frozen=True)
class Conv:
    """What a convolution does besides its weight: spatial input sizes, kernel, and how the kernel walks."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]  # zeros before each axis
    high: tuple[int, ...]  # zeros behind it
    dilation: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        lists = (self.size, self.kernel, self.stride, self.low, self.high, self.dilation)
        if not 1 <= len(self.size) <= 3 or any(len(values) != len(self.size) for values in lists):
            raise SpecError(f"{self}: every list has one number for each of 1 to 3 axes")
        positive = (*self.size, *self.kernel, *self.stride, *self.dilation, self.groups)
        if min(positive) < 1 or min(*self.low, *self.high) < 0 or max(*positive, *self.low, *self.high) > MAX_SIZE:
            raise SpecError(f"{self}: sizes, kernel, stride, dilation and groups are positive, padding is not negative")
        if min(axis.out for axis in self.axes) < 1:
            raise SpecError(f"{self}: the kernel is larger than its padded input, so there is no output")
        if math.prod(self.size) > MAX_SIZE or math.prod(self.out) > MAX_SIZE:
            raise SpecError(f"{self}: a plane has more than 2**31 - 1 elements")

    @property
    def axes(self) -> tuple[Axis, ...]:
        lists = (self.size, self.kernel, self.stride, self.low, self.high, self.dilation)
        return tuple(Axis(*values) for values in zip(*lists, strict=True))

    @property
    def out(self) -> tuple[int, ...]:
        """Spatial output sizes."""
        return tuple(axis.out for axis in self.axes)

    @property
    def taps(self) -> int:
        """Weights per input channel."""
        return math.prod(self.kernel)

    @property
    def pixels(self) -> int:
        """Output pixels of an image."""
        return math.prod(self.out)

    @property
    def inputs(self) -> int:
        """Input pixels of an image."""
        return math.prod(self.size)

    @property
    def layout(self) -> Layout:
        return _layout(self)

    def numbers(self) -> list[object]:
        """The JSON form: six lists and the groups."""
        lists = (self.size, self.kernel, self.stride, self.low, self.high, self.dilation)
        return [*(list(values) for values in lists), self.groups]

    @classmethod
    def parse(cls, numbers: object) -> Conv:
        """The inverse of `numbers`. Raises SpecError for anything else."""
        if not isinstance(numbers, list) or len(numbers) != 7 or not all(isinstance(v, list) for v in numbers[:6]):
            raise SpecError(f"a convolution is six lists and the groups, got {numbers!r:.120}")
        if any(type(n) is not int for values in numbers[:6] for n in values) or type(numbers[6]) is not int:
            raise SpecError(f"a convolution is described by integers, got {numbers!r:.120}")
        size, kernel, stride, low, high, dilation = (tuple(values) for values in numbers[:6])
        return cls(size, kernel, stride, low, high, dilation, numbers[6])


@functools.lru_cache(maxsize=1024)
def _layout(conv: Conv) -> Layout:
    axes = _merged(conv.axes)
    phases = tuple(itertools.product(*(axis.phases for axis in axes)))
    taps = []
    for combination in itertools.product(*(axis.taps for axis in axes)):
        offset = 0
        for axis, (_, shift) in zip(axes, combination, strict=True):
            offset = offset * axis.extent + shift
        taps.append((phases.index(tuple(phase for phase, _ in combination)), offset))
    return Layout(axes, phases, tuple(taps))


def _merged(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes on which nothing happens disappear into the axis behind them, those of one element altogether."""
    found: list[Axis] = []
    for axis in axes:
        if found and found[-1].trivial and axis.trivial:
            found[-1] = Axis(found[-1].size * axis.size, 1, 1, 0, 0, 1)
        else:
            found.append(axis)
    left = [axis for axis in found if not (axis.trivial and axis.size == 1)]
    return tuple(left) or (Axis(1, 1, 1, 0, 0, 1),)
