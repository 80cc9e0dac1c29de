"""Sparse linear layers on a CUDA device against cuBLAS, cuSPARSE CSR and cuSPARSELt 2:4, all through torch.

    python benchmarks/gpu.py                     # the whole grid, a table, and JSON beside it
    python benchmarks/gpu.py --quick --check     # one shape; the float64 oracle instead of the clock

Times are medians of CUDA events, in turns, after the L2 cache was overwritten: a weight of a large model does not wait
there between two uses. Without a device it says so and exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsec import verify
from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import DTYPES, Problem
from sparsec.formats import BSR, CSR, Bitmask, FanIn, Format, GroupInt4, SpQR, TiledCSL, TwoFour
from sparsec.ops.linear import OVERLOAD
from sparsec.target import Target

SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384), (8192, 8192))  # (out, in) of OPT-like layers
BATCHES = (8, 16, 32, 64, 512)
ZEROS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ROUNDS = 21
CALLS = 10  # in a round
CUSPARSE_GOAL = 2.5  # times as fast as cuSPARSE CSR, for every kernel of a format that it can read
# (format, batch, zeros, rival, least ratio): what the kernels are meant to reach
GOALS = (
    ("tiled_csl", 16, 0.8, "cublas", 2.0),
    ("tiled_csl", 16, 0.6, "cublas", 1.3),
    ("bsr", 512, 0.9, "cublas", 3.0),
)


@dataclass(frozen=True)
class Row:
    """One kernel on one problem; times in microseconds, NaN for a rival that cannot run it."""

    variant: str
    format: str
    out: int
    inp: int
    batch: int
    zeros: float
    dtype: str
    ours: float
    cublas: float
    cusparse: float
    cusparselt: float
    share_of_bound: float

    def ratio(self, rival: str) -> float:
        """How many times as fast as a rival."""
        return float(getattr(self, rival)) / self.ours


def prune(weight: torch.Tensor, fmt: Format, zeros: float) -> torch.Tensor:
    """`weight` with the wanted share of zeros in the structure of a format; 2:4 always has half."""
    rows, cols = weight.shape
    scores = torch.rand(rows, cols, device=weight.device)
    if isinstance(fmt, TwoFour):
        keep = scores.reshape(rows, -1, 4).argsort(2).argsort(2).reshape(rows, cols) < 2
    elif isinstance(fmt, BSR):
        blocks = torch.rand(-(-rows // fmt.r), -(-cols // fmt.c), device=weight.device) >= zeros
        keep = blocks.repeat_interleave(fmt.r, 0).repeat_interleave(fmt.c, 1)[:rows, :cols]
    elif isinstance(fmt, GroupInt4):
        keep = (torch.rand(rows, cols // 16, device=weight.device) >= zeros).repeat_interleave(16, 1)
    elif isinstance(fmt, FanIn):
        keep = scores.argsort(1).argsort(1) < fmt.k
    elif isinstance(fmt, SpQR):
        keep = torch.ones_like(scores, dtype=torch.bool)
    else:
        keep = scores >= zeros
    return torch.where(keep, weight, torch.zeros_like(weight))


def formats(cols: int, zeros: float) -> Iterator[Format]:
    """Every format that a CUDA kernel reads, where its share of zeros makes sense."""
    yield from (TiledCSL(128), CSR(), BSR(16, 16), FanIn(max(1, round(cols * (1 - zeros)))), Bitmask(32))
    if zeros == 0.5:
        yield from (TwoFour(), GroupInt4(), SpQR(10))


def times(contenders: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """Median microseconds of each contender, in turns, with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            total = 0.0
            for _ in range(CALLS):
                flush.zero_()
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                stop.record()
                stop.synchronize()
                total += start.elapsed_time(stop)
            seen[name].append(total / CALLS * 1e3)
    return {name: statistics.median(values) for name, values in seen.items()}


def rivals(weight: torch.Tensor, x: torch.Tensor, fmt: Format) -> dict[str, Callable[[], torch.Tensor]]:
    """The dense product, and those sparse ones of torch that take this weight."""
    found: dict[str, Callable[[], torch.Tensor]] = {"cublas": lambda: F.linear(x, weight)}
    if fmt.exact:
        csr, columns = weight.to_sparse_csr(), x.t().contiguous()
        found["cusparse"] = lambda: csr @ columns
    if isinstance(fmt, TwoFour):
        from torch.sparse import to_sparse_semi_structured

        packed = to_sparse_semi_structured(weight)
        found["cusparselt"] = lambda: F.linear(x, packed)
    return found


