"""What differs between the ops that have kernels: how a site is called, its dense form, and what a check looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparsec import verify
from sparsec.aten import arguments, opname
from sparsec.codegen.kernel import Conv, Problem, Step
from sparsec.errors import PassError, SpecError
from sparsec.graph import Fact
from sparsec.ops import conv as conv_op
from sparsec.ops import embedding as embedding_op
from sparsec.ops import linear as linear_op

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def op_of(fact: Fact) -> str:
    """The op of the catalogue that computes a site."""
    return "conv" if fact.op in CONVOLUTIONS else fact.op


def overload(op: str, buckets: bool = False) -> Any:
    """The library op that runs kernels of an op of the catalogue; `buckets`: with a dense weight beside it."""
    if op == "embedding":
        return embedding_op.OVERLOAD
    found = conv_op if op == "conv" else linear_op
    return found.BUCKETS if buckets else found.OVERLOAD


@dataclass(frozen=True)
class Source:
    """The node whose value a kernel reads: the site's input, or what is behind a pad with zeros that the kernel folds.

    `low` and `high` are the zeros that it adds before and behind the last dimensions.
    """

    node: fx.Node
    low: tuple[int, ...] = ()
    high: tuple[int, ...] = ()

    def crop(self, x: torch.Tensor) -> torch.Tensor:
        """The value of `node`, of the padded value."""
        for i, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            dim = i - len(self.low)
            x = x.narrow(dim, low, x.shape[dim] - low - high)
        return x.contiguous() if any(self.low + self.high) else x


def operand(node: fx.Node) -> fx.Node:
    """What a site's weight multiplies, or the indices of an embedding."""
    read = node.args[1 if opname(node) == "aten::embedding" else 0]
    if not isinstance(read, fx.Node):
        raise PassError(f"node {node.name!r} multiplies {read!r}, which is no node")
    return read


def source(node: fx.Node) -> Source:
    """What a site's kernel reads: `conv(pad(x, (0, 1, 0, 1)), W) --> conv(x, W)` with that padding in its geometry."""
    read = operand(node)
    if not opname(node).startswith("aten::conv") or opname(read) not in ("aten::constant_pad_nd", "aten::pad"):
        return Source(read)
    bound = arguments(read)
    axes = len(_shape(read)) - 2
    pads = bound["pad"]
    plain = bound.get("mode", "constant") == "constant" and bound.get("value") in (None, 0, 0.0)
    if not plain or not all(isinstance(n, int) and n >= 0 for n in pads) or not 0 < len(pads) // 2 <= axes:
        return Source(read)
    pads = [*pads, *[0] * (2 * axes - len(pads))]
    inner = bound["self"] if "self" in bound else bound["input"]
    return Source(inner, tuple(reversed(pads[::2])), tuple(reversed(pads[1::2])))


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape that the capture recorded for a node; () when it recorded none."""
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def rows(node: fx.Node) -> tuple[int, ...]:
    """How many rows a linear's input has, where the capture recorded it as a number; else ()."""
    read = node.args[0]
    sizes = _shape(read)[:-1] if isinstance(read, fx.Node) else ()
    return (max(1, math.prod(sizes)),) if sizes and all(isinstance(s, int) for s in sizes) else ()


def geometry(node: fx.Node, fact: Fact) -> Conv | str:
    """The geometry of a convolution node, or why it has none that a kernel could be made for."""
    bound = arguments(node)
    axes = len(fact.shape) - 2
    read = source(node)
    value = read.node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return "the capture recorded no shape of its input"
    size = tuple(value.shape[-axes:])
    if not all(isinstance(n, int) for n in size):
        return f"its input has dynamic spatial sizes {tuple(map(str, size))}; capture it with static ones"
    stride, dilation = _spread(bound["stride"], axes), _spread(bound["dilation"], axes)
    low = high = (0,) * axes
    if isinstance(bound["padding"], str):
        if bound["padding"] == "same":
            total = [d * (k - 1) for d, k in zip(dilation, fact.shape[2:], strict=True)]
            low, high = tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)
    else:
        low = high = _spread(bound["padding"], axes)
    if read.low:
        low = tuple(a + b for a, b in zip(low, read.low, strict=True))
        high = tuple(a + b for a, b in zip(high, read.high, strict=True))
    try:
        return Conv(size, tuple(fact.shape[2:]), stride, low, high, dilation, int(bound["groups"]))
    except SpecError as error:
        return str(error)


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


@dataclass(frozen=True)
class Sample:
    """Rows that stand for a product: y[i] = epilogue(weight @ x[i] + bias), with a residual beside."""

    y: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    stored: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None


