"""A kernel of one line for the tests of rendering, building and caching: y = factor * x + out_features."""

from __future__ import annotations

from pathlib import Path

from sparsec.codegen import catalog
from sparsec.codegen.kernel import KernelSpec, Step

TEMPLATE = Path(__file__).parent / "templates" / "tiny.c.jinja"
TINY = catalog.Variant("tiny", "tiny", "csr", str(TEMPLATE), isas=("avx2", "portable"), steps=("scale",))


def register() -> None:
    """Make the variant known to this process, once."""
    if TINY not in catalog.variants_for("tiny"):
        catalog.register(TINY)


def spec(number: int = 3, factor: float = 0.5, isa: str = "portable") -> KernelSpec:
    """Kernels of different `number` differ in one integer of their text."""
    register()
    return KernelSpec("tiny", "tiny", "csr", "float32", number, 4, isa, epilogue=(Step("scale", (factor,)),))
