"""sparsec beside what a user could pick instead, interleaved in one run: layers, or BERT-base as a whole.

Peers: torch eager, torch.compile, weights prepacked by oneDNN and MKL, dense bf16, torch.sparse CSR (also with the
activations transposed beforehand), SciPy, OpenVINO fp32 and bf16, ONNX Runtime, and DeepSparse 1.8.0 from the Python of
an environment of its own. What is not installed is named and left out. Engines with thread pools of their own slow each
other down when they alternate without a pause, so every round is preceded by one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engines import measure, missing
from linear import Case, dense_calls, installed_op, layer_of
from timing import exclusive, headline, idle, write_json
from torch import nn

import sparsec
from sparsec.sparsifiers import Magnitude

SHAPES = ((768, 768), (3072, 768), (4096, 4096))
BATCHES = (1, 8, 32, 128, 512)
ZEROS = (0.5, 0.8, 0.9, 0.95)


def sparse_calls(layer: nn.Linear, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """torch.sparse and SciPy on the layer's weight; the transposed forms get activations that already are."""
    import scipy.sparse

    weight, bias = layer.weight.detach(), layer.bias.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = weight.to_sparse_csr()
        csr = torch.sparse_csr_tensor(wide.crow_indices().int(), wide.col_indices().int(), wide.values(), wide.shape)
    turned, other = x.t().contiguous(), scipy.sparse.csr_matrix(weight.numpy())
    array = turned.numpy()
    return {
        "torch CSR": lambda: torch.nn.functional.linear(x, csr, bias),
        "torch CSR, x turned": lambda: csr @ turned,
        "SciPy, x turned": lambda: other @ array,
    }


def layer_row(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One layer against every peer."""
    layer = layer_of(case)
    x = torch.randn(case.batch, case.shape[1])
    compiled = sparsec.compile(layer, example_inputs=(x,), min_speedup=0)
    half, half_x = layer_of(case).bfloat16(), x.bfloat16()
    calls = {"sparsec": installed_op(compiled, x), **dense_calls(layer, x), **sparse_calls(layer, x)}
    calls["eager bf16"] = lambda: half(half_x)
    return {
        "workload": f"{case.shape[0]}x{case.shape[1]}", "batch": case.batch, "zeros": case.zeros,
        "ms": measure(layer, (x,), calls, options.deepsparse, options.rounds, folder, 0.03),
    }  # fmt: skip


class _Hidden(nn.Module):
    """BERT with positional inputs and one output, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def bert_row(batch: int, zeros: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """BERT-base, random weights, 128 tokens, the encoder's linears pruned."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    pruned = sparsec.sparsify(BertModel(BertConfig()).eval(), Magnitude(zeros), where=r"re:encoder\..*")
    ids = torch.randint(0, 30000, (batch, 128))
    args = (ids, torch.ones_like(ids))
    model = _Hidden(pruned)
    compiled = sparsec.compile(model, example_inputs=args)
    calls: dict[str, Callable[[], Any]] = {"sparsec": lambda: compiled(*args), "eager": lambda: model(*args)}
    if options.compile:
        inductor = torch.compile(model)
        calls["torch.compile"] = lambda: inductor(*args)
    plain = _Hidden(pruned)
    pruned.set_attn_implementation("eager")  # what the exporter can print
    fast = partial(pruned.set_attn_implementation, "sdpa")
    try:
        ms = measure(plain, args, calls, options.deepsparse, options.rounds, folder, 0.3, fast)
    finally:
        fast()
    return {"workload": "BERT-base, 128 tokens", "batch": batch, "zeros": zeros, "ms": ms}


def show(row: dict[str, Any]) -> None:
    """One line: ours, and how many times longer every peer takes."""
    ours, peers = row["ms"]["sparsec"], {k: v for k, v in row["ms"].items() if k != "sparsec"}
    rest = "  ".join(f"{name} {ms / ours:.2f}x" for name, ms in sorted(peers.items(), key=lambda item: item[1]))
    print(f"{row['workload']}, batch {row['batch']}, {row['zeros']:.0%}: sparsec {ours:.3f} ms;  {rest}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", nargs="?", choices=("layers", "bert"), default="layers")
    parser.add_argument("--quick", action="store_true", help="one row, few rounds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well (whole models)")
    parser.add_argument("--deepsparse", metavar="PYTHON", help="interpreter that has deepsparse 1.8.0")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    options.rounds = 3 if options.quick else options.rounds
    absent = missing()
    print(headline() + (f"; not installed: {', '.join(absent)}" if absent else ""), file=sys.stderr)
    rows = []
    with exclusive(), tempfile.TemporaryDirectory() as folder:
        if not idle(patience_s=1 if options.quick else 60):
            print("the machine is busy: ratios are what to trust", file=sys.stderr)
        if options.workload == "bert":
            cells = [(1, 0.9)] if options.quick else [(b, z) for b in (1, 8) for z in (0.8, 0.9)]
            work = (bert_row(b, z, options, Path(folder)) for b, z in cells)
        else:
            grid = [Case(s, b, z, torch.float32) for s in SHAPES for b in BATCHES for z in ZEROS]
            grid = [Case((768, 768), 64, 0.9, torch.float32)] if options.quick else grid
            work = (layer_row(case, options, Path(folder)) for case in grid)
        for row in work:
            rows.append(row)
            show(row)
    write_json(options.json, f"peers of {options.workload}", rows)


if __name__ == "__main__":
    main()
