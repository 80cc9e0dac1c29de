"""Published systems that the sparsifiers implement, each with the property that its paper is known by."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsec.formats import NM
from sparsec.sparsifiers import (
    ER,
    ERK,
    Block,
    Calibration,
    Compose,
    Cubic,
    Decay,
    DSnoT,
    Gradual,
    Grid,
    Magnitude,
    NetTrim,
    Random,
    SparseGPT,
    Wanda,
    calibrate,
    sparsify,
)
from sparsec.sparsifiers.group_scores import hesso_scores
from sparsec.sparsifiers.hessian import damped, sweep, upper_inverse
from sparsec.sparsifiers.layers import find_layers
from sparsec.sparsifiers.net_trim import net_trim
from sparsec.sparsifiers.scores import OBS

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train inputs and labels, test inputs and labels of the 8 x 8 digits, 70 to 30."""
    data = sklearn_datasets.load_digits()
    x = torch.from_numpy(data.data).float() / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.from_numpy(data.target)[order]
    cut = int(0.7 * len(x))
    return x[:cut], y[:cut], x[cut:], y[cut:]


def mlp(seed: int, width: int = 64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def train(
    model: nn.Module, steps: int, after: Callable[[], Any] | None = None, seed: int = 0, lr: float = 3e-3,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy,
    before: Callable[[], Any] | None = None,
) -> nn.Module:  # fmt: skip
    x, y, _, _ = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(x), (128,), generator=generator)
        optimizer.zero_grad()
        loss(model(x[pick]), y[pick]).backward()
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after()
    return model


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    _, _, x, y = digits()
    return float((model(x).argmax(1) == y).float().mean())


def correlated(rows: int, features: int, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(rows, features, generator=generator) @ (mix * torch.linspace(0.3, 3, features))
    return x + mean * torch.randn(features, generator=generator)


def zeros(tensor: torch.Tensor) -> int:
    return int((tensor == 0).sum())


@torch.no_grad()
def error(layer: nn.Linear, pruned: Any, x: torch.Tensor) -> float:
    return float(((pruned.weight - layer.weight) @ x.T).square().sum())


# GMP


def test_gmp_schedule() -> None:
    schedule = Cubic(0.9, begin=10, end=110, every=10, initial=0.1)
    assert [schedule.sparsity(t) for t in (9, 10, 110, 500)] == [0.0, pytest.approx(0.1), 0.9, 0.9]
    assert schedule.sparsity(60) == pytest.approx(0.9 - 0.8 / 8)
    assert [t for t in range(200) if schedule.due(t)] == list(range(10, 111, 10))


@pytest.mark.slow
def test_gmp_90_percent_on_digits_is_within_a_point_of_dense() -> None:
    dense, sparse = [], []
    for seed in range(5):
        dense.append(accuracy(train(mlp(seed, 256), 300, seed=seed, lr=5e-3)))
        model = mlp(seed, 256)
        pruner = Gradual(model, Magnitude, Cubic(0.9, 40, 160, 10))
        train(model, 300, pruner.step, seed=seed, lr=5e-3)
        sizes = [m.weight.numel() for m in model if isinstance(m, nn.Linear)]
        found = [zeros(m.weight) for m in model if isinstance(m, nn.Linear)]
        assert all(abs(f - 0.9 * s) <= 1 for f, s in zip(found, sizes))
        assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
        sparse.append(accuracy(model))
    assert np.mean(dense) > 0.95 and np.mean(sparse) > np.mean(dense) - 0.01


# Random pruning with ER and ERK


@pytest.mark.parametrize("kind", [ER, ERK])
def test_random_pruning_meets_its_budget_to_one_weight(kind: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(100, 10))
    total = sum(m.weight.numel() for m in model)
    for sparsity in (0.1, 0.5, 0.9, 0.98):
        pruned = sparsify(model, Random(kind(sparsity)))
        assert sum(zeros(m.weight) for m in pruned) == round(sparsity * total)


def test_random_pruning_trains_and_a_wider_net_is_not_worse() -> None:
    found = []
    for width in (32, 256):
        model = sparsify(mlp(0, width), Random(ERK(0.9)))
        keep = [(x.weight, x.weight != 0) for x in find_layers(model)]
        train(model, 500, lambda keep=keep: [w.data.mul_(m) for w, m in keep])  # type: ignore[misc]
        found.append(accuracy(model))
    dense = accuracy(train(mlp(0, 256), 500))
    assert found[1] >= dense - 0.02 and found[1] >= found[0] - 0.005


# SparseGPT, GQSA, SpQR


def test_sparsegpt_orders_the_layer_errors() -> None:
    layer, x = nn.Linear(64, 48), correlated(800, 64)
    for target in (0.5, NM(2, 4)):
        found = [error(layer, sparsify(layer, m(target), data=[x]), x) for m in (Magnitude, Wanda, SparseGPT)]
        assert found == sorted(found, reverse=True) and found[2] < 0.8 * found[0]


def test_gqsa_group_saliency_beats_magnitude_groups() -> None:
    layer, x = nn.Linear(64, 32), correlated(800, 64)
    groups = Block(1, 16)
    ours, magnitude = Compose(0.5, OBS(), groups), Compose(0.5, unit=groups)
    found = [sparsify(layer, m, data=[x]) for m in (ours, magnitude)]
    assert [zeros(p.weight) for p in found] == [1024, 1024]
    assert error(layer, found[0], x) < error(layer, found[1], x)
    stats = calibrate(layer, [x], needs=("gram",))["<root>"]
    (site,) = find_layers(layer)
    hessian = x.T @ x / len(x)
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)).diagonal()
    torch.testing.assert_close(OBS()(site, stats), layer.weight.detach().square() / inverse**2, rtol=1e-2, atol=0)


