"""One linear layer, sparse against dense: (out, in) x batch x zeros x dtype, as a table and as JSON.

The dense side is the best of eager `F.linear` and of weights prepacked by oneDNN and by MKL, where torch has them. The
sparse side is the installed op with its allocation. Weights are pruned at random; activations and weights stay in cache
between calls as far as they fit, for both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from limits import Limits, measure
from timing import exclusive, headline, idle, interleave, write_json
from torch import fx, nn

import sparsec
from sparsec.target import Target

SHAPES = ((768, 768), (3072, 768), (4096, 4096))
BATCHES = (1, 8, 64, 512)
ZEROS = (0.5, 0.8, 0.9, 0.95)
DTYPES = (torch.float32, torch.bfloat16)
COLUMNS = ("out x in", "batch", "zeros", "dtype", "dense us", "by", "ours us", "gain", "GFLOP/s", "limit", "variant")
WIDTHS = (11, 6, 6, 9, 9, 7, 9, 7, 8, 7, 22)


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    shape: tuple[int, int]
    batch: int
    zeros: float
    dtype: torch.dtype


def grid(quick: bool) -> Iterator[Case]:
    """All cells, those of one weight together."""
    if quick:
        yield from (Case((768, 768), b, 0.9, torch.float32) for b in (1, 64))
        return
    for dtype in DTYPES:
        for shape in SHAPES:
            for zeros in ZEROS:
                yield from (Case(shape, batch, zeros, dtype) for batch in BATCHES)


def layer_of(case: Case) -> nn.Linear:
    """A layer with exactly the wanted number of zeros, at random places."""
    rows, cols = case.shape
    torch.manual_seed(0)
    layer = nn.Linear(cols, rows)
    keep = torch.zeros(rows * cols, dtype=torch.bool)
    keep[torch.randperm(rows * cols)[: round((1 - case.zeros) * rows * cols)]] = True
    with torch.no_grad():
        layer.weight *= keep.view(rows, cols)
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


def run(case: Case, limits: Limits, rounds: int) -> dict[str, Any]:
    """Compile and time one cell."""
    layer = layer_of(case)
    x = torch.randn(case.batch, case.shape[1]).to(case.dtype)
    compiled = sparsec.compile(layer, example_inputs=(x,), min_speedup=0)
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
        "dense_us": {name: 1e6 * t.median for name, t in times.items()}, "dense_best": best,
        "sparse_us": 1e6 * ours.median, "ratio": times[best].median / ours.median,
        "ratio_eager": times["eager"].median / ours.median,
        "gflops": 2e-9 * nnz * case.batch / ours.median, "share_of_limit": least / ours.median,
        "format": row.format, "variant": row.variant, "nbytes": row.nbytes, "dense_nbytes": row.dense_nbytes,
        "rounds": ours.rounds, "repeated": ours.repeated,
    }  # fmt: skip


def line(cells: tuple[Any, ...]) -> str:
    """Cells right-aligned in the columns of the table."""
    return " ".join(str(c).rjust(w) for c, w in zip(cells, WIDTHS, strict=True))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cells and few rounds")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with exclusive():
        if not idle(patience_s=1 if options.quick else 60):
            print("the machine is busy: ratios are what to trust")
        limits = measure(runs=3 if options.quick else 40)
        print(headline())
        print(f"limits: {limits.flops / 1e9:.0f} GFLOP/s fp32, L2 {limits.l2 / 1e9:.0f} GB/s", end=", ")
        print(f"L3 {limits.l3 / 1e9:.0f} GB/s, memory {limits.memory / 1e9:.0f} GB/s")
        print(line(COLUMNS))
        for case in grid(options.quick):
            row = run(case, limits, 3 if options.quick else 15)
            rows.append(row)
            shape = f"{row['out']}x{row['in']}"
            dense = f"{row['dense_us'][row['dense_best']]:.1f}"
            first = (shape, row["batch"], f"{row['zeros']:.0%}", row["dtype"], dense, row["dense_best"])
            last = (f"{row['gflops']:.1f}", f"{row['share_of_limit']:.0%}", row["variant"])
            print(line((*first, f"{row['sparse_us']:.1f}", f"{row['ratio']:.2f}x", *last)), flush=True)
    write_json(options.json, "linear", rows, limits=vars(limits))


if __name__ == "__main__":
    main()
