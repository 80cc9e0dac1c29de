"""The benchmarks' own arithmetic: tables, limits, repeated rounds. Nothing here reads the clock's verdict."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import limits  # noqa: E402
import linear  # noqa: E402
import readme_table  # noqa: E402
import speedups  # noqa: E402
import timing  # noqa: E402

from sparsec.target import Target  # noqa: E402


def test_the_limit_follows_the_working_set():
    target = Target("x86_64", l1d=32 << 10, l2=1 << 20, l3=32 << 20)
    found = limits.Limits(threads=2, flops=400e9, l1=400e9, l2=200e9, l3=100e9, memory=50e9)
    levels = [found.bandwidth(n, target) / 1e9 for n in (40 << 10, 1 << 20, 10 << 20, 64 << 20)]
    assert levels == [400, 200, 100, 50]
    assert found.seconds(400e9, 100, target) == 1.0, "bound by arithmetic"
    assert found.seconds(1, 64 << 20, target) == (64 << 20) / 50e9, "bound by memory"


def test_the_measuring_loops_compute_what_they_say():
    loops = limits.library()
    lanes = loops.lanes()
    data = torch.cat([torch.full((lanes,), v) for v in (0.5, 1.0, *(2.0 * i for i in range(12)))])
    loops.multiply_add(data.data_ptr(), 1)
    assert data[:lanes].tolist() == [12 + sum(range(12))] * lanes, "chains of 2 i * 0.5 + 1, i < 12"
    values, sink = torch.ones(64 * lanes), torch.zeros(lanes)
    loops.read_all(values.data_ptr(), values.numel(), 3, sink.data_ptr())
    assert sink.sum().item() == 3 * 64 * lanes


def test_polluted_rounds_are_repeated_up_to_a_limit(monkeypatch: pytest.MonkeyPatch):
    noise = iter([0.0, 1.0, 1.0, 0.0] + [1.0] * 100)
    monkeypatch.setattr(timing._Watch, "foreign", lambda self: next(noise))
    calls: list[str] = []
    times = timing.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4, 1e-5, repeats=1)
    assert times["a"].rounds == times["b"].rounds == 4
    assert times["a"].repeated == 4, "as many repeats as rounds, then polluted rounds count"
    assert calls.count("a") > 8 and calls.count("b") > 8


def test_json_names_the_machine(tmp_path: Path):
    timing.write_json(str(tmp_path / "deep" / "x.json"), "x", [{"a": 1}], more=2)
    data = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert data["rows"] == [{"a": 1}] and data["more"] == 2
    assert data["machine"]["threads"] == torch.get_num_threads() and data["machine"]["processor"]


def test_layers_have_exactly_the_wanted_zeros():
    layer = linear.layer_of(linear.Case((96, 100), 1, 0.95, torch.bfloat16))
    assert torch.count_nonzero(layer.weight) == 480 and layer.weight.dtype == torch.bfloat16
    assert len(list(linear.grid(linear.arguments([])))) == 120
    assert len(list(linear.grid(linear.arguments(["--quick"])))) == 2
    given = ["--structure", "bsr(r=4,c=1)", "--dtype", "float32", "--shape", "32", "48", "--batches", "8"]
    (blocks,) = linear.grid(linear.arguments([*given, "--zeros", "0.75"]))
    weight = linear.layer_of(blocks).weight
    assert torch.count_nonzero(weight) == 32 * 48 // 4
    assert blocks.structure is not None and blocks.structure.stored(weight) == 32 * 48 // 4


def test_speed_ups_are_drawn_with_their_limits():
    rows = [
        {
            "out": 4, "in": 8, "dtype": "float32", "structure": "", "batch": b, "zeros": z, "ratio": r,
            "limit_ratio": 2 * r,
        }
        for b in (1, 64) for z, r in ((0.5, 1.0), (0.9, 4.0))
    ]  # fmt: skip
    drawn = speedups.figure(rows)
    assert drawn.count("<polyline") == 4 and drawn.count("stroke-dasharray") == 2 and "4 x 8, float32" in drawn
    heights = re.findall(r'points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', drawn)
    assert all(float(late) < float(early) for early, late in heights), "a larger gain lies higher"
    assert len(heights) == 4 and float(heights[0][1]) < float(heights[1][1]), "limits lie above"


def test_a_headline_says_when_threads_sleep(monkeypatch: pytest.MonkeyPatch):
    for spins, policy, sleeps in (
        ("0", "", True),
        (None, "PASSIVE", True),
        ("300000", "PASSIVE", False),
        (None, "", False),
    ):
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        if spins is not None:
            monkeypatch.setenv("GOMP_SPINCOUNT", spins)
        assert ("threads sleep" in timing.headline()) == sleeps


def test_dense_peers_compute_the_layer():
    layer, x = linear.layer_of(linear.Case((32, 48), 4, 0.5, torch.float32)), torch.randn(4, 48)
    with torch.inference_mode():
        for name, call in linear.dense_calls(layer, x).items():
            assert torch.allclose(call(), layer(x), atol=1e-4), name


def test_readme_tables_and_marks():
    data = {
        "machine": {"processor": "P", "threads": 2, "isa": "avx2", "torch": "2"},
        "rows": [
            {"batch": 8, "length": 128, "zeros": 0.9, "ms": {"eager": 10.0, "sparsec": 4.0}, "ratio": {"sparsec": 2.5}}
        ],
    }
    table = readme_table.encoder_table(data)
    assert "(P, 2 threads, avx2, torch 2)" in table and "| 8 x 128 | 90% | 10.0 | 4.0 (2.50x) |" in table
    row = {"out": 4, "in": 8, "dtype": "float32", "zeros": 0.5, "batch": 1, "ratio": 1.5}
    table = readme_table.linear_table({**data, "rows": [row, {**row, "batch": 8, "ratio": 0.5}]})
    assert "| 4 x 8 | float32 | 50% | 1.50x | 0.50x |" in table
    page = "a\n<!-- speeds: begin -->\nold\n<!-- speeds: end -->\nz"
    filled = readme_table.fill(page, "speeds", "new")
    assert filled == page.replace("old", "new") and readme_table.fill(filled, "speeds", "new") == filled
    with pytest.raises(SystemExit, match="lacks the marks"):
        readme_table.fill("nothing", "speeds", "new")


def test_the_readme_has_its_marks_and_example():
    readme = (FOLDER.parent / "README.md").read_text()
    assert "sparsec.compile(" in readme_table.example(readme)
    for mark in ("output", "speeds"):
        assert readme_table.fill(readme, mark, "x").count("x") >= 1
