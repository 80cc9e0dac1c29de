"""A small network on scikit-learn's digits: factored layers keep its accuracy at a fraction of the work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from sparsec.factors import CP, Factor, LowRank, TensorTrain, Tucker
from sparsec.factors.adapters import rank_dropout
from sparsec.factors.uses import conv_flops, convolve
from sparsec.formats import Buffers

Params = dict[str, torch.Tensor]
CONV, HEAD = (32, 16, 3, 3), (10, 512)


@pytest.fixture(scope="module")
def digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    data = sklearn.load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cut = int(0.7 * len(x))
    return x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]]


def forward(p: Params, x: torch.Tensor, conv: Callable[..., torch.Tensor], head: Callable[..., torch.Tensor]):
    x = F.max_pool2d(F.relu(F.conv2d(x, p["conv1"], p["bias1"], padding=1)), 2)
    x = F.relu(conv(x) + p["bias2"][:, None, None])
    return head(x.flatten(1)) + p["bias3"]


def dense(p: Params, x: torch.Tensor) -> torch.Tensor:
    return forward(p, x, lambda h: F.conv2d(h, p["conv2"], padding=1), lambda h: h @ p["head"].T)


def train(p: Params, model: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor, epochs: int, rate: float):
    for t in p.values():
        t.requires_grad_(True)
    optimiser = torch.optim.Adam(p.values(), rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(p, x[batch]), y[batch]).backward()
            optimiser.step()
    return {k: t.detach() for k, t in p.items()}


def accuracy(p: Params, model: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(p, x).argmax(1) == y).float().mean()) * 100


@pytest.fixture(scope="module")
def trained(digits):
    x, y, _, _ = digits
    generator = torch.Generator().manual_seed(2)
    shapes = {"conv1": (16, 1, 3, 3), "bias1": (16,), "conv2": CONV, "bias2": (32,), "head": HEAD, "bias3": (10,)}
    p = {}
    for name, shape in shapes.items():
        fan_in = max(1, torch.Size(shape[1:]).numel())
        scale = 0.0 if name.startswith("bias") else fan_in**-0.5
        p[name] = scale * torch.randn(shape, generator=generator)
    return train(p, dense, x, y, epochs=6, rate=3e-3)


@pytest.mark.parametrize(
    "factor", [CP(14), Tucker((12, 8)), TensorTrain((12, 12, 9)), LowRank(8)], ids=lambda f: f.text()
)
def test_convolutions_at_a_third_of_the_flops(digits, trained, factor: Factor):
    """Stable CPD and the forms of the low rank survey: less than a point lost after one epoch on the factors."""
    x, y, test_x, test_y = digits
    fewer = conv_flops(LowRank(32), CONV, 1, (4, 4), padding=1)  # full rank, for scale only
    whole = 2 * 16 * 32 * 16 * 9
    assert whole >= 3 * conv_flops(factor, CONV, 1, (4, 4), padding=1) and fewer > whole
    buffers = factor.fit(trained["conv2"]).buffers
    p = {k: t.clone() for k, t in trained.items() if k != "conv2"} | {k: t.clone() for k, t in buffers.items()}

    def model(p: Params, x: torch.Tensor) -> torch.Tensor:
        own: Buffers = {k: p[k] for k in buffers}
        return forward(p, x, lambda h: convolve(factor, h, own, CONV, padding=1), lambda h: h @ p["head"].T)

    before = accuracy(trained, dense, test_x, test_y)
    assert before > 95
    tuned = train(p, model, x, y, epochs=2, rate=1e-3)
    assert accuracy(tuned, model, test_x, test_y) > before - 1


def test_a_tensor_regression_head_with_dropout(digits, trained):
    """Tensor dropout: ten times fewer values in the head, less than a point lost, and no worse under noise."""
    x, y, test_x, test_y = digits
    factor = CP(10, outs=(10,), ins=(32, 4, 4))
    buffers = factor.fit(trained["head"]).buffers
    assert 10 * sum(t.numel() for t in buffers.values()) <= 5120
    generator = torch.Generator().manual_seed(3)

    def model(p: Params, x: torch.Tensor, keep: float = 1.0) -> torch.Tensor:
        own = rank_dropout(factor, {k: p[k] for k in buffers}, HEAD, keep, generator)
        return forward(p, x, lambda h: F.conv2d(h, p["conv2"], padding=1), lambda h: factor.apply(h, own, HEAD))

    p = {k: t.clone() for k, t in trained.items() if k != "head"} | {k: t.clone() for k, t in buffers.items()}
    tuned = train(p, lambda p, x: model(p, x, 0.95), x, y, epochs=10, rate=4e-3)
    assert accuracy(tuned, model, test_x, test_y) > accuracy(trained, dense, test_x, test_y) - 1
    noisy = test_x + 0.2 * torch.randn(test_x.shape, generator=generator)
    assert accuracy(tuned, model, noisy, test_y) > accuracy(trained, dense, noisy, test_y) - 2
