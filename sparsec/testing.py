"""Random kernel problems that are valid by construction, and the checks that every kernel must pass on them.

A `Case` fixes what a kernel is generated for; a `Data` fixes one call of it. Both are drawn from a seeded generator, so
that a failure is a pair of values that can be written down. `python -m sparsec.testing` runs them by the thousand.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsec import verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, KernelSpec, Problem, Step
from sparsec.formats import FORMATS, NM, Buffers, FanIn, Format
from sparsec.ops.linear import OVERLOAD
from sparsec.target import Target

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
    sizes = LARGE if rng.random() < 0.2 else SIZES
    rows, cols = int(rng.choice(sizes)), int(rng.choice(sizes))
    return Case(
        variant=variant.name,
        isa=isas[int(rng.integers(len(isas)))],
        format=_draw_format(rng, variant.format, rows, cols),
        dtype=variant.dtypes[int(rng.integers(len(variant.dtypes)))],
        rows=rows,
        cols=cols,
        bias=bool(rng.random() < 0.5),
        epilogue=_STEPS[int(rng.integers(len(_STEPS)))],
    )


def _draw_format(rng: np.random.Generator, name: str, rows: int, cols: int) -> Format:
    make: Callable[..., Format] = FORMATS[name]
    if name == "bsr":
        choice = ((1, 4), (4, 1), (16, 1), (1, 16), (4, 4), (8, 8), (16, 16), (3, 5), (2, 7))[int(rng.integers(9))]
        return make(*choice).resolve(rows, cols)
    if name == "csr":
        block = (None, 64, 128, 256)[int(rng.integers(4))]
        return make(index_bits=(None, 32)[int(rng.integers(2))], block=block).resolve(rows, cols)
    if name == "bitmask":
        block = (None, 64, 128)[int(rng.integers(3))]
        return make(width=(None, 16, 32, 64)[int(rng.integers(4))], block=block).resolve(rows, cols)
    if name == "nm":
        return make(*((1, 2), (2, 4), (1, 4), (3, 8), (4, 8), (2, 16), (5, 16), (4, 32))[int(rng.integers(8))])
    if name == "fan_in":
        return make(int(rng.integers(1, min(cols, 40) + 1)), (None, 32)[int(rng.integers(2))]).resolve(rows, cols)
    if name == "quantized":
        inner: Callable[..., Format] = FORMATS["csr_groups"]
        return make(inner((None, 7, 64, 255)[int(rng.integers(4))])).resolve(rows, cols)
    if name == "csr_groups":
        return make((None, 7, 64, 128, 255)[int(rng.integers(5))]).resolve(rows, cols)
    return make().resolve(rows, cols)


def draw_data(rng: np.random.Generator) -> Data:
    """A random weight and call."""
    return Data(
        pattern=PATTERNS[int(rng.integers(len(PATTERNS)))],
        density=float(rng.choice((0.02, 0.1, 0.3, 0.5, 0.9))),
        batch=int(rng.choice(BATCHES)),
        values=VALUES[int(rng.choice(len(VALUES), p=(0.5, 0.15, 0.1, 0.1, 0.15)))],
        layout=LAYOUTS[int(rng.integers(len(LAYOUTS)))],
        threads=int(rng.choice((1, 2, 3))),
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


def call(
    case: Case, data: Data, text: str, weight: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, verify.Verdict]:
    """Run the kernel `text` on one problem; its output and the verdict of the float64 oracle."""
    rng = np.random.default_rng((data.seed, 3))
    bias = _fill("normal", (case.rows,), rng).to(weight.dtype) if case.bias else None
    residual = None
    if any(step.name == "add" for step in case.epilogue):
        residual = _fill("normal", (*x.shape[:-1], case.rows), rng).to(weight.dtype)
    buffers = case.format.pack(weight)
    case.format.validate(buffers, case.rows, case.cols)
    before = torch.get_num_threads()
    torch.set_num_threads(data.threads)
    try:
        with torch.no_grad():
            y = OVERLOAD(x, list(buffers.values()), bias, residual, text)
    finally:
        torch.set_num_threads(before)
    return y, judge(case, y, x, weight, buffers, bias, residual)


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


def failures(case: Case, data: Data, text: str) -> list[str]:
    """What is wrong with a kernel on one problem: the oracle's complaint and the metamorphic relations that break."""
    weight = make_weight(case, data)
    x = make_input(case, data, case.cols, 2)
    y, verdict = call(case, data, text, weight, x)
    found = [] if verdict.ok else [f"oracle: {verdict.sentence}"]
    again, _ = call(case, data, text, weight, x)
    if not torch.equal(torch.nan_to_num(y.float()), torch.nan_to_num(again.float())):
        found.append("two calls with the same threads differ")
    if case.epilogue or case.bias or data.values in ("tiny", "huge", "special"):
        return found
    doubled, _ = call(case, data, text, weight, x * 2)
    if not torch.equal(doubled, y * 2):
        found.append("scaling the input by 2 does not scale the output by 2")
    order = torch.from_numpy(np.random.default_rng((data.seed, 4)).permutation(case.rows))
    permuted, verdict = call(case, data, text, weight[order], x)
    if not verdict.ok:
        found.append(f"permuted rows: {verdict.sentence}")
    if not torch.allclose(permuted.double(), y[..., order].double(), rtol=2e-2, atol=1e-3 * math.sqrt(case.cols)):
        found.append("permuting the rows of the weight does not permute the outputs")
    return found


