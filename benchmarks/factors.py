"""Factored layers against their dense originals and tensorly-torch, and BERT-base at low rank plus sparse residual."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import algebra
import torch
from timing import exclusive, headline, idle, interleave, write_json
from torch import nn

import sparsec
from sparsec.factors import Factor, Fit, Kronecker, LowRank, Monarch, Sparse, Sum, TensorTrain, Tucker
from sparsec.formats import Buffers


@dataclass(frozen=True)
class Layer:
    """One row: a factor on a bias-free linear of `shape`, and the gain over dense that it must reach.

    `peer` are the arguments of the tensorly-torch layer of the same compression: its factorisation and its digits.
    """

    name: str
    factor: Factor
    shape: tuple[int, int]
    batch: int
    bar: float
    peer: tuple[str, tuple[int, ...]] | None = None


LAYERS = (
    Layer("low rank", LowRank(256), (4096, 4096), 64, 5.0),
    Layer("monarch 1024", Monarch(32), (1024, 1024), 256, 5.0),
    Layer("monarch 4096", Monarch(64), (4096, 4096), 256, 10.0),
    Layer("kronecker", Kronecker((64, 64)), (4096, 4096), 64, 15.0),
    Layer(
        "tensor train", TensorTrain((32, 50, 32), (32, 32), (32, 32)), (1024, 1024), 64, 2.0,
        ("blocktt", (8, 16, 8)),
    ),
    Layer(
        "tucker", Tucker((5, 11, 5, 5, 11, 5), (8, 16, 8), (8, 16, 8)), (1024, 1024), 64, 2.0,
        ("tucker", (8, 16, 8)),
    ),
    Layer("low rank, one row", LowRank(64), (768, 768), 1, 1.0),
    Layer("low rank + 95 % sparse", LowRank(64) + Sparse(0.95), (768, 768), 1024, 1.0),
)  # fmt: skip


class Batched(nn.Module):
    """x (batch, n, in) times as many matrices."""

    def __init__(self, batch: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(batch, width, out) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight)


def table(rows: int, width: int) -> nn.Module:
    return nn.Embedding(rows, width, _weight=torch.randn(rows, width))


USES: tuple[tuple[str, Callable[[], nn.Module], Factor, Callable[[], torch.Tensor]], ...] = (
    ("batched low rank", lambda: Batched(12, 768, 768), LowRank(96), lambda: torch.randn(12, 128, 768)),
    ("batched monarch", lambda: Batched(12, 1024, 1024), Monarch(32), lambda: torch.randn(12, 64, 1024)),
    ("table, rank 4", lambda: table(100_000, 512), LowRank(4), lambda: torch.randint(0, 100_000, (4096,))),
    ("table, rank 32", lambda: table(100_000, 512), LowRank(32), lambda: torch.randint(0, 100_000, (4096,))),
)
"""Batches of matrices and tables that are looked up: (name, module, factor, input)."""


def any_fit(factor: Factor, weight: torch.Tensor, gram: torch.Tensor | None = None) -> Fit:
    """Random operands in the place of a fit, which decides the error and not the time."""
    shapes = factor.shapes(tuple(weight.shape))
    return Fit({k: torch.randn(s, dtype=weight.dtype) / s[-1] ** 0.5 for k, s in shapes.items()}, 1.0)


def run_use(name: str, make: Callable[[], nn.Module], factor: Factor, x: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Compile and time one of USES with operands of the right shapes, and its chain also where the dense op stays."""
    torch.manual_seed(0)
    dense = make().eval()
    with mock.patch.object(Factor, "fit", any_fit):
        compiled = sparsec.compile(dense, factor, (x,))
        row = sparsec.report(compiled).rows[0]
        forced = compiled if row.decision == "factored" else sparsec.compile(dense, factor, (x,), min_speedup=0)
    calls = {"dense": lambda: dense(x), "chain": lambda: forced(x), "sparsec": lambda: compiled(x)}
    times = interleave(calls, rounds)
    used = sparsec.report(forced).rows[0]
    return {
        "use": name, "factor": factor.text(), "dtype": "float32", "decision": row.decision, "variant": used.variant,
        "reason": row.reason, "compression": used.dense_nbytes / used.nbytes,
        "us": {n: 1e6 * t.median for n, t in times.items()},
        "ratio": {n: times["dense"].median / t.median for n, t in times.items()},
    }  # fmt: skip


def use_line(row: dict[str, Any]) -> str:
    text = f"{row['use']:<20} {row['compression']:6.1f}x fewer bytes  "
    text += "  ".join(f"{n} {us:.0f} us" for n, us in row["us"].items())
    return f"{text}  chain {row['ratio']['chain']:.2f}x, installed: {row['decision']} ({row['variant']})"


