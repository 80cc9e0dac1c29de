"""One linear layer, sparse against dense: (out, in) x batch x zeros x dtype, as a table and as JSON.

The dense side is the best of eager `F.linear` and of weights prepacked by oneDNN and by MKL, where torch has them. The
sparse side is the installed op with its allocation. Weights are pruned at random, or to a format's structure; they and
the activations stay in cache between calls as far as they fit, for both sides. `first/best` is how long the kernel that
the cost model ranks first takes, over the fastest of the catalogue, timed apart from the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from limits import Limits, measure
from speedups import figure
from timing import exclusive, headline, idle, interleave, write_json
from torch import fx, nn

import sparsec
from sparsec import cost
from sparsec.codegen import catalog, tune
from sparsec.codegen.build import build_kernels
from sparsec.codegen.kernel import Problem
from sparsec.codegen.rates import rates
from sparsec.formats import BSR, Format, GroupInt4, parse
from sparsec.target import Target

SHAPES = ((768, 768), (3072, 768), (4096, 4096))
BATCHES = (1, 8, 64, 512)
ZEROS = (0.5, 0.7, 0.8, 0.9, 0.95)
DTYPES = (torch.float32, torch.bfloat16)
CLOSE = 1.3  # of the fastest kernel: where the model's first choice should be
COLUMNS = (
    "out x in", "batch", "zeros", "dtype", "dense us", "by", "ours us", "gain", "GFLOP/s", "limit", "first/best",
    "variant",
)  # fmt: skip
WIDTHS = (11, 6, 6, 9, 9, 7, 9, 7, 8, 7, 11, 22)


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    shape: tuple[int, int]
    batch: int
    zeros: float
    dtype: torch.dtype
    structure: Format | None = None

    @property
    def lossy(self) -> bool:
        """Whether the format changes values, so that only a spec asks for it."""
        return self.structure is not None and not self.structure.exact


def grid(options: argparse.Namespace) -> Iterator[Case]:
    """The cells that the options ask for, those of one weight together."""
    if options.quick:
        yield from (Case((768, 768), b, 0.9, torch.float32) for b in (1, 64))
        return
    structure = parse(options.structure) if options.structure else None
    for dtype in DTYPES if options.dtype is None else (getattr(torch, options.dtype),):
        for shape in SHAPES if options.shape is None else (tuple(options.shape),):
            for zeros in options.zeros:
                yield from (Case(shape, batch, zeros, dtype, structure) for batch in options.batches)


def kept(case: Case, weight: torch.Tensor) -> torch.Tensor:
    """The bool pattern of a case: exactly its share of entries or blocks at random places, or what the format keeps."""
    rows, cols = case.shape
    if case.structure is not None and not case.lossy and not isinstance(case.structure, BSR):
        return case.structure.choose(weight)
    r, c = (case.structure.r, case.structure.c) if isinstance(case.structure, BSR) else (1, 1)
    if isinstance(case.structure, GroupInt4):
        c = 16
    count = (rows // r) * (cols // c)
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.randperm(count)[: round((1 - case.zeros) * count)]] = True
    return keep.view(rows // r, cols // c).repeat_interleave(r, 0).repeat_interleave(c, 1)


def layer_of(case: Case) -> nn.Linear:
    """A layer with the wanted zeros."""
    torch.manual_seed(0)
    layer = nn.Linear(case.shape[1], case.shape[0])
    with torch.no_grad():
        layer.weight *= kept(case, layer.weight)
    return layer.to(case.dtype).eval()


def dense_calls(layer: nn.Linear, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Every dense way to compute the layer that this build of torch has."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    calls: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda: F.linear(x, weight, bias)}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        calls["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        calls["oneDNN"]()
    except (RuntimeError, AttributeError):
        calls.pop("oneDNN", None)
    try:
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, x.shape[0])
        calls["MKL"] = lambda: torch.ops.mkl._mkl_linear(x, mkl, weight, bias, x.shape[0])
        calls["MKL"]()
    except (RuntimeError, AttributeError):
        calls.pop("MKL", None)
    return calls


def installed_op(compiled: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The call of the installed op alone, without the module around it."""
    for node in compiled.graph.nodes:
        if getattr(node.target, "namespace", "") == "sparsec":
            args = fx.map_arg(node.args, lambda n: getattr(compiled, n.target) if n.op == "get_attr" else x)
            kwargs = fx.map_arg(node.kwargs, lambda n: getattr(compiled, n.target) if n.op == "get_attr" else x)
            target = node.target
            return lambda: target(*args, **kwargs)
    raise SystemExit(f"nothing was installed:\n{sparsec.report(compiled)}")


