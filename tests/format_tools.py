"""What the tests of formats share: random weights, buffer sizes, and ways to break buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsec.formats import BSR, CSR, Bitmask, Buffers, Dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
FORMAT_LIST = (
    Dense(),
    CSR(),
    CSR(16, 8),
    CSR(32, 5),
    CSR(None, 128),
    Bitmask(),
    Bitmask(16, 32),
    Bitmask(32),
    Bitmask(32, 32),
    Bitmask(64, 128),
    BSR(1, 1),
    BSR(1, 4),
    BSR(4, 1),
    BSR(16, 1, 32),
    BSR(3, 5),
    BSR(8, 8),
)


def weight(rows: int, cols: int, density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator) * 20
    kept = torch.rand(rows, cols, generator=generator) < density
    return (values.clamp(-100, 100) * kept).to(dtype)


def nbytes(buffers: Buffers) -> int:
    return sum(t.numel() * t.element_size() for t in buffers.values())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit pattern, so that NaN equals itself."""
    return tensor.contiguous().view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


# Corruption: each line breaks one thing in buffers that pack made, and names words of the message.

Break = Callable[[Buffers], Buffers]


def put(key: str, at: int | tuple[int, ...], value: float) -> Break:
    def change(buffers: Buffers) -> Buffers:
        fresh = buffers[key].clone()
        fresh[at] = value
        return {**buffers, key: fresh}

    return change


def swap(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    return lambda buffers: {**buffers, key: change(buffers[key])}


def shorter(t: torch.Tensor) -> torch.Tensor:
    return t[:-1].clone()


def longer(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t[-1:]])


def strided(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t], dim=-1)[..., 0]


def without_last(buffers: Buffers) -> Buffers:
    return dict(list(buffers.items())[:-1])


def reordered(buffers: Buffers) -> Buffers:
    return dict(reversed(list(buffers.items())))


COMMON: list[tuple[Break, str]] = [
    (without_last, "expected"),
    (reordered, "in this order"),
    (lambda b: {**b, "extra": b["values"]}, "expected"),
    (swap("values", strided), "'values' is not contiguous"),
    (swap("values", lambda t: t.to(torch.complex64)), "'values' has dtype torch.complex64"),
    (swap("values", lambda t: t.to(torch.int32)), "'values' has dtype torch.int32"),
    (swap("values", lambda t: t[None].clone()), "'values' has shape"),
    (swap("values", shorter), "expected"),
    (swap("values", longer), "expected"),
]
