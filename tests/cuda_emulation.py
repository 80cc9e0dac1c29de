"""Generated CUDA kernels on the host: one library for many of them, built with g++ against `cuda_emulation.h`."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec.codegen import render
from sparsec.codegen.kernel import KernelSpec
from sparsec.codegen.toolchain import include_path

HEADER = Path(__file__).with_name("cuda_emulation.h")
FLAGS = ("-std=c++17", "-Og", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-w")
CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")


@dataclass(frozen=True)
class Emulated:
    """Kernels by the text of their KernelSpec, called like real ones but with CPU tensors."""

    kernels: dict[str, Callable[..., Any]]
    library: ctypes.CDLL

    def conflicts(self) -> int:
        """Bank conflicts of ldmatrix since this was last asked."""
        return int(self.library.emulation_conflicts())

    def blocks(self) -> int:
        """Blocks of all launches since this was last asked."""
        return int(self.library.emulation_blocks())

    def launches(self) -> int:
        """Kernels launched since this was last asked."""
        return int(self.library.emulation_launches())

    def stream(self) -> int:
        """The stream of the last launch."""
        self.library.emulation_stream.restype = ctypes.c_void_p
        return self.library.emulation_stream() or 0

    def set_device(self, device: int) -> int:
        """Make another device current; which one was."""
        return int(self.library.emulation_set_device(device))

    def misplaced(self) -> int:
        """Launches, since this was last asked, while another device was current than the tensors are on."""
        return int(self.library.emulation_misplaced())

    def set_memory(self, there: bool) -> None:
        """Whether scratch memory can be had from here on."""
        self.library.emulation_set_memory(int(there))


def available() -> str | None:
    """Why there is no emulation here; None when there is."""
    return None if shutil.which("g++") else "no g++ on PATH: CUDA kernels are not emulated"


def build(specs: Sequence[KernelSpec], folder: Path) -> Emulated:
    """Compile the kernels of `specs` for the host. Every source is a namespace of its own, so they share a unit."""
    text = "\n".join(render.render(spec).text for spec in dict.fromkeys(specs))
    module = compile_text(text, folder)
    library = ctypes.CDLL(str(_place(text, folder)))
    return Emulated({spec.text(): module[spec.symbol] for spec in specs}, library)


def _place(text: str, folder: Path) -> Path:
    return folder / (hashlib.sha256(text.encode()).hexdigest()[:16] + ".so")


def compile_text(text: str, folder: Path) -> Any:
    """The tvm-ffi module of some CUDA sources."""
    from tvm_ffi import load_module

    output = _place(text, folder)
    source = output.with_suffix(".cpp")
    for header in CUDA_HEADERS:
        (folder / header).write_text(f'#include "{HEADER}"\n', encoding="utf-8")
    source.write_text(text, encoding="utf-8")
    command = ["g++", *FLAGS, "-include", str(HEADER), f"-I{folder}", f"-I{include_path()}"]
    done = subprocess.run([*command, "-o", str(output), str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"the emulated kernels do not compile:\n{done.stderr[:4000]}")
    return load_module(str(output))
