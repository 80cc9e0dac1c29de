"""Generated AMX kernels on any processor of AVX-512: built against `amx_emulation.h`, and for real to look at."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec.codegen import render, toolchain
from sparsec.codegen.kernel import KernelSpec
from sparsec.target import ISAS, Target

HEADER = Path(__file__).with_name("amx_emulation.h")
VECTORS = "avx512bf16"  # what emulated kernels use besides tiles
FLAGS = ("-std=gnu11", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-w")


@dataclass(frozen=True)
class Emulated:
    """One kernel, called like a real one, and what its registers saw."""

    call: Callable[..., Any]
    library: ctypes.CDLL

    def fault(self) -> str:
        """The first thing since this was last asked that a processor would not have done."""
        text = ctypes.create_string_buffer(200)
        self.library.amx_fault(text, len(text))
        return text.value.decode()

    def open(self) -> int:
        """Threads that hold configured tiles."""
        return int(self.library.amx_open())

    def products(self) -> int:
        """Tile products since this was last asked."""
        return int(self.library.amx_products())

    def asked(self) -> int:
        """How often the kernel has asked for permission."""
        return int(self.library.amx_asked())

    def refuse(self) -> None:
        """From here on the system lends no tiles."""
        self.library.amx_refuse(1)


def missing() -> str | None:
    """Why AMX kernels are not emulated here; None when they are."""
    if VECTORS not in Target.probe().isas:
        return f"this processor has no {VECTORS}: AMX kernels are not emulated"
    return None if shutil.which("gcc") else "no gcc on PATH: AMX kernels are not emulated"


def build(spec: KernelSpec, folder: Path) -> Emulated:
    """Compile a kernel against the emulation; a second build of it in the same folder is the first one."""
    from tvm_ffi import load_module

    source, output = folder / f"{spec.symbol}.c", folder / f"{spec.symbol}.so"
    if not output.exists():
        source.write_text(render.render(spec).text, encoding="utf-8")
        _gcc([*FLAGS, *ISAS[VECTORS].flags, "-include", str(HEADER)], source, output)
    return Emulated(load_module(str(output))[spec.symbol], ctypes.CDLL(str(output)))


def native(spec: KernelSpec, folder: Path) -> str:
    """The instructions of a kernel as it is built for AMX, with every warning an error."""
    source, output = folder / f"{spec.symbol}.c", folder / f"{spec.symbol}-amx.so"
    source.write_text(render.render(spec).text, encoding="utf-8")
    _gcc([*toolchain.FLAGS, *ISAS["amx"].flags, "-Wall", "-Wextra", "-Werror"], source, output)
    done = subprocess.run(["objdump", "-d", str(output)], capture_output=True, text=True, check=True)
    return done.stdout


def _gcc(flags: list[str], source: Path, output: Path) -> None:
    command = ["gcc", *flags, f"-I{toolchain.include_path()}", "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"the kernel does not compile:\n{done.stderr[:4000]}")
