"""One compiled model under load: many threads, changing batches and thread counts, compiles beside calls."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec

BATCHES = (1, 2, 5, 8, 17, 33)


def _model() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p[torch.rand_like(p) < 0.8] = 0
    x = torch.randn(4, 64)
    cm = sparsec.compile(model, None, (x,), dynamic_shapes="batch", tune="off", min_speedup=0)
    assert [row.decision for row in sparsec.report(cm).rows] == ["sparse", "sparse"]
    return model, cm


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def _threads() -> object:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("calls", [3_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_sixteen_threads_call_one_model(calls: int, _threads: int) -> None:
    """Batches and torch.set_num_threads change all the time; results stay, and memory does not grow."""
    model, cm = _model()
    with torch.no_grad():
        inputs = [torch.randn(batch, 64) for batch in BATCHES]
        wanted = [model(x) for x in inputs]
    wrong: list[str] = []

    def work(number: int, share: int) -> None:
        for i in range(share):
            at = (number + i) % len(BATCHES)
            if number == 0 and i % 50 == 0:
                torch.set_num_threads(1 + i // 50 % 3)
            with torch.no_grad():
                y = cm(inputs[at])
            if not torch.allclose(y, wanted[at], rtol=1e-4, atol=1e-5):
                wrong.append(f"thread {number}, call {i}, batch {BATCHES[at]}")
                return

    def run(share: int) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16), [share] * 16))

    run(50)
    gc.collect()
    before = _resident()
    run(calls // 16)
    gc.collect()
    assert wrong == []
    assert _resident() - before < 32 << 20


def test_a_fixed_number_of_threads_gives_the_same_bits(_threads: int) -> None:
    _, cm = _model()
    x = torch.randn(129, 64)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            first = cm(x)
            assert all(torch.equal(cm(x), first) for _ in range(20))


def test_compiling_beside_calls() -> None:
    """One thread compiles new models while another calls an old one; neither disturbs the other."""
    model, cm = _model()
    x = torch.randn(9, 64)
    with torch.no_grad():
        wanted = model(x)
    stop, wrong = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.allclose(cm(x), wanted, rtol=1e-4, atol=1e-5):
                    wrong.append("a call differs")

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for width in (20, 21, 22):
            layer, z = nn.Linear(width, 30).eval(), torch.randn(3, width)
            with torch.no_grad():
                layer.weight[torch.rand_like(layer.weight) < 0.8] = 0
                new = sparsec.compile(layer, sparsec.CSR(), (z,), tune="off", min_speedup=0, capture="trace")
                torch.testing.assert_close(new(z), layer(z))
    finally:
        stop.set()
        caller.join()
    assert wrong == []


def test_threads_that_compile_the_same_model_agree() -> None:
    model, _ = _model()
    x = torch.randn(4, 64)

    def compile_one(_: int) -> torch.Tensor:
        cm = sparsec.compile(model, None, (x,), tune="off", min_speedup=0, capture="trace")
        with torch.no_grad():
            return cm(x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compile_one, range(4)))
    assert all(torch.equal(y, found[0]) for y in found)
