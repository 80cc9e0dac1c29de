"""Factored convolutions through compile: chains of small convolutions, checks, refusals, state dicts and files."""

from __future__ import annotations

import copy
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec import codes
from sparsec.codegen import catalog, tune
from sparsec.codegen.kernel import Conv, KernelSpec
from sparsec.errors import FormatError, SpecError
from sparsec.factors import CP, Circulant, Factor, LowRank, Monarch, Sparse, TensorTrain, Tucker
from sparsec.factors.conv_chain import FactoredConv
from sparsec.factors.conv_steps import chains_of, run_chains
from sparsec.factors.uses import Window, conv_flops, convolve
from sparsec.passes import DEFAULT, Factorise
from sparsec.verify import Verdict

CASES: dict[str, tuple[nn.Module, tuple[int, ...], Factor]] = {
    "tucker": (nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 11, 10), Tucker((6, 5))),
    "cp": (nn.Conv2d(12, 20, 3, dilation=2, padding=1), (2, 12, 11, 10), CP(6)),
    "train": (nn.Conv2d(12, 20, (3, 5), padding=(0, 2), bias=False), (1, 12, 9, 9), TensorTrain(6)),
    "low_rank": (nn.Conv2d(12, 20, 3, padding="same"), (3, 12, 8, 8), LowRank(7)),
    "uneven": (nn.Conv2d(12, 20, (2, 4), padding="same"), (1, 12, 8, 8), Tucker((8, 8))),
    "line": (nn.Conv1d(12, 20, 5, padding=2), (2, 12, 30), Tucker((6, 5))),
    "volume": (nn.Conv3d(6, 8, (1, 3, 3)), (1, 6, 4, 6, 6), CP(5)),
    "sum": (nn.Conv2d(12, 20, 3), (2, 12, 9, 9), Tucker((3, 3)) + LowRank(2)),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


def made(name: str) -> tuple[Net, torch.Tensor, Factor]:
    conv, size, factor = CASES[name]
    return Net(copy.deepcopy(conv)).eval().requires_grad_(False), torch.randn(size), factor


