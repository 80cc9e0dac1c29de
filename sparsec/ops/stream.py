"""`sparsec::stream`: the kernels of a `codegen.stream.Stream` one after the other, image by image.

What is here calls them batch by batch and answers everywhere; `codegen.dispatch` puts the library in front of it that
knows about images, threads and planned memory. Both give the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sparsec.codegen import dispatch
from sparsec.codegen.build import get_kernel
from sparsec.codegen.kernel import DTYPES
from sparsec.codegen.stream import Stream
from sparsec.errors import InputError
from sparsec.ops.linear import GRADIENT, define

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")
_SCHEMA = "(Tensor[] inputs, Tensor[] operands, str stream) -> Tensor[]"


@lru_cache(maxsize=1024)
def parse(text: str) -> Stream:
    """The stream of a text. Raises SpecError for another text."""
    return Stream.parse(text)


def _stream(inputs: list[torch.Tensor], operands: list[torch.Tensor], stream: str) -> list[torch.Tensor]:
    steps = parse(stream)
    _check(inputs, operands, steps)
    values: list[torch.Tensor | None] = [value.contiguous() for value in inputs]
    calls = [get_kernel(step.kernel).call for step in steps.steps]
    dispatch.admit_stream(stream, steps, calls)
    last = {read: place for place, step in enumerate(steps.steps) for read in (step.x, step.residual)}
    rest = iter(operands)
    for place, (step, call) in enumerate(zip(steps.steps, calls, strict=True)):
        x = values[step.x]
        if x is None:  # a stream reads what has been computed and not yet been dropped
            raise InputError("a value of the stream was dropped before its last use")
        bias = next(rest) if step.bias else None
        added = values[step.residual] if step.residual >= 0 else None
        y = x.new_empty((x.shape[0], *step.spec.output_shape))
        try:
            call(x, y, bias, added, *(next(rest) for _ in range(step.buffers)))
        except ValueError as refusal:
            raise InputError(f"step {place} of a stream refuses its operands: {refusal}") from refusal
        values.append(y)
        for read in (step.x, step.residual):
            if read >= 0 and last[read] == place and read not in steps.outputs:
                values[read] = None
    return [made for value in steps.outputs if (made := values[value]) is not None]


def _check(inputs: list[torch.Tensor], operands: list[torch.Tensor], stream: Stream) -> None:
    """InputError for inputs of another number, shape, dtype or device than the stream was made for."""
    if len(inputs) != stream.inputs or len(operands) != stream.operands:
        raise InputError(
            f"a stream of {stream.inputs} inputs and {stream.operands} operands got {len(inputs)} and {len(operands)}"
        )
    dtype = DTYPES[stream.dtype]
    for x, shape in zip(inputs, stream.shapes[: stream.inputs], strict=True):
        if x.shape[1:] != shape or x.shape[0] != inputs[0].shape[0]:
            sizes = ", ".join(map(str, shape))
            raise InputError(f"input has shape {tuple(x.shape)}; these sites were compiled for (batch, {sizes})")
        if x.dtype is not dtype or x.device.type != "cpu":
            raise InputError(f"input is {x.dtype} on {x.device}; these sites were compiled for {dtype} on cpu")
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(GRADIENT)


def _fake(inputs: list[torch.Tensor], operands: list[torch.Tensor], stream: str) -> list[torch.Tensor]:
    steps = parse(stream)
    return [inputs[0].new_empty((inputs[0].shape[0], *steps.shapes[value])) for value in steps.outputs]


def _autocast(inputs: list[torch.Tensor], operands: list[torch.Tensor], stream: str) -> list[torch.Tensor]:
    """Under autocast activations come in another dtype than the weights were packed in: cast, as for `conv`."""
    dtype = DTYPES[parse(stream).dtype]
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return OVERLOAD([x.to(dtype) for x in inputs], operands, stream)  # type: ignore[no-any-return]


define(_LIBRARY, "stream", _SCHEMA, _stream)
torch.library.register_fake("sparsec::stream", _fake, lib=_LIBRARY)

OVERLOAD = torch.ops.sparsec.stream.default

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_LIBRARY.impl("stream", _autocast, "AutocastCPU")