def ranked_first(case: Case, layer: nn.Linear, x: torch.Tensor) -> float:
    """Time of the kernel that the cost model ranks first over that of the fastest one that the catalogue offers."""
    target, weight = Target.probe(), layer.weight.detach()
    problem = Problem(
        "linear", *case.shape, str(case.dtype).removeprefix("torch."), int(torch.count_nonzero(weight)),
        batches=(case.batch,), threads=torch.get_num_threads(),
    )  # fmt: skip
    found = [
        (fmt, spec)
        for variant in catalog.variants_for("linear", target=target)
        for fmt in (*variant.formats(problem, target), *([case.structure] if case.structure is not None else []))
        if variant.language == "c" and fmt.exact and variant.refuse(problem, fmt, target) is None
        for spec in variant.specs(problem, fmt, target)
    ]
    kernels = build_kernels(list(dict.fromkeys(spec for _, spec in found)), target)
    y = torch.empty(case.batch, case.shape[0], dtype=case.dtype)
    calls = []
    for fmt, spec in found:
        buffers = list(fmt.resolve(*case.shape).pack(weight).values())
        calls.append(lambda call=kernels[spec].call, buffers=buffers: call(x, y, None, None, *buffers))
    expected = [cost.sparse_us(problem, fmt, spec, case.batch, target, rates(target)) for fmt, spec in found]
    times = tune.measure(calls).us
    return times[expected.index(min(expected))] / min(times)


def run(case: Case, limits: Limits, rounds: int) -> dict[str, Any]:
    """Compile and time one cell."""
    layer = layer_of(case)
    x = torch.randn(case.batch, case.shape[1]).to(case.dtype)
    compiled = sparsec.compile(layer, case.structure if case.lossy else None, (x,), min_speedup=0)
    row = sparsec.report(compiled).rows[0]
    times = interleave({**dense_calls(layer, x), "sparsec": installed_op(compiled, x)}, rounds)
    ours = times.pop("sparsec")
    best = min(times, key=lambda name: times[name].median)
    nnz = torch.count_nonzero(layer.weight).item()
    moved = row.nbytes + (case.shape[0] + case.shape[1]) * case.batch * x.element_size()
    least = limits.seconds(2 * nnz * case.batch, moved, Target.probe())
    return {
        "out": case.shape[0], "in": case.shape[1], "batch": case.batch, "zeros": case.zeros,
        "dtype": str(case.dtype).removeprefix("torch."),
        "structure": case.structure.text() if case.structure is not None else "",
        "dense_us": {name: 1e6 * t.median for name, t in times.items()}, "dense_best": best,
        "sparse_us": 1e6 * ours.median, "ratio": times[best].median / ours.median,
        "ratio_eager": times["eager"].median / ours.median,
        "gflops": 2e-9 * nnz * case.batch / ours.median, "share_of_limit": least / ours.median,
        "limit_ratio": times[best].median / least, "ranked_first_over_best": ranked_first(case, layer, x),
        "format": row.format, "variant": row.variant, "nbytes": row.nbytes, "dense_nbytes": row.dense_nbytes,
        "rounds": ours.rounds, "repeated": ours.repeated,
    }  # fmt: skip


def line(cells: tuple[Any, ...]) -> str:
    """Cells right-aligned in the columns of the table."""
    return " ".join(str(c).rjust(w) for c, w in zip(cells, WIDTHS, strict=True))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cells and few rounds")
    parser.add_argument("--threads", type=int, help="of torch and of the kernels; its own number without it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one of the two")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("OUT", "IN"), help="one shape and not three")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--zeros", type=float, nargs="+", default=ZEROS)
    parser.add_argument("--structure", help='of the weight, as a format: "bsr(r=16,c=1)", "nm(n=2,m=4)", "group_int4"')
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--plot", help="also draw speed-ups against zeros, as SVG, here")
    return parser.parse_args(given)


@torch.inference_mode()
def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with exclusive():
        if not idle(patience_s=1 if options.quick else 60):
            print("the machine is busy: ratios are what to trust")
        limits = measure(runs=3 if options.quick else 40)
        print(headline())
        print(f"limits: {limits.flops / 1e9:.0f} GFLOP/s fp32, L2 {limits.l2 / 1e9:.0f} GB/s", end=", ")
        print(f"L3 {limits.l3 / 1e9:.0f} GB/s, memory {limits.memory / 1e9:.0f} GB/s")
        print(line(COLUMNS))
        for case in grid(options):
            row = run(case, limits, 3 if options.quick else options.rounds)
            rows.append(row)
            shape = f"{row['out']}x{row['in']}"
            dense = f"{row['dense_us'][row['dense_best']]:.1f}"
            first = (shape, row["batch"], f"{row['zeros']:.0%}", row["dtype"], dense, row["dense_best"])
            ranked = f"{row['ranked_first_over_best']:.2f}x"
            last = (f"{row['gflops']:.1f}", f"{row['share_of_limit']:.0%}", ranked, row["variant"])
            print(line((*first, f"{row['sparse_us']:.1f}", f"{row['ratio']:.2f}x", *last)), flush=True)
    close = sum(row["ranked_first_over_best"] <= CLOSE for row in rows)
    print(f"the cost model's first choice is within {CLOSE}x of the fastest kernel in {close} of {len(rows)} cells")
    write_json(options.json, "linear", rows, limits=vars(limits))
    if options.plot:
        Path(options.plot).write_text(figure(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
