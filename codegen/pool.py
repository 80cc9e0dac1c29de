"""Max pooling, which torch runs number by number: the kernel of depthwise convolutions, with a maximum for the sum."""

from __future__ import annotations

import functools

from sparsec.codegen import conv_variants
from sparsec.codegen.build import usable
from sparsec.codegen.kernel import Conv, KernelSpec, Problem
from sparsec.formats import Dense
from sparsec.target import Target

VARIANT = next(v for v in conv_variants.VARIANTS if v.name == "pool_max")


@functools.lru_cache(maxsize=256)
def spec(channels: int, conv: Conv, dtype: str) -> KernelSpec | None:
    """The kernel that pools `channels` planes by the geometry `conv`, whose groups they are, or None.

    Raises ToolchainError where there is no C compiler.
    """
    target, _ = usable(Target.probe())
    problem = Problem(VARIANT.op, channels, conv.taps, dtype, channels * conv.taps, conv=conv)
    if VARIANT.refuse(problem, Dense(), target) is not None:
        return None
    return VARIANT.specs(problem, Dense(), target)[0]
