"""`sparsec::embedding`: rows of a table that is held as a factor, (..., width) for indices (...).

The kernel argument is the text of a KernelSpec of (rows, width), as for `linear`; bias and residual are always None.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sparsec.codegen.build import get_kernel
from sparsec.codegen.kernel import DTYPES, KernelSpec
from sparsec.errors import InputError
from sparsec.ops.linear import ONE

_LIBRARY = torch.library.Library("sparsec", "FRAGMENT")


@lru_cache(maxsize=4096)
def _row(kernel: str) -> tuple[int, torch.dtype]:
    """Width and dtype of a row."""
    spec = KernelSpec.parse(kernel)
    return spec.in_features, DTYPES[spec.dtype]


def _embedding(
    x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    """`x` are the indices. Raises InputError for those out of range."""
    width, dtype = _row(kernel)
    y = torch.empty((*x.shape, width), dtype=dtype, device=x.device)
    try:
        get_kernel(kernel).call(x, y, bias, residual, *weight)
    except ValueError as refusal:
        raise InputError(f"the kernel of this site refuses its operands: {refusal}") from refusal
    return y


def _fake(
    x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    width, dtype = _row(kernel)
    return x.new_empty((*x.shape, width), dtype=dtype)


_LIBRARY.define("embedding" + ONE)
_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")
torch.library.register_fake("sparsec::embedding", _fake, lib=_LIBRARY)

OVERLOAD = torch.ops.sparsec.embedding.default
