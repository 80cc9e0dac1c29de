"""Refinements: values by least squares, biases, Net-Trim, against what they are defined to minimise."""

from __future__ import annotations

import torch
from test_sparsifiers_methods import X, correlated, zeros
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsec.sparsifiers import BiasCorrection, Magnitude, NetTrim, Wanda, sparsify
from sparsec.sparsifiers.least_squares import refit


def test_refit_is_least_squares() -> None:
    x, weight = correlated(300, 12).double(), torch.randn(5, 12).double()
    kept = torch.rand(5, 12) > 0.5
    found = refit(weight, weight * kept, kept, x.T @ x / 300, steps=500, tolerance=1e-13)
    for row in range(5):
        own = x[:, kept[row]]
        expected = torch.linalg.lstsq(own, x @ weight[row]).solution
        torch.testing.assert_close(found[row, kept[row]], expected, rtol=1e-6, atol=1e-8)
        assert bool((found[row, ~kept[row]] == 0).all())


def test_refit_settles_in_a_few_steps_where_inputs_share_directions() -> None:
    """A strong mean and a falling spectrum, as activations have: with the diagonal alone, as many steps leave more."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(400, 128, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 128) @ basis + 0.5
    weight, hessian = torch.randn(96, 128, generator=generator, dtype=torch.float64), x.T @ x / 400
    kept = torch.rand(96, 128, generator=generator) > 0.5
    start, lost = weight * kept, lambda v: float((((v - weight) @ hessian) * (v - weight)).sum())
    plain, residual = start.clone(), ((weight - start) @ hessian) * kept
    direction = residual / hessian.diagonal()
    for _ in range(10):
        rho = (residual * residual / hessian.diagonal()).sum(1, keepdim=True)
        image = (direction @ hessian) * kept
        alpha = rho / (direction * image).sum(1, keepdim=True)
        plain, residual = plain + alpha * direction, residual - alpha * image
        z = residual / hessian.diagonal()
        direction = z + direction * (residual * z).sum(1, keepdim=True) / rho
    with FlopCounterMode(display=False) as flops:
        found = refit(weight, start, kept, hessian)
    assert flops.get_total_flops() < 15 * 2 * 96 * 128 * 128  # in products with H
    best = lost(refit(weight, start, kept, hessian, steps=300, tolerance=1e-12))
    assert best < lost(found) < 1.1 * best and lost(plain) - best > 3 * (lost(found) - best)
    errors = [lost(refit(weight, start, kept, hessian, steps=s, tolerance=0.0)) for s in range(1, 6)]
    assert errors == sorted(errors, reverse=True)


def test_bias_correction_restores_the_mean() -> None:
    layer, x = nn.Linear(64, 48), X + 1
    pruned = sparsify(layer, BiasCorrection(Magnitude(0.7)), data=[x])
    torch.testing.assert_close(pruned(x).mean(0), layer(x).mean(0), rtol=1e-4, atol=1e-4)
    assert not torch.equal(pruned.bias, layer.bias)
    (row,) = sparsify(nn.Linear(64, 4, bias=False), BiasCorrection(Wanda(0.5)), data=[x])._sparsec_report
    assert row["reason"].endswith("no bias to correct")


def test_net_trim_is_sparser_with_a_wider_tolerance() -> None:
    layer, x = nn.Linear(20, 6, bias=False), correlated(200, 20)
    found = [sparsify(layer, NetTrim(epsilon=e), data=[x]) for e in (0.02, 0.1, 0.4)]
    counts = [zeros(p.weight) for p in found]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    for p, e in zip(found, (0.02, 0.1, 0.4)):
        assert float(((p(x) - layer(x)).norm() / layer(x).norm()).detach()) <= 1.05 * e + 1e-3