def test_spqr_with_one_percent_of_outliers_errs_less_than_gptq_less_than_rounding() -> None:
    """Where outliers sit that a coarse grid suits badly; without any, a threshold far above finds none."""
    layer, x = nn.Linear(64, 64), correlated(800, 64)
    with torch.no_grad():
        layer.weight.view(-1)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:40]] *= 8
    weight, hessian = layer.weight.detach(), damped(x.T @ x, len(x), 0.01)
    upper = upper_inverse(hessian)

    def quantised(grid: Grid) -> tuple[float, float]:
        """Layer error, and the share of entries off their grid."""
        rounding, threshold = grid.fit(weight, upper)
        on_grid = []
        noting = lambda column, j, rest: on_grid.append(rounding(column, j, rest)) or on_grid[-1]  # noqa: E731
        found, _ = sweep(weight, upper, 0, quantise=noting, outlier=threshold)
        share = float((found != torch.stack(on_grid, 1)).float().mean())
        return float(((found - weight) @ x.T).square().sum()), share

    rtn = float(((Grid(3, 16).nearest(weight) - weight) @ x.T).square().sum())
    gptq, none = quantised(Grid(3, 16))
    spqr, share = quantised(Grid(3, 16, outliers=0.15))
    assert none == 0 and 0.005 <= share <= 0.015
    assert spqr < 0.5 * gptq and gptq < 0.8 * rtn
    assert quantised(Grid(3, 16, outliers=1e6)) == (pytest.approx(gptq), 0)


# DSnoT


def test_dsnot_keeps_row_counts_and_lowers_the_error_of_nine_layers_in_ten() -> None:
    better = 0
    for seed in range(20):
        torch.manual_seed(seed)
        layer, x = nn.Linear(256, 32), correlated(400, 256, seed, mean=2.0)
        before, after = (sparsify(layer, m, data=[x]) for m in (Wanda(0.7), DSnoT(0.7)))
        assert torch.equal((before.weight != 0).sum(1), (after.weight != 0).sum(1))
        mean = x.mean(0)
        shift = [((p.weight - layer.weight) @ mean).detach().abs() for p in (before, after)]
        assert bool((shift[1] <= shift[0] + 1e-5).all())
        kept = after.weight != 0
        assert torch.equal(after.weight[kept], layer.weight[kept])
        better += error(layer, after, x) < error(layer, before, x)
    assert better >= 18


