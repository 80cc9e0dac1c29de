"""Max pooling on a generated kernel: torch's result to the last bit, and the pass that installs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsec
from sparsec.codegen import tune
from sparsec.ops import pool

# shape, kernel, stride, padding, dilation
CASES = {
    "stem": ((2, 5, 19, 37), (3, 3), (2, 2), (1, 1), (1, 1)),
    "small images share a vector": ((2, 3, 7, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "halves": ((1, 4, 28, 33), (2, 2), (2, 2), (0, 0), (1, 1)),
    "uneven": ((1, 2, 20, 50), (3, 2), (2, 1), (1, 1), (2, 1)),
}


def wild(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Negative numbers, so that padding would win if it were a zero, infinities and a NaN."""
    x = -torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype) - 1
    x[0, 0, 2, 3], x[0, 1, 1, 1], x[-1, -1, 4:7, 2:6] = float("nan"), float("inf"), float("-inf")
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("name", CASES)
def test_it_is_torch_to_the_last_bit(name: str) -> None:
    shape, *numbers = CASES[name]
    assert pool.find(shape[1:], "float32", *numbers) is not None
    x = wild(shape)
    assert same(pool.OVERLOAD(x, *map(list, numbers)), F.max_pool2d(x, *numbers))


def test_what_has_no_kernel_runs_on_torch() -> None:
    shape, *numbers = CASES["stem"]
    x, lists = wild(shape), [list(n) for n in numbers]
    last = x.to(memory_format=torch.channels_last)
    for other in (x.double(), last, x[0]):
        assert same(pool.OVERLOAD(other, *lists), F.max_pool2d(other, *numbers))
    assert pool.find(shape[1:], "float64", *numbers) is None
    assert pool.find(shape[1:], "float32", (9, 9), (1, 1), (0, 0), (1, 1)) is None  # 81 taps
    with pytest.raises(RuntimeError, match="pad"):
        pool.OVERLOAD(x, [2, 2], [2, 2], [2, 2], [1, 1])
    torch.library.opcheck(pool.OVERLOAD, (torch.rand(1, 2, 7, 7), *lists))
    half = wild(shape, torch.bfloat16)
    assert same(pool.OVERLOAD(half, *lists), F.max_pool2d(half, *numbers))


class Stem(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv(x))


def pooled(cm: nn.Module) -> list[str]:
    return [str(n.target) for n in cm.graph.nodes if "max_pool" in str(n.target)]


def compiled(model: nn.Module, x: torch.Tensor, **options: str) -> nn.Module:
    return sparsec.compile(model, {"_default": None}, (x,), **options)


def test_the_pass_installs_what_the_clock_prefers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Stem().eval(), torch.randn(2, 3, 16, 16)
    timings = {1.0: ["sparsec.max_pool.default"], 100.0: ["aten.max_pool2d.default"]}
    for ours, wanted in timings.items():
        monkeypatch.setattr(tune, "measure", lambda contenders, ours=ours: tune.Timing((ours, 50.0), 9))
        cm = compiled(model, x)
        assert pooled(cm) == wanted and torch.equal(cm(x), model(x))
    monkeypatch.setattr(tune, "measure", lambda contenders: tune.Timing((1.0, 50.0), 9))
    cm = compiled(model, x)
    assert "1 max pooling on a generated kernel" in str(sparsec.report(cm).notes)
    sparsec.save(cm, tmp_path / "model.sparsec")
    again = sparsec.load(tmp_path / "model.sparsec")
    assert pooled(again) == ["sparsec.max_pool.default"] and torch.equal(again(x), model(x))
    assert pooled(compiled(model, x, tune="off")) == ["aten.max_pool2d.default"]  # nothing is timed
    up = Stem(ceil_mode=True).eval()
    assert pooled(compiled(up, x)) == ["aten.max_pool2d.default"]
