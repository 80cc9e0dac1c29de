"""Gather, multiply, scatter: the kernel behind convolution over points and over the kept pixels of an image."""

from __future__ import annotations

import functools

from sparsec.codegen.build import get_kernel, usable
from sparsec.codegen.catalog import Variant
from sparsec.codegen.kernel import Kernel, KernelSpec
from sparsec.target import Target

VARIANTS = (
    Variant(
        "gather_gemm", "gather_gemm", "rulebook", "gather_gemm.c.jinja", isas=("avx512", "avx2", "portable"), steps=()
    ),
)


def spec(isa: str) -> KernelSpec:
    """The kernel takes every size as an argument: one serves all layers, since what it multiplies changes by input."""
    (only,) = VARIANTS
    return KernelSpec(only.op, only.name, only.format, only.dtypes[0], out_features=0, in_features=0, isa=isa)


@functools.cache
def kernel() -> Kernel:
    """The kernel for this machine, built on first use. Raises ToolchainError where there is no C compiler."""
    target, _ = usable(Target.probe())
    return get_kernel(spec(VARIANTS[0].isa(target) or "portable").text())