def peer(layer: Layer) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The tensorly-torch layer at a tenth of the values; None where that package is not installed."""
    if layer.peer is None:
        return None
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tltorch

        kind, digits = layer.peer
        made: nn.Module = tltorch.FactorizedLinear(
            digits, digits, bias=False, factorization=kind, rank=0.1, implementation="factorized"
        )
        made.weight.normal_(0, 0.02)
        return made
    return None


def run(layer: Layer, rounds: int) -> dict[str, Any]:
    """Compile, check and time one layer."""
    torch.manual_seed(0)
    dense = nn.Linear(layer.shape[1], layer.shape[0], bias=False).eval()
    x = torch.randn(layer.batch, layer.shape[1])
    compiled = sparsec.compile(dense, layer.factor, (x,))
    row = sparsec.report(compiled).rows[0]
    contenders = {"dense": lambda: dense(x), "sparsec": lambda: compiled(x)}
    rival = peer(layer)
    if rival is not None:
        contenders["tensorly-torch"] = lambda: rival(x)
    times = interleave(contenders, rounds)
    twin = nn.Linear(layer.shape[1], layer.shape[0], bias=False)
    twin.load_state_dict(sparsec.dense_state_dict(compiled))
    difference = (compiled(x) - twin(x)).abs().max().item() / twin(x).abs().max().item()
    return {
        "layer": layer.name, "factor": layer.factor.text(), "shape": layer.shape, "batch": layer.batch,
        "dtype": "float32", "decision": row.decision, "variant": row.variant, "reason": row.reason,
        "compression": 4 * prod(layer.shape) / layer.factor.nbytes(layer.shape, 4),
        "flops": 2 * prod(layer.shape) * layer.batch, "factor_flops": layer.factor.flops(layer.shape, layer.batch),
        "us": {n: 1e6 * t.median for n, t in times.items()}, "difference": difference,
        "ratio": {n: times["dense"].median / t.median for n, t in times.items()}, "bar": layer.bar,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row of figures as text."""
    text = f"{row['layer']:<23} {row['shape'][0]:>4} x {row['shape'][1]:<4} batch {row['batch']:<4} "
    text += f"{row['compression']:5.1f}x fewer values {row['flops'] / row['factor_flops']:5.1f}x fewer flops  "
    text += "  ".join(f"{n} {us:.0f} us" for n, us in row["us"].items())
    text += f"  {row['ratio']['sparsec']:.2f}x over dense (bar {row['bar']:g})"
    if "tensorly-torch" in row["us"]:
        text += f", {row['us']['tensorly-torch'] / row['us']['sparsec']:.1f}x over tensorly-torch (bar 20)"
    return text + f"  [{row['decision']}, {row['variant']}]"


def any_operands(factor: Sum, weight: torch.Tensor) -> Buffers:
    """Operands of the right shapes instead of a fit."""
    shape = tuple(weight.shape)
    found: Buffers = {}
    for at, term in enumerate(factor.terms):
        if isinstance(term, Sparse):
            own = term.solve(weight)
        else:
            own = {k: torch.randn(s, dtype=weight.dtype) / s[-1] ** 0.5 for k, s in term.shapes(shape).items()}
        found |= {f"{at}_{k}": t for k, t in own.items()}
    return found


def bert(rounds: int, saved: str | None, fit: bool) -> dict[str, Any]:
    """BERT-base from its configuration, every encoder linear at LowRank(64) + 95 % sparse residual.

    Fitting 72 weights takes minutes; `saved` keeps the compiled model in a file, and a second run only times it.
    Without `fit` the low-rank operands are random, which leaves every shape, pattern size and time as it is.
    """
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    dense = BertModel(BertConfig()).eval()
    ids = torch.randint(0, 30_000, (8, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if saved and Path(saved).exists():
        compiled = sparsec.load(saved)
    else:
        spec = {r"re:encoder\..*": LowRank(64) + Sparse(0.95), "_default": None}
        with contextlib.nullcontext() if fit else mock.patch.object(Sum, "solve", any_operands):
            compiled = sparsec.compile(dense, spec, example_kwargs=batch)
        if saved:
            sparsec.save(compiled, saved)
    times = interleave({"dense": lambda: dense(**batch), "sparsec": lambda: compiled(**batch)}, rounds, round_s=0.05)
    report = sparsec.report(compiled)
    print(report)
    for row in report.rows[:3]:
        print(f"  {row.site}: {row.reason}")
    totals = report.totals()
    return {
        "model": "bert-base", "batch": 8, "length": 128, "dtype": "float32", "factored": totals.factored,
        "sites": totals.sites, "nbytes": totals.nbytes, "dense_nbytes": totals.dense_nbytes,
        "ms": {n: 1e3 * t.median for n, t in times.items()},
        "ratio": times["dense"].median / times["sparsec"].median, "bar": 2.2,
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "layers", nargs="*", help="only layers whose name holds one of these words, and these parts of algebra.py"
    )
    parser.add_argument("--model", action="store_true", help="BERT-base instead of single layers")
    parser.add_argument("--fit", action=argparse.BooleanOptionalAction, default=True, help="with --model: really fit")
    parser.add_argument("--saved", help="with --model: where the compiled model is kept between runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    rows = []
    print(f"{headline()}, fp32; ratios are to the dense layer in the same run")
    with exclusive():
        if not idle(patience_s=5):
            print("the machine is busy: ratios are what to trust")
        if options.model:
            rows.append(found := bert(options.rounds, options.saved, options.fit))
            figures = "  ".join(f"{n} {ms:.0f} ms" for n, ms in found["ms"].items())
            print(f"BERT-base 8 x 128: {figures}  {found['ratio']:.2f}x over dense (bar {found['bar']:g})")
        else:
            for name, make, factor, given in USES:
                if not options.layers or any(word in name for word in options.layers):
                    rows.append(run_use(name, make, factor, given(), options.rounds))
                    print(use_line(rows[-1]), flush=True)
            for layer in LAYERS:
                if not options.layers or any(word in layer.name for word in options.layers):
                    rows.append(run(layer, options.rounds))
                    print(line(rows[-1]), flush=True)
            for found in algebra.rows(options.layers, options.rounds):
                rows.append(found)
                print(algebra.line(found), flush=True)
    write_json(options.json, "factors", rows)


if __name__ == "__main__":
    main()