def flatten(problem: Problem, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Activations and residual with one batch dimension in front: rows, or images."""
    if problem.op == "embedding":
        return x.reshape(-1), None
    if problem.op == "bmm":
        return x, None
    if problem.conv is None:
        x = x.reshape(-1, x.shape[-1])
        return x, residual.reshape(x.shape[0], -1) if residual is not None else None
    image = len(problem.conv.size) + 1
    if x.dim() == image:
        return x[None], residual[None] if residual is not None else None
    return x, residual


def take(problem: Problem, x: torch.Tensor, batch: int) -> torch.Tensor:
    """x cyclically made `batch` rows long: real activations at a size that the example inputs do not have."""
    dim = 1 if problem.op == "bmm" else 0
    count = batch // x.shape[0] if problem.op == "bmm" else batch
    return x if x.shape[dim] == count else x.index_select(dim, torch.arange(count) % x.shape[dim])


def dense(
    problem: Problem, weight: torch.Tensor, bias: torch.Tensor | None, steps: tuple[Step, ...]
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """The dense site as torch runs it, of (x, residual); `weight` in the shape that torch wants."""
    conv = problem.conv
    if problem.op == "embedding":
        return lambda x, residual: F.embedding(x, weight)
    if problem.op == "bmm":
        return lambda x, residual: torch.bmm(x, weight)
    if conv is None:
        return lambda x, residual: verify.apply_steps(steps, F.linear(x, weight, bias), residual)
    return lambda x, residual: verify.apply_steps(steps, conv_op.dense(x, weight, bias, conv), residual)


def samples(
    problem: Problem, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stored: torch.Tensor,
    bias: torch.Tensor | None, residual: torch.Tensor | None,
) -> Iterator[Sample]:  # fmt: skip
    """What a check compares: a few hundred rows of a linear; pixels of a convolution with what lies under its taps.

    `weight` and `stored` are the (out, in) matrix. Groups of channels are rows of one block-diagonal product.
    """
    if problem.conv is None:
        rows = verify.sample(x.shape[0])
        yield Sample(y[rows], x[rows], weight, stored, bias, residual[rows] if residual is not None else None)
        return
    conv, out = problem.conv, weight.shape[0]
    pixels = _pixels(x.shape[0] * conv.pixels)
    image, place = pixels // conv.pixels, pixels % conv.pixels
    got = y.reshape(y.shape[0], out, conv.pixels)[image, :, place]
    rest = residual.reshape(y.shape[0], out, conv.pixels)[image, :, place] if residual is not None else None
    columns = _under_taps(x, conv, image, place)
    wide = columns.shape[1] // conv.groups
    at_once = max(1, min(conv.groups, int((_BLOCK_DIAGONAL / max(1, wide * out // conv.groups)) ** 0.5)))
    for g in range(0, conv.groups, at_once):
        stop = min(conv.groups, g + at_once)
        rows_ = slice(g * out // conv.groups, stop * out // conv.groups)
        parts = [part.unflatten(0, (stop - g, -1)) for part in (weight[rows_], stored[rows_])]
        full = [torch.block_diag(*part).to(part.dtype) for part in parts]
        yield Sample(
            got[:, rows_], columns[:, g * wide : stop * wide], full[0], full[1],
            bias[rows_] if bias is not None else None, rest[:, rows_] if rest is not None else None,
        )  # fmt: skip


_BLOCK_DIAGONAL = 1 << 21  # entries of a block-diagonal weight that are alive at once


def _pixels(count: int) -> torch.Tensor:
    """Which output pixels of all images to check: both ends, where padding is, and evenly spread odd places between."""
    chosen = verify.sample(count)
    if isinstance(chosen, slice):
        return torch.arange(count)
    spread = (chosen * 7919 + 13) % count  # a prime step meets every row and column of an image
    pixels: torch.Tensor = torch.unique(torch.cat([chosen[::2], spread[1::2]]))
    return pixels


def windows(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """What a weight multiplies: rows of x, or of images the inputs under some thousand evenly spread output pixels."""
    if problem.op == "bmm":
        return x
    if problem.conv is None:
        return x.reshape(-1, x.shape[-1])
    x, _ = flatten(problem, x, None)
    count = x.shape[0] * problem.conv.pixels
    pixels = torch.arange(0, count, max(1, count // _WINDOWS))
    return _under_taps(x, problem.conv, pixels // problem.conv.pixels, pixels % problem.conv.pixels)


_WINDOWS = 1 << 14  # pixels that calibration looks at


def _under_taps(x: torch.Tensor, conv: Conv, image: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """(pixels, channels * taps): the inputs that each output pixel multiplies, zeros where there is padding."""
    inside = torch.ones(place.shape[0], 1, dtype=torch.bool)
    index = torch.zeros(place.shape[0], 1, dtype=torch.long)
    below = math.prod(conv.out)
    for axis in conv.axes:
        below //= axis.out
        at = (place // below % axis.out)[:, None] * axis.stride + torch.arange(axis.kernel) * axis.dilation - axis.low
        good = (at >= 0) & (at < axis.size)
        index = (index[:, :, None] * axis.size + at.clamp(0, axis.size - 1)[:, None, :]).flatten(1)
        inside = (inside[:, :, None] & good[:, None, :]).flatten(1)
    flat = x.reshape(x.shape[0], x.shape[1], conv.inputs)
    found: torch.Tensor = flat[image[:, None, None], torch.arange(x.shape[1])[None, :, None], index[:, None, :]]
    shown: torch.Tensor = torch.where(inside[:, None, :], found, torch.zeros_like(found))
    return shown.flatten(1)
