"""Portable kernels on another architecture: cross-compiled for aarch64, whose vectors of four are NEON, run by qemu.

Needs Debian's gcc-aarch64-linux-gnu and qemu-user; part of `make soak`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from sanitizer import DRIVER, cases, problems, run

from sparsec.codegen import catalog, toolchain
from sparsec.codegen.kernel import KernelSpec
from sparsec.codegen.render import render

GCC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [tool for tool in (GCC, QEMU) if shutil.which(tool) is None]
VARIANTS = [v for v in catalog.variants_for("linear") if v.language == "c" and "portable" in v.isas]
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', no '.join(MISSING)}: install gcc-{GCC[:-4]} and qemu-user"),
]


def _compile(spec: KernelSpec, folder: Path, *options: str) -> Path:
    """A kernel for aarch64: with `-S` its text, else a program around it that this machine can start."""
    source = folder / f"{spec.symbol}.c"
    source.write_text(render(spec).text)
    kernel = [f"-I{toolchain.include_path()}", "-std=gnu11", "-O3", "-fno-math-errno"]
    output = folder / f"{spec.symbol}.{'s' if options else 'bin'}"
    if options:
        command = [GCC, *kernel, *options, str(source), "-o", str(output)]
    else:
        defines = [f'-DKERNEL_SOURCE="{source}"', f"-DENTRY_POINT=__tvm_ffi_{spec.symbol}"]
        command = [GCC, *kernel, *defines, "-static", str(DRIVER), "-o", str(output), "-pthread", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if options:
        return output
    program = folder / spec.symbol
    program.write_text(f'#!/bin/sh\nexec {QEMU} {output} "$@"\n')
    program.chmod(0o700)
    return program


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_kernels_are_right_between_guard_pages(variant: catalog.Variant, tmp_path: Path) -> None:
    for case, spec in cases(variant, "portable", seed=11, count=3):
        program = _compile(spec, tmp_path)
        for number, data in enumerate(problems(11, 7)):
            wrong = run(program, case, data, threads=1 + number % 3, low=number % 2 == 1)
            assert not wrong, f"{case}\n{data}\n{wrong[0]}"


@pytest.mark.parametrize("name", ["linear_csr", "linear_csr_groups", "linear_sell", "linear_bsr", "linear_nm"])
def test_multiply_adds_of_four_lanes_come_out(name: str, tmp_path: Path) -> None:
    ((_, spec),) = cases(catalog.variant(name), "portable", seed=11, count=1)
    text = _compile(spec, tmp_path, "-S").read_text()
    assert "fmla\tv" in text and ".4s" in text
