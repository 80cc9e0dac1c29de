"""What a code generator promises: text from a KernelSpec, a library from the text, a callable from the library."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from sparsec.codegen.kernel import Kernel, KernelSpec, Source
from sparsec.errors import SpecError
from sparsec.target import Target


class Backend:
    """Base of the C, CUDA and TVM backends and of a user's own, given to `sparsec.register`.

    `name` is what a Variant gives as its `language`. `build` and `load` are called from several threads at once. Build
    products belong into `sparsec.codegen.cache.open_cache()`, which locks, checks and evicts them.
    """

    name: ClassVar[str] = ""

    def available(self) -> str | None:
        """Why this backend cannot build here, with what to install; None when it can."""
        return None

    def render(self, spec: KernelSpec) -> Source:
        """The text of the kernel; equal specs give equal bytes in any process. Raises SpecError."""
        raise SpecError(f"backend {self.name!r} does not define render(spec)")

    def build(self, source: Source, target: Target) -> Path:
        """Compile, or find what was compiled before; the path is never written again. Raises ToolchainError."""
        raise SpecError(f"backend {self.name!r} does not define build(source, target)")

    def load(self, path: Path, source: Source) -> Kernel:
        """The callable in a built library. Raises LoadError."""
        raise SpecError(f"backend {self.name!r} does not define load(path, source)")
