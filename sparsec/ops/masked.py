"""`sparsec::masked_conv`: a convolution that computes some pixels of its output and leaves zeros in the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from sparsec.errors import InputError
from sparsec.ops.gather import MAX_ROWS, fits, kernel_call, run

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")
_LIBRARY.define(
    "masked_conv(Tensor x, Tensor weight, Tensor? bias, Tensor keep, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor"
)

Sizes = Sequence[int]


@dataclass(frozen=True, eq=False)
class Patches:
    """What each kept pixel reads: `source` (pixels, offsets), -1 outside the image; `target` is the pixel itself.

    Pixels are cut into chunks of `chunk`; `starts` (chunks + 1,) is the first kept one of each. Chunk c reads pixels
    lows[c] to lows[c] + span at most.
    """

    source: torch.Tensor  # int32
    target: torch.Tensor  # int32 (pixels,)
    starts: torch.Tensor  # int32
    lows: torch.Tensor  # int32 (chunks,)
    span: int
    inputs: int
    chunk: int

    @classmethod
    def build(
        cls, keep: torch.Tensor, space: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
    ) -> Patches:
        """Of a convolution over a grid of `space` cells whose outputs are the cells where `keep` is True."""
        kept, inputs, outputs = keep.nonzero(), math.prod(space), keep.numel()
        if max(inputs, outputs, len(kept) * math.prod(kernel)) > MAX_ROWS:
            raise InputError(f"images of {tuple(space)} have more patches than 32 bits can count")
        source = kept.new_zeros(len(kept), 1)
        inside = torch.ones_like(source, dtype=torch.bool)
        for d, size in enumerate(space):
            at = kept[:, d, None] * stride[d] - padding[d] + torch.arange(kernel[d], device=kept.device) * dilation[d]
            source = (source[:, :, None] * size + at[:, None]).flatten(1)
            inside = (inside[:, :, None] & ((at >= 0) & (at < size))[:, None]).flatten(1)
        target = keep.reshape(-1).nonzero().reshape(-1)
        chunk = max(1, -(-outputs // max(1, min(16, outputs // 96))))
        chunks = -(-outputs // chunk)
        starts = torch.searchsorted(target, torch.arange(chunks + 1, device=target.device) * chunk)
        low = torch.where(inside, source, inputs).amin(1)
        high = torch.where(inside, source, -1).amax(1)
        lows = low.new_full((chunks,), inputs).scatter_reduce(0, target // chunk, low, "amin")
        highs = low.new_full((chunks,), -1).scatter_reduce(0, target // chunk, high, "amax")
        span = int((highs - lows + 1).clamp(min=0).amax()) if chunks else 0
        table, target, starts, lows = (
            t.to(torch.int32) for t in (torch.where(inside, source, -1), target, starts, lows)
        )
        return cls(table, target, starts, lows, span, inputs, chunk)


_BOOKS: Any = WeakIdKeyDictionary()  # mask -> {geometry: rulebook}


def _book(keep: torch.Tensor, *geometry: tuple[int, ...]) -> Patches:
    """The rulebook of a mask, kept as long as the mask lives and nobody writes into it."""
    version = 0 if keep.is_inference() else keep._version
    table = _BOOKS.setdefault(keep, {})
    key = (version, keep.data_ptr(), geometry)
    if key not in table:
        table.clear()
        table[key] = Patches.build(keep, *geometry)
    found: Patches = table[key]
    return found


def _masked_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> torch.Tensor:
    """x (images, in, *space), weight (out, in / groups, *kernel) --> (images, out, *keep.shape).

    Images in channels_last are read and written as they are.
    """
    _check(x, weight, bias, keep, stride, padding, dilation, groups)
    space, kernel = tuple(x.shape[2:]), tuple(weight.shape[2:])
    book = _book(keep, space, kernel, tuple(stride), tuple(padding), tuple(dilation))
    last = _channels_last(x)
    y = _empty(x, weight, keep)
    call = kernel_call() if fits(x, weight, bias) else None
    if call is None or not y.numel() or not weight.numel():
        return y.copy_(_by_hand(x, weight, bias, keep, book, groups))
    x, y_given = (_rows(x), _rows(y)) if last else (x.contiguous(), y)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    tables = keep.reshape(-1), book.source, book.target, book.starts
    lows, span = (None, 0) if last else (book.lows, book.span)
    sizes = x.shape[0], book.inputs, keep.numel(), math.prod(kernel), book.chunk, groups, weight.shape[1]
    run(call, x, weight, bias, *tables, y_given, torch.empty_like(weight), lows, *sizes, len(weight) // groups, span, 1)
    return y


def _empty(x: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The output, in the memory format of x."""
    memory = _last(x.dim()) if _channels_last(x) else torch.contiguous_format
    size = x.shape[0], weight.shape[0], *keep.shape
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> None:
    d = weight.dim() - 2
    if d not in (1, 2, 3) or x.dim() != d + 2 or any(len(v) != d for v in (stride, padding, dilation)):
        raise InputError(
            f"x {tuple(x.shape)} does not fit a weight of {tuple(weight.shape)} (out, in / groups, *kernel)"
        )
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise InputError(
            f"x has {x.shape[1]} channels, a weight of {tuple(weight.shape)} in {groups} groups other ones"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"the bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if any(t is not None and (t.dtype, t.device) != (x.dtype, x.device) for t in (weight, bias)):
        raise InputError(f"x is {x.dtype} on {x.device}, the weight {weight.dtype} on {weight.device}; they must agree")
    if min((*stride, *dilation)) < 1 or min(padding) < 0:
        raise InputError(f"stride {stride} and dilation {dilation} must be positive, padding {padding} not negative")
    given = (n + 2 * p - e * (k - 1) - 1 for n, p, e, k in zip(x.shape[2:], padding, dilation, weight.shape[2:]))
    want = tuple(g // s + 1 for g, s in zip(given, stride))
    if keep.dtype is not torch.bool or tuple(keep.shape) != want or keep.device != x.device:
        raise InputError(
            f"the mask is {keep.dtype} {tuple(keep.shape)} on {keep.device}; for x {tuple(x.shape)} it must be "
            f"bool {want} on {x.device}, one value for each pixel of the output"
        )


def _by_hand(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, keep: torch.Tensor, book: Patches, groups: int
) -> torch.Tensor:
    """The same offset by offset, for every dtype and device: half precision sums in float32."""
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    rows = x.flatten(2).permute(2, 0, 1).unflatten(2, (groups, weight.shape[1]))  # (pixels, images, groups, in)
    sums = x.new_zeros((len(book.target), x.shape[0], weight.shape[0]), dtype=wide)
    split = weight.flatten(2).unflatten(0, (groups, -1))
    for k, source in enumerate(book.source.unbind(1)):
        inside = (source >= 0).nonzero().reshape(-1)
        products = torch.einsum("pngi,goi->pngo", rows.index_select(0, source[inside]), split[..., k])
        sums.index_add_(0, inside, products.flatten(2).to(wide))
    y = sums.new_zeros((keep.numel(), *sums.shape[1:]))
    y[book.target.long()] = sums if bias is None else sums + bias.to(wide)
    image: torch.Tensor = y.permute(1, 2, 0).unflatten(2, keep.shape)
    return image.to(x.dtype)


def _last(rank: int) -> torch.memory_format:
    return torch.channels_last if rank == 4 else torch.channels_last_3d


def _channels_last(x: torch.Tensor) -> bool:
    return x.dim() in (4, 5) and x.is_contiguous(memory_format=_last(x.dim())) and not x.is_contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor (images, *space, channels) behind a channels_last one."""
    return x.permute(0, *range(2, x.dim()), 1)


def _fake(x: Any, weight: Any, bias: Any, keep: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> Any:
    return _empty(x, weight, keep)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, keep, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, keep)
    ctx.bias = None if bias is None else list(bias.shape)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    """Masked pixels pass no gradient; the rest is an ordinary convolution's."""
    x, weight, keep = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias is not None and ctx.needs_input_grad[2]]
    grads = torch.ops.aten.convolution_backward.default(
        dy * keep, x, weight, ctx.bias, stride, padding, dilation, False, [0] * len(stride), groups, wanted
    )
    return (*grads, None, None, None, None, None)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("masked_conv", _masked_conv, _key)
torch.library.register_fake("sparsec::masked_conv", _fake, lib=_LIBRARY)
torch.library.register_autograd("sparsec::masked_conv", _backward, setup_context=_setup, lib=_LIBRARY)

MASKED_CONV = torch.ops.sparsec.masked_conv.default