def run(shape: tuple[int, int], zeros: float, dtype: str, target: Target, check_only: bool) -> Iterator[Row]:
    """All kernels on one weight shape, over all batches."""
    rows, cols = shape
    for fmt in formats(cols, zeros):
        torch.manual_seed(0)
        weight = prune(torch.randn(rows, cols, device="cuda").to(DTYPES[dtype]), fmt, zeros)
        resolved = fmt.resolve(rows, cols)
        packed = resolved.pack(weight)
        dense = weight if resolved.exact else resolved.unpack(packed, rows, cols)
        problem = Problem("linear", rows, cols, dtype, int(torch.count_nonzero(weight)), batches=BATCHES)
        known = catalog.variants_for("linear", fmt.name, target)
        specs = [v.specs(problem, resolved, target)[0] for v in known if not v.refuse(problem, resolved, target)]
        build_kernels(specs, target)
        buffers = list(packed.values())
        for batch in BATCHES:
            x = torch.randn(batch, cols, device="cuda").to(DTYPES[dtype])
            contenders = {spec.variant: partial(OVERLOAD, x, buffers, None, None, spec.text()) for spec in specs}
            verdicts = {name: verify.check(call(), x, dense, None) for name, call in contenders.items()}
            for name, verdict in verdicts.items():
                if not verdict.ok:
                    raise SystemExit(f"{name} {shape} batch {batch}: {verdict.sentence}")
            others = {} if check_only else rivals(weight, x, fmt)
            took = {} if check_only else times({**others, **contenders})
            for name in contenders:
                yield Row(
                    name, fmt.text(), rows, cols, batch, zeros, dtype, took.get(name, float("nan")),
                    *(took.get(r, float("nan")) for r in ("cublas", "cusparse", "cusparselt")), verdicts[name].worst,
                )  # fmt: skip


def judge(rows: list[Row]) -> Iterator[str]:
    """One line for each goal that the rows can speak to."""
    for fmt, batch, zeros, rival, least in GOALS:
        ratios = [
            r.ratio(rival) for r in rows
            if r.format.startswith(fmt) and r.variant.endswith("mma")
            and (r.batch, r.zeros, r.dtype) == (batch, zeros, "float16")
        ]  # fmt: skip
        if ratios:
            met = "met" if min(ratios) >= least else "missed"
            yield f"{fmt} at {zeros:.0%} zeros, batch {batch}: {min(ratios):.2f}x of {rival}, goal {least}x, {met}"
    timed = [r for r in rows if not math.isnan(r.cusparse)]
    if timed:
        least_of = min(timed, key=lambda r: r.ratio("cusparse"))
        won = sum(r.ratio("cusparse") >= CUSPARSE_GOAL for r in timed)
        met = "met" if won == len(timed) else "missed"
        where = f"{least_of.ratio('cusparse'):.2f}x by {least_of.variant}, batch {least_of.batch}"
        yield f"{won} of {len(timed)} rows at least {CUSPARSE_GOAL}x of cusparse, the least {where}, {met}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one shape, two shares of zeros, float16")
    parser.add_argument("--check", action="store_true", help="verify against float64 and time nothing")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    target = Target.parse("cuda")
    if not target.isas:
        print("no CUDA device: torch sees none, so there is nothing to measure", file=sys.stderr)
        return 2
    grid = [((4096, 4096), z, "float16") for z in (0.5, 0.8)] if options.quick else [
        (shape, zeros, dtype) for dtype in ("float16", "bfloat16") for shape in SHAPES for zeros in ZEROS
    ]  # fmt: skip
    print(f"{date.today()}  {target.name}  {target.detail}  torch {torch.__version__}  CUDA {torch.version.cuda}")
    heads = "".join(f"{head:>9}" for head in ("us", "cuBLAS", "cuSPARSE", "2:4", "of bound"))
    print(f"{'variant':24}{'out x in':>14}{'batch':>6}{'zeros':>7}{heads}")
    rows: list[Row] = []
    for shape, zeros, dtype in grid:
        for row in run(shape, zeros, dtype, target, options.check):
            rows.append(row)
            ratios = "".join(f"{row.ratio(r):8.2f}x" for r in ("cublas", "cusparse", "cusparselt"))
            size = f"{row.out}x{row.inp}"
            line = f"{row.variant:24}{size:>14}{row.batch:>6}{row.zeros:>7.0%}{row.ours:>9.1f}{ratios}"
            print(f"{line}{row.share_of_bound:>9.2f}")
    print("\n".join(judge(rows)))
    facts = {"date": str(date.today()), "device": target.name, "torch": torch.__version__}
    options.json.write_text(json.dumps({**facts, "rows": [asdict(r) for r in rows]}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
