"""Random kernel problems that are valid by construction, and the checks that every kernel must pass on them.

A `Case` fixes what a kernel is generated for; a `Data` fixes one call of it. Both are drawn from a seeded generator, so
that a failure is a pair of values that can be written down. `python -m sparsec.testing_kernels` runs thousands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsec import verify
from sparsec.codegen import catalog
from sparsec.codegen.kernel import DTYPES, KernelSpec, Problem, Step
from sparsec.formats import BSR, CSR, FORMATS, NM, NMG, Bitmask, Buffers, CSRGroups, FanIn, Format, Picks, Tiles
from sparsec.target import Target
from sparsec.testing_relations import RELATIONS, Trial, run_packed

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 95, 127, 128, 129, 191, 255)
LARGE = (256, 257, 300, 384, 511, 512, 520)
BATCHES = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129)
PATTERNS = (
    "uniform", "empty", "full", "one_row", "one_column", "one_entry", "last_entry", "power_law", "duplicate_rows",
    "diagonal", "banded", "blocks", "empty_rows", "dense_rows",
)  # fmt: skip
VALUES = ("normal", "integers", "tiny", "huge", "special")
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "offset", "three_d")
_STEPS = (
    (), (Step("relu"),), (Step("gelu"),), (Step("gelu_tanh"),), (Step("silu"),), (Step("tanh"),),
    (Step("clamp", (0.0, 6.0)),), (Step("hardswish"),), (Step("scale", (-0.5,)),), (Step("add"),),
    (Step("add"), Step("relu")), (Step("scale", (2.0,)), Step("gelu")),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What one kernel is generated for."""

    variant: str
    isa: str
    format: Format
    dtype: str
    rows: int
    cols: int
    bias: bool
    epilogue: tuple[Step, ...]

    def spec(self, target: Target) -> KernelSpec | None:
        """The kernel of the case on `target`, or None where the variant refuses it."""
        problem = Problem(
            op="linear", out_features=self.rows, in_features=self.cols, dtype=self.dtype,
            nnz=self.rows * self.cols // 4, bias=self.bias, epilogue=self.epilogue,
        )  # fmt: skip
        variant = catalog.variant(self.variant)
        narrowed = target if self.isa == target.isas[0] else target.limit(self.isa)
        if variant.refuse(problem, self.format, narrowed):
            return None
        return variant.specs(problem, self.format, narrowed)[0]


@dataclass(frozen=True)
class Data:
    """One weight and one call: everything that follows from a seed."""

    pattern: str
    density: float
    batch: int
    values: str
    layout: str
    threads: int
    seed: int


def draw_case(rng: np.random.Generator, target: Target, variants: Sequence[catalog.Variant]) -> Case:
    """A random kernel; a fifth of them have at least 256 inputs and outputs."""
    variant = variants[int(rng.integers(len(variants)))]
    isas = [isa for isa in variant.isas if isa in target.isas]
    sizes = LARGE if rng.random() < 0.22 else SIZES
    rows, cols = int(rng.choice(sizes)), int(rng.choice(sizes))
    rows = cols if rng.random() < 0.1 else rows  # a square weight can be transposed
    return Case(
        variant=variant.name,
        isa=isas[int(rng.integers(len(isas)))],
        format=draw_format(rng, variant.format, rows, cols),
        dtype=variant.dtypes[int(rng.integers(len(variant.dtypes)))],
        rows=rows,
        cols=cols,
        bias=bool(rng.random() < 0.5),
        epilogue=_STEPS[int(rng.integers(len(_STEPS)))],
    )


def draw_format(rng: np.random.Generator, name: str, rows: int, cols: int) -> Format:
    """A random resolved format of this name for a (rows, cols) weight."""
    make: Callable[..., Format] = FORMATS[name]
    if name == "bsr":
        small = (1, 4), (4, 1), (16, 1), (1, 16), (4, 4), (8, 8), (16, 16), (3, 5), (2, 7)
        choice = (*small, (16, 32), (32, 64, 32))[int(rng.integers(11))]
        return make(*choice).resolve(rows, cols)
    if name == "csr":
        block = (None, 64, 128, 256)[int(rng.integers(4))]
        return make(index_bits=(None, 32)[int(rng.integers(2))], block=block).resolve(rows, cols)
    if name == "bitmask":
        block = (None, 64, 128)[int(rng.integers(3))]
        return make(width=(None, 16, 32, 64)[int(rng.integers(4))], block=block).resolve(rows, cols)
    if name == "nm":
        choice = ((1, 2), (2, 4), (1, 4), (3, 8), (4, 8), (2, 16), (5, 16), (4, 32), (5, 32))[int(rng.integers(9))]
        return make(*choice)
    if name == "nmg":
        return make(*((1, 2, 3), (1, 4, 4), (2, 4, 2), (2, 8, 1), (2, 16, 1))[int(rng.integers(5))])
    if name == "block_nm":
        return make(*((16, 16), (16, 32), (8, 8), (32, 16), (4, 8))[int(rng.integers(5))])
    if name == "permuted":
        held = (BSR(16, 1), BSR(4, 4), BSR(3, 5), CSRGroups(), CSRGroups(64))[int(rng.integers(5))]
        return make(held, int(rng.integers(4)), int(rng.integers(4))).resolve(rows, cols)
    if name == "sum":
        first = (BSR(4, 4), NM(1, 4))[int(rng.integers(2))]
        return make(first, (CSR(), CSRGroups(), Bitmask())[int(rng.integers(3))]).resolve(rows, cols)
    if name == "fan_in":
        return make(int(rng.integers(1, min(cols, 40) + 1)), (None, 32)[int(rng.integers(2))]).resolve(rows, cols)
    if name == "quantized":
        codes = (*(CSRGroups(block) for block in (None, 7, 64, 255)), Picks(), Bitmask(64), Tiles())
        return make(codes[int(rng.choice(7, p=(0.05, 0.05, 0.05, 0.1, 0.25, 0.25, 0.25)))]).resolve(rows, cols)
    if name == "csr_groups":
        return make((None, 7, 64, 128, 255)[int(rng.integers(5))]).resolve(rows, cols)
    if name == "pairs":
        return make(CSRGroups((1, 7, 64, 255)[int(rng.integers(4))])).resolve(rows, cols)
    if name == "sell":
        block, window = (None, 7, 64, 255)[int(rng.integers(4))], (4, 8, 128, 256)[int(rng.integers(4))]
        return make(block, window).resolve(rows, cols)
    if name == "window":
        return make((32, 64)[int(rng.integers(2))]).resolve(rows, cols)
    return make().resolve(rows, cols)


