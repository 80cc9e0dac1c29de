"""Building a generated kernel with a sanitizer around a C driver, and running problems through it."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparsec.codegen import catalog, toolchain
from sparsec.codegen.kernel import DTYPES, KernelSpec
from sparsec.codegen.render import render
from sparsec.target import ISAS, Target
from sparsec.testing import Case, Data, draw_case, draw_data, judge, make_input, make_weight

DRIVER = Path(__file__).parent / "sanitizer_driver.c"
FLAGS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
_CODES = {torch.float32: 2, torch.float16: 2, torch.bfloat16: 4, torch.float64: 2, torch.uint8: 1, torch.bool: 6}


def supported(kind: str, folder: Path) -> str | None:
    """Why this compiler cannot make and run a program with the sanitizer; None when it can."""
    place = folder / "probe.c"
    place.write_text("int main(void) { return 0; }\n")
    command = ["gcc", *FLAGS[kind], str(place), "-o", str(folder / "probe")]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            return f"gcc has no {kind} sanitizer"
        done = subprocess.run([str(folder / "probe")], capture_output=True, text=True)
    except OSError as error:
        return f"no gcc: {error}"
    return f"the {kind} sanitizer does not run here: {done.stderr[:200]}" if done.returncode else None


def build(spec: KernelSpec, kind: str, folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """The driver around one kernel, as an instrumented program."""
    source, program = folder / f"{spec.symbol}.c", folder / f"{spec.symbol}.{kind}"
    source.write_text(render(spec).text)
    command = [
        "gcc", "-std=gnu11", "-g1", "-O0", "-fno-omit-frame-pointer", "-Wno-psabi", *FLAGS[kind], *ISAS[spec.isa].flags,
        f"-I{toolchain.include_path()}", f'-DKERNEL_SOURCE="{source}"', f"-DENTRY_POINT=__tvm_ffi_{spec.symbol}",
        *extra, str(DRIVER), "-o", str(program), "-pthread", "-lm",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return program


def cases(variant: catalog.Variant, isa: str, seed: int, count: int) -> list[tuple[Case, KernelSpec]]:
    """Random kernels of one variant on one instruction set, all of which start threads for the smallest product."""
    import dataclasses

    rng = np.random.default_rng(seed)
    found: list[tuple[Case, KernelSpec]] = []
    for _ in range(400):
        case = dataclasses.replace(draw_case(rng, Target.probe(), [variant]), isa=isa)
        spec = case.spec(Target.probe())
        if spec is not None and case.rows * case.cols <= 70_000:
            tile = tuple((k, v) for k, v in spec.tile if k != "one_thread")
            found.append((case, dataclasses.replace(spec, tile=(*tile, ("one_thread", 0)))))
        if len(found) == count:
            break
    return found


def problems(seed: int, count: int) -> list[Data]:
    """Calls with batches that reach every routine of a plan first, then random ones."""
    import dataclasses

    rng = np.random.default_rng(seed)
    fixed = [1, 0, 7, 33, 128]
    drawn = [draw_data(rng) for _ in range(count)]
    return [dataclasses.replace(d, batch=fixed[i]) if i < len(fixed) else d for i, d in enumerate(drawn)]


def _tensor(tensor: torch.Tensor | int | None) -> bytes:
    if tensor is None:
        return struct.pack("<iii", -1, 0, 0)
    if isinstance(tensor, int):
        return struct.pack("<iiiq", -2, 0, 0, tensor)
    flat = tensor.detach().contiguous()
    code = _CODES.get(flat.dtype, 0)
    head = struct.pack(f"<iii{flat.dim()}q", code, flat.element_size() * 8, flat.dim(), *flat.shape)
    return head + bytes(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def run(program: Path, case: Case, data: Data, threads: int, low: bool, **environment: str) -> list[str]:
    """What is wrong: a report of the sanitizer, a status, or an output beyond the bound of the float64 oracle."""
    weight, x = make_weight(case, data), make_input(case, data, case.cols, 2)
    x = x.reshape(-1, case.cols).contiguous()
    rng = np.random.default_rng((data.seed, 9))
    dtype = DTYPES[case.dtype]
    bias = torch.from_numpy(rng.standard_normal(case.rows)).to(dtype) if case.bias else None
    needs = any(step.name == "add" for step in case.epilogue)
    shape = (x.shape[0], case.rows)
    residual = torch.from_numpy(rng.standard_normal(shape)).to(dtype) if needs else None
    buffers = case.format.pack(weight)
    y = torch.full(shape, float("nan"), dtype=dtype)
    wrong, y = execute(program, [x, y, bias, residual, *buffers.values()], threads, low, **environment)
    if wrong:
        return wrong
    verdict = judge(case, y, x, weight, buffers, bias, residual)
    return [] if verdict.ok else [verdict.sentence]


def execute(
    program: Path,
    arguments: Sequence[torch.Tensor | int | None],
    threads: int,
    low: bool,
    output: int = 1,
    **environment: str,
) -> tuple[list[str], torch.Tensor]:
    """Run a program on the operands of a kernel, one of which is the output: what it complains of, and that.

    A program whose output is not the second operand is built with -DOUTPUT.
    """
    y = arguments[output]
    assert isinstance(y, torch.Tensor)
    place, out = program.with_suffix(".in"), program.with_suffix(".out")
    place.write_bytes(struct.pack("<i", len(arguments)) + b"".join(_tensor(t) for t in arguments))
    done = subprocess.run(
        [str(program), str(place), str(out), str(threads), str(int(low))],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
    )
    if done.returncode or done.stderr.strip():
        return [f"status {done.returncode}: {done.stderr[:1500]}"], y
    got = torch.frombuffer(bytearray(out.read_bytes()), dtype=y.dtype).view(y.shape) if y.numel() else y
    return [], got