def test_dsnot_swaps_inside_the_groups_of_a_pattern() -> None:
    layer, x = nn.Linear(64, 32), correlated(400, 64, mean=2.0)
    before, after = (sparsify(layer, m, data=[x]) for m in (Wanda(NM(2, 4)), DSnoT(NM(2, 4))))
    assert NM(2, 4).refuse(after.weight.detach()) is None and zeros(after.weight) == 1024
    assert not torch.equal(before.weight, after.weight) and error(layer, after, x) < error(layer, before, x)


# Net-Trim


def planted(rows: int, features: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, features, generator=generator).argsort(1) < round(0.15 * features)
    return weight * keep, torch.randn(samples, features, generator=generator, dtype=torch.float64)


def test_net_trim_recovers_a_planted_layer_behind_a_relu_as_the_linear_program_does() -> None:
    from scipy.optimize import linprog

    weight, x = planted(3, 60, 80)  # about 40 equations a row for 60 unknowns
    found = net_trim(weight, x, torch.zeros(3, dtype=torch.float64), 0.0, relu=True, steps=3000)
    assert torch.equal(found.abs() > 1e-3, weight != 0)
    torch.testing.assert_close(found, weight, atol=1e-3, rtol=1e-3)
    for row in range(3):
        on = (x @ weight[row] > 0).numpy()
        a, y = x.numpy(), (x @ weight[row]).numpy()
        solved = linprog(
            np.ones(120), A_ub=np.hstack([a[~on], -a[~on]]), b_ub=np.zeros((~on).sum()),
            A_eq=np.hstack([a[on], -a[on]]), b_eq=y[on], bounds=(0, None),
        ).x  # fmt: skip
        np.testing.assert_allclose(found[row].numpy(), solved[:60] - solved[60:], atol=1e-3)


def test_net_trim_on_digits() -> None:
    model = train(mlp(0), 250)
    before = accuracy(model)
    pruned = sparsify(model, NetTrim(0.7, relu=True, steps=60), data=[digits()[0]], where=["0", "2"])
    assert zeros(pruned[0].weight) == round(0.7 * 4096) and accuracy(pruned) > before - 0.01


# CoSpaDi's calibration


def test_cospadi_functional_error_is_the_error_behind_the_gram_matrix() -> None:
    layer, x = nn.Linear(24, 12), correlated(300, 24).double()
    stats = calibrate(layer.double(), Calibration([x[:100], x[100:]], double=True), needs=("gram",))["<root>"]
    assert stats is not None
    lower = torch.linalg.cholesky(stats.get("gram")[0])
    change = torch.randn(12, 24, dtype=torch.float64)
    assert float((change @ lower).square().sum()) == pytest.approx(float((change @ x.T).square().sum()), rel=1e-9)


# HESSO


def test_hesso_scores_and_decay_to_exact_zero() -> None:
    decay = Decay(8)
    assert math.prod(decay.factor(t) for t in range(7)) == pytest.approx(1 / 8)
    assert decay.factor(7) == 0
    strong, weak = torch.full((2, 3), 2.0), torch.full((2, 3), 0.01)
    scores = hesso_scores([[(strong, strong)], [(weak, weak)], [(strong, -strong)]])
    assert int(scores.argmin()) == 1 and scores[0] > scores[2]  # cos(w, -g) = 1: the step points at zero
    model = mlp(0)
    before = [m.weight.detach().clone() for m in model if isinstance(m, nn.Linear)]
    pruner = Gradual(model, Magnitude, Cubic(0.5, 0, 1, 1, initial=0.5), decay=decay)
    sizes = []
    for _ in range(10):
        pruner.step()
        weights = [m.weight.detach() for m in model if isinstance(m, nn.Linear)]
        sizes.append(sum(float(w.masked_fill(pruner.masks[s], 0).norm()) for w, s in zip(weights, ("0", "2", "4"))))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0 and sizes[-1] == 0
    for weight, old, site in zip(weights, before, ("0", "2", "4")):
        kept = pruner.masks[site]
        assert torch.equal(weight[kept], old[kept]) and zeros(weight) == weight.numel() // 2