@pytest.mark.parametrize("name", CASES)
def test_a_site_runs_as_a_chain_and_everything_follows(name: str, tmp_path: Path) -> None:
    net, x, factor = made(name)
    shape = tuple(net.conv.weight.shape)
    fast = sparsec.compile(net, {"conv": factor}, (x,), tune="off")
    (row,) = sparsec.report(fast).rows
    fit = factor.fit(net.conv.weight)
    assert (row.decision, row.variant, row.format) == ("factored", "conv_chain_torch", factor.resolve(shape).text())
    assert row.error == pytest.approx(fit.error, rel=1e-4) and row.nbytes == factor.nbytes(shape, 4)
    assert f"{row.dense_nbytes} to {row.nbytes} bytes" in row.reason and "flops an image" in row.reason

    state = sparsec.dense_state_dict(fast)
    assert list(state) == list(net.state_dict())
    torch.testing.assert_close(state["conv.weight"], factor.reconstruct(fit.buffers, shape), rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(net)
    twin.load_state_dict(state)
    torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-5)

    sparsec.save(fast, tmp_path / "net")
    again = sparsec.load(tmp_path / "net")
    assert torch.equal(again(x), fast(x))
    assert [(r.site, r.decision, r.format) for r in sparsec.report(again).rows] == [("conv", "factored", row.format)]
    assert "conv(x, b_" in sparsec.source(fast, "conv") and "relu" in sparsec.source(fast, "conv")
    with pytest.raises(sparsec.InputError, match="shape|size"):
        fast(x[..., 1:])

    net.conv.weight.mul_(2.0)
    sparsec.load_dense_state_dict(fast, net.state_dict())
    twin.load_state_dict(sparsec.dense_state_dict(fast))
    torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_chain_equals_the_convolution_with_the_reconstruction(name: str) -> None:
    conv, size, factor = CASES[name]
    shape, dims = tuple(conv.weight.shape), len(size) - 2
    weight, x = torch.randn(shape, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    buffers = factor.fit(weight).buffers
    dense = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
    for stride, padding, dilation in ((1, 0, 1), (2, 1, 1), (1, 1, 2)):
        if any(n + 2 * padding <= dilation * (k - 1) for n, k in zip(size[2:], shape[2:])):
            continue
        expected = dense(x, factor.reconstruct(buffers, shape), None, stride, padding, dilation)
        found = run_chains(chains_of(factor, shape), x, buffers, Window.of(dims, stride, padding, dilation))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(convolve(factor, x, buffers, shape, stride, padding, dilation), expected)


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for conv, size, factor in CASES.values():
        shape = tuple(conv.weight.shape)
        buffers = factor.fit(torch.randn(shape)).buffers
        with FlopCounterMode(display=False) as counter:
            convolve(factor, torch.randn(size), buffers, shape, 1, 1)
        assert conv_flops(factor, shape, size[0], size[2:], 1, 1) == counter.get_total_flops()


def test_a_low_rank_convolution_is_a_window_and_1x1() -> None:
    assert conv_flops(LowRank(4), (16, 8, 3, 3), 2, (10, 10), padding=1) == 2 * 2 * 100 * (4 * 8 * 9 + 16 * 4)


def test_the_clock_decides_and_both_rows_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, factor = made("tucker")
    monkeypatch.setattr(tune, "recall", lambda key, count: None)
    for us, decision, code in ((10.0, "factored", codes.FACTORED), (31.0, "dense", codes.DENSE_FASTER)):
        monkeypatch.setattr(tune, "measure_cold", lambda contenders, us=us: tune.Timing((30.0, us), 1, steady=False))
        (row,) = sparsec.analyze(net, {"conv": factor}, (x,)).rows
        assert (row.decision, row.code, row.dense_us, row.sparse_us) == (decision, code, 30.0, us)
        if decision == "factored":
            assert "3.00x" in row.reason and f"{factor.resolve((20, 12, 3, 3)).text()}" in row.reason


def test_an_error_above_the_tolerance_and_zero_tolerance_keep_the_convolution() -> None:
    net, x, factor = made("tucker")
    (row,) = sparsec.analyze(net, {"conv": factor}, (x,), tune="off", tolerance=0.01).rows
    assert (row.decision, row.code) == ("dense", codes.TOLERANCE)
    (row,) = sparsec.analyze(net, {"conv": factor}, (x,), tune="off", tolerance=0).rows
    assert (row.decision, row.code) == ("dense", codes.LOSSY)


@pytest.mark.parametrize(
    ("conv", "factor", "code", "says"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), Tucker((4, 2)), codes.NO_VARIANT, "one group of channels"),
        (nn.Conv2d(8, 8, 3), Monarch(4), codes.NO_VARIANT, "mixes the window with channels"),
        (nn.Conv2d(8, 8, 3), Circulant(4), codes.NO_VARIANT, "circulant"),
        (nn.Conv2d(8, 8, 3), LowRank(2) + Sparse(0.9), codes.NO_VARIANT, "sparse operand|mixes the window"),
        (nn.Conv2d(8, 8, 3), Tucker((9, 2)), codes.FORMAT_REFUSES, "more than the 8"),
    ],
    ids=["groups", "monarch", "circulant", "sparse", "rank"],
)
def test_refusals_leave_the_convolution_and_say_why(conv: nn.Module, factor: Factor, code: str, says: str) -> None:
    import re

    (row,) = sparsec.analyze(Net(conv).eval(), {"conv": factor}, (torch.randn(1, 8, 6, 6),), tune="off").rows
    assert (row.decision, row.code) == ("dense", code) and re.search(says, row.reason)


def test_no_examples_and_a_free_image_size_are_refused() -> None:
    net, x, factor = made("tucker")
    (row,) = sparsec.analyze(net, {"conv": factor}, None, tune="off", capture="trace").rows
    assert row.decision == "dense" and row.code in (codes.NO_EXAMPLES, codes.NO_VARIANT)
    shapes = {"x": {2: torch.export.Dim("h", min=8, max=64)}}
    (row,) = sparsec.analyze(net, {"conv": factor}, (x,), tune="off", dynamic_shapes=shapes).rows
    assert row.decision == "dense" and "dynamic spatial sizes" in row.reason


