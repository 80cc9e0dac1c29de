"""The problems that every CUDA variant is run on: shapes, formats, weights, and tensors that end at a guard page."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cuda_emulation import Emulated

from sparsec import verify
from sparsec.codegen import catalog
from sparsec.codegen.kernel import DTYPES, KernelSpec, Problem, Step
from sparsec.formats import BSR, CSR, Bitmask, FanIn, Format, GroupInt4, Permuted, SpQR, TiledCSL, TwoFour
from sparsec.target import Target

FORMATS: dict[str, Format] = {
    "linear_csr_cuda": CSR(),
    "linear_csr_merge": CSR(block=16),
    "linear_tiled_csl_mma": TiledCSL(128),
    "linear_two_four_mma": TwoFour(),
    "linear_bitmask_cuda": Bitmask(32),
    "linear_group_int4_cuda": GroupInt4(),
    "linear_spqr_cuda": SpQR(20),
    "linear_fan_in_cuda": FanIn(9),
    "linear_bsr_mma": BSR(16, 16),
    "linear_bsr_rows": BSR(4, 2),
    "linear_permuted_bsr_mma": Permuted(BSR(16, 16)),
}
# (outputs, inputs): first one that is odd in every way, then one whose rows of x can be copied 16 bytes at a time.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "linear_csr_cuda": ((70, 51), (33, 160)),
    "linear_csr_merge": ((70, 51), (33, 160)),
    "linear_two_four_mma": ((70, 51), (136, 600)),
    "linear_group_int4_cuda": ((70, 48), (33, 1040)),
    "linear_spqr_cuda": ((70, 48), (33, 1040)),
    "linear_bitmask_cuda": ((70, 51), (33, 1100)),
    "linear_tiled_csl_mma": ((70, 51), (136, 600)),
    "linear_fan_in_cuda": ((70, 51), (33, 160)),
    "linear_bsr_mma": ((70, 51), (33, 160)),
    "linear_bsr_rows": ((71, 50), (33, 160)),
    "linear_permuted_bsr_mma": ((70, 51), (33, 160)),
}
STEPS: tuple[tuple[Step, ...], ...] = (
    (Step("gelu"),),
    (Step("relu"),),
    (Step("silu"),),
    (Step("scale", (0.5,)), Step("clamp", (-1.0, 1.0))),
    (Step("gelu_tanh"),),
    (Step("tanh"),),
    (Step("hardswish"),),
    (Step("add"), Step("relu")),
    (),
)
BATCHES = (1, 7, 8, 16, 33)
DENSITIES = (0.3, 0.0, 1.0)


@dataclass(frozen=True)
class Case:
    """One kernel."""

    name: str
    dtype: str
    shape: tuple[int, int]
    steps: tuple[Step, ...]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def cols(self) -> int:
        return self.shape[1]

    @property
    def format(self) -> Format:
        return FORMATS[self.name].resolve(*self.shape)

    def problem(self) -> Problem:
        nnz = self.rows * self.cols // 4
        return Problem("linear", *self.shape, self.dtype, nnz, bias=True, epilogue=self.steps)

    def packed(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed = self.format.pack(weight)
        self.format.validate(packed, *self.shape)
        return packed

    def run(self, emulated: Emulated, x: torch.Tensor, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """y, with a bias and a residual of zeros."""
        y = torch.full((x.shape[0], self.rows), float("nan")).to(x.dtype)
        residual = torch.zeros_like(y) if any(step.name == "add" for step in self.steps) else None
        bias = torch.zeros(self.rows, dtype=x.dtype)
        emulated.kernels[spec_of(self).text()](x, y, bias, residual, *buffers)
        return y


def spec_of(case: Case, target: Target | None = None) -> KernelSpec:
    """The first kernel that the variant offers for a case."""
    variant = catalog.variant(case.name)
    return variant.specs(case.problem(), case.format, target or Target.parse("cuda:sm_90"))[0]


def gradient_spec(op: str, fmt: Format, dtype: str, rows: int, cols: int) -> KernelSpec:
    """The kernel of a gradient of a (rows, cols) weight: sizes are those of the op's y and x."""
    out, inp = (cols, rows) if op == "linear_dx" else (rows, cols)
    variant = catalog.variants_for(op, "csr")[0]
    return variant.specs(Problem(op, out, inp, dtype, rows * cols // 4), fmt, Target.parse("cuda:sm_90"))[0]


def first_spec(name: str) -> KernelSpec:
    """One kernel of any variant."""
    variant = catalog.variant(name)
    if variant.op == "linear":
        return spec_of(cases(name)[0])
    return gradient_spec(variant.op, CSR(block=64).resolve(37, 150), variant.dtypes[0], 37, 150)


def cases(name: str, thorough: bool = False) -> list[Case]:
    """Every dtype of a variant on its odd shape and the first one on the other; all shapes and steps when thorough."""
    variant = catalog.variant(name)
    shapes = SHAPES[name]
    if thorough:
        return [
            Case(name, dtype, shape, STEPS[(i + j) % len(STEPS)])
            for i, dtype in enumerate(variant.dtypes)
            for shape in shapes
            for j in range(len(STEPS))
        ]
    found = [Case(name, dtype, shapes[0], STEPS[i]) for i, dtype in enumerate(variant.dtypes)]
    return [*found, *(Case(name, variant.dtypes[0], shape, STEPS[7]) for shape in shapes[1:])]


def weight_of(case: Case, density: float) -> torch.Tensor:
    """A weight that obeys the format, with an empty row and a full one where density and format allow."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(case.shape, generator=generator)
    kept = torch.rand(case.shape, generator=generator) < density
    if 0 < density < 1:
        kept[0], kept[-1] = False, True
    if isinstance(case.format, FanIn):
        order = torch.rand(case.shape, generator=generator).argsort(1) < case.format.k
        kept &= order
    if isinstance(case.format, TwoFour):
        score = torch.nn.functional.pad(torch.rand(case.shape, generator=generator), (0, -case.cols % 4))
        best = score.reshape(case.rows, -1, 4).argsort(2).argsort(2) >= 2
        kept &= best.reshape(case.rows, -1)[:, : case.cols]
    return torch.where(kept, weight, torch.zeros(())).to(DTYPES[case.dtype])


def battery(emulated: Emulated, case: Case, thorough: bool = False) -> list[str]:
    """What is wrong with a kernel, over densities and batches."""
    dtype = DTYPES[case.dtype]
    call = emulated.kernels[spec_of(case).text()]
    generator = torch.Generator().manual_seed(5)
    wrong = []
    for density in DENSITIES if not thorough else (*DENSITIES, 0.02, 0.7):
        weight = weight_of(case, density)
        packed = case.packed(weight)
        oracle = case.format.unpack(packed, *case.shape)
        if case.format.exact and not torch.equal(oracle, weight):
            wrong.append(f"{case}: unpack differs")
        buffers = [guarded(buffer) for buffer in packed.values()]
        for batch in BATCHES if not thorough else (*BATCHES, 2, 64, 65, 100):
            x = guarded(torch.randn(batch, case.cols, generator=generator).to(dtype))
            bias = guarded(torch.randn(case.rows, generator=generator).to(dtype))
            y = guarded(torch.full((batch, case.rows), float("nan")).to(dtype))
            residual = None
            if any(step.name == "add" for step in case.steps):
                residual = guarded(torch.randn(batch, case.rows, generator=generator).to(dtype))
            call(x, y, bias, residual, *buffers)
            verdict = verify.check(y, x, oracle, bias, case.steps, residual)
            if not verdict.ok:
                wrong.append(f"{case} density {density} batch {batch}: {verdict.sentence}")
    return wrong


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last of a page, before one that may not be touched."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    length = -(-size // page) * page + page
    area = mmap.mmap(-1, length)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(base + length - page), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    if size == 0:
        return tensor.clone()
    raw = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=length - page - size)
    return raw.view(tensor.dtype).reshape(tensor.shape).copy_(tensor)
