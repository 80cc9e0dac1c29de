"""The same weights through the C and the TVM back end, fp32: dense torch, CSR at 90 % zeros, and low rank chains."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import exclusive, headline, idle, interleave, write_json

from sparsec.codegen import catalog
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import KernelSpec, Problem
from sparsec.factors import LowRank
from sparsec.factors.chain import Factored
from sparsec.formats import CSR, Format
from sparsec.ops.linear import OVERLOAD
from sparsec.target import Target

CASES = (((768, 768), 0), ((3072, 768), 0), ((768, 768), 64), ((3072, 768), 128))
"""(out, in), and the rank of a chain or 0 for CSR."""
BATCHES = (1, 16, 64, 512)
ZEROS = 0.9


def weight_of(shape: tuple[int, int], rank: int) -> tuple[torch.Tensor, Format]:
    """A dense weight and the format that stands for it."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    if rank:
        return dense, Factored(LowRank(rank), *shape, 1)
    return dense * (torch.rand(shape, generator=generator) >= ZEROS), CSR()


def kernel(target: str, fmt: Format, weight: torch.Tensor, batch: int) -> tuple[KernelSpec, Format]:
    """The kernel that a target prefers, built, and its format with the fields that it likes."""
    here, op = Target.parse(target), "chain" if isinstance(fmt, Factored) else "linear"
    problem = Problem(
        op, *weight.shape, "float32", int(torch.count_nonzero(weight)), batches=(batch,),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    variant = next(v for v in catalog.variants_for(op, fmt.name, here) if v.dtypes == ("float32",))
    liked = (*variant.formats(problem, here), fmt.resolve(*weight.shape))[0]
    spec = variant.specs(problem, liked, here)[0]
    build_kernels([spec], here)
    return spec, liked


def searched(spec: KernelSpec, buffers: dict[str, torch.Tensor], batch: int, trials: int) -> KernelSpec:
    """The kernel with the best of `trials` schedules that MetaSchedule drew; chains keep theirs."""
    from sparsec.codegen import tvm_search

    if spec.op != "linear":
        return spec
    found = tvm_search.search(spec, buffers, (batch,), trials)
    print(f"  {found.trials} schedules, the best {found.gain:.2f}x as fast as the usual one: {dict(found.spec.tile)}")
    return found.spec


def run(shape: tuple[int, int], rank: int, rounds: int, trials: int = 0) -> list[dict[str, Any]]:
    """All batches of one weight."""
    weight, fmt = weight_of(shape, rank)
    rows = []
    packs: dict[Format, dict[str, torch.Tensor]] = {}
    for batch in BATCHES:
        x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(1))
        contenders: dict[str, Callable[[], torch.Tensor]] = {"dense": partial(F.linear, x, weight)}
        for name in ("cpu", "tvm", *(("search",) if trials else ())):
            spec, liked = kernel("cpu" if name == "cpu" else "tvm", fmt, weight, batch)
            buffers = packs.setdefault(liked, liked.pack(weight))
            if name == "search":
                spec = searched(spec, buffers, batch, trials)
            call = contenders[name] = partial(OVERLOAD, x, list(buffers.values()), None, None, spec.text())
            exact = x.double() @ liked.unpack(buffers, *shape).double().t()
            if (error := float((call() - exact).abs().max() / exact.abs().max())) > 1e-5:
                raise SystemExit(f"{spec.variant} {shape} batch {batch}: off by {error:.1e}")
        times = interleave(contenders, rounds)
        best = {n: 1e6 * t.best for n, t in times.items()}
        us = {n: 1e6 * t.median for n, t in times.items()}
        rows.append({"shape": shape, "rank": rank, "batch": batch, "us": us, "best_us": best})
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one weight, few rounds")
    parser.add_argument("--search", type=int, default=0, metavar="N", help="also the best of N schedules")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    print(f"{headline()}, fp32; microseconds, medians")
    print(f"{'weight':>10} {'as':>9} {'batch':>5} {'dense':>8} {'C':>7} {'TVM':>7} {'TVM/C':>6} {'TVM over dense':>15}")
    rows = []
    with exclusive():
        if not idle(patience_s=1 if options.quick else 60):
            print("the machine is busy: ratios are what to trust")
        for shape, rank in CASES[:1] if options.quick else CASES:
            for row in run(shape, rank, 3 if options.quick else 15, options.search):
                rows.append(row)
                dense, c, tvm = (row["us"][n] for n in ("dense", "cpu", "tvm"))
                name, kind = f"{shape[0]}x{shape[1]}", f"rank {rank}" if rank else f"{ZEROS:.0%} CSR"
                figures = f"{dense:8.0f} {c:7.0f} {tvm:7.0f} {tvm / c:6.2f} {dense / tvm:14.1f}x"
                if options.search:
                    figures += f"   searched {row['us']['search']:7.0f}"
                print(f"{name:>10} {kind:>9} {row['batch']:>5} {figures}", flush=True)
    write_json(options.json, "backends", rows)


if __name__ == "__main__":
    main()
