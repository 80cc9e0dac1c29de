"""Convolution sites end to end: found, decided, lowered with their tails, reported, saved, and given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsec
from sparsec import codes
from sparsec.errors import InputError


class Net(nn.Module):
    """A pad of its own, a norm, a residual, a clamp, a depthwise and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = F.relu(x + self.same(x))
        return self.grouped(F.hardswish(self.point(F.relu6(self.depth(x)))))


X = torch.randn(2, 3, 14, 17, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    generator = torch.Generator().manual_seed(1)
    for layer in (net.stem, net.same, net.point, net.grouped):
        layer.weight.data *= torch.rand(layer.weight.shape, generator=generator) < 0.3
    net.norm.running_mean.uniform_(-1, 1)
    return net


@pytest.fixture(scope="module")
def compiled(model: Net) -> nn.Module:
    return sparsec.compile(model, None, (X,), tune="off")


@torch.no_grad()
def test_the_result_agrees_and_every_tail_is_in_a_kernel(model: Net, compiled: nn.Module) -> None:
    assert torch.allclose(compiled(X), model(X), atol=1e-5)
    calls = [n for n in compiled.graph.nodes if n.op == "call_function"]  # type: ignore[union-attr]
    assert [str(n.target) for n in calls] == ["sparsec.conv.default"] * 5
    rows = {row.site: row for row in sparsec.report(compiled).rows}
    assert {site: row.decision for site, row in rows.items()} == {
        "stem": "sparse", "same": "sparse", "depth": "dense", "point": "sparse", "grouped": "sparse",
    }  # fmt: skip
    assert rows["depth"].variant == "conv_depthwise" and rows["same"].op == "conv2d"
    assert "conv_csr" in sparsec.source(compiled, "same")


@torch.no_grad()
def test_state_dicts_and_files(model: Net, compiled: nn.Module, tmp_path: Path) -> None:
    original = model.state_dict()
    for key, value in sparsec.dense_state_dict(compiled).items():
        assert torch.equal(value, original[key]), key
    sparsec.save(compiled, tmp_path / "net.sparsec")
    again = sparsec.load(tmp_path / "net.sparsec")
    assert torch.equal(again(X), compiled(X))
    twice = {k: v * 2 if k == "same.weight" else v for k, v in original.items()}
    sparsec.load_dense_state_dict(again, twice)
    other = Net().eval()
    other.load_state_dict(twice)
    assert torch.allclose(again(X), other(X), atol=1e-5)


@torch.no_grad()
def test_channels_last_torch_compile_and_other_shapes(compiled: nn.Module) -> None:
    want = compiled(X)
    assert torch.equal(compiled(X.to(memory_format=torch.channels_last)), want)
    assert torch.allclose(torch.compile(compiled, backend="aot_eager", fullgraph=True)(X), want)
    with pytest.raises(InputError):
        compiled(X[..., :-1])


def test_what_stays_dense_says_why(model: Net) -> None:
    rows = {row.site: row for row in sparsec.report(sparsec.compile(model, tune="off")).rows}
    assert {rows[site].code for site in ("stem", "same", "point")} <= {codes.NO_EXAMPLES, codes.NO_VARIANT}
    rows = {row.site: row for row in sparsec.report(sparsec.compile(model, sparsec.Dense(), (X,))).rows}
    assert {row.code for row in rows.values()} == {codes.SPEC_DENSE}


@torch.no_grad()
@pytest.mark.parametrize("axes", [1, 3])
def test_one_and_three_axes(axes: int) -> None:
    torch.manual_seed(axes)
    layer = (nn.Conv1d, nn.Conv3d)[axes // 3](4, 8, 3, stride=2, padding=1)
    layer.weight *= torch.rand_like(layer.weight) < 0.3
    x = torch.randn(2, 4, *(9, 8, 7)[:axes])
    result = sparsec.compile(nn.Sequential(layer, nn.SiLU()).eval(), None, (x,), tune="off")
    assert torch.allclose(result(x), F.silu(layer(x)), atol=1e-5)
    assert sparsec.report(result).rows[0].decision == "sparse"


@torch.no_grad()
def test_the_clock_decides_and_is_believed(model: Net) -> None:
    result = sparsec.compile(model, None, (X,), tune="measure")
    assert torch.allclose(result(X), model(X), atol=1e-5)
    for row in sparsec.report(result).rows:
        assert row.dense_us is not None and row.sparse_us is not None
        taken = row.code in (codes.INSTALLED, codes.DENSE_KERNEL)
        assert taken == (row.dense_us >= 1.05 * row.sparse_us), row
