"""The engines a user could pick instead, as contenders that take turns: what reads ONNX here, and DeepSparse.

Engines with thread pools of their own slow each other down when they alternate without a pause, so every turn is
preceded by one. DeepSparse 1.8.0 runs in a process of its own, from the Python of an environment of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import signal
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

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


def measure(
    model: nn.Module,
    args: tuple[torch.Tensor, ...],
    calls: dict[str, Callable[[], Any]],
    python: str | None,
    rounds: int,
    folder: Path,
    seconds: float,
    exported: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Median milliseconds of `calls`, of the ONNX engines, and of DeepSparse where `python` has it."""
    path = folder / "model.onnx"
    contenders = {name: rounds_of(call) for name, call in {**calls, **engines(model, args, path)}.items()}
    exported()
    with contextlib.ExitStack() as stack:
        if python and path.exists():
            feeds = {f"input_{i}": arg.numpy() for i, arg in enumerate(args)}
            contenders["deepsparse"] = stack.enter_context(deepsparse(python, path, feeds))
        return alternate(contenders, rounds, seconds)


def missing() -> list[str]:
    """What an export needs or runs on, and is not installed."""
    return [name for name in ("onnx", "onnxruntime", "openvino") if importlib.util.find_spec(name) is None]