def draw_data(rng: np.random.Generator) -> Data:
    """A random weight and call."""
    return Data(
        pattern=PATTERNS[int(rng.integers(len(PATTERNS)))],
        density=float(rng.choice((0.02, 0.1, 0.3, 0.5, 0.9))),
        batch=int(rng.choice(BATCHES)),
        values=VALUES[int(rng.choice(len(VALUES), p=(0.5, 0.15, 0.1, 0.1, 0.15)))],
        layout=LAYOUTS[int(rng.integers(len(LAYOUTS)))],
        threads=int(rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15))),
        seed=int(rng.integers(2**31)),
    )


def mask_of(pattern: str, rows: int, cols: int, density: float, rng: np.random.Generator) -> np.ndarray:
    """The bool (rows, cols) pattern of a name in PATTERNS."""
    mask = rng.random((rows, cols)) < density
    if pattern == "empty":
        mask[:] = False
    elif pattern == "full":
        mask[:] = True
    elif pattern in ("one_row", "one_column", "one_entry", "last_entry"):
        row, col = int(rng.integers(rows)), int(rng.integers(cols))
        mask[:] = False
        place: Any = {
            "one_row": np.s_[row, :], "one_column": np.s_[:, col], "one_entry": np.s_[row, col],
            "last_entry": np.s_[rows - 1, cols - 1],
        }[pattern]  # fmt: skip
        mask[place] = True
    elif pattern == "power_law":
        share = np.minimum(1.0, density * rows / (1.0 + rng.permutation(rows)))
        mask = rng.random((rows, cols)) < share[:, None]
    elif pattern == "duplicate_rows":
        mask = mask[rng.integers(max(1, rows // 4), size=rows)]
    elif pattern in ("diagonal", "banded"):
        width = 0 if pattern == "diagonal" else 3
        mask = np.abs(np.arange(rows)[:, None] * cols // rows - np.arange(cols)[None, :]) <= width
    elif pattern == "blocks":
        mask = np.kron(rng.random((-(-rows // 4), -(-cols // 4))) < density, np.ones((4, 4), bool))[:rows, :cols]
    elif pattern == "empty_rows":
        mask[rng.random(rows) < 0.6] = False
    elif pattern == "dense_rows":
        mask[rng.random(rows) < 0.2] = True
    return mask


def _fill(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    if kind == "integers":
        return torch.from_numpy(rng.integers(-3, 4, shape).astype(np.float64))
    scale = {"tiny": 1e-20, "huge": 1e15}.get(kind, 1.0)
    values = rng.standard_normal(shape) * scale
    if kind == "special" and values.size:
        flat = values.reshape(-1)
        places = rng.integers(flat.size, size=max(1, flat.size // 200))
        flat[places] = rng.choice((np.nan, np.inf, -np.inf), size=places.size)
    return torch.from_numpy(values)


def make_weight(case: Case, data: Data) -> torch.Tensor:
    """The (rows, cols) weight; pruned entries are zeros of either sign."""
    rng = np.random.default_rng((data.seed, 1))
    mask = torch.from_numpy(_obey(case.format, mask_of(data.pattern, case.rows, case.cols, data.density, rng)))
    values = _fill(data.values, (case.rows, case.cols), rng)
    values = torch.where(values == 0, torch.ones_like(values), values)
    if not case.format.exact:  # codes stand for finite values only
        values = torch.where(values.isfinite(), values, torch.ones_like(values))
    signed_zero = torch.where(values < 0, -0.0, 0.0).double()
    return torch.where(mask, values, signed_zero).to(DTYPES[case.dtype])


def _obey(fmt: Format, mask: np.ndarray) -> np.ndarray:
    """`mask` without the entries for which a format with a quota per row or group has no slot."""
    rows, cols = mask.shape
    if isinstance(fmt, NM):
        groups = np.pad(mask, ((0, 0), (0, -cols % fmt.m))).reshape(rows, -1, fmt.m)
        return (groups & (groups.cumsum(axis=2) <= fmt.n)).reshape(rows, -1)[:, :cols]
    if isinstance(fmt, FanIn):
        return mask & (mask.cumsum(axis=1) <= fmt.k)
    if isinstance(fmt, NMG):
        kept: np.ndarray = mask & fmt.choose(torch.from_numpy(mask).float()).numpy()
        return kept
    return mask


def make_input(case: Case, data: Data, features: int, stream: int) -> torch.Tensor:
    """(..., features) activations in the layout of `data`, `batch` rows in all."""
    rng = np.random.default_rng((data.seed, stream))
    kind = data.values if data.values != "huge" else "normal"
    batch, dtype = data.batch, DTYPES[case.dtype]
    if data.layout == "transposed":
        return _fill(kind, (features, batch), rng).to(dtype).t()
    if data.layout == "strided":
        return _fill(kind, (batch, 2 * features), rng).to(dtype)[:, ::2]
    if data.layout == "expanded":
        return _fill(kind, (1, features), rng).to(dtype).expand(batch, features)
    if data.layout == "offset":
        return _fill(kind, (batch * features + 1,), rng).to(dtype)[1:].view(batch, features)
    if data.layout == "three_d":
        outer = next(d for d in (4, 3, 2, 1) if batch % d == 0)
        return _fill(kind, (outer, batch // outer, features), rng).to(dtype)
    return _fill(kind, (batch, features), rng).to(dtype)


def operands(case: Case, data: Data, leading: torch.Size) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The bias (rows) and the residual (*leading, rows) of a problem, each None where the kernel takes none."""
    rng = np.random.default_rng((data.seed, 3))
    bias = _fill("normal", (case.rows,), rng).to(DTYPES[case.dtype]) if case.bias else None
    residual = None
    if any(step.name == "add" for step in case.epilogue):
        residual = _fill("normal", (*leading, case.rows), rng).to(DTYPES[case.dtype])
    return bias, residual


def trial(case: Case, data: Data, text: str, other: tuple[Format, str] | None = None) -> Trial:
    """Run the kernel `text` on one problem, and compute what should have come out."""
    weight, x = make_weight(case, data), make_input(case, data, case.cols, 2)
    bias, residual = operands(case, data, x.shape[:-1])
    buffers = case.format.pack(weight)
    case.format.validate(buffers, case.rows, case.cols)
    y = run_packed(text, data.threads, x, list(buffers.values()), bias, residual)
    flat = x.reshape(-1, case.cols)
    want = verify.expected(
        flat, weight if case.format.exact else case.format.unpack(buffers, case.rows, case.cols), bias, case.epilogue,
        residual.reshape(-1, case.rows) if residual is not None else None,
        None if data.values != "special" else case.format.positions(buffers, case.rows, case.cols),
        case.format.blur(flat),
    )  # fmt: skip
    return Trial(
        case.format, text, tuple(s.name for s in case.epilogue), data.threads, data.values in ("normal", "integers"),
        x, weight, bias, residual, y, want, data.seed, other,
    )  # fmt: skip


def judge(
    case: Case,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    buffers: Buffers,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> verify.Verdict:
    """What the float64 oracle says of an output: a lossy format is held to what it stores, not to the weight."""
    stored = case.format.positions(buffers, case.rows, case.cols)
    if not case.format.exact:
        weight = case.format.unpack(buffers, case.rows, case.cols)
    blur = case.format.blur(x.reshape(-1, case.cols))
    return verify.check(y, x, weight, bias, case.epilogue, residual, stored, blur)


def failures(
    case: Case, data: Data, text: str, other: tuple[Format, str] | None = None, relations: Sequence[str] | None = None
) -> list[str]:
    """What is wrong with a kernel on one problem: the oracle's complaint and the metamorphic relations that break.

    `relations` are names of RELATIONS, by default all; `other` is a second kernel for the same weight.
    """
    ran = trial(case, data, text, other)
    complaint = ran.off(ran.y)
    found = [f"oracle: {complaint}"] if complaint else []
    for name in RELATIONS if relations is None else relations:
        if wrong := RELATIONS[name](ran):
            found.append(f"{name}: {wrong}")
    return found


def shrink(case: Case, data: Data, text: str, other: tuple[Format, str] | None = None) -> Data:
    """A smaller problem for the same kernel that still fails: fewer rows, one thread, simpler values and layout."""
    for change in (
        {"threads": 1}, {"layout": "contiguous"}, {"values": "integers"}, {"pattern": "one_entry"},
        {"batch": 1}, {"batch": data.batch // 2}, {"density": 0.02},
    ):  # fmt: skip
        smaller = dataclasses.replace(data, **change)
        if smaller != data and failures(case, smaller, text, other):
            data = smaller
    return data