def shrink(case: Case, data: Data, text: str) -> Data:
    """A smaller problem for the same kernel that still fails: fewer rows, one thread, simpler values and layout."""
    for change in (
        {"threads": 1}, {"layout": "contiguous"}, {"values": "integers"}, {"pattern": "one_entry"},
        {"batch": 1}, {"batch": data.batch // 2}, {"density": 0.02},
    ):  # fmt: skip
        smaller = dataclasses.replace(data, **change)
        if smaller != data and failures(case, smaller, text):
            data = smaller
    return data


def run(
    seed: int, kernels: int, problems: int, target: Target | None = None, variants: Sequence[str] = ()
) -> Iterator[tuple[Case, Data, list[str]]]:
    """Draw `kernels` kernels, run `problems` problems on each, and yield every failure, shrunk."""
    target = target or Target.probe()
    rng = np.random.default_rng(seed)
    table = [v for v in catalog.variants_for("linear") if not variants or v.name in variants]
    table = [v for v in table if v.serves(target) and v.isa(target) is not None]
    drawn = [draw_case(rng, target, table) for _ in range(kernels)]
    specs = {case: spec for case in drawn if (spec := case.spec(target)) is not None}
    build_kernels(list(specs.values()), target)
    for case, spec in specs.items():
        for _ in range(problems):
            data = draw_data(rng)
            if failures(case, data, spec.text()):
                data = shrink(case, data, spec.text())
                yield case, data, failures(case, data, spec.text())


def main() -> int:
    """`python -m sparsec.testing --seed 0 --kernels 100 --problems 200`; exit status 1 when anything failed."""
    parser = argparse.ArgumentParser(description="Run random kernel problems against their float64 oracle.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", type=int, default=40, help="kernels to generate (half a second each when new)")
    parser.add_argument("--problems", type=int, default=200, help="problems to run on each kernel")
    parser.add_argument("--variant", action="append", default=[], help="only this catalogue variant; may be repeated")
    options = parser.parse_args()
    count = 0
    for case, data, wrong in run(options.seed, options.kernels, options.problems, variants=options.variant):
        count += 1
        print(f"{case}\n{data}\n  {'; '.join(wrong)}")
    print(f"seed {options.seed}: {options.kernels * options.problems} problems, {count} failures")
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main())