def test_a_wrong_chain_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, factor = made("tucker")
    real = FactoredConv.products

    def off(self: FactoredConv, *args: object) -> tuple[torch.Tensor, torch.Tensor, int]:
        exact, size, longest = real(self, *args)  # type: ignore[arg-type]
        exact[-1, -1] = 2.0 * size[-1, -1]  # positive, so that the rectifier keeps it
        return exact, size, longest

    monkeypatch.setattr(FactoredConv, "products", off)
    (row,) = sparsec.analyze(net, {"conv": factor}, (x,), tune="off").rows
    assert (row.decision, row.code) == ("dense", codes.VERIFY_FAILED)
    with pytest.raises(sparsec.VerifyError):
        sparsec.analyze(net, {"conv": factor}, (x,), tune="off", fallback="error")
    assert not Verdict(False, 2.0, "").ok


def test_calibration_lowers_the_error_on_the_images() -> None:
    """Channels that are silent in the examples cost nothing."""
    net, x, _ = made("tucker")
    x = torch.randn(8, 12, 11, 10)
    x[:, 1:] = 0
    plain = sparsec.compile(net, {"conv": LowRank(9)}, (x,), tune="off")
    tuned = sparsec.compile(
        net, {"conv": LowRank(9)}, (x,), tune="off", passes=DEFAULT.replace("factor", Factorise(True))
    )
    errors = [float((fast(x) - net(x)).norm() / net(x).norm()) for fast in (plain, tuned)]
    assert errors[1] < 0.01 < 0.1 < errors[0]


def test_text_reads_back_and_bad_text_does_not() -> None:
    fmt = FactoredConv(Tucker((6, 5)).resolve((20, 12, 3, 3)), (20, 12, 3, 3))
    assert FactoredConv.parse(fmt.text()) == fmt and fmt.shape == (20, prod((12, 3, 3)))
    for bad in (
        "factored_conv(factor=cp(rank=2),weight=(4,4,3))",
        "factored_conv(factor=nothing,weight=(4,4,3,3))",
        "x",
    ):
        with pytest.raises(SpecError):
            FactoredConv.parse(bad)
    weight = torch.randn(20, 108)
    buffers = fmt.pack(weight)
    fmt.validate(buffers, 20, 108)
    assert fmt.refuse(weight[:, 1:]) and fmt.refuse(weight / 0)
    with pytest.raises(FormatError, match="holds a weight"):
        fmt.validate(buffers, 20, 107)
    with pytest.raises(FormatError, match="has no pattern"):
        fmt.pack(weight, weight != 0)
    with pytest.raises(FormatError):
        fmt.pack(weight[:-1])


def test_the_kernel_refuses_what_it_was_not_made_for() -> None:
    fmt = FactoredConv(Tucker((6, 5)).resolve((20, 12, 3, 3)), (20, 12, 3, 3))
    geometry = Conv((9, 9), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    variant = catalog.variant("conv_chain_torch")
    spec = KernelSpec("conv", variant.name, fmt.text(), "float32", 20, 108, "portable", bias=True, conv=geometry)
    backend = catalog.backend("torch")
    kernel = backend.load(Path(), backend.render(spec))
    buffers = list(fmt.pack(torch.randn(20, 108)).values())
    x, y, bias = torch.randn(1, 12, 9, 9), torch.empty(1, 20, 9, 9), torch.zeros(20)
    kernel.call(x, y, bias, None, *buffers)
    wrong = [(x[:, 1:], y, bias, None, *buffers), (x.double(), y, bias, None, *buffers), (x, y, None, None, *buffers)]
    wrong += [(x, y, bias, None, *buffers[1:]), (x, y, bias[1:], None, *buffers)]
    for bad in wrong:
        with pytest.raises(ValueError, match="must be|expected the buffers"):
            kernel.call(*bad)
    kernel.call(x[:0], y[:0], bias, None, *buffers)
