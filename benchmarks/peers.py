"""sparsec beside what a user could pick instead, interleaved in one run: layers, or BERT-base as a whole.

Peers: torch eager, torch.compile, weights prepacked by oneDNN and MKL, dense bf16, torch.sparse CSR (also with the
activations transposed beforehand), SciPy, OpenVINO fp32 and bf16, ONNX Runtime, and DeepSparse 1.8.0 from the Python of
an environment of its own. What is not installed is named and left out. Engines with thread pools of their own slow each
other down when they alternate without a pause, so every round is preceded by one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linear import Case, dense_calls, installed_op, layer_of
from timing import exclusive, headline, idle, write_json
from torch import nn

import sparsec
from sparsec.sparsifiers import Magnitude

SHAPES = ((768, 768), (3072, 768), (4096, 4096))
BATCHES = (1, 8, 32, 128, 512)
ZEROS = (0.5, 0.8, 0.9, 0.95)
PAUSE_S = 0.05

Round = Callable[[float], float]
"""Runs for about so many seconds; returns the milliseconds of one call."""


def rounds_of(call: Callable[[], Any]) -> Round:
    """A contender of this process. The first part of a turn is not counted: threads of the last may still spin."""

    def turn(seconds: float) -> float:
        calls, begin = 0, time.perf_counter()
        while calls < 2 or time.perf_counter() - begin < seconds:
            call()
            calls += 1
        return 1e3 * (time.perf_counter() - begin) / calls

    def one(seconds: float) -> float:
        turn(seconds)
        return turn(seconds)

    return one


def alternate(contenders: Mapping[str, Round], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each; they take turns, and a pause lets the threads of the last one go to sleep."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            time.sleep(PAUSE_S)
            ms = run(seconds)
            taken[name] += [ms] if turn else []
    return {name: statistics.median(ms) for name, ms in taken.items()}


# -- engines that read ONNX ------------------------------------------------------------------------------------------


def export(model: nn.Module, args: tuple[torch.Tensor, ...], path: Path) -> list[str]:
    """Write `model` as ONNX, opset 13 with static shapes, which all of the engines read; returns the input names."""
    names = [f"input_{i}" for i in range(len(args))]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, str(path), opset_version=13, dynamo=False, input_names=names)
    return names


def onnxruntime(path: Path, feeds: dict[str, np.ndarray]) -> Callable[[], Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def openvino(path: Path, feeds: dict[str, np.ndarray], precision: str) -> Callable[[], Any]:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(path), "CPU", hints).create_infer_request()
    return lambda: request.infer(feeds)


@contextlib.contextmanager
def deepsparse(python: str, path: Path, feeds: dict[str, np.ndarray]) -> Iterator[Round]:
    """The engine in its own process. Raises RuntimeError with what it printed when it does not start."""
    inputs = path.with_suffix(".npz")
    np.savez(inputs, **feeds)
    command = [python, str(Path(__file__).with_name("deepsparse_engine.py")), str(path), str(inputs)]
    process = subprocess.Popen(
        [*command, str(torch.get_num_threads())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.strip() == "ready":
            break
    else:
        raise RuntimeError(f"deepsparse did not start: {''.join(printed)[-400:]}")

    def one(seconds: float) -> float:
        process.send_signal(signal.SIGCONT)
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
        ms = float(process.stdout.readline())
        process.send_signal(signal.SIGSTOP)  # its threads would spin through the turns of the others
        return ms

    try:
        yield one
    finally:
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        process.wait(timeout=30)


def engines(model: nn.Module, args: tuple[torch.Tensor, ...], path: Path) -> dict[str, Callable[[], Any]]:
    """The installed ONNX engines on an export of `model`."""
    found: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("onnx") is None:
        return found
    names = export(model, args, path)
    feeds = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
    if importlib.util.find_spec("onnxruntime"):
        found["onnxruntime"] = onnxruntime(path, feeds)
    if importlib.util.find_spec("openvino"):
        found["openvino"] = openvino(path, feeds, "f32")
        found["openvino bf16"] = openvino(path, feeds, "bf16")
    return found


# -- the two workloads -----------------------------------------------------------------------------------------------


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
        "ms": measure(layer, (x,), calls, options, folder, 0.03),
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
    try:
        return {
            "workload": "BERT-base, 128 tokens", "batch": batch, "zeros": zeros,
            "ms": measure(plain, args, calls, options, folder, 0.3, lambda: pruned.set_attn_implementation("sdpa")),
        }  # fmt: skip
    finally:
        pruned.set_attn_implementation("sdpa")


def measure(
    model: nn.Module,
    args: tuple[torch.Tensor, ...],
    calls: dict[str, Callable[[], Any]],
    options: argparse.Namespace,
    folder: Path,
    seconds: float,
    exported: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Median milliseconds of `calls`, of the ONNX engines, and of DeepSparse."""
    path = folder / "model.onnx"
    contenders = {name: rounds_of(call) for name, call in {**calls, **engines(model, args, path)}.items()}
    exported()
    with contextlib.ExitStack() as stack:
        if options.deepsparse and path.exists():
            feeds = {f"input_{i}": arg.numpy() for i, arg in enumerate(args)}
            contenders["deepsparse"] = stack.enter_context(deepsparse(options.deepsparse, path, feeds))
        return alternate(contenders, options.rounds, seconds)


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
    missing = [name for name in ("onnx", "onnxruntime", "openvino") if importlib.util.find_spec(name) is None]
    print(headline() + (f"; not installed: {', '.join(missing)}" if missing else ""), file=sys.stderr)
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
