"""`sparsec::gather_gemm`: y[target] += x[source] W[offset] over the pairs of a rulebook, and its gradients.

In float32 on a processor one generated kernel does all of it; other dtypes and devices multiply offset by offset.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.codegen.gather import kernel
from sparsec.errors import InputError, ToolchainError

MAX_ROWS = 2**31 - 2


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows that meet: `y[target[p]] += x[source[p]] @ W[k]` for bounds[k] <= p < bounds[k + 1].

    Pairs are ordered by offset, then by target, and no target occurs twice under one offset. Targets are cut into
    chunks of `chunk` rows, which threads share out; `starts` (offsets, chunks + 1) is where each chunk's pairs begin.
    """

    source: torch.Tensor  # int32 (pairs,)
    target: torch.Tensor  # int32 (pairs,)
    starts: torch.Tensor  # int32 (offsets, chunks + 1)
    bounds: tuple[int, ...]
    inputs: int
    outputs: int
    chunk: int

    @classmethod
    def build(
        cls,
        offset: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
        offsets: int,
        inputs: int,
        outputs: int,
        chunk: int = 0,
    ) -> Pairs:
        """Pairs given as three int64 vectors in any order. Raises InputError beyond 2**31 pairs or rows."""
        if max(inputs, outputs, offset.numel()) > MAX_ROWS:
            raise InputError(
                f"{inputs} inputs, {outputs} outputs and {offset.numel()} pairs: rulebooks count in 32 bits; "
                "split the batch"
            )
        key = offset * max(1, outputs) + target
        if bool((key[1:] < key[:-1]).any()):
            order = torch.argsort(key)
            offset, source, target = offset[order], source[order], target[order]
        chunk = chunk or max(1, -(-outputs // max(1, min(16, outputs // 96))))  # W[k] in L1; every thread gets some
        chunks = -(-outputs // chunk)
        cells = torch.bincount(offset * chunks + target // chunk, minlength=offsets * chunks)
        ends = torch.cat([cells.new_zeros(1), cells.cumsum(0)])
        at = torch.arange(offsets, device=ends.device)[:, None] * chunks + torch.arange(chunks + 1, device=ends.device)
        starts = ends[at].to(torch.int32)
        bounds = tuple(ends[torch.arange(offsets + 1, device=ends.device) * chunks].tolist())
        return cls(source.to(torch.int32), target.to(torch.int32), starts, bounds, inputs, outputs, chunk)

    @functools.cached_property
    def transposed(self) -> Pairs:
        """The same pairs with the roles exchanged, as the gradient of x needs them."""
        counts = torch.tensor(self.bounds).diff().to(self.source.device)
        offset = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        args = self.target.long(), self.source.long(), len(counts), self.outputs, self.inputs
        return Pairs.build(offset, *args)

    @property
    def operands(self) -> tuple[list[torch.Tensor], list[int]]:
        """What the ops take: [source, target, starts], [outputs, chunk, *bounds]."""
        return [self.source, self.target, self.starts], [self.outputs, self.chunk, *self.bounds]


_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")
_LIBRARY.define(
    "gather_gemm(Tensor x, Tensor weight, Tensor? bias, Tensor[] pairs, int[] sizes, "
    "Tensor[] back, int[] back_sizes) -> Tensor"
)
_LIBRARY.define("gather_weight_grad(Tensor x, Tensor dy, Tensor[] pairs, int[] sizes) -> Tensor")


@functools.cache
def kernel_call() -> Callable[..., Any] | None:
    """The kernel, or None where there is no C compiler (said once)."""
    try:
        return kernel().call
    except ToolchainError as error:
        warnings.warn(f"products go offset by offset, which is slower: {str(error).splitlines()[0]}", stacklevel=2)
        return None


def fits(*tensors: torch.Tensor | None) -> bool:
    return all(t is None or (t.dtype is torch.float32 and t.device.type == "cpu") for t in tensors)


def _gather_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: Sequence[torch.Tensor],
    sizes: Sequence[int],
    back: Sequence[torch.Tensor],
    back_sizes: Sequence[int],
) -> torch.Tensor:
    """x (inputs, in), weight (out, in, offsets), bias (out,) --> (outputs, out)."""
    outputs, chunk, bounds = sizes[0], sizes[1], sizes[2:]
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1] or len(bounds) != weight.shape[2] + 1:
        raise InputError(
            f"features {tuple(x.shape)} do not fit a weight of {tuple(weight.shape)} (out, in, offsets) and a rulebook "
            f"of {len(bounds) - 1} offsets"
        )
    call = kernel_call() if fits(x, weight, bias) else None
    if call is not None and weight.numel():
        y, n = x.new_empty((outputs, weight.shape[0])), (x.shape[0], outputs)
        x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
        sizes = 1, *n, weight.shape[2], chunk, 1, weight.shape[1], weight.shape[0], 0, 0
        run(call, x, weight, bias, None, *pairs, y, torch.empty_like(weight), None, *sizes)
        return y
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    sums = x.new_zeros((outputs, weight.shape[0]), dtype=wide)
    for k, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end > begin:
            rows = x.index_select(0, pairs[0][begin:end])
            sums.index_add_(0, pairs[1][begin:end], (rows @ weight[:, :, k].t()).to(wide))
    return (sums if bias is None else sums + bias).to(x.dtype)


def run(call: Callable[..., Any], *operands: Any) -> None:
    try:
        call(*operands)
    except ValueError as refusal:
        raise InputError(f"the kernel refuses its operands: {refusal}") from refusal


def _weight_grad(
    x: torch.Tensor, dy: torch.Tensor, pairs: Sequence[torch.Tensor], sizes: Sequence[int]
) -> torch.Tensor:
    """dW[:, :, k] = sum over the pairs of offset k of dy[target]^T x[source]."""
    bounds = sizes[2:]
    grad = x.new_zeros((len(bounds) - 1, dy.shape[1], x.shape[1]))
    for k, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end > begin:
            rows = x.index_select(0, pairs[0][begin:end]), dy.index_select(0, pairs[1][begin:end])
            torch.mm(rows[1].t(), rows[0], out=grad[k])
    return grad.permute(1, 2, 0).contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, pairs, sizes, back, back_sizes = inputs
    if not back:
        raise InputError("a gradient is wanted through a rulebook that came without its transpose")
    ctx.save_for_backward(x, weight, *pairs, *back)
    ctx.sizes, ctx.back_sizes, ctx.bias = list(sizes), list(back_sizes), bias is not None


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, weight, *rest = ctx.saved_tensors
    pairs, back = rest[:3], rest[3:]
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        turned = weight.transpose(0, 1).contiguous()
        dx = GATHER(dy, turned, None, back, ctx.back_sizes, pairs, ctx.sizes)
    if ctx.needs_input_grad[1]:
        dw = WEIGHT_GRAD(x, dy.contiguous(), pairs, ctx.sizes)
    if ctx.bias and ctx.needs_input_grad[2]:
        db = dy.sum(0)
    return dx, dw, db, [None] * 3, None, [None] * 3, None


def _fake_gather(x: Any, weight: Any, bias: Any, pairs: Any, sizes: Any, back: Any, back_sizes: Any) -> Any:
    return x.new_empty((sizes[0], weight.shape[0]))


def _fake_weight_grad(x: Any, dy: Any, pairs: Any, sizes: Any) -> Any:
    return x.new_empty((dy.shape[1], x.shape[1], len(sizes) - 3))


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("gather_gemm", _gather_gemm, _key)
    _LIBRARY.impl("gather_weight_grad", _weight_grad, _key)
torch.library.register_fake("sparsec::gather_gemm", _fake_gather, lib=_LIBRARY)
torch.library.register_fake("sparsec::gather_weight_grad", _fake_weight_grad, lib=_LIBRARY)
torch.library.register_autograd("sparsec::gather_gemm", _backward, setup_context=_setup, lib=_LIBRARY)

GATHER = torch.ops.sparsec.gather_gemm.default
WEIGHT_GRAD = torch.ops.sparsec.gather_weight_grad.default


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pairs: Pairs) -> torch.Tensor:
    """x (inputs, in) through a rulebook and a weight (out, in, offsets): (outputs, out); differentiable."""
    forward, sizes = pairs.operands
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    back, back_sizes = pairs.transposed.operands if wanted else ([], [])
    return GATHER(x, weight, bias, forward, sizes, back, back_sizes)  # type: ignore[no-any-return]
